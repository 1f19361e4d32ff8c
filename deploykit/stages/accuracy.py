"""accuracy: the same batches through the reference and every candidate, in lock-step -> a Drift each.

No outputs are kept: a batch's are added to the Drifts before the next batch is read, so memory does not grow with n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deploykit import children
from deploykit.drift import Drift
from deploykit.drift_accumulator import DriftAccumulator
from deploykit.errors import DataError, DeploykitError, InputError
from deploykit.samples import Samples
from deploykit.signature import Feeds, Outputs

InferFn = Callable[[Feeds], Outputs]
REFERENCE = "(reference)"


def measure(
    samples: Samples,
    reference: InferFn,
    candidates: Mapping[str, InferFn],
    *,
    batch: int,
    notes: tuple[str, ...] = (),
    progress: children.Progress | None = None,
) -> dict[str, Drift | DeploykitError]:
    """The drift of each candidate by name, and under REFERENCE that of the reference from itself (its own top-1 and top-5).

    Every batch has `batch` samples; the last is filled up and the filling is not counted. `notes` go with each drift. A candidate that raises a
    DeploykitError has that error in its place and the others go on. Raises DataError without samples or for labels outside
    the model's classes, ModelError for NaN in the reference's outputs, and whatever the reference raises.
    """
    if not len(samples):
        raise DataError(f"{samples.spec}: no samples to judge with", "give more data")
    if REFERENCE in candidates:
        raise ValueError(f"no candidate may be called {REFERENCE}")
    if batch < 1:
        raise InputError(f"a batch of {batch} is none", "use a batch of at least 1")
    tell = children.report_progress if progress is None else progress
    labels = samples.label_array()

    def accumulator(*, own: bool = False) -> DriftAccumulator:
        return DriftAccumulator(samples.signature, len(samples), labels, samples=samples.digest, own=own, numbers=samples.indices)

    own = accumulator(own=True)
    open_ = {name: accumulator() for name in candidates}
    failed: dict[str, DeploykitError] = {}
    done = 0
    for feeds, count in samples.batches(batch, pad=True):
        expected = reference(feeds)
        own.add(expected, expected, count, batch)
        for name in list(open_):
            try:
                open_[name].add(expected, candidates[name](feeds), count, batch)
            except DeploykitError as exc:
                failed[name] = exc
                del open_[name]
        done += count
        tell("accuracy", done / len(samples))
    remarks = (*notes, *_remarks(samples, own.classes))
    drifts: dict[str, Drift | DeploykitError] = {REFERENCE: own.drift(remarks)}
    for name in candidates:
        drifts[name] = failed[name] if name in failed else open_[name].drift(remarks)
    return drifts


def _remarks(samples: Samples, classes: int | None) -> tuple[str, ...]:
    """What is doubtful about the judging itself."""
    found = []
    if samples.random:
        found.append("judged on random inputs")
    names = samples.classes
    if samples.labels is not None and classes is not None and names is not None and len(names) != classes:
        found.append(
            f"the data names {len(names)} classes, the model has {classes}: labels count from 0 in the data's order "
            "(--classes gives the model's)"
        )
    return tuple(found)
