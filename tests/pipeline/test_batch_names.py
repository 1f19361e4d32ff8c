"""Inputs whose batch axes are named differently: one batch, as long as the graph runs at equal sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import graph
from deploykit.errors import DataError
from deploykit.pipeline import comparing, line, prepare
from deploykit.pipeline.line import LineRequest
from deploykit.pipeline.request import DataRequest, RowsRequest, Silent, SourceRequest
from deploykit.signature import Dim, TensorSpec, with_one_batch
from deploykit.store import Store

pytest.importorskip("onnxruntime")
F = TensorProto.FLOAT


def _net(path: Path, a: int | str, b: int | str, out: int | str, *, seed: int = 0) -> Path:
    """a [a, 4], b [b, 4] -> y [out, 3] = (a + b) w."""
    w = numpy_helper.from_array(np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Add", ["a", "b"], ["s"], name="sum"),
        helper.make_node("MatMul", ["s", "w"], ["y"], name="product"),
    ]
    given = [helper.make_tensor_value_info("a", F, [a, 4]), helper.make_tensor_value_info("b", F, [b, 4])]
    made = helper.make_graph(nodes, "n", given, [helper.make_tensor_value_info("y", F, [out, 3])], [w])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def _data(path: Path, n: int = 24) -> Path:
    rng = np.random.default_rng(1)
    np.savez(path, a=rng.normal(size=(n, 4)).astype(np.float32), b=rng.normal(size=(n, 4)).astype(np.float32))
    return path


@pytest.mark.parametrize(
    ("names", "one"),
    [
        (("N", "batch"), True),
        (("batch_size", "batch_b"), True),
        (("a_dynamic_axes_1", "b_dynamic_axes_1"), True),
        (("batch", "points"), False),
    ],
)
def test_what_counts_as_another_name_of_the_batch(names: tuple[str, str], one: bool) -> None:
    inputs = tuple(TensorSpec(n, "float32", (d, 4)) for n, d in zip("ab", names, strict=True))
    found, outputs = with_one_batch(inputs, (TensorSpec("y", "float32", (names[1], 3)),))
    assert (found[0].shape[0] == found[1].shape[0]) is one
    assert (outputs[0].shape[0] == found[0].shape[0]) is one


def test_an_input_with_the_batch_keeps_its_other_axes() -> None:
    shapes: list[tuple[Dim, ...]] = [("batch", "N"), ("batch", 4)]
    inputs = tuple(TensorSpec(n, "float32", s) for n, s in zip("ab", shapes, strict=True))
    assert with_one_batch(inputs, ()) == (inputs, ())


@pytest.mark.parametrize("backends", [("onnxruntime",), ("openvino",)])
def test_a_graph_with_two_names_for_its_batch_goes_through_the_line(backends: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip(backends[0])
    path = _net(tmp_path / "two.onnx", "N", "batch", "N")
    assert graph.signature(graph.load(path)).batch_symbol == "batch"
    rows = RowsRequest(backends, ("fp32", "int8"), (1, 4), threads=1, duration="smoke")
    result = line.run(
        LineRequest((SourceRequest(str(path)),), DataRequest(str(_data(tmp_path / "x.npz"))), rows, tmp_path / "store")
    )
    assert {row.status for row in result.report.rows} == {"ok"}
    assert {row.batch for row in result.report.rows} == {1, 4}
    for row in result.report.rows:
        assert row.sqnr_db is None or row.sqnr_db > 20


def test_samples_that_do_not_pair_are_one_error(tmp_path: Path) -> None:
    path = _net(tmp_path / "two.onnx", "N", "batch", "N")
    np.savez(tmp_path / "x.npz", a=np.ones((4, 4), np.float32), b=np.ones((3, 4), np.float32))
    rows = RowsRequest(("onnxruntime",), ("fp32",), (1,), threads=1, duration="smoke")
    with pytest.raises(DataError, match="different numbers of samples"):
        line.run(LineRequest((SourceRequest(str(path)),), DataRequest(str(tmp_path / "x.npz")), rows, tmp_path / "store"))


@pytest.mark.parametrize(("reference", "candidate"), [("batch", 4), (4, "batch"), (4, 6)])
def test_compare_takes_models_of_unlike_batches(reference: int | str, candidate: int | str, tmp_path: Path) -> None:
    paths = [_net(tmp_path / f"{i}.onnx", b, b, b) for i, b in enumerate((reference, candidate))]
    found = comparing.compare(*paths, DataRequest(str(_data(tmp_path / "x.npz", 30))), {}, Silent())
    assert found.n == 30
    assert found.drift.agreement == 1.0
    other = _net(tmp_path / "other.onnx", candidate, candidate, candidate, seed=5)
    assert (comparing.compare(paths[0], other, DataRequest(str(tmp_path / "x.npz")), {}, Silent()).drift.sqnr_db or 0.0) < 20


def _pairs(path: Path) -> Path:
    """a [rows, 4], b [points, 4] -> y [rows, points] = a b^T: two axes of their own."""
    nodes = [
        helper.make_node("Transpose", ["b"], ["t"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["a", "t"], ["y"], name="product"),
    ]
    given = [helper.make_tensor_value_info("a", F, ["rows", 4]), helper.make_tensor_value_info("b", F, ["points", 4])]
    made = helper.make_graph(nodes, "n", given, [helper.make_tensor_value_info("y", F, ["rows", "points"])])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_an_axis_of_any_name_that_must_equal_the_batch_is_the_batch(tmp_path: Path) -> None:
    source = SourceRequest(str(_net(tmp_path / "tied.onnx", "rows", "items", "rows")))
    shop = prepare.open_source(source, Store(tmp_path / "store"), Silent(), batches=(1,))
    assert [spec.shape[0] for spec in (*shop.signature.inputs, *shop.signature.outputs)] == ["rows"] * 3
    assert any("the axes items are taken for the batch" in note for note in shop.model.facts["notes"])
    assert [run["batch"] for run in shop.model.facts["proof"]["runs"]] == [1, 2, 3]


def test_an_axis_of_its_own_is_not(tmp_path: Path) -> None:
    source = SourceRequest(str(_pairs(tmp_path / "pairs.onnx")))
    shop = prepare.open_source(source, Store(tmp_path / "store"), Silent(), batches=(1,))
    assert [spec.shape[0] for spec in shop.signature.inputs] == ["rows", "points"]
    assert not any("taken for the batch" in note for note in shop.model.facts["notes"])
