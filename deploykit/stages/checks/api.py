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
TARGETS = ("onnxruntime", "openvino", *TENSORRT, "torch", "torch-compile", "executorch", "litert", "tvm")
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


def _hits(graph: Graph, targets: tuple[str, ...], shapes: Mapping[str, ShapeRange] | None) -> Iterator[Hit]:
    signature = graph.signature
    coarse = any(n.op_type.endswith("Linear") or n.op_type.endswith("Integer") for n in graph.nodes)
    coarse = coarse or any(spec.dtype in ("float16", "bfloat16") for spec in signature.outputs) or _stores_half(graph)
    ran = runs.prove(graph.path, signature, COARSE_TOLERANCE if coarse else TOLERANCE, shapes)
    yield from _validity(graph, ran, targets)
    yield from structure.find(graph)
    yield from interface.find(graph)
    yield from weights.find(graph)
    yield from quantized.find(graph)
    yield from batch.find(graph, ran)
    if "openvino" in targets:
        yield from loaders.openvino(graph.path)
    for target in targets:
        if target in TENSORRT:
            rules = list(tensorrt.find(graph, target))
            yield from rules
            # A computed scale crashes the parser, and a rule that failed has named its node already.
            if not any(RULES[hit.code].severity == "error" for hit in rules):
                yield from loaders.tensorrt(graph.path, target)


def _stores_half(graph: Graph) -> bool:
    import onnx

    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return any(t.data_type in halves for t in graph.tensors.values())


def _validity(graph: Graph, ran: runs.Report, targets: tuple[str, ...]) -> Iterator[Hit]:
    """DK001 when the checker and ONNX Runtime both refuse, DK002 or DK003 when only the checker does, DK060 when only
    ONNX Runtime does."""
    checker = structure.checker_error(graph)
    inference = None if checker else structure.inference_error(graph)
    if checker and not ran.loaded:
        said = f"; ONNX Runtime: {ran.load_error}" if ran.load_error else f"; ONNX Runtime was not asked: {ran.not_run}"
        yield Hit("DK001", structure.named_in(graph, checker), checker + said)
    elif checker:
        yield Hit("DK002", structure.named_in(graph, checker), checker)
    elif inference:
        yield Hit("DK003", structure.named_in(graph, inference), inference)
    if "onnxruntime" in targets and ran.load_error:
        yield Hit("DK060", structure.named_in(graph, ran.load_error), ran.load_error, "onnxruntime")
    elif ran.load_error and not checker:
        yield Hit("DK015", detail=f"ONNX Runtime refuses the model: {ran.load_error}")
    if "onnxruntime" in targets and ran.not_run == runs.NOT_INSTALLED:
        yield Hit("DK065", detail=ran.not_run, target="onnxruntime", remedy="pip install 'deploykit[cpu]'")
