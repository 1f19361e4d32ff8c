"""find: every check over one model, read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deploykit.errors import UnknownName
from deploykit.signature import ShapeRange
from deploykit.stages.checks import batch, interface, loaders, quantized, runs, structure, tensorrt, weights
from deploykit.stages.checks.codes import RULES, Hit, fold
from deploykit.stages.checks.context import Graph
from deploykit.verdict import Finding

TENSORRT = ("tensorrt", "tensorrt-rtx")
_PROVIDERS = (
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-rtx",
)  # no findings of their own: they fall back, and say so
TARGETS = ("onnxruntime", "openvino", *TENSORRT, "torch", "torch-compile", "executorch", "litert", "tvm", *_PROVIDERS)
RULED = ("onnxruntime", "openvino", *TENSORRT)  # targets of which something is known beyond what holds for every engine
# How far a sample's outputs may lie apart between batches, as a share of the output's largest magnitude. FP32: summation
# order. FP16 and integer graphs: a rounding step in the last layer, a scale taken over the whole batch.
TOLERANCE, COARSE_TOLERANCE = 1e-3, 5e-2


def find(path: Path, targets: Sequence[str] = (), *, shapes: Mapping[str, ShapeRange] | None = None) -> list[Finding]:
    """What is wrong with the model, errors first; findings about one backend only for the backends in `targets`.

    Findings of one kind are folded into one, with their count and the first three nodes. `target` of a finding is 'any',
    one of `targets`, or 'model': a defect that engines load all the same. `shapes` gives the axes beside the batch a
    size for the runs.

    Raises UnknownName for a target that is none, ModelError for a file that is no ONNX model.
    """
    for target in targets:
        if target not in TARGETS:
            raise UnknownName("target", target, TARGETS)
    graph = Graph.load(path)
    return fold(_hits(graph, tuple(dict.fromkeys(targets)), shapes))


def lint(path: Path, target: str) -> list[Finding]:
    """What TensorRT's rules for Q/DQ say of a quantized graph, errors first, without running it or asking the target's parser;
    empty for any other target. Raises ModelError for a file that is no ONNX model."""
    return fold(tensorrt.find(Graph.load(path), target)) if target in TENSORRT else []


def _hits(graph: Graph, targets: tuple[str, ...], shapes: Mapping[str, ShapeRange] | None) -> Iterator[Hit]:
    ran = runs.prove(graph.path, graph.signature, COARSE_TOLERANCE if _is_coarse(graph) else TOLERANCE, shapes)
    refused = list(loaders.openvino(graph.path)) if "openvino" in targets else []
    yield from refused
    invalid = list(_validity(graph, ran, loaded=ran.loaded or ("openvino" in targets and not refused)))
    yield from invalid
    yield from _onnxruntime(graph, ran, targets, quiet=bool(invalid))
    yield from structure.find(graph)
    sound = not any(hit.code == "DK001" for hit in invalid)
    if sound:  # these trust what the checker has passed
        yield from interface.find(graph)
        yield from weights.find(graph)
        yield from quantized.find(graph)
        yield from batch.find(graph, ran)
    for target in targets:
        if target not in RULED:
            detail = f"nothing was looked for that {target} in particular would refuse or slow down"
            yield Hit("DK068", detail=detail, target=target)
        if target in TENSORRT:
            rules = list(tensorrt.find(graph, target)) if sound else []
            yield from rules
            if not any(RULES[hit.code].severity == "error" for hit in rules):  # else the nodes are named already
                yield from loaders.tensorrt(graph.path, target)


def _is_coarse(graph: Graph) -> bool:
    """Whether a sample's outputs may move with its batch by a rounding step: FP16, BF16 or integers inside."""
    import onnx

    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return (
        any(n.op_type.endswith(("Linear", "Integer")) or n.op_type.startswith("QLinear") for n in graph.nodes)
        or any(spec.dtype in ("float16", "bfloat16") for spec in graph.signature.outputs)
        or any(t.data_type in halves for t in graph.tensors.values())
    )


def _validity(graph: Graph, ran: runs.Report, *, loaded: bool) -> Iterator[Hit]:
    """DK001 when the checker refuses and no engine that was asked loads the model, DK002 when one does, DK003 when only
    strict shape inference fails."""
    checker = structure.checker_error(graph)
    if checker and not loaded:
        said = f"; ONNX Runtime: {ran.load_error}" if ran.load_error else f"; ONNX Runtime was not asked: {ran.not_run}"
        yield Hit("DK001", structure.named_in(graph, checker), checker + said)
    elif checker:
        yield Hit("DK002", structure.named_in(graph, checker), checker)
    elif inference := structure.inference_error(graph):
        yield Hit("DK003", structure.named_in(graph, inference), inference)


def _onnxruntime(graph: Graph, ran: runs.Report, targets: tuple[str, ...], *, quiet: bool) -> Iterator[Hit]:
    """What ONNX Runtime's loader says; where it isn't a target, only that nothing could be proven by running."""
    if "onnxruntime" in targets:
        if ran.load_error:
            yield Hit("DK060", structure.named_in(graph, ran.load_error), ran.load_error, "onnxruntime")
        if ran.not_run == runs.NOT_INSTALLED:
            yield Hit("DK065", detail=ran.not_run, target="onnxruntime", remedy="pip install 'deploykit[cpu]'")
    elif ran.load_error and not quiet:
        yield Hit("DK015", detail=f"ONNX Runtime refuses the model: {ran.load_error}")
