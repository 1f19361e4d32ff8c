"""Whether the file is valid ONNX: the checker, strict shape inference, names, control flow, size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from deploykit.graph import MAX_INLINE_BYTES
from deploykit.stages.checks.codes import Hit
from deploykit.stages.checks.context import Graph, label

LARGE_BYTES = 1_000_000_000
OLD_OPSET = 13
# Where in a library's own C++ source the check stands: of no use to who reads the finding.
_SOURCE_LINES = re.compile(
    r"/onnxruntime_src/\S+(?: [^()]*\([^()]*\))?(?: const)?|Exception from \S+:\d+:|Check '[^']*' failed at \S+:\d+:|"
    r"Load model from \S+ failed:|FrontEnd API failed with \w+:|\[ONNXRuntimeError\] : \d+ : (?:\w+ : )?"
)
ONNX_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training")


def checker_error(graph: Graph) -> str | None:
    """What onnx.checker (full check) says against the model, in one line; None when nothing."""
    import onnx

    try:
        if graph.weight_bytes < MAX_INLINE_BYTES:
            onnx.checker.check_model(graph.model, full_check=True)
        else:
            onnx.checker.check_model(str(graph.path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as exc:
        return one_line(str(exc))
    return None


def inference_error(graph: Graph, batch: int | None = None) -> str | None:
    """What strict shape inference says against the model at a batch, in one line; None when nothing."""
    import onnx

    try:
        onnx.shape_inference.infer_shapes(graph.skeleton(batch), check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as exc:
        return one_line(str(exc))
    return None


def one_line(text: str, limit: int = 400) -> str:
    """A library's message on one line, cut at `limit` characters."""
    flat = " ".join(_SOURCE_LINES.sub("", " ".join(text.split())).split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def named_in(graph: Graph, message: str) -> str:
    """The node that a library's message names; '' when it names none of the graph's."""
    names = {node.name for node in graph.nodes if node.name}
    return next(
        (m for found in re.findall(r"""[('"]([^('")]+)[)'"]|node name: ([^)]+)\)""", message) for m in found if m in names), ""
    )


def find(graph: Graph) -> Iterator[Hit]:
    """Names, control flow, external data, size, dead nodes, foreign domains, opset."""
    import onnx

    names = Counter(node.name for node in graph.nodes)
    for node in graph.nodes:
        if not node.name:
            yield Hit("DK004", label(node), "has no name")
    for name, count in names.items():
        if name and count > 1:
            yield Hit("DK004", name, f"names {count} nodes")
    for node in graph.nodes:
        if node.op_type in ("If", "Loop", "Scan", "SequenceMap"):
            yield Hit("DK005", label(node), f"is a{'n' if node.op_type == 'If' else ''} {node.op_type}")
        if node.output and not any(o in graph.consumers or o in graph.outputs for o in node.output if o):
            yield Hit("DK008", label(node))
    functions = {(f.domain, f.name) for f in graph.model.functions}
    foreign = Counter(
        (n.domain, n.op_type) for n in graph.nodes if n.domain not in ONNX_DOMAINS and (n.domain, n.op_type) not in functions
    )
    for (domain, op), count in foreign.items():
        first = next(label(n) for n in graph.nodes if (n.domain, n.op_type) == (domain, op))
        yield Hit("DK064", first, f"is {domain}::{op}" + (f" ({count} of them)" if count > 1 else ""))
    yield from _size(graph)
    if 0 < graph.opset < OLD_OPSET:
        yield Hit("DK066", detail=f"opset {graph.opset}")
    newest = onnx.defs.onnx_opset_version()
    if graph.opset > newest:
        yield Hit("DK067", detail=f"opset {graph.opset}; onnx {onnx.__version__} knows up to {newest}")


def _size(graph: Graph) -> Iterator[Hit]:
    if graph.weight_bytes >= LARGE_BYTES:
        yield Hit("DK007", detail=f"{graph.weight_bytes / 1e9:.1f} GB of weights")
    for file, count in graph.external_files().items():
        yield Hit("DK006", detail=f"'{file}' holds {count} tensors")
