"""What makes two runs, or two rows, comparable at all, and what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deploykit.measurement import MIN_RUNS, Measurement
from deploykit.report_document import Report, row_id
from deploykit.row import Row
from deploykit.stages.gate.turns import doubtful
from deploykit.verdict import Reason

EVERYTHING = "report"


def unlike(new: Report, old: Report, *, accuracy: bool) -> list[Reason]:
    """What makes the two runs no comparison at all (fail), or leaves open whether they are one (inconclusive)."""
    found = []
    mine, theirs = _digest(new.model), _digest(old.model)
    if mine != theirs and mine and theirs:
        said = f"the baseline is of model {theirs[:12]}, the report of {mine[:12]}: move the baseline on purpose"
        found.append(Reason(EVERYTHING, "model", "fail", said))
    elif not mine or not theirs:
        said = "which model it is, is recorded in " + ("neither report" if not mine and not theirs else "one report only")
        found.append(Reason(EVERYTHING, "model", "inconclusive", said))
    if accuracy:
        data, base = (r.samples.get("judge", {}).get("digest") for r in (new, old))
        if data and base and data != base:
            said = f"the baseline was judged on samples {str(base)[:12]}, the report on {str(data)[:12]}"
            found.append(Reason(EVERYTHING, "samples", "fail", said))
    return found


def edited(report: Report, whose: str) -> list[Reason]:
    """That a report was changed after it was written, where its checksum says so."""
    if not report.wrong_checksum:
        return []
    said = f"{whose} was edited after it was written (its checksum is another's): make it anew"
    return [Reason(EVERYTHING, "checksum", "inconclusive", said)]


def raw_contradiction(report: Report, row: Row) -> str:
    """How the row's figures do not fit the raw seconds kept beside the report, or these no clock; empty when they do or none
    are kept."""
    doc = report.measurements.get(row_id(row), {})
    launches = doc.get("launches")
    if not isinstance(launches, list) or not any(isinstance(x, list) and x for x in launches):
        return ""
    try:
        raw = Measurement.from_json(doc)
        found = {"images_per_s": raw.images_per_s, "n_timed": raw.n_timed}
        found |= {f"p{p}_s": raw.percentile_s(p) or 0.0 for p in MIN_RUNS if raw.n_timed >= MIN_RUNS[p]}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
        return f"the raw seconds of the row cannot be read ({type(exc).__name__})"
    for name, value in found.items():
        stated = getattr(row, name)
        if stated is not None and not math.isclose(stated, value, rel_tol=1e-6):
            return f"the report contradicts itself: {name} is {stated:g}, its raw seconds say {value:g}"
    return doubtful(raw)


def _digest(model: Mapping[str, Any]) -> str:
    return str(model.get("digest") or model.get("sha256") or "")


def speed_doubts(new: Report, old: Report) -> list[str]:
    """Why no ratio of the two runs can be trusted; empty when nothing speaks against it."""
    doubts = []
    mine, theirs = (r.environment.get("fingerprint") or r.environment for r in (new, old))
    if not mine or not theirs:
        doubts.append("the machine is not recorded")
    elif mine != theirs:
        doubts.append("it is another machine")
    if changed := changed_versions(new, old):
        doubts.append(changed)
    if not new.reference or dict(new.reference) != dict(old.reference):
        doubts.append("the speed-ups are over another reference")
    data, base = (r.samples.get("judge", {}).get("digest") for r in (new, old))
    if data != base:
        doubts.append("it was timed on other samples")
    return doubts


def changed_versions(new: Report, old: Report) -> str:
    """Which packages changed between the two runs, in words; empty when none that both have did."""
    shared = set(new.versions) & set(old.versions)
    if not shared:
        return "the versions are not recorded"
    changed = sorted(k for k in shared if new.versions[k] != old.versions[k])
    return "other versions: " + ", ".join(f"{k} {old.versions[k]} -> {new.versions[k]}" for k in changed) if changed else ""


def percentile_doubt(row: Row) -> str:
    """Which percentile the row states without the runs for it (an edit by hand, or another tool's); empty when none."""
    for p, least in MIN_RUNS.items():
        if getattr(row, f"p{p}_s") is not None and (row.n_timed is None or row.n_timed < least):
            return f"it states a p{p} of {row.n_timed or 'unknown'} runs, which needs {least}"
    found = [x for x in (row.p50_s, row.p90_s, row.p95_s, row.p99_s) if x is not None]
    return "" if found == sorted(found) else "its percentiles are not in order"


def _identity(row: Row) -> tuple[str, str, str, int, str]:
    """What makes it the same row: the device only where it is a build target, since a row that did not run has none."""
    target = row.device if row.device and row.device.startswith("sm") else ""
    return (row.name, row.backend, row.precision, row.batch, target)


def pairs_of(new: Sequence[Row], old: Sequence[Row]) -> Iterator[tuple[Row, Row | None, str]]:
    """(baseline's row, its row in the report or None, why there is none)."""
    found: dict[tuple[str, str, str, int, str], list[Row]] = {}
    for row in new:
        if not row.is_copy:
            found.setdefault(_identity(row), []).append(row)
    for was in old:
        twins = [r for r in old if _identity(r) == _identity(was)]
        candidates = found.get(_identity(was), [])
        if len(candidates) > 1 or len(twins) > 1:
            candidates = [r for r in candidates if r.threads == was.threads]
            if len(candidates) > 1 or sum(t.threads == was.threads for t in twins) > 1:
                yield was, None, "several rows of the same name: which one to compare cannot be told"
                continue
        if candidates:
            yield was, candidates[0], ""
        else:
            yield was, None, f"is in the baseline ({was.status}) and not in the report"


def drop_contradiction(report: Report, row: Row) -> str:
    """How the row's drop does not fit its top-1 and the reference's (an edit by hand); empty when it does."""
    reference = report.reference_row(row.batch) or report.reference_row()
    if reference is None or row.top1 is None or reference.top1 is None or row.top1_drop_pp is None:
        return ""
    drop = 100 * (reference.top1 - row.top1)
    if not abs(drop - row.top1_drop_pp) > 0.01:  # a NaN is judged elsewhere, and fails
        return ""
    return f"the report contradicts itself: top-1 is {drop:.2f} pp below the reference's, its drop says {row.top1_drop_pp:.2f}"


def speed_contradiction(report: Report, row: Row) -> str:
    """How the row's speed-up does not fit the two throughputs (an edit by hand); empty when it does."""
    reference = report.reference_row(row.batch)
    if reference is None or not reference.images_per_s or not row.images_per_s or not row.speedup:
        return ""
    ratio = row.images_per_s / reference.images_per_s
    low, high = row.speedup_low or row.speedup, row.speedup_high or row.speedup
    # throughput is over all windows and the speed-up a median of rounds: they agree but for the noise
    slack = 1.15 + (row.cov or 0.0) + (reference.cov or 0.0)
    if low / slack <= ratio <= high * slack:
        return ""
    return f"the report contradicts itself: {ratio:.2f} times the reference's throughput, but a speed-up of {row.speedup:.2f}"
