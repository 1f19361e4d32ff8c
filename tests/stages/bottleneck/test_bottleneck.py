"""Why INT8 isn't faster: real profiles of both runtimes, and each cause both given and withheld."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from quantizable_models import ZOO, const, conv, model, node, residual, table_for

from deploykit import data, quantized_layers
from deploykit.artifact import Artifact
from deploykit.errors import UnknownName
from deploykit.kernel_profile import KINDS, Kernel, KernelProfile, per_run
from deploykit.pipeline import single
from deploykit.session import OpenRequest
from deploykit.stages import bottleneck
from deploykit.stages.bottleneck import Explanation
from deploykit.stages.bottleneck.api import judge
from deploykit.stages.precision import Int8Options, to_int8, to_int8_dynamic

VNNI = frozenset({"avx2", "avx512f", "avx512_vnni"})
AMX = VNNI | {"amx_int8", "amx_tile"}
BOTH = ["onnxruntime", "openvino"]


def saved(made: onnx.ModelProto, folder: Path, name: str = "float.onnx") -> Path:
    path = folder / name
    onnx.save(made, str(path))
    return path


def int8(path: Path, layout: str = "cpu", options: Int8Options | None = None) -> Path:
    out = path.with_name(f"int8-{layout}.onnx")
    to_int8(path, table_for(path), layout, out, options or Int8Options())
    return out


def explained(path: Path, backend: str, has: frozenset[str] = AMX) -> Explanation:
    pytest.importorskip(backend)
    engine = single.open_model(path).artifact
    size = engine.signature.fixed_batch or 2
    pool = [feeds for feeds, _ in data.open(f"random:{2 * size}", engine.signature).batches(size)]
    return bottleneck.explain(backend, engine, path, OpenRequest("int8", size, 1), pool, has, "x86_64")


def codes(found: Explanation) -> list[str]:
    return [finding.code for finding in found.findings]


def text(found: Explanation, code: str) -> str:
    return " | ".join(f"{finding.text} -> {finding.remedy}" for finding in found.findings if finding.code == code)


@pytest.mark.parametrize("backend", BOTH)
def test_a_graph_in_the_cpu_s_layout_has_all_layers_in_integers(tmp_path: Path, backend: str) -> None:
    found = explained(int8(saved(residual(), tmp_path)), backend)
    assert len(found.profile.of_kind("integer")) == 5
    assert not found.profile.of_kind("float")
    assert "float-layer" not in codes(found)
    assert found.verdict.startswith("5 of 5 convolutions and matrix products run in integers")
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("backend", BOTH)
def test_a_float_model_is_called_one(tmp_path: Path, backend: str) -> None:
    found = explained(saved(residual(), tmp_path), backend)
    assert not found.profile.of_kind("integer")
    assert "it is a float model" in text(found, "float-layer")
    assert found.verdict.startswith("none of the 5")


def test_tensorrt_s_layout_in_onnx_runtime_names_the_missing_pairs(tmp_path: Path) -> None:
    found = explained(int8(saved(residual(), tmp_path), "tensorrt"), "onnxruntime")
    said = text(found, "float-layer")
    assert "its result is not quantized" in said and "--layout cpu" in said
    assert "a Relu stands between it and the Quantize" in said
    assert "unfused-qdq" in codes(found)
    shares = [finding.share for finding in found.findings if finding.share is not None]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("backend", BOTH)
def test_layers_kept_in_float_are_named(tmp_path: Path, backend: str) -> None:
    path = saved(residual(), tmp_path)
    kept = ("conv_c2", "conv_p", "conv_c3", "Gemm_y")
    found = explained(int8(path, options=Int8Options(keep_float=kept)), backend)
    said = text(found, "float-layer")
    assert "the graph leaves it in float" in said
    assert len(found.profile.of_kind("float")) >= 2
    named = {name for f in found.findings if f.code == "float-layer" for name in f.kernels}
    assert not any("conv_c1" in name for name in named)


def test_a_convolution_that_writes_the_model_s_output_is_named(tmp_path: Path) -> None:
    found = explained(int8(saved(softplus_between(), tmp_path)), "onnxruntime")
    assert "its result is the model's output" in text(found, "float-layer")
    found = explained(int8(saved(softplus_between(), tmp_path)), "openvino")
    assert "float-layer" not in codes(found)


def test_dynamic_convolutions_are_told_to_calibrate(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    to_int8_dynamic(path, tmp_path / "dynamic.onnx")
    made = graph_ops(tmp_path / "dynamic.onnx")
    found = explained(tmp_path / "dynamic.onnx", "onnxruntime")
    assert ("dynamic-range" in codes(found)) == ("ConvInteger" in made)
    assert "dynamic-range" not in codes(explained(int8(path), "onnxruntime"))


def graph_ops(path: Path) -> set[str]:
    return {found.op_type for found in onnx.load(str(path)).graph.node}


def test_convolutions_both_ways_with_a_transposed_one(tmp_path: Path) -> None:
    """ConvTranspose with pairs all around it: float in ONNX Runtime, and the reason is the operator."""
    path = saved(ZOO["transposed"](), tmp_path)
    out = int8(path, "tensorrt")
    found = explained(out, "onnxruntime")
    assert "no integer ConvTranspose" in text(found, "float-layer")


def softplus_between() -> onnx.ModelProto:
    nodes = [conv("x", "a", "w"), node("Softplus", ["a"], ["s"]), conv("s", "y", "v")]
    return model(nodes, [const("w", 64, 3, 3, 3), const("v", 4, 64, 3, 3)])


def test_float_islands_leave_quantize_steps_beside_them(tmp_path: Path) -> None:
    found = explained(int8(saved(softplus_between(), tmp_path)), "onnxruntime")
    assert "Softplus, which runs in float" in text(found, "unfused-qdq")
    assert "Softplus" in text(found, "other-float")
    plain = explained(int8(saved(residual(), tmp_path)), "onnxruntime")
    assert "which runs in float" not in text(plain, "unfused-qdq")


def depthwise() -> onnx.ModelProto:
    nodes = [conv("x", "a", "w", kernel=1), conv("a", "b", "d", group=64), conv("b", "y", "v", kernel=1)]
    weights = [const("w", 64, 3, 1, 1), const("d", 64, 1, 3, 3), const("v", 2, 64, 1, 1)]
    return model(nodes, weights, {"x": ["batch", 3, 32, 32]})


def test_depthwise_convolutions_are_no_gain(tmp_path: Path) -> None:
    assert "depthwise" in codes(explained(int8(saved(depthwise(), tmp_path)), "onnxruntime"))
    assert "depthwise" not in codes(explained(int8(saved(residual(), tmp_path)), "onnxruntime"))


@pytest.mark.parametrize(
    ("has", "arch", "code"),
    [
        (frozenset({"avx2"}), "x86_64", "no-vnni"),
        (VNNI, "x86_64", "no-amx"),
        (frozenset({"avx_vnni"}), "x86_64", "no-amx"),
        (AMX, "x86_64", None),
        (frozenset({"asimd"}), "aarch64", "no-dotprod"),
        (frozenset({"asimd", "asimddp"}), "aarch64", None),
    ],
)
def test_the_cpu_s_missing_feature(tmp_path: Path, has: frozenset[str], arch: str, code: str | None) -> None:
    view = quantized_layers.load(int8(saved(residual(), tmp_path)))
    found = judge(profile(kernel("conv_c1", "integer", 1.0)), view, has, arch)
    assert [c for c in codes(found) if c.startswith("no-")] == ([code] if code else [])
    assert ("what holds it back is the CPU" in found.verdict) == (code in ("no-vnni", "no-dotprod"))


def kernel(name: str, kind: str, seconds: float, op: str = "Conv", detail: str = "") -> Kernel:
    return Kernel(name, op, kind, "", seconds, detail, (name,))


def profile(*kernels: Kernel) -> KernelProfile:
    return KernelProfile("onnxruntime", kernels, 1.0, 10, 1, 1)


def test_inner_reformats_and_reference_kernels_are_findings(tmp_path: Path) -> None:
    layers = [kernel(f"conv{i}", "integer", 1.0) for i in range(4)]
    reorder = kernel("r", "reformat", 1.0, "Reorder")
    inside = judge(profile(layers[0], layers[1], reorder, layers[2], layers[3]), None, AMX, "x86_64")
    assert "reformat" in codes(inside) and "reformat-edge" not in codes(inside)
    assert "1 x Reorder inside the graph" in inside.verdict
    outside = judge(profile(reorder, *layers), None, AMX, "x86_64")
    assert "reformat-edge" in codes(outside) and "reformat" not in codes(outside)
    slow = judge(profile(*layers, replace(layers[0], name="s", detail="ref_any_I8")), None, AMX, "x86_64")
    assert "reference-kernel" in codes(slow) and "reference-kernel" not in codes(outside)


def test_an_engine_without_layers_has_nothing_to_speed_up() -> None:
    found = judge(profile(kernel("s", "other-float", 1.0, "Softmax")), None, AMX, "x86_64")
    assert "nothing to speed up" in found.verdict


def test_without_the_graph_the_layers_are_still_counted() -> None:
    found = judge(profile(kernel("a", "float", 1.0), kernel("b", "integer", 1.0)), None, AMX, "x86_64")
    assert "explain the .onnx file instead" in text(found, "float-layer")


def test_shares_add_up(tmp_path: Path) -> None:
    found = explained(int8(saved(residual(), tmp_path)), "openvino").to_json()
    assert sum(kind["share"] for kind in found["kinds"]) == pytest.approx(1.0)
    assert {kind["kind"] for kind in found["kinds"]} <= set(KINDS)


def test_seconds_of_a_kernel() -> None:
    assert per_run([3.0, 1.0, 2.0], 3) == 2.0
    assert per_run([1.0, 1.0, 1.0, 1.0], 2) == 2.0  # twice a run
    assert per_run([], 3) == 0.0


def test_a_backend_without_a_profile_is_named(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    engine: Artifact = single.open_model(path).artifact
    with pytest.raises(UnknownName, match="backend with a profile"):
        bottleneck.explain("torch", engine, path, OpenRequest("int8", 1, 1), [], AMX, "x86_64")


def test_activations_with_a_scale_a_channel_have_no_kernel_in_onnx_runtime(tmp_path: Path) -> None:
    made = onnx.load(str(int8(saved(softplus_between(), tmp_path))))
    for found in made.graph.node:
        if found.op_type in ("QuantizeLinear", "DequantizeLinear") and found.input[1] == "x_scale":
            found.attribute.append(helper.make_attribute("axis", 1))
    for stored in made.graph.initializer:
        if stored.name in ("x_scale", "x_zero_point"):
            stored.CopyFrom(numpy_helper.from_array(np.repeat(numpy_helper.to_array(stored).reshape(1), 3), stored.name))
    # ONNX Runtime 1.31 fails on this very graph, and leaves depthwise convolutions in float: the profile is written here
    seen = profile(kernel("conv_a", "float", 1.0))
    found = judge(seen, quantized_layers.load(saved(made, tmp_path, "channels.onnx")), AMX, "x86_64")
    assert "a scale for each channel" in text(found, "float-layer")
    found = judge(seen, quantized_layers.load(tmp_path / "int8-cpu.onnx"), AMX, "x86_64")
    assert "a scale for each channel" not in text(found, "float-layer")


def test_sixteen_bit_activations_have_no_integer_kernel(tmp_path: Path) -> None:
    path = int8(saved(softplus_between(), tmp_path))
    made = onnx.load(str(path))
    for opset in made.opset_import:
        opset.version = 21
    names = {found.input[2] for found in made.graph.node if found.op_type == "QuantizeLinear"}
    for stored in made.graph.initializer:
        if stored.name in names:
            wide = numpy_helper.to_array(stored).astype(np.uint16) * 257
            stored.CopyFrom(
                helper.make_tensor(stored.name, onnx.TensorProto.UINT16, list(stored.dims), wide.reshape(-1).tolist())
            )
        elif stored.name.endswith("_scale") and f"{stored.name[:-6]}_zero_point" in names:
            stored.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(stored) / 257).astype(np.float32), stored.name))
    made.graph.ClearField("value_info")
    found = explained(saved(made, tmp_path, "wide.onnx"), "onnxruntime")
    assert "have 16 bits" in text(found, "float-layer")
