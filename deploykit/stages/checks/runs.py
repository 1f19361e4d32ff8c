"""Proof by running: the model in ONNX Runtime at batch 1, 2 and 3 on random inputs, in a child process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import children
from deploykit.errors import BackendFailed
from deploykit.signature import ShapeRange, Signature, TensorSpec
from deploykit.stages.checks.structure import one_line

BATCHES = (1, 2, 3)
TIMEOUT_S = 180.0
NOT_INSTALLED = "onnxruntime is not installed"
IMAGE_SIZES, SEQUENCE_SIZES = (224, 64, 32, 640, 16), (16, 8, 128, 4, 1)
Array = NDArray[Any]


@dataclass(frozen=True)
class Failure:
    """One run that failed: the batch, the node ONNX Runtime named ('' when none), its words."""

    batch: int
    node: str
    message: str


@dataclass(frozen=True)
class Report:
    """What running showed. `not_run`: why nothing ran; `load_error`: what ONNX Runtime said against the model."""

    not_run: str = ""
    load_error: str = ""
    loaded: bool = False
    failures: tuple[Failure, ...] = ()
    mixed: tuple[str, ...] = ()  # outputs whose samples depend on their batch mates, in words
    constant: tuple[str, ...] = ()  # outputs whose shape doesn't follow the batch, in words
    not_finite: tuple[str, ...] = ()  # outputs with NaN or Inf
    unrepeatable: tuple[str, ...] = ()  # outputs that differ between two runs on one input
    sizes: tuple[tuple[str, int], ...] = ()  # sizes taken for axes beside the batch


def prove(path: Path, signature: Signature, tolerance: float, ranges: Mapping[str, ShapeRange] | None = None) -> Report:
    """What ONNX Runtime makes of the model: loads it, runs it at batch 1, 2 and 3 (at its own batch when that is fixed).

    `tolerance` is what a sample's outputs may differ by between batches, relative to the output's largest magnitude.
    """
    if not children.has_module("onnxruntime"):
        return Report(not_run=NOT_INSTALLED)
    try:
        return children.run(
            "ONNX Runtime (checks)", _prove, str(path), signature, tolerance, dict(ranges or {}), timeout_s=TIMEOUT_S
        )
    except BackendFailed as exc:
        return Report(not_run=one_line(str(exc)))


def _prove(path: str, signature: Signature, tolerance: float, ranges: Mapping[str, ShapeRange]) -> Report:
    try:
        import onnxruntime
    except ImportError as exc:
        return Report(not_run=f"onnxruntime cannot be imported: {exc}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # errors then name the graph's own nodes
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its exception classes share no base
        return Report(load_error=one_line(str(exc)))
    odd = [spec for spec in signature.inputs if not _can_feed(spec)]
    if odd:
        return Report(not_run=f"no random inputs can be made for {odd[0]}", loaded=True)
    return replace(_Prover(session, signature, tolerance, ranges).report(), loaded=True)


def _can_feed(spec: TensorSpec) -> bool:
    return (
        spec.dtype != "str" and (spec.dtype == "bool" or np.dtype(spec.dtype).kind in "fiu")
        if spec.dtype != "bfloat16"
        else False
    )


class _Prover:
    """Runs one session at several batches and compares sample by sample."""

    def __init__(self, session: Any, signature: Signature, tolerance: float, ranges: Mapping[str, ShapeRange]) -> None:
        self.session, self.signature, self.tolerance = session, signature, tolerance
        self.ranges = ranges
        self.names = [o.name for o in session.get_outputs()]
        self.sizes: dict[str, int] = {}

    def report(self) -> Report:
        """Everything found. One sample first, then batches of two and three whose first samples are the same ones."""
        fixed = self.signature.fixed_batch
        first = self._first_run(fixed)
        found = Report(sizes=tuple(self.sizes.items()))
        if isinstance(first, Failure):
            return replace(found, failures=(first,))
        found = replace(
            found,
            not_finite=tuple(
                n for n, a in zip(self.names, first, strict=True) if a.dtype.kind == "f" and not np.isfinite(a).all()
            ),
        )
        return found if fixed is not None else self._at_other_batches(found, first)

    def _first_run(self, fixed: int | None) -> list[Array] | Failure:
        """One run of the first sample, trying sizes for the axes nothing is known of until one runs."""
        unknown = {s for spec in self.signature.inputs if spec.name not in self.ranges for s in self.signature.free_axes(spec)}
        images = any(len(spec.shape) == 4 for spec in self.signature.inputs)
        outcome: list[Array] | Failure = Failure(fixed or 1, "", "did not run")
        for size in (IMAGE_SIZES if images else SEQUENCE_SIZES) if unknown else (0,):
            self.sizes = dict.fromkeys(sorted(unknown), size)
            outcome = self._run(self._feeds(fixed) if fixed is not None else self._slice(self._feeds(max(BATCHES)), 1))
            if not isinstance(outcome, Failure):
                break
        return outcome

    def _at_other_batches(self, found: Report, first: list[Array]) -> Report:
        samples = self._feeds(max(BATCHES))
        failures, by_batch = [], {1: first}
        for batch in BATCHES[1:]:
            outcome = self._run(self._slice(samples, batch))
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                by_batch[batch] = outcome
        if failures:
            return replace(found, failures=tuple(failures))
        constant, mixed = [], {}
        for index, name in enumerate(self.names):
            arrays = {b: outs[index] for b, outs in by_batch.items()}
            axis = _growing_axis(arrays)
            if axis is None:
                constant.append(
                    f"{name} has shape {'x'.join(map(str, first[index].shape)) or 'scalar'} at every batch"
                    if _same_shape(arrays)
                    else name
                )
            else:
                worst = max(
                    self._difference(a, arrays[max(BATCHES)].take(range(a.shape[axis]), axis=axis)) for a in arrays.values()
                )
                if worst > self.tolerance:
                    mixed[index] = f"{name} differs by {worst:.2g} of its largest value"
        unrepeatable = self._unrepeatable(first, self._slice(samples, 1)) if mixed else set()
        return replace(
            found,
            constant=tuple(constant),
            mixed=tuple(text for index, text in mixed.items() if index not in unrepeatable),
            unrepeatable=tuple(self.names[index] for index in sorted(unrepeatable)),
        )

    def _unrepeatable(self, first: list[Array], feeds: dict[str, Array]) -> set[int]:
        """The outputs that differ when the first sample is run once more."""
        again = self._run(feeds)
        if isinstance(again, Failure):
            return set()
        return {i for i, (a, b) in enumerate(zip(first, again, strict=True)) if self._difference(a, b) > self.tolerance}

    def _feeds(self, batch: int) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        feeds: dict[str, Array] = {}
        for spec in self.signature.inputs:
            known = self.ranges.get(spec.name)
            shape = []
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, int):
                    shape.append(dim)
                elif dim == self.signature.batch_symbol:
                    shape.append(batch)
                else:
                    shape.append(known.opt[axis] if known is not None else self.sizes[dim])
            kind = "b" if spec.dtype == "bool" else np.dtype(spec.dtype).kind
            values = rng.standard_normal(shape) if kind == "f" else rng.integers(0, 2, shape)
            feeds[spec.name] = np.asarray(values).astype(spec.dtype)
        return feeds

    def _slice(self, feeds: dict[str, Array], count: int) -> dict[str, Array]:
        """The first `count` samples."""
        sliced = {}
        for spec in self.signature.inputs:
            axis = self.signature.batch_axis(spec)
            array = feeds[spec.name]
            sliced[spec.name] = array if axis is None else array.take(range(count), axis=axis)
        return sliced

    def _run(self, feeds: dict[str, Array]) -> list[Array] | Failure:
        batches = [feeds[s.name].shape[a] for s in self.signature.inputs if (a := self.signature.batch_axis(s)) is not None]
        try:
            return [np.asarray(o) for o in self.session.run(None, feeds)]
        except Exception as exc:  # its exception classes share no base
            return Failure(batches[0] if batches else 1, _node_in(str(exc)), one_line(str(exc)))

    def _difference(self, left: Array, right: Array) -> float:
        if left.shape != right.shape:
            return float("inf")
        if left.dtype.kind not in "fiub" or not left.size:
            return 0.0
        a, b = left.astype(np.float64), right.astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
        scale = np.abs(a[np.isfinite(a)]).max(initial=0.0)
        worst = float(gap.max())
        return worst / scale if scale else worst


def _node_in(message: str) -> str:
    found = re.search(r"Name:\s*'([^']*)'", message)
    return found.group(1) if found else ""


def _same_shape(arrays: Mapping[int, Array]) -> bool:
    return len({a.shape for a in arrays.values()}) == 1


def _growing_axis(arrays: Mapping[int, Array]) -> int | None:
    """The axis whose size is the batch times a constant, all others being equal; None when there is none."""
    one = arrays[1]
    if any(a.ndim != one.ndim for a in arrays.values()):
        return None
    for axis in range(one.ndim):
        expected = {b: tuple(n * b if i == axis else n for i, n in enumerate(one.shape)) for b in arrays}
        if one.shape[axis] and all(a.shape == expected[b] for b, a in arrays.items()):
            return axis
    return None
