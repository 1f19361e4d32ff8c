"""Stored values: each defect is found where it is, and clean weights give nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from written import by_code, write

GEMM = "g (float[batch,4] x) => (float[batch,3] y) { y = Gemm(x, w, b) }"


def gemm(path: Path, weight: np.ndarray, bias: np.ndarray | None = None, **more: np.ndarray) -> Path:
    return write(path, GEMM, w=weight.astype(np.float32), b=np.ones(3, np.float32) if bias is None else bias, **more)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (4, 3)).astype(np.float32)


def test_clean_weights_give_no_finding(tmp_path: Path) -> None:
    assert not [c for c in by_code(tiny_models.conv_net(tmp_path / "m.onnx")) if c.startswith(("DK03", "DK04"))]


def test_nan_is_an_error_of_the_model(tmp_path: Path, weight: np.ndarray) -> None:
    weight[1, 2] = np.nan
    finding = by_code(gemm(tmp_path / "m.onnx", weight))["DK030"]
    assert (finding.severity, finding.target, finding.node) == ("error", "model", "w")
    assert "1 NaN in 12 values (used by gemm0)" in finding.message


def test_inf_is_an_error_of_the_model(tmp_path: Path, weight: np.ndarray) -> None:
    weight[0, 0] = -np.inf
    found = by_code(gemm(tmp_path / "m.onnx", weight))
    assert found["DK031"].severity == "error"
    assert "DK030" not in found


def test_an_infinite_mask_constant_is_no_broken_weight(tmp_path: Path) -> None:
    text = "g (float[batch,4] x, bool[batch,4] keep) => (float[batch,4] y) { m = Where(keep, x, low)\n y = Softmax<axis=1>(m) }"
    assert "DK031" not in by_code(write(tmp_path / "m.onnx", text, low=np.float32(-np.inf)))


def test_denormals_are_counted(tmp_path: Path, weight: np.ndarray) -> None:
    weight[:2, 0] = 1e-40
    assert "2 denormals in 12" in by_code(gemm(tmp_path / "m.onnx", weight))["DK032"].message


def test_dead_channels_are_those_of_the_output(tmp_path: Path, weight: np.ndarray) -> None:
    rows = weight.copy()
    rows[1] = 0  # an unused input, not a dead output
    assert "DK033" not in by_code(gemm(tmp_path / "a.onnx", rows))
    weight[:, 1] = 0
    assert "1 of 3 channels dead" in by_code(gemm(tmp_path / "b.onnx", weight))["DK033"].message


def test_a_dead_channel_behind_dq_is_found(tmp_path: Path) -> None:
    stored = {
        "q": np.zeros((4, 3), np.int8) + np.array([1, 0, 2], np.int8),
        "s": np.full(3, 0.1, np.float32),
        "b": np.ones(3, np.float32),
    }
    text = "g (float[batch,4] x) => (float[batch,3] y) { w = DequantizeLinear<axis=1>(q, s)\n y = Gemm(x, w, b) }"
    assert "1 of 3 channels dead" in by_code(write(tmp_path / "m.onnx", text, **stored))["DK033"].message


def test_unused_and_duplicate_initializers(tmp_path: Path, weight: np.ndarray) -> None:
    found = by_code(gemm(tmp_path / "m.onnx", weight, left_over=np.ones((2, 2), np.float32)))
    assert found["DK034"].node == "left_over"
    assert "DK035" not in found
    text = "g (float[batch,4] x) => (float[batch,4] y) { t = Add(x, a)\n y = Mul(t, b) }"
    same = np.arange(4, dtype=np.float32)
    found = by_code(write(tmp_path / "d.onnx", text, a=same, b=same))
    assert "'b' repeats 'a' (16 bytes)" in found["DK035"].message
    assert "DK034" not in found


def test_a_body_of_control_flow_uses_outer_weights(tmp_path: Path) -> None:
    text = (
        "g (float[4] x, bool c) => (float[4] y) { y = If(c) <"
        "then_branch = t () => (float[4] a) { a = Add(x, w) }, else_branch = e () => (float[4] b) { b = Identity(x) }> }"
    )
    found = by_code(write(tmp_path / "m.onnx", text, w=np.ones(4, np.float32)))
    assert "DK034" not in found
    assert "DK005" in found


def test_weights_beyond_fp16_with_their_share(tmp_path: Path, weight: np.ndarray) -> None:
    weight[0, 0] = 70000.0
    weight[:, 2] = 3e-8
    found = by_code(gemm(tmp_path / "m.onnx", weight))
    assert "1 of 12 values (8.33 %) above 65504, up to 7e+04" in found["DK040"].message
    assert "4 of 12 values (33.3 %) under 6e-8" in found["DK041"].message


def test_large_masks_and_tiny_epsilons(tmp_path: Path) -> None:
    text = "g (float[batch,4] x) => (float[batch,4] y) { n = LayerNormalization<epsilon=1e-12>(x, s)\n a = Add(n, eps)\n y = Max(a, low) }"
    found = by_code(write(tmp_path / "m.onnx", text, s=np.ones(4, np.float32), eps=np.float32(1e-12), low=np.float32(-1e9)))
    assert found["DK042"].node == "low"
    assert found["DK043"].node == "eps, layernormalization0"


def test_ordinary_epsilons_pass(tmp_path: Path) -> None:
    text = "g (float[batch,4] x) => (float[batch,4] y) { y = LayerNormalization<epsilon=1e-5>(x, s) }"
    assert not {"DK042", "DK043"} & set(by_code(write(tmp_path / "m.onnx", text, s=np.ones(4, np.float32))))


def test_many_of_a_kind_are_folded(tmp_path: Path) -> None:
    nodes = "\n".join(f" v{i + 1} = Add(v{i}, c{i})" for i in range(1, 9))
    stored = {f"c{i}": np.array([1.0, np.nan], np.float32) for i in range(9)}
    text = f"g (float[batch,2] x) => (float[batch,2] v9) {{ v1 = Add(x, c0)\n{nodes} }}"
    finding = by_code(write(tmp_path / "m.onnx", text, **stored))["DK030"]
    assert "(9 places)" in finding.message
    assert "and 6 more" in finding.message
    assert finding.node == "c0, c1, c2"


def test_half_and_bfloat_weights_are_read(tmp_path: Path) -> None:
    text = "g (float16[batch,4] x) => (float16[batch,3] y) { y = MatMul(x, w) }"
    found = by_code(write(tmp_path / "m.onnx", text, w=np.array([[np.nan] * 3] * 4, np.float16)))
    assert {"DK030", "DK021"} <= set(found)
    assert "DK040" not in found
