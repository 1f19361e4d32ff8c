"""Inputs and outputs: their types, a fixed batch, dynamic axes beside the batch."""

from __future__ import annotations

from collections.abc import Iterator

from deploykit.signature import BATCH_NAMES
from deploykit.stages.checks.codes import Hit
from deploykit.stages.checks.context import Graph

_BY_DTYPE = {
    "float64": "DK020",
    "complex128": "DK020",
    "float16": "DK021",
    "bfloat16": "DK021",
    "str": "DK022",
    "int64": "DK023",
    "uint64": "DK023",
}


def find(graph: Graph) -> Iterator[Hit]:
    """Unusual types at the boundary, float64 inside, the batch axis and the other dynamic axes."""
    import onnx

    signature = graph.signature
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.dtype in _BY_DTYPE:
                yield Hit(_BY_DTYPE[spec.dtype], spec.name, f"is a {spec.dtype} {kind}")
    for name, tensor in graph.tensors.items():
        if tensor.data_type == onnx.TensorProto.DOUBLE:
            yield Hit("DK020", name, "is a stored float64 tensor")
    if signature.fixed_batch is not None and signature.inputs:
        first = signature.inputs[0]
        yield Hit(
            "DK010",
            first.name,
            f"is {first}: it runs at batch {signature.fixed_batch} only",
            remedy="export with a dynamic batch axis (deploykit export does) to run at other batches; as it is, "
            f"every row runs at batch {signature.fixed_batch}",
        )
    for spec in signature.inputs:
        for axis in signature.free_axes(spec):
            yield Hit("DK016", spec.name, f"has the dynamic axis '{axis}'")
    if signature.batch_symbol is not None:
        yield from _outputs(graph)


def _outputs(graph: Graph) -> Iterator[Hit]:
    """Outputs declared with a size where inference finds the batch's symbol."""
    inferred = graph.shapes()
    symbol = graph.signature.batch_symbol
    for spec in graph.signature.outputs:
        shape = inferred.get(spec.name, ())
        if len(shape) != len(spec.shape):
            continue
        for axis, (declared, found) in enumerate(zip(spec.shape, shape, strict=True)):
            if isinstance(declared, int) and isinstance(found, str) and (found == symbol or found.lower() in BATCH_NAMES):
                yield Hit("DK014", spec.name, f"is declared {spec}, but axis {axis} is '{found}'")
