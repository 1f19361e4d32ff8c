"""The layers of two graphs ranked by what they lost, and why, over samples that pass once (and once more for each group of
layers quantized alone). Memory does not grow with the samples: sums, histograms and one batch of activations are held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploykit import graph as graphs
from deploykit import quantized_layers
from deploykit.children import available_threads
from deploykit.errors import DataError, InputError
from deploykit.layer import Layer
from deploykit.quantized_layers import View
from deploykit.samples import Samples
from deploykit.stages.layers import alone, own, reasons
from deploykit.stages.layers.match import Match, matches
from deploykit.stages.layers.reasons import Reason
from deploykit.stages.layers.sums import Sums

ALONE = 64  # layers measured alone, unless asked for otherwise: in a deep network a fine layer near the input can cost most
ALONE_SAMPLES = 16  # and on how many samples at most: about 1 s a layer of an EfficientNet-Lite0
_NEVER_WORSE = 300.0  # dB; orders layers without any error last


@dataclass(frozen=True)
class LayerDrift:
    """A layer of the reference in the candidate. tensor: where its result was read; sqnr_db: of that, with the error of all
    layers before it; own_sqnr_db: of the model's output with this layer alone quantized (own_why: why it was not measured);
    weights_sqnr_db, input_sqnr_db,
    output_sqnr_db: of its weight, input and result rounded as the candidate rounds them. identical: no
    difference at all. position: its place in the graph."""

    layer: str
    op: str
    tensor: str
    position: int
    sqnr_db: float | None
    max_abs: float
    identical: bool
    quantized: bool
    matched_by: str
    weights_sqnr_db: float | None
    input_sqnr_db: float | None
    output_sqnr_db: float | None
    own_sqnr_db: float | None
    own_why: str
    reasons: tuple[Reason, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "reasons": [reason.to_json() for reason in self.reasons]}


@dataclass(frozen=True)
class LayerReport:
    """Every matched layer, the one with the lowest SQNR first, after those that have none since their results are not finite;
    `n` samples; notes: what a reader should know."""

    layers: tuple[LayerDrift, ...]
    n: int
    notes: tuple[str, ...]


def find(
    reference: Path,
    candidate: Path,
    samples: Samples,
    batch: int = 8,
    threads: int | None = None,
    most_alone: int | None = ALONE,
) -> LayerReport:
    """The layers of `candidate` (a Q/DQ graph by any tool, or another form of the same model) against `reference`.

    most_alone: how many layers are measured alone, those whose own rounding is coarsest first; None: all.
    Raises InputError where the two have other inputs or no layer in common, DataError without samples, ModelError for a
    file that is no model, MissingBackend without ONNX Runtime, BackendFailed where one fails.
    """
    if not len(samples):
        raise DataError(f"there are no samples in {samples.spec}", "give data with at least one sample")
    count = threads or available_threads()
    mine, its = quantized_layers.load(reference), quantized_layers.load(candidate)
    _require_same_inputs(mine, its, reference, candidate)
    found, missing = matches(mine, its)
    sums = Sums(mine, its, found)
    if found:
        sums.run(reference, candidate, samples, batch, count)
    rows = {i: _row(i, match, mine, sums) for i, match in enumerate(found) if i not in sums.unlike}
    if not rows:
        raise InputError(
            f"{candidate.name} has no Conv, Gemm or MatMul in common with {reference.name} ({len(its.layers)} there, "
            f"{len(mine.layers)} here)",
            "compare two graphs of one model: the float one and what was made of it",
        )
    chosen = _coarsest(rows, found, mine, most_alone)
    few = samples.take(range(min(len(samples), ALONE_SAMPLES)), samples.role)
    measured = own.measure(mine, chosen, reference.name, few, batch, count) if chosen else {}
    least = min((part.sqnr_db for part in measured.values() if part.sqnr_db is not None), default=None)
    for i, row in rows.items():
        rows[i] = _finished(row, measured.get(i), _why_not(mine, found[i]), least)
    ranked = sorted(rows.values(), key=_rank_db)
    unlike = [found[i].layer for i in sorted(sums.unlike)]
    notes = [*sums.notes, *_notes(mine, its, missing, unlike, len(chosen), len(rows))]
    if chosen and len(few) < len(samples):
        notes.append(f"layers were measured alone on the first {len(few)} samples")
    return LayerReport(tuple(ranked), len(samples), tuple(notes))


def _require_same_inputs(mine: View, its: View, reference: Path, candidate: Path) -> None:
    names = [sorted(spec.name for spec in graphs.signature(found.model).inputs) for found in (mine, its)]
    if names[0] != names[1]:
        raise InputError(
            f"{reference.name} takes {names[0]}, {candidate.name} takes {names[1]}", "compare two graphs of one model"
        )


def _row(i: int, match: Match, mine: View, sums: Sums) -> LayerDrift:
    """The layer without its own contribution."""
    layer, other, error = match.layer, match.other, sums.errors[i]
    weights = None
    if other is not None and alone.same_weights(mine, match):
        weights = reasons.weight_sqnr_db(alone.folded_weight(mine, match), other.weight)
    rounded, result = sums.roundings.get((i, layer.data)), sums.roundings.get((i, match.reference_tensor))
    why = [
        *reasons.of_range(sums.spreads.get(layer.data), rounded, "input"),
        *reasons.of_range(sums.spreads.get(match.reference_tensor), result, "output"),
        *reasons.of_weights(layer, other, weights),
        *reasons.of_channels(layer, sums.spreads.get(layer.bare.read)),
    ]
    if not error.finite:
        why.insert(0, Reason("not-finite", "its result holds NaN or infinite values in one of the graphs"))
    return LayerDrift(
        layer=layer.name,
        op=layer.op,
        tensor=match.reference_tensor,
        position=i,
        sqnr_db=error.sqnr_db,
        max_abs=error.max_abs,
        identical=error.finite and error.noise == 0.0,
        quantized=other is None or other.quantized,
        matched_by=match.by,
        weights_sqnr_db=weights,
        input_sqnr_db=None if rounded is None else rounded.sqnr_db,
        output_sqnr_db=None if result is None else result.sqnr_db,
        own_sqnr_db=None,
        own_why="",
        reasons=tuple(why),
    )


def _rank_db(row: LayerDrift) -> float:
    """The SQNR in dB to rank by. A result that is not finite, or is no longer zero where the reference's is, has none, and comes
    first."""
    return (_NEVER_WORSE if row.identical else -_NEVER_WORSE) if row.sqnr_db is None else row.sqnr_db


def _local(row: LayerDrift) -> float | None:
    return reasons.together(row.weights_sqnr_db, row.input_sqnr_db, row.output_sqnr_db)


def _coarsest(rows: Mapping[int, LayerDrift], found: Sequence[Match], mine: View, most: int | None) -> dict[int, Match]:
    """The layers to measure alone: those whose input, weight and output lose most by rounding."""
    able = [i for i in rows if _why_not(mine, found[i]) is None]
    able.sort(key=lambda i: _NEVER_WORSE if (db := _local(rows[i])) is None else db)
    return {i: found[i] for i in able[: len(able) if most is None else most]}


def _why_not(mine: View, match: Match) -> str | None:
    return "the reference is quantized itself" if mine.quantized else alone.why_not(mine, match)


def _finished(row: LayerDrift, measured: own.Own | None, why_not: str | None, least_db: float | None) -> LayerDrift:
    """The row with its own contribution, or why there is none, and whether its error came from before."""
    alone_db = None if measured is None else measured.sqnr_db
    why = measured.why if measured is not None else why_not or "not among the coarsest layers"
    costs = reasons.of_cost(_local(row), alone_db, least_db)
    before = [] if costs else reasons.of_error(_local(row), row.sqnr_db, row.quantized)
    return replace(row, own_sqnr_db=alone_db, own_why=why, reasons=(*row.reasons, *costs, *before))


def _notes(mine: View, its: View, missing: Sequence[Layer], unlike: Sequence[Layer], measured: int, whole: int) -> list[str]:
    notes = []
    if missing:
        notes.append(f"without a counterpart in the candidate: {_listed([layer.name for layer in missing])}")
    if unlike:
        notes.append(f"left out, results of other shapes or types: {_listed([layer.name for layer in unlike])}")
    if not its.quantized:
        notes.append("the candidate holds no Q/DQ nodes: nothing is said of ranges and levels")
    elif mine.quantized:
        notes.append("the reference is quantized itself: no layer was measured alone")
    elif 0 < measured < whole:
        notes.append(f"{measured} of {whole} layers were measured alone, those with the coarsest rounding of their own")
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
