"""A dynamic batch has to be really dynamic, and the finding has to name the node that bakes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from written import by_code, write

W = np.ones((4, 3), np.float32)


def test_a_dynamic_network_has_no_batch_finding(tmp_path: Path) -> None:
    found = by_code(tiny_models.conv_net(tmp_path / "m.onnx"))
    assert not [c for c in found if c.startswith("DK01")]


def test_several_inputs_with_integers_have_no_batch_finding(tmp_path: Path) -> None:
    found = by_code(tiny_models.two_inputs(tmp_path / "m.onnx"))
    assert not [c for c in found if c.startswith("DK01")]


def test_a_fixed_batch_is_a_warning(tmp_path: Path) -> None:
    found = by_code(tiny_models.conv_net(tmp_path / "m.onnx", batch=4))
    assert found["DK010"].severity == "warning"
    assert "batch 4" in found["DK010"].message
    assert "DK011" not in found


BAKED = {
    "reshape to a constant": (
        "g (float[batch,2,2] x) => (float[batch,4] y) <int64[2] s = {1, 4}> { y = Reshape(x, s) }",
        "reshape0",
        "[-1, 4]",
    ),
    "reshape that folds the batch away": (
        "g (float[batch,2,2] x, float[4,3] w) => (float[batch,3] y) <int64[2] s = {1, -1}> { f = Reshape(x, s)\n y = Gemm(f, w) }",
        "reshape0",
        "axis 0 stays the batch",
    ),
    "class token expanded to the example's batch": (
        "g (float[batch,5,3] x) => (float[batch,6,3] y) <float[1,1,3] token = {1,2,3}, int64[3] s = {2, 1, 3}>"
        " { t = Expand(token, s)\n y = Concat<axis=1>(t, x) }",
        "expand0",
        "x.shape[0]",
    ),
    "class token of batch 1 that is not expanded": (
        "g (float[batch,5,3] x) => (float[batch,6,3] y) <float[1,1,3] token = {1,2,3}> { y = Concat<axis=1>(token, x) }",
        "concat0",
        "batch axis of 1",
    ),
    "constant of the example's batch": (
        "g (float[batch,2] x) => (float[batch,2] y) <float[2,2] c = {1,2,3,4}> { y = Add(x, c) }",
        "add0",
        "batch axis of 1",
    ),
    "expand to a constant": (
        "g (float[batch,3] x) => (float[batch,3] y) <int64[2] s = {2, 3}> { y = Expand(x, s) }",
        "expand0",
        "x.expand(x.shape[0]",
    ),
}


@pytest.mark.parametrize("case", BAKED)
def test_the_node_that_bakes_the_batch_is_named(case: str, tmp_path: Path) -> None:
    text, node, remedy = BAKED[case]
    stored = {"w": W} if "float[4,3] w" in text else {}
    finding = by_code(write(tmp_path / "m.onnx", text.replace(", float[4,3] w", ""), **stored))["DK011"]
    assert finding.severity == "error"
    assert finding.target == "model"
    assert finding.node == node
    assert remedy in finding.remedy


DYNAMIC = {
    "reshape with 0": "g (float[batch,2,2] x) => (float[batch,4] y) <int64[2] s = {0, 4}> { y = Reshape(x, s) }",
    "reshape with -1": "g (float[batch,2,2] x) => (float[batch,4] y) <int64[2] s = {-1, 4}> { y = Reshape(x, s) }",
    "shape computed": "g (float[batch,2,2] x) => (float[batch,4] y) <int64[1] four = {4}>"
    " { b = Shape<start=0,end=1>(x)\n s = Concat<axis=0>(b, four)\n y = Reshape(x, s) }",
    "expand that only broadcasts": "g (float[batch,1] x) => (float[batch,3] y) <int64[2] s = {1, 3}> { y = Expand(x, s) }",
    "batch folded and unfolded": "g (float[batch,2,3] x) => (float[batch,2,3] y) <int64[2] a = {-1, 3}, int64[3] c = {-1, 2, 3}>"
    " { t = Reshape(x, a)\n y = Reshape(t, c) }",
}


@pytest.mark.parametrize("case", DYNAMIC)
def test_shapes_that_follow_the_batch_pass(case: str, tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", DYNAMIC[case]))
    assert not {"DK011", "DK012", "DK013", "DK015"} & set(found)


def test_what_only_running_shows_is_found_by_running(tmp_path: Path) -> None:
    # The shape is computed from values, which inference cannot follow: 4 elements a sample, asked into [4].
    text = (
        "g (float[batch,4] x) => (float[n,4] y) <float[1] one = {1.0}>"
        " { o = Relu(one)\n c = Cast<to=7>(o)\n four = Constant<value_ints=[4]>()\n s = Concat<axis=0>(c, four)\n y = Reshape(x, s) }"
    )
    finding = by_code(write(tmp_path / "m.onnx", text))["DK011"]
    assert finding.node == "reshape4"
    assert "fails at batch 2" in finding.message


def test_samples_that_influence_each_other_are_found(tmp_path: Path) -> None:
    text = (
        "g (float[batch,4] x) => (float[batch,4] y) <int64[1] zero = {0}> { m = ReduceMean<keepdims=1>(x, zero)\n y = Sub(x, m) }"
    )
    found = by_code(write(tmp_path / "m.onnx", text))
    assert found["DK012"].severity == "warning"
    assert "DK011" not in found


def test_an_output_without_the_batch_is_found(tmp_path: Path) -> None:
    text = "g (float[batch,4] x) => (float[1,4] y) <int64[1] zero = {0}> { y = ReduceMean<keepdims=1>(x, zero) }"
    assert "1x4 at every batch" in by_code(write(tmp_path / "m.onnx", text))["DK013"].message


def test_an_output_declared_with_a_fixed_batch_is_found(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", "g (float[batch,4] x) => (float[1,4] y) { y = Relu(x) }"))
    assert found["DK014"].node == "y"


def test_a_batch_on_another_axis_is_followed(tmp_path: Path) -> None:
    text = "g (float[3,batch,4] x) => (float[3,batch,4] y) { y = Relu(x) }"
    assert not [c for c in by_code(write(tmp_path / "m.onnx", text)) if c.startswith("DK01")]


def test_other_dynamic_axes_are_named_and_the_proof_goes_on(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", "g (float[batch,1,h,w] x) => (float[batch,1,h,w] y) { y = Relu(x) }"))
    assert "2 places" in found["DK016"].message
    assert "DK015" not in found


def test_a_run_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", "g (string[batch] x) => (string[batch] y) { y = Identity(x) }"))
    assert "x:str" in found["DK015"].message
    assert "DK022" in found


def test_random_outputs_are_not_taken_for_dependent_samples(tmp_path: Path) -> None:
    found = by_code(
        write(tmp_path / "m.onnx", "g (float[batch,4] x) => (float[batch,4] y) { r = RandomNormalLike(x)\n y = Add(x, r) }")
    )
    assert "DK017" in found
    assert "DK012" not in found


def test_outputs_that_are_not_finite_are_found(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", "g (float[batch,4] x) => (float[batch,4] y) { y = Sqrt(x) }"))
    assert found["DK036"].node == "y"
