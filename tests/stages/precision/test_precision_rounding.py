"""Learnt rounding: a layer's varying error shrinks; the written graph holds those integers; what it cannot do it leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from quantizable_models import residual, run, table_for
from test_precision_bias import samples_of, saved

from deploykit.errors import UnknownName
from deploykit.stages.precision import Int8Options, bias_correct, rounding


def correlated(channels: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base, mix = rng.normal(size=(8, 3, 12, 12)), rng.normal(size=(channels, 3))
    return (np.einsum("nchw,dc->ndhw", base, mix) + 0.3 * rng.normal(size=(8, channels, 12, 12))).astype(np.float32)


@pytest.mark.parametrize(("kernel", "strides", "dilations"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2)])
def test_the_layers_own_error_shrinks(kernel: int, strides: int, dilations: int) -> None:
    x, rng = correlated(8), np.random.default_rng(2)
    weight = rng.normal(size=(6, 8, kernel, kernel)).astype(np.float32)
    scale = (np.abs(weight).max(axis=(1, 2, 3)) / 15).astype(np.float32)
    pad = dilations * (kernel // 2)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="n", pads=[pad] * 4, strides=[strides] * 2, dilations=[dilations] * 2)
    assert rounding.can_round(node, weight)

    def error(integers: np.ndarray) -> float:
        wide = scale.reshape(-1, 1, 1, 1)
        model = helper.make_model(
            helper.make_graph(
                [node],
                "g",
                [helper.make_tensor_value_info("x", 1, x.shape), helper.make_tensor_value_info("w", 1, weight.shape)],
                [helper.make_tensor_value_info("y", 1, None)],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=9,
        )
        (found,) = run(model, {"x": x, "w": weight - (integers * wide).astype(np.float32)})
        return float(found.var(axis=(0, 2, 3)).mean())

    nearest = np.clip(np.rint(weight / scale.reshape(-1, 1, 1, 1)), -15, 15)
    learnt = rounding.learnt(node, weight, scale, 15, [x[:4], x[4:]])
    assert learnt.shape == weight.shape and np.abs(learnt).max() <= 15
    assert error(learnt) < 0.8 * error(nearest)


def test_what_it_does_not_serve() -> None:
    weight = np.ones((8, 1, 3, 3), np.float32)
    assert not rounding.can_round(helper.make_node("Conv", ["x", "w"], ["y"], group=8), weight)
    assert not rounding.can_round(helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER"), weight)
    assert not rounding.can_round(helper.make_node("ConvTranspose", ["x", "w"], ["y"]), weight)


@pytest.mark.parametrize(("layout", "rest"), [("cpu", "fp32"), ("tensorrt", "fp32"), ("tensorrt", "fp16")])
def test_the_written_graph_holds_the_learnt_integers(tmp_path: Path, layout: str, rest: str) -> None:
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    samples = samples_of(made)
    artifact = bias_correct(path, table_for(path), layout, samples, out, Int8Options(rounding="gptq"), rest)
    assert artifact.facts["rounded_layers"] == 5
    assert artifact.options["rounding"] == "gptq"
    onnx.checker.check_model(str(out), full_check=True)
    feeds = samples.reader.read(range(16))
    wanted, found = run(made, feeds)[0], run(out, feeds, literal=True)[0]
    assert np.square(wanted - found).sum() < 0.01 * np.square(wanted - wanted.mean()).sum() + 0.01 * np.square(wanted).sum()


def test_an_unknown_rounding() -> None:
    with pytest.raises(UnknownName, match="gptq"):
        Int8Options(rounding="gtpq")


def test_inputs_that_hardly_vary_are_rounded_too() -> None:
    """The variance is lost in float32 beside such a mean: the covariance has eigenvalues below zero."""
    rng = np.random.default_rng(0)
    x = (1000.0 + 1e-3 * rng.normal(size=(256, 24))).astype(np.float32)
    kept = x.copy()
    weight = rng.normal(size=(24, 6)).astype(np.float32)
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    learnt = rounding.learnt(helper.make_node("Gemm", ["x", "w"], ["y"], name="n"), weight, scale, 127, [x[:128], x[128:]])
    assert np.abs(learnt * scale - weight).max() < 8 * scale.max()
    assert np.array_equal(x, kept)  # the samples are the next layer's too


def test_a_covariance_below_zero_is_damped_until_it_has_a_factor() -> None:
    moments = np.array([[[1.0, 1.1], [1.1, 1.0]]])
    factor = rounding._inverse_factor(moments.copy(), np.array([0.01]))
    damped = moments + np.eye(2)
    assert np.allclose(np.transpose(factor, (0, 2, 1)) @ factor, np.linalg.inv(damped))
