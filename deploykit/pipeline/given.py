"""The calibration table that --calib names: ours, or a cache that another tool has made, held against the graph."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import calibration_table, children, foreign_cache
from deploykit.calibration_table import IMPORTED, CalibrationTable, Range
from deploykit.errors import InputError

if TYPE_CHECKING:
    import onnx

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Of operators whose results are never negative, and of those that only pass values on.
_NOT_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus"})
_PASSING = frozenset(
    {
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Identity",
    }
)


def require_readable(path: Path) -> None:
    """Raises InputError for a file that is no calibration table, before anything is spent."""
    if foreign_cache.is_ours(path):
        calibration_table.load(path)
    else:
        foreign_cache.read(path)


def table(path: Path, model: Path, digest: str) -> CalibrationTable:
    """The table for the model at `model` (of that digest). Raises StaleCalibration for our own table of another model,
    InputError for a foreign cache that names nothing the model's weighted layers read."""
    if foreign_cache.is_ours(path):
        found = calibration_table.load(path)
        found.require_match(model_sha256=digest)
        return found
    return children.run("read", imported, path, model, digest)


def imported(path: Path, model: Path, digest: str) -> CalibrationTable:
    """A foreign cache as a table for this model; runs in a child process. What does not match stands in its notes."""
    from deploykit import graph

    cache = foreign_cache.read(path)
    loaded = graph.load(model)
    tensors, wanted = _tensors(loaded)
    shared = {name: ends for name, ends in cache.ends.items() if name in tensors}
    reads = wanted & shared.keys()
    if not reads:
        raise InputError(
            f"{cache.origin} names {len(cache.ends)} tensors, and no convolution or matrix product of {model.name} reads one of "
            f"them ({_some(cache.ends)} ...)",
            "it was made for another model or another export of it; calibrate this one",
        )
    notes = [f"calibrated elsewhere, by {cache.origin}: on which samples, it does not say", *cache.notes]
    if strays := cache.ends.keys() - shared.keys():
        doubt = "; was it made for another model?" if len(strays) > len(shared) else ""
        notes.append(f"{len(strays)} of {len(cache.ends)} tensors of the cache are not in the graph: {_some(strays)}{doubt}")
    if bare := wanted - reads:
        notes.append(
            f"{len(bare)} of {len(wanted)} tensors that layers read have no range in the cache; those layers stay in float: {_some(bare)}"
        )
    positive = _not_negative(loaded) if cache.symmetric else set()
    ranges = {name: Range(0.0 if name in positive else low, high) for name, (low, high) in shared.items()}
    return CalibrationTable(
        ranges=ranges,
        observed=ranges,
        method=IMPORTED,
        model_sha256=digest,
        samples_digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        preprocess=None,
        n=0,
        notes=tuple(notes),
        options={"origin": cache.origin},
    )


def _tensors(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """The tensors of a graph that are computed or fed, and those of them that its weighted layers read."""
    stored = {t.name for t in model.graph.initializer}
    fed = {v.name for v in model.graph.input} - stored
    constants = {o for node in model.graph.node if node.op_type == "Constant" for o in node.output}
    tensors = (fed | {name for node in model.graph.node for name in node.output if name}) - constants
    wanted = {node.input[0] for node in model.graph.node if node.op_type in _WEIGHTED and node.input} & tensors
    return tensors, wanted


def _not_negative(model: onnx.ModelProto) -> set[str]:
    """Tensors that cannot be negative, so that an asymmetric quantizer need not keep levels for it: a magnitude alone does
    not tell."""
    stored: Mapping[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer}
    found: set[str] = set()
    for node in model.graph.node:
        clips = node.op_type == "Clip" and len(node.input) > 1 and _zero_or_more(stored.get(node.input[1]))
        passes = node.op_type in _PASSING and bool(node.input) and node.input[0] in found
        if node.op_type in _NOT_NEGATIVE or clips or passes:
            found.update(name for name in node.output if name)
        elif node.op_type in ("Add", "Concat", "Mul") and all(name in found for name in node.input):
            found.update(node.output)
    return found


def _zero_or_more(low: onnx.TensorProto | None) -> bool:
    from onnx import numpy_helper

    return low is not None and bool(numpy_helper.to_array(low).min() >= 0)


def _some(names: Mapping[str, object] | set[str]) -> str:
    return ", ".join(sorted(names)[:3])
