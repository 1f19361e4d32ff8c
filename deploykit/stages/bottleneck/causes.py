"""Why a kernel runs in float, or at all: read from the Q/DQ graph, the runtime's rules and the CPU's features.

ONNX Runtime's rules are those of its QDQ selectors (core/optimizer/qdq_transformer/selectors_actions): a Conv becomes
QLinearConv where its input, its weight and its result are quantized; a Gemm or MatMul may write float.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.kernel_profile import Kernel, KernelProfile
from deploykit.layer import BARE, Layer
from deploykit.quantized_layers import View

_WIDE = frozenset({"int16", "uint16"})
_LEAST_SHARE = 0.01  # findings below one hundredth of the time are left out
_QUANTIZE = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Finding:
    """One cost: a code, what was seen, which share of the kernels' time the named kernels take (None: a fact about the
    machine, whose cost this profile cannot show), and what to do."""

    code: str
    text: str
    share: float | None
    kernels: tuple[str, ...]
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "kernels": list(self.kernels)}


def floats(profile: KernelProfile, view: View | None) -> list[Finding]:
    """Convolutions and matrix products that ran in float, grouped by the reason."""
    layers = {} if view is None else _by_name(view)
    return _grouped(
        profile, profile.of_kind("float"), "float-layer", lambda kernel: _why_float(profile.backend, kernel, layers, view)
    )


def steps(profile: KernelProfile, view: View | None) -> list[Finding]:
    """Quantize and Dequantize steps that stayed nodes of their own, grouped by what they stand beside."""
    return _grouped(profile, profile.of_kind("quantize"), "unfused-qdq", lambda kernel: _why_step(kernel, view))


def reformats(profile: KernelProfile) -> list[Finding]:
    """Reorders, converts and transposes that the runtime put in."""
    found = profile.of_kind("reformat")
    edge = [kernel for kernel in found if kernel in (*profile.kernels[:2], *profile.kernels[-2:])]
    inner = [k for k in found if k not in edge]
    made = []
    if edge and profile.share(edge) >= _LEAST_SHARE:
        made.append(
            _finding(
                "reformat-edge",
                profile,
                edge,
                f"{len(edge)} x {_ops(edge)} at the model's input or output: the graph has NCHW, the kernels want NHWC",
                "unavoidable: one pass over the input or the output",
            )
        )
    if inner and profile.share(inner) >= _LEAST_SHARE:
        made.append(
            _finding(
                "reformat",
                profile,
                inner,
                f"{len(inner)} x {_ops(inner)} inside the graph, where integer and float parts (or two data layouts) meet",
                "quantize the float islands between integer layers, so that data stays in one layout",
            )
        )
    return made


def others(profile: KernelProfile) -> list[Finding]:
    """Other operators in float, and reference kernels."""
    found = []
    rest = profile.of_kind("other-float")
    if rest and profile.share(rest) >= _LEAST_SHARE:
        found.append(
            _finding(
                "other-float",
                profile,
                rest,
                f"{len(rest)} other operators in float ({_ops(rest)})",
                "ranges on both sides let a runtime go on in integers where it has a kernel (additions, poolings, concatenations): "
                "quantize with --layout cpu; Softmax and normalizations have none",
            )
        )
    slow = [kernel for kernel in profile.kernels if kernel.detail.startswith("ref")]
    if slow:
        said = "kernels of the runtime's plain reference code, which is not vectorized"
        found.append(
            _finding(
                "reference-kernel", profile, slow, f"{len(slow)} {said}", "another operator or shape there, or another runtime"
            )
        )
    return found


def depthwise(profile: KernelProfile, view: View | None) -> list[Finding]:
    """Integer depthwise convolutions, where they are a quarter of the time or more."""
    if view is None:
        return []
    layers = _by_name(view)
    found = [
        kernel
        for kernel in profile.of_kind("integer")
        if any((layer := layers.get(s)) and layer.op == "Conv" and _is_depthwise(layer, view) for s in kernel.sources)
    ]
    if profile.share(found) < 0.25:
        return []
    return [
        _finding(
            "depthwise",
            profile,
            found,
            f"{len(found)} depthwise convolutions run in integers, but are bound by memory, not by arithmetic: about 9 to 25 "
            "multiply-adds a value leave dot-product instructions nothing to do",
            "nothing in the graph: expect a speed-up nearer the 4x smaller data than the arithmetic's; larger batches do not help",
        )
    ]


def dynamic(profile: KernelProfile) -> list[Finding]:
    """Integer layers that find their ranges anew in every run."""
    found = [k for k in profile.kernels if k.op in ("ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")]
    if not any(k.op == "ConvInteger" for k in found):
        return []
    said = "kernels that find activation ranges anew in each run; ConvInteger has no fast path in ONNX Runtime"
    return [_finding("dynamic-range", profile, found, f"{len(found)} {said}", "calibrate: deploykit quantize --mode static")]


def features(profile: KernelProfile, has: Collection[str], arch: str) -> list[Finding]:
    """The instructions for INT8 that this CPU does not have."""
    share = profile.share(profile.of_kind("integer"))
    where = f"INT8 layers take {share * 100:.0f} % of the time here"
    if arch in ("x86_64", "AMD64"):
        if not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(has):
            text = (
                "this CPU has no VNNI: an INT8 dot product takes three instructions instead of one, so INT8 does at most about 1.3 "
                f"times FP32's multiply-adds, not 4 times; {where}"
            )
            remedy = "a CPU with VNNI (Intel from Cascade Lake or Alder Lake on, AMD from Zen 4 on); reduced-range weights against saturation"
            return [Finding("no-vnni", text, None, (), remedy)]
        if "amx_int8" not in has:
            text = f"this CPU has VNNI (4 times FP32's multiply-adds a cycle) but no AMX (INT8 tiles, 8 times VNNI's); {where}"
            return [Finding("no-amx", text, None, (), "Intel Xeon from Sapphire Rapids on, where large layers should gain")]
        return []
    if arch in ("aarch64", "arm64") and "asimddp" not in has:
        text = f"this CPU has no dot-product instructions (asimddp); {where}"
        return [Finding("no-dotprod", text, None, (), "an Arm CPU from v8.2 with dotprod on, or v8.6 with i8mm")]
    return []


def _why_float(backend: str, kernel: Kernel, layers: Mapping[str, Layer], view: View | None) -> tuple[str, str]:
    """The reason and the remedy for one layer."""
    layer = next((layers[s] for s in kernel.sources if s in layers), None)
    if layer is None or view is None:
        return "the runtime computes it in float, and the graph it was given is not at hand", "explain the .onnx file instead"
    if not view.quantized:
        return (
            "the graph holds no Q/DQ nodes at all: it is a float model",
            "quantize it: deploykit quantize --mode static --data DATA",
        )
    if layer.data_pair is None and layer.weight_pair is None:
        return "the graph leaves it in float: no Q/DQ pair on its input and weight", (
            "quantize it too, or accept it where it was kept for the accuracy"
        )
    if layer.data_pair is None:
        return "its weight is quantized, its input is not", "calibrate its input: weights alone save memory, not time"
    if layer.weight is not None and layer.weight_pair is None:
        return "its input is quantized, its weight is left in float", (
            "quantize the weight as well, or accept it where it was kept for the accuracy"
        )
    if layer.data_pair.dtype in _WIDE:
        return (
            f"its activations have 16 bits ({layer.data_pair.dtype}): there is no integer kernel for them",
            "use 8-bit activations",
        )
    if backend == "onnxruntime":
        return _why_float_onnx_runtime(layer, view)
    return "OpenVINO did not take its pairs for an integer kernel", "quantize with --layout cpu; compare with NNCF's graph"


def _why_float_onnx_runtime(layer: Layer, view: View) -> tuple[str, str]:
    if layer.op == "ConvTranspose":
        return "ONNX Runtime's CPU provider has no integer ConvTranspose", "use --backend openvino, which has one"
    pairs = [pair for pair in (layer.data_pair, *(point.pair for point in layer.points)) if pair is not None]
    if any(not pair.per_tensor for pair in pairs):  # NNCF 3 does so around depthwise convolutions
        return "its input or result has a scale for each channel, and ONNX Runtime's integer kernels take one for all", (
            "quantize activations per tensor, as deploykit quantize --layout cpu does"
        )
    if layer.op == "Conv" and any(point.names[0] in view.outputs for point in layer.points if point.pair is None):
        return "its result is the model's output, in float, and ONNX Runtime's integer Conv can only write integers", (
            "a pair on the output would let it run in integers; --backend openvino needs none"
        )
    if layer.op == "Conv" and all(point.pair is None for point in layer.points):
        return "its result is not quantized, and ONNX Runtime's integer Conv can only write integers", (
            "quantize for the CPU: deploykit quantize --layout cpu puts a pair behind each convolution (TensorRT's layout leaves "
            "them out)"
        )
    kept = _kept_activation(layer)
    if kept is not None:
        return kept
    if (
        layer.weight_pair is not None
        and layer.weight_pair.dtype == "uint8"
        and layer.data_pair
        and layer.data_pair.dtype == "int8"
    ):
        return "int8 activations with uint8 weights: no kernel takes them", "use uint8 activations with int8 weights"
    if layer.op == "MatMul" and layer.weight is None:
        return "both of its operands are computed at run time, and its pairs were not fused", "quantize its result as well"
    result = next((point for point in layer.points if point.pair is not None), None)
    if result is not None and result.pair is not None and result.pair.dtype == "int8" and len(view.readers[result.read]) > 1:
        readers = ", ".join(sorted({view.nodes[i].op_type for i in view.readers[result.read]}))
        return f"its int8 result is read by several operators ({readers}), not all of which run in integers", (
            "unsigned activations, and pairs around every operator: deploykit quantize --layout cpu"
        )
    return "its pairs are there, but ONNX Runtime did not fuse them", "see `deploykit check`; quantize with --layout cpu"


def _kept_activation(layer: Layer) -> tuple[str, str] | None:
    """The Relu or Clip between a convolution and its Quantize, where saturation cannot do its work."""
    after = next((point for point in layer.points if point.kind != BARE and point.pair is not None), None)
    if layer.op != "Conv" or after is None or after.pair is None or layer.bare.pair is not None:
        return None
    if after.pair.per_tensor and after.pair.reach[0] == 0.0 and after.kind in ("Relu", "Clip"):
        return None
    return (
        f"a {after.kind} stands between it and the Quantize of its result, whose {after.pair.dtype} go below zero: saturation "
        f"cannot do the {after.kind}'s work, so it stays, and so does the convolution, in float"
    ), "unsigned activations with zero at the lowest level: deploykit quantize --layout cpu"


def _why_step(kernel: Kernel, view: View | None) -> tuple[str, str]:
    names = {} if view is None else {node.name: node for node in view.nodes if node.op_type in _QUANTIZE}
    node = next((names[s] for s in (*kernel.sources, kernel.name) if s in names), None)
    if node is None or view is None:
        return "quantize or dequantize steps that no kernel took in", "quantize the operators beside them too (--layout cpu)"
    quantizes = node.op_type == "QuantizeLinear"
    if quantizes and node.input[0] not in view.producer:
        return "the model's input is made integers", "unavoidable: it is the first step"
    if not quantizes and view.value(node.output[0]) is not None:
        return "weights are made float in every run: their layer does not run in integers", "see the float layers above"
    if not quantizes and node.output[0] in view.outputs:
        return "the model's output is made float", "unavoidable: it is the last step"
    if quantizes:
        beside = {view.nodes[view.producer[node.input[0]]].op_type}
    else:
        beside = {view.nodes[i].op_type for i in view.readers.get(node.output[0], [])}
    said = ", ".join(sorted(beside - set(_QUANTIZE))) or "other steps like them"
    way = "after" if quantizes else "before"
    return f"{'Quantize' if quantizes else 'Dequantize'} {way} {said}, which runs in float", (
        "an operator with pairs on all its inputs and its result can run in integers: quantize with --layout cpu"
    )


def _grouped(
    profile: KernelProfile, kernels: Sequence[Kernel], code: str, why: Callable[[Kernel], tuple[str, str]]
) -> list[Finding]:
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[why(kernel)].append(kernel)
    found = []
    for (text, remedy), members in groups.items():
        if code == "float-layer" or profile.share(members) >= _LEAST_SHARE:
            found.append(_finding(code, profile, members, f"{len(members)} x {_ops(members)}: {text}", remedy))
    return found


def _finding(code: str, profile: KernelProfile, kernels: Sequence[Kernel], text: str, remedy: str) -> Finding:
    slowest = sorted(kernels, key=lambda kernel: -kernel.seconds)
    return Finding(code, text, profile.share(kernels), tuple(kernel.name for kernel in slowest), remedy)


def _ops(kernels: Sequence[Kernel]) -> str:
    return ", ".join(sorted({kernel.op for kernel in kernels}))


def _by_name(view: View) -> dict[str, Layer]:
    """The layers by node name and by every name of their results: runtimes name a fused kernel after either."""
    found = {name: layer for layer in view.layers for point in layer.points for name in point.names}
    return {**found, **{layer.name: layer for layer in view.layers}}


def _is_depthwise(layer: Layer, view: View) -> bool:
    group = next((a.i for a in view.nodes[layer.index].attribute if a.name == "group"), 1)
    return layer.weight is not None and group > 1 and layer.weight.shape[1] == 1
