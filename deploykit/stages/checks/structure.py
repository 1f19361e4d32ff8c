"""Whether the file is valid ONNX: the checker, strict shape inference, names, control flow, size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from deploykit.graph import MAX_INLINE_BYTES
from deploykit.stages.checks.codes import Hit
from deploykit.stages.checks.context import Graph, label

LARGE_BYTES = 1_000_000_000
OLD_OPSET = 13
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
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def find(graph: Graph) -> Iterator[Hit]:
    """Names, control flow, external data, size, dead nodes, foreign domains, old opset."""
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


def _size(graph: Graph) -> Iterator[Hit]:
    if graph.weight_bytes >= LARGE_BYTES:
        yield Hit("DK007", detail=f"{graph.weight_bytes / 1e9:.1f} GB of weights")
    for file, count in graph.external_files().items():
        yield Hit("DK006", detail=f"'{file}' holds {count} tensors")
