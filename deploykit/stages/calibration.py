"""Ranges of a float model's tensors over real samples: one pass, all methods, memory that does not grow with the samples.

The graph runs in ONNX Runtime with the tensors of `observation.plan` as its outputs. Of each, every value counts for
the extremes, and a share chosen by the sample's position alone for the histogram: the batch size changes neither, up to
the float rounding of the runtime's own kernels.

Reductions stay outside the graph: on ResNet-18, numpy's minimum and maximum cost 0.9 ms an image beside 16 ms for the
forward pass, ReduceMin and ReduceMax nodes in the graph as much; and numpy's see a NaN, which ONNX Runtime's may not.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import checkpoint, graph, nonfinite, observation
from deploykit.activations import Activations, open_model
from deploykit.calibration_table import METHODS, CalibrationTable, Range
from deploykit.children import available_threads, report_progress
from deploykit.clipping import PERCENTILE, choose
from deploykit.errors import DataError, DeploykitError, InputError, ModelError, UnknownName
from deploykit.histogram import Observation, sampled_row
from deploykit.observation import Plan
from deploykit.samples import Samples
from deploykit.signature import Feeds, Signature

VALUES_PER_TENSOR = 1 << 21  # sampled for the histogram, over all samples ...
LEAST_PER_SAMPLE = 4096  # ... but so many of each sample at least
CHECKPOINT_S = 2.0  # seconds of work that a killed pass loses at most, where `resume` is given
FEW = 100
MASK = 1e30  # larger magnitudes are attention masks (float32's lowest value, say), which no 8-bit range can hold


@dataclass
class _Progress:
    """What has been seen so far, of how many samples."""

    done: int = 0
    seen: dict[str, Observation] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)
    first: int | None = None  # checksum of the first sample
    vary: bool = False


def collect(
    path: Path,
    samples: Samples,
    *,
    methods: Sequence[str] = ("minmax",),
    batch: int = 8,
    threads: int | None = None,
    tensors: Sequence[str] | None = None,
    resume: Path | None = None,
    percentile: float = PERCENTILE,
) -> dict[str, CalibrationTable]:
    """A table per method, of every tensor that quantization needs (or of `tensors`), model inputs included.

    One pass over the samples serves all methods. With `resume`, progress is kept in that file, and a pass that was
    killed goes on from there; the file is removed at the end. `percentile` (in %) is that method's share of values kept.
    Raises ModelError for a model that is quantized already, cannot run, or gives NaN or infinite activations (naming the node and the
    sample), DataError for no samples and for NaN in them, UnknownName for a method or a tensor, MissingBackend without
    ONNX Runtime, BackendFailed where the model fails on a batch.
    """
    _check_arguments(samples, methods, batch, percentile)
    model = graph.load(path)
    observation.require_float(model, path)
    _check_inputs(model, path, samples)
    digest = graph.digest(model)
    model = observation.inlined(model)
    plan = observation.plan(model, tensors)
    opened = open_model(model, path.name, plan.roots, samples, batch=batch, threads=threads or available_threads())
    del model
    most = max(LEAST_PER_SAMPLE, VALUES_PER_TENSOR // len(samples))
    mark = hashlib.sha256(repr((digest, samples.digest, tuple(opened.layouts), most)).encode()).hexdigest()
    state = _Progress() if resume is None else _restore(resume, mark)
    rest = samples.take(range(state.done, len(samples)), samples.role)
    what = "calibrating" + (f", resumed at sample {state.done}" if state.done else "")
    kept_at = time.monotonic()
    for feeds, count in _ahead(rest, opened):
        try:
            _see(state, opened, plan, feeds, count, most)
        except _NotFiniteError as exc:
            if resume is not None:  # no use to anyone: these samples fail again
                resume.unlink(missing_ok=True)
            raise _explained(exc, path, samples) from exc
        state.done += count
        report_progress(what, state.done / len(samples))
        if resume is not None and state.done < len(samples) and time.monotonic() - kept_at >= CHECKPOINT_S:
            _keep(resume, mark, state)
            kept_at = time.monotonic()
    notes = (*opened.notes, *_notes(state, plan, samples))
    tables = _tables(_all_seen(state, plan), samples, digest, methods, percentile, most, notes)
    if resume is not None:
        resume.unlink(missing_ok=True)
    return tables


def _check_arguments(samples: Samples, methods: Sequence[str], batch: int, percentile: float) -> None:
    for method in methods:
        if method not in METHODS:
            raise UnknownName("calibration method", method, METHODS)
    if not methods:
        raise InputError("no calibration method was named", f"choose from: {', '.join(METHODS)}")
    if batch < 1:
        raise InputError(f"the calibration batch must be at least 1, not {batch}")
    if not 50.0 < percentile <= 100.0:
        raise InputError(f"percentile {percentile} is not above 50 and at most 100", f"the default is {PERCENTILE}")
    if not len(samples):
        raise DataError(f"there are no samples to calibrate on in {samples.spec}", "give data with at least one sample")


def _check_inputs(model: Any, path: Path, samples: Samples) -> None:
    takes, has = ([spec.name for spec in signature.inputs] for signature in (graph.signature(model), samples.signature))
    if sorted(takes) != sorted(has):
        raise DataError(f"the samples hold the inputs {has}, but {path.name} takes {takes}", "open the data for this model")


def _ahead(samples: Samples, opened: Activations) -> Iterator[tuple[Feeds, int]]:
    """The samples' batches, the next one read while the model runs on the last."""
    batches = samples.batches(opened.batch, pad=opened.fixed)
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, batches, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield item


def _see(state: _Progress, opened: Activations, plan: Plan, feeds: Feeds, count: int, most: int) -> None:
    """Takes in the tensors of one batch, of which `count` samples are real."""
    opened.signature.check(feeds)
    _compare_inputs(state, opened.signature, feeds, count)
    for name, tensor in opened.run(feeds).items():
        if name in state.masks or tensor.size == 0:
            continue
        rows = opened.rows(name, tensor, feeds, count)
        low, high = float(rows.min()), float(rows.max())
        if not (low > -MASK and high < MASK):  # so too for NaN
            if np.isnan(low) or np.isnan(high) or (np.isinf([low, high]).any() and not plan.masked):
                raise _not_finite(name, rows, state.done, name in feeds)
            state.masks.add(name)
            state.seen.pop(name, None)
            continue
        start = 0 if opened.layouts[name].axis is None else state.done
        sampled = [sampled_row(row, start + i, most) for i, row in enumerate(rows)]
        values = rows if sampled[0].size == rows[0].size else np.stack(sampled)
        state.seen.setdefault(name, Observation()).see(low, high, values)


class _NotFiniteError(Exception):
    """A tensor that holds NaN or Inf on a sample."""

    def __init__(self, name: str, kind: str, position: int, is_input: bool) -> None:
        super().__init__(name)
        self.name, self.kind, self.position, self.is_input = name, kind, position, is_input


def _not_finite(name: str, rows: NDArray[Any], done: int, is_input: bool) -> _NotFiniteError:
    bad = next(i for i, row in enumerate(rows) if not np.isfinite(row).all())
    return _NotFiniteError(name, "NaN" if np.isnan(rows[bad]).any() else "Inf", done + bad, is_input)


def _explained(found: _NotFiniteError, path: Path, samples: Samples) -> InputError:
    """DataError where the data is at fault, ModelError with the node where the model is."""
    where = f"sample {found.position} of the calibration set (counted from 0)"
    if found.is_input:
        return DataError(f"input '{found.name}' holds {found.kind} in {where}", "repair or remove that sample")
    try:
        origin = nonfinite.first(path, samples, found.position, found.kind)
    except DeploykitError:
        origin = None
    return ModelError(
        f"tensor '{found.name}' holds {found.kind} on {where}" + (f": {origin}" if origin is not None else ""),
        "the float model itself overflows or divides by zero there: look at its weights with `deploykit check`, and at that sample",
    )


def _compare_inputs(state: _Progress, signature: Signature, feeds: Feeds, count: int) -> None:
    if state.vary:
        return
    for i in range(count):
        checksum = 0
        for spec in signature.inputs:
            axis = signature.batch_axis(spec)
            if axis is not None:
                checksum = zlib.crc32(np.ascontiguousarray(np.take(feeds[spec.name], i, axis=axis)).tobytes(), checksum)
        if state.first is None:
            state.first = checksum
        state.vary |= checksum != state.first


def _restore(resume: Path, mark: str) -> _Progress:
    kept = checkpoint.load(resume, mark)
    if kept is None:  # none there, or of other samples or another model: this pass replaces it
        return _Progress()
    facts, seen = kept
    return _Progress(int(facts["done"]), seen, set(facts["masks"]), facts["first"], bool(facts["vary"]))


def _keep(resume: Path, mark: str, state: _Progress) -> None:
    facts = {"done": state.done, "masks": sorted(state.masks), "first": state.first, "vary": state.vary}
    checkpoint.save(resume, mark, facts, state.seen)


def _all_seen(state: _Progress, plan: Plan) -> dict[str, Observation]:
    """What was seen of each wanted tensor, itself or by way of the one it follows from."""
    seen = {}
    for name, source in plan.wanted.items():
        root = state.seen.get(source.root)
        if root is not None:
            seen[name] = root.clipped(source.low, source.high) if source.clips else root
    if not seen:
        raise ModelError("no float tensor of the model could be observed", "there is nothing in it that int8 could speed up")
    return seen


def _tables(
    seen: Mapping[str, Observation],
    samples: Samples,
    digest: str,
    methods: Sequence[str],
    percentile: float,
    most: int,
    notes: tuple[str, ...],
) -> dict[str, CalibrationTable]:
    observed = {name: Range(found.low, found.high) for name, found in seen.items()}
    tables = {}
    for method in methods:
        chosen = {name: choose(found, method, percentile=percentile) for name, found in seen.items()}
        options: dict[str, Any] = {"values_per_sample": most, "random": samples.random}
        if method == "percentile":
            options["percentile"] = percentile
        tables[method] = CalibrationTable(
            ranges={name: pair[0] for name, pair in chosen.items()},
            observed=observed,
            method=method,
            model_sha256=digest,
            samples_digest=samples.digest,
            preprocess=None if samples.preprocess is None else samples.preprocess.to_json(),
            n=len(samples),
            versions=_versions(),
            notes=notes,
            symmetric={name: amax for name, (found, amax) in chosen.items() if amax != found.amax},
            options=options,
        )
    return tables


def _notes(state: _Progress, plan: Plan, samples: Samples) -> list[str]:
    n, notes = len(samples), list[str]()
    seen = _all_seen(state, plan)
    if samples.random:
        notes.append("calibrated on random numbers: the ranges say nothing about real data")
    if n < FEW:
        notes.append(
            f"{n} sample{'s are' if n > 1 else ' is'} few: one unseen sample in {n + 1} can be expected to exceed the largest value "
            f"seen of any one tensor (1 / (n + 1)); with {FEW} or more it is 1 %, and NVIDIA calibrates ImageNet networks on about 500"
        )
    if n > 1 and not state.vary:
        notes.append(f"all {n} samples are alike: the ranges are those of one input")
    still = sorted(name for name, found in seen.items() if found.low == found.high)
    if still:
        notes.append(f"never varies: {_listed(still)}")
    if state.masks:
        notes.append(f"left out, since they hold a mask's infinite or huge values: {_listed(sorted(state.masks))}")
    return notes


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__, "numpy": np.__version__}
