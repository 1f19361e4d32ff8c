"""TensorRT's rules for Q/DQ: what the linter says, held against the parser that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_models import CHANNELS, WIDTH, Qdq
from written import by_code, write

from deploykit import children
from deploykit.stages.checks import tensorrt
from deploykit.stages.checks.codes import RULES
from deploykit.stages.checks.context import Graph
from deploykit.stages.checks.loaders import _parse_rtx

NAN = float("nan")
CASES: dict[str, tuple[Qdq, str | None]] = {
    "symmetric int8": (Qdq(), None),
    "fp16 scales": (Qdq(half=True), None),
    "per tensor": (Qdq(weight_scale=[0.01]), None),
    "MatMul on its last axis": (Qdq(op="MatMul", weight_axis=1), None),
    "opset 13": (Qdq(opset=13), None),
    "opset 21": (Qdq(opset=21), None),
    "bias in int32": (Qdq(int32_bias=True), "DK101"),
    "zero point in int8": (Qdq(activation_zero=5), "DK102"),
    "zero point in uint8": (Qdq(activation_dtype=np.uint8, activation_zero=128), "DK102"),
    "zero point of a weight": (Qdq(weight_zero=3), "DK102"),
    "uint8 without offset": (Qdq(activation_dtype=np.uint8), "DK103"),
    "no zero point at all": (Qdq(activation_zero=None), "DK103"),
    "int16": (Qdq(activation_dtype=np.int16, opset=21), "DK104"),
    "uint16": (Qdq(activation_dtype=np.uint16, opset=21), "DK104"),
    "int16 weights": (Qdq(weight_dtype=np.int16, opset=21), "DK104"),
    "scale of zero": (Qdq(weight_scale=[0.01, 0.0, 0.01, 0.01]), "DK105"),
    "negative scale": (Qdq(weight_scale=[0.01, -0.1, 0.01, 0.01]), "DK105"),
    "scale that is NaN": (Qdq(weight_scale=[0.01, NAN, 0.01, 0.01]), "DK105"),
    "activation scale of zero": (Qdq(activation_scale=0.0), "DK105"),
    "computed scale": (Qdq(computed_scale=True), "DK108"),
    "per-channel activation": (Qdq(activation_scale=[0.1] * CHANNELS), "DK109"),
    "weight axis of Conv": (Qdq(weight_axis=1, weight_scale=[0.01] * CHANNELS), "DK110"),
    "weight axis of ConvTranspose": (Qdq(op="ConvTranspose", weight_scale=[0.01] * CHANNELS), "DK110"),
    "weight axis of MatMul": (Qdq(op="MatMul", weight_scale=[0.01] * CHANNELS), "DK110"),
    "only the weight": (Qdq(quantize_activation=False), "DK111"),
    "only the activation": (Qdq(quantize_weight=False), "DK111"),
    "tiny scales in FP16": (Qdq(weight_scale=[1e-6] * WIDTH, half=True), "DK112"),
    "tiny scales in FP32": (Qdq(weight_scale=[1e-6] * WIDTH), None),
    "Q/DQ before the activation function": (Qdq(between=True), "DK113"),
    "uint8 weights": (Qdq(weight_dtype=np.uint8), "DK114"),
    "ConvTranspose": (Qdq(op="ConvTranspose", weight_axis=1), "DK115"),
}
# The parser takes these, and they are wrong all the same: half of the range lost, or a crash when the engine is built.
TAKEN_BY_THE_PARSER = {"uint8 without offset", "no zero point at all", "computed scale"}


def rules(path: Path, target: str = "tensorrt-rtx") -> set[str]:
    """The codes the linter alone gives, without the runs and loaders that `find` adds."""
    return {hit.code for hit in tensorrt.find(Graph.load(path), target)}


@pytest.mark.parametrize("case", CASES)
def test_each_rule(case: str, tmp_path: Path) -> None:
    spec, code = CASES[case]
    path = spec.save(tmp_path / "m.onnx")
    found = rules(path)
    expected = {code} if code else set()
    assert found - {"DK115"} == expected - {"DK115"}
    assert ("DK115" in found) == (spec.op == "ConvTranspose")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_the_parser_refuses_what_the_linter_calls_an_error_and_nothing_else(tmp_path: Path) -> None:
    disagree = []
    with children.Child("parser") as child:
        for index, (case, (spec, code)) in enumerate(CASES.items()):
            refused = bool(child.call(_parse_rtx, str(spec.save(tmp_path / f"{index}.onnx"))))
            error = code is not None and RULES[code].severity == "error" and case not in TAKEN_BY_THE_PARSER
            if refused != error:
                disagree.append((case, refused))
    assert disagree == []


def test_the_two_targets_are_told_apart(tmp_path: Path) -> None:
    path = CASES["bias in int32"][0].save(tmp_path / "m.onnx")
    assert by_code(path, "tensorrt")["DK101"].target == "tensorrt"
    assert by_code(path, "tensorrt-rtx")["DK101"].target == "tensorrt-rtx"
    assert not [c for c in by_code(path, "onnxruntime") if c.startswith("DK1")]


def test_findings_carry_the_nodes_name_and_a_remedy(tmp_path: Path) -> None:
    finding = by_code(CASES["bias in int32"][0].save(tmp_path / "m.onnx"), "tensorrt")["DK101"]
    assert finding.node == "b_dq"
    assert "QuantizeBias=False" in finding.remedy


def test_operators_in_quantized_form_and_dynamic_quantization(tmp_path: Path) -> None:
    text = (
        "g (float[batch,4] x) => (float[batch,3] y) { q, s, z = DynamicQuantizeLinear(x)\n i = MatMulInteger(q, w, z)\n"
        " f = Cast<to=1>(i)\n y = Mul(f, s) }"
    )
    found = by_code(write(tmp_path / "m.onnx", text, w=np.ones((4, 3), np.int8)), "tensorrt")
    assert {"DK106", "DK107", "DK052"} <= set(found)


def test_a_transposed_weight_is_followed(tmp_path: Path) -> None:
    text = (
        "g (float[batch,4] x) => (float[batch,3] y) { q = QuantizeLinear(x, s, z)\n d = DequantizeLinear(q, s, z)\n"
        " w = DequantizeLinear<axis=0>(wq, ws)\n t = Transpose<perm=[1,0]>(w)\n y = MatMul(d, t) }"
    )
    stored = {"s": np.float32(0.1), "z": np.int8(0), "wq": np.ones((3, 4), np.int8)}
    assert not rules(write(tmp_path / "m.onnx", text, ws=np.full(3, 0.1, np.float32), **stored))
    wrong = write(tmp_path / "n.onnx", text.replace("axis=0", "axis=1"), ws=np.full(4, 0.1, np.float32), **stored)
    assert "axis 0, not 1" in by_code(wrong, "tensorrt-rtx")["DK110"].message


def test_a_graph_deeper_than_pythons_recursion_is_read(tmp_path: Path) -> None:
    chain = "\n".join(f" t{i + 1} = Relu(t{i})" for i in range(1500))
    text = f"g (float[batch,4] x) => (float[batch,4] y) {{ t0 = Relu(x)\n{chain}\n q = QuantizeLinear(t1500, s, z)\n y = DequantizeLinear(q, s, z) }}"
    path = write(tmp_path / "m.onnx", text, s=np.float32(0.1), z=np.int8(0))
    assert rules(path) == set()
    assert Graph.load(path).is_constant("s")
    assert not Graph.load(path).is_constant("t1500")


def test_nodes_that_lack_inputs_are_left_to_the_checker(tmp_path: Path) -> None:
    path = CASES["symmetric int8"][0].save(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    for node in model.graph.node:
        del node.input[1:]
    onnx.save(model, str(path))
    assert rules(path) == set()


FOLDED = {
    "Identity": " s2 = Identity(s)\n z2 = Identity(z)\n",
    "Cast": " s2 = Cast<to=1>(s)\n z2 = Cast<to=3>(z)\n",
    "Unsqueeze": " s1 = Unsqueeze(s, axes)\n s2 = Squeeze(s1, axes)\n z2 = Identity(z)\n",
}


@pytest.mark.parametrize("how", FOLDED)
def test_a_scale_that_the_parser_folds_is_constant(how: str, tmp_path: Path) -> None:
    """PyTorch's exporter writes them so; a product of constants is not folded there."""
    text = (
        f"g (float[batch,4] x) => (float[batch,3] y) {{ {FOLDED[how]} q = QuantizeLinear(x, s2, z2)\n"
        " d = DequantizeLinear(q, s2, z2)\n w = DequantizeLinear<axis=1>(wq, ws)\n y = MatMul(d, w) }"
    )
    stored = {"s": np.float32(0.1), "wq": np.ones((4, 3), np.int8), "ws": np.full(3, 0.1, np.float32), "axes": np.array([0])}
    assert rules(write(tmp_path / "m.onnx", text, z=np.int8(0), **stored)) == set()
    assert rules(write(tmp_path / "o.onnx", text, z=np.int8(4), **stored)) == {"DK102"}
    computed = text.replace(" d = ", " s9 = Mul(s, s)\n d = ").replace("DequantizeLinear(q, s2", "DequantizeLinear(q, s9")
    assert "DK108" in rules(write(tmp_path / "c.onnx", computed, z=np.int8(0), **stored))


@pytest.mark.parametrize(
    ("between", "float_layer"),
    [("Flatten(d)", False), ("Concat<axis=1>(d, d)", False), ("Transpose<perm=[0,1]>(d)", False), ("Relu(d)", True)],
)
def test_what_only_moves_values_leaves_them_dequantized(between: str, float_layer: bool, tmp_path: Path) -> None:
    width = 8 if between.startswith("Concat") else 4
    text = (
        "g (float[batch,4] x) => (float[batch,3] y) { q = QuantizeLinear(x, s, z)\n d = DequantizeLinear(q, s, z)\n"
        f" m = {between}\n w = DequantizeLinear<axis=1>(wq, ws)\n y = MatMul(m, w) }}"
    )
    stored = {"s": np.float32(0.1), "z": np.int8(0), "wq": np.ones((width, 3), np.int8), "ws": np.full(3, 0.1, np.float32)}
    assert ("DK111" in rules(write(tmp_path / "m.onnx", text, **stored))) is float_layer
