"""What runs where in a lowered ExecuTorch program: inside XNNPACK's parts or outside, in integers or in float."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from deploykit.artifact import Json

_LAYERS = ("convolution", "conv1d", "conv2d", "conv_transpose2d", "linear", "addmm", "mm", "bmm", "matmul")
_QUANTIZERS = ("quantize_per", "dequantize_per", "choose_qparams", "quantize_affine", "dequantize_affine")


def counts(program: Any) -> dict[str, Json]:
    """What runs where in a lowered ExportedProgram.

    delegated, delegates: operators inside XNNPACK's parts, and how many parts there are; not_delegated: those outside, by
    name; layers: convolutions and matrix products; layers_int8: those of them inside whose input and weight both come
    from dequantize; layers_float: the names of the others; quantizers: quantize and dequantize operators in all.
    """
    inside: list[Any] = []
    outside: list[Any] = []
    delegates = 0
    module = program.graph_module
    for node in module.graph.nodes:
        if node.op != "call_function" or _operator(node) == "getitem":
            continue
        if _operator(node) == "executorch_call_delegate":
            delegates += 1
            lowered = getattr(module, str(node.args[0].target))
            inside += [n for n in lowered.original_module.graph.nodes if n.op == "call_function" and _operator(n) != "getitem"]
        else:
            outside.append(node)
    work = [n for n in inside if not _quantizes(n)]
    left = Counter(_operator(n) for n in outside)
    layers = [n for n in (*inside, *outside) if _operator(n).split(".")[0] in _LAYERS]
    integer = [n for n in layers if n in inside and _both_dequantized(n)]
    return {
        "delegated": len(work),
        "delegates": delegates,
        "not_delegated": dict(left.most_common()),
        "layers": len(layers),
        "layers_int8": len(integer),
        "layers_float": [_layer_name(n) for n in layers if n not in integer],
        "quantizers": sum(map(_quantizes, (*inside, *outside))),
    }


def _operator(node: Any) -> str:
    """'convolution.default' of an edge or ATen operator, else the function's own name."""
    target = node.target
    name = str(target.name()) if callable(getattr(target, "name", None)) else str(getattr(target, "__name__", target))
    return name.rpartition("::")[2]


def _quantizes(node: Any) -> bool:
    return _operator(node).startswith(_QUANTIZERS)


def _both_dequantized(node: Any) -> bool:
    """Whether the first two tensor inputs of a layer (for addmm the two after the bias) come from dequantize."""
    operands = [a for a in node.args if hasattr(a, "op")]
    if _operator(node).startswith("addmm"):
        operands = operands[1:]
    return len(operands) >= 2 and all(_dequantized(n) for n in operands[:2])


def _dequantized(node: Any) -> bool:
    while _operator(node).split(".")[0] in ("permute_copy", "t_copy", "view_copy", "permute", "t", "view") and node.args:
        node = node.args[0]
    return node.op == "call_function" and _operator(node).startswith("dequantize")


def _layer_name(node: Any) -> str:
    """The module's path in the user's model, where the trace kept it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = re.sub(r"^(L\['self'\]|_modules|model)\.?", "", path).removeprefix("model.")
    return path or str(node.name)
