"""The table as a person reads it: which columns, and the text of each cell; shared by terminal, Markdown and HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.report_document import Report
from deploykit.row import Row

UNSTABLE = "UNSTABLE"
_REUSED = re.compile(r"reused(?: from|, measured) ([^\s;,]+)")


@dataclass(frozen=True)
class Column:
    """One column: key (stable, for tests and CSS), its heading, and whether its cells are figures."""

    key: str
    heading: str
    figure: bool = True


def columns(report: Report) -> list[Column]:
    """The columns this report fills, in order. The tail is p99 where every measured row supports it, else p90; accuracy
    is top-1 where there are labels, else agreement with the reference; columns nothing was measured for are left out."""
    rows = report.rows
    measured = [r for r in rows if r.p50_s is not None]
    found = [Column("model", "Model", False)] if len({r.name for r in rows}) > 1 else []
    found += [Column("backend", "Backend", False), Column("precision", "Precision", False), Column("batch", "Batch")]
    if len({r.threads for r in rows if r.threads is not None}) > 1:
        found.append(Column("threads", "Threads"))
    found += [Column("rate", "img/s"), Column("p50", "p50 ms")]
    if measured and all(r.p99_s is not None for r in measured):
        found.append(Column("p99", "p99 ms"))
    elif any(r.p90_s is not None for r in measured):
        found.append(Column("p90", "p90 ms"))
    found.append(Column("speedup", "Speed-up"))
    if any(r.roofline_share is not None for r in rows):
        found.append(Column("roofline", "Roofline"))
    if any(r.top1 is not None for r in rows):
        found.append(Column("top1", "Top-1"))
    elif any(r.agreement is not None for r in rows):
        found.append(Column("agreement", "Agreement"))
    if any(r.top1_drop_pp is not None for r in rows):
        found.append(Column("drop", "Drop pp"))
    if any(r.size_bytes is not None for r in rows):
        found.append(Column("size", "Size"))
    return [*found, Column("status", "Status", False)]


def cell(report: Report, row: Row, key: str) -> str:
    """The text of one cell; empty where it was not measured."""
    figures = {
        "rate": lambda: number(row.images_per_s) + (f" {UNSTABLE}" if row.stable is False and row.images_per_s else ""),
        "p50": lambda: milliseconds(row.p50_s),
        "p90": lambda: milliseconds(row.p90_s),
        "p99": lambda: milliseconds(row.p99_s),
        "speedup": lambda: speedup(row),
        "top1": lambda: percent(row.top1),
        "agreement": lambda: percent(row.agreement),
        "drop": lambda: drop(row),
        "roofline": lambda: "" if row.roofline_share is None else f"{row.roofline_share:.0%} {row.bound_by or ''}".strip(),
        "size": lambda: size(row.size_bytes),
        "status": lambda: status(report, row),
        "model": lambda: row.name,
        "precision": lambda: f"{row.precision} {row.device}" if row.device and row.device.startswith("sm") else row.precision,
        "threads": lambda: "" if row.threads is None else str(row.threads),
    }
    if key in figures:
        return figures[key]()
    return str(getattr(row, key))


def number(value: float | None) -> str:
    """Three significant figures, whole from 100 on, two below 0.1; empty for None."""
    if value is None:
        return ""
    if 0 < abs(value) < 0.0995:
        return f"{value:.2g}"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds with three significant figures (more below a hundredth of one); empty for None."""
    if seconds is None:
        return ""
    ms = seconds * 1e3
    return number(ms) if ms >= 0.995 or ms == 0 else f"{ms:.3g}"


def speedup(row: Row) -> str:
    """'13.4x (13.1-13.7)': the ratio with its 95 % interval."""
    if row.speedup is None:
        return ""
    low, high = row.speedup_low, row.speedup_high
    # the reference is 1 by definition; an interval there would be noise
    if low is None or high is None or low == high:
        return f"{number(row.speedup)}x"
    return f"{number(row.speedup)}x ({number(low)}-{number(high)})"


def drop(row: Row) -> str:
    """'0.12 (-0.05..0.30)': percentage points of top-1 lost (positive = worse) with its 95 % interval."""
    if row.top1_drop_pp is None:
        return ""
    point = _signed(row.top1_drop_pp)
    if row.top1_drop_low is None or row.top1_drop_high is None or row.top1_drop_low == row.top1_drop_high:
        return point
    return f"{point} ({_signed(row.top1_drop_low)}..{_signed(row.top1_drop_high)})"


def _signed(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with two decimals, cut and not rounded up to 100."""
    if fraction is None:
        return ""
    shown = 100 * fraction
    if shown < 100 and f"{shown:.2f}" == "100.00":
        return "99.99%"
    return f"{shown:.2f}%"


def size(count: int | None) -> str:
    """Bytes as kB, MB or GB (powers of ten); empty for None."""
    if count is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count} B"


def status(report: Report, row: Row) -> str:
    """The status in a word, or what stands out about an ok row: 'reference', 'best'."""
    words = [] if row.status == "ok" else [row.status]
    if report.is_reference(row):
        words.append("reference")
    if row is report.best():
        words.append("best")
    return ", ".join(words) or "ok"


def why(row: Row) -> str:
    """What there is to say of the row beside its figures: the reason of its status, and its notes."""
    said = [row.reason if row.reason or row.status == "ok" else "no reason was recorded"]
    if row.status == "built" and row.device:
        said.insert(0, f"for {row.device}")
    said.append(row.notes)
    return "; ".join(x.strip() for x in said if x.strip())


def title(report: Report) -> str:
    """The model's name."""
    return str(report.model.get("name") or ", ".join(sorted({r.name for r in report.rows})) or "no model")


def remarks(report: Report) -> list[tuple[list[int], str, str]]:
    """What the rows say, each thing once: (indices of the rows, who they are, what they say)."""
    found: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(report.rows):
        if why(row):
            found.setdefault((row.name, row.backend, row.precision, row.status, why(row)), []).append(i)
    several = len({r.name for r in report.rows}) > 1
    lines = []
    for (name, backend, precision, state, said), indices in found.items():
        batches = ", ".join(str(report.rows[i].batch) for i in indices)
        who = f"{name + ' ' if several else ''}{backend} {precision} batch {batches}"
        lines.append((indices, who, said if state == "ok" else f"{state}: {said}"))
    return lines


def reference_line(report: Report) -> str:
    """What speed-ups and drops are over."""
    parts = [str(report.reference[k]) for k in ("name", "backend", "precision", "layout") if report.reference.get(k)]
    if not parts:
        return "none: no row here can be one, so there are no speed-ups"
    return " ".join(parts) + ", at the same batch"


def samples_lines(report: Report) -> list[str]:
    """One line for each share of the data: what it was, how many, for what; random data is called random."""
    lines = []
    for role, said in report.samples.items():
        kind = "RANDOM data, no accuracy can be read from it" if said.get("random") else str(said.get("data", "?"))
        labels = "" if said.get("random") else (", labelled" if said.get("labelled") else ", without labels")
        lines.append(f"{role}: {said.get('n', '?')} of {kind}{labels}")
    return lines


_MACHINE_WORDS = ("cpu", "processor", "cores", "threads", "memory", "memory_bytes", "gpu", "driver", "os", "platform")


def machine_line(environment: Mapping[str, Any]) -> str:
    """The machine in one line."""
    said = []
    for key in _MACHINE_WORDS:
        value = environment.get(key)
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            value = value.get("name") or value.get("model") or value.get("brand") or ", ".join(f"{v}" for v in value.values())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if key == "memory_bytes" and isinstance(value, int):
            said.append(f"{value / 2**30:.0f} GiB")
        elif key in ("cores", "threads"):
            said.append(f"{value} {key}")
        else:
            said.append(str(value))
    if not said:
        said = [f"{k} {v}" for k, v in environment.items() if isinstance(v, (str, int, float)) and not isinstance(v, bool)]
    return ", ".join(said) or "not recorded"


def reused(report: Report) -> list[Row]:
    """The rows whose figures were measured by an earlier run."""
    return [r for r in report.rows if _REUSED.search(r.notes)]


def footer(report: Report) -> list[tuple[str, str]]:
    """(label, text) for the lines under the table."""
    lines = [("reference", reference_line(report))]
    best = report.best()
    if best is not None:
        lines.append(("best", f"{best.label}: the fastest row shown to keep the accuracy (at least 99 % of the reference's)"))
    elif any(r.status == "ok" for r in report.rows):
        lines.append(("best", "none is marked: no row was shown to keep the accuracy"))
    lines += [("samples", line) for line in samples_lines(report)]
    lines.append(("machine", machine_line(report.environment)))
    if report.measured_at:
        lines.append(("measured", report.measured_at))
    old = reused(report)
    if old:
        dates = sorted({m[1] for r in old if (m := _REUSED.search(r.notes))})
        lines.append(("reused", f"{len(old)} of {len(report.rows)} rows, from {', '.join(dates)}"))
    if any(r.stable is False for r in report.rows):
        lines.append(("UNSTABLE", "window medians vary by more than 2.5 %: close other programs and measure again"))
    lines += [("note", note) for note in report.notes]
    return lines


def verdict_lines(report: Report) -> list[str]:
    """The gate's outcome and one sentence for each comparison that did not pass; empty without a verdict."""
    if report.verdict is None:
        return []
    reasons = report.verdict.reasons
    passed = sum(r.outcome == "pass" for r in reasons)
    lines = [f"{report.verdict.outcome.upper()}: {passed} of {len(reasons)} comparisons passed"]
    lines += [f"{r.outcome}: {r.row}, {r.check}: {r.message}" for r in reasons if r.outcome != "pass"]
    return lines
