"""The roofline of a report: its rows under the ceilings measured on that machine, as inline SVG and in words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deploykit import roofline
from deploykit.report_document import Report
from deploykit.roofline import Ceilings, Cost
from deploykit.row import Row
from deploykit.stages.report import cells, plots

_TOP_ROOM = 1.7
_OPEN_LINES = 12


def ceilings(report: Report) -> Ceilings | None:
    """The ceilings that the report was made under; None where it has none, or none that can be read."""
    try:
        return Ceilings.from_json(report.environment["ceilings"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _cost(report: Report) -> Cost | None:
    summary = report.model.get("summary")
    return Cost.from_summary(summary) if isinstance(summary, dict) else None


def _placed(report: Report) -> list[Row]:
    own = report.model.get("name")
    return [r for r in report.rows if r.roofline_share is not None and r.images_per_s and r.name.split(" (")[0] == own]


def words(report: Report) -> list[tuple[str, str]]:
    """(row, where it stands under the roofline) for every measured row."""
    found, cost = ceilings(report), _cost(report)
    if found is None or cost is None:
        return []
    lines = []
    for row in _placed(report):
        place = roofline.place(cost, row.precision, row.batch, row.batch / (row.images_per_s or 1.0), found)
        if place is not None:
            lines.append((f"{row.backend} {row.precision} batch {row.batch}", place.words))
    return lines


def footnotes(report: Report) -> list[str]:
    """What the ceilings are and how each was found."""
    found = ceilings(report)
    if found is None:
        return []
    lines = [f"{found.name}, {found.source}"]
    for precision, rate in found.ops_per_s.items():
        lines.append(f"{precision}: {cells.number(rate / 1e9)} Gop/s ({found.how.get(precision, '')})")
    sizes = [f"{cells.number(rate / 1e9)} GB/s at {cells.size(size)}" for size, rate in sorted(found.bytes_per_s.items())]
    return [*lines, "memory: " + ", ".join(sizes)]


def svg(report: Report) -> str:
    """SVG, both axes logarithmic: operations a byte to the right, operations a second up; a line for each ceiling, a dot for
    each row. Empty where the report has no ceilings, or no row under them."""
    found, cost = ceilings(report), _cost(report)
    rows = _placed(report)
    if found is None or cost is None or not rows or not found.ops_per_s:
        return ""
    dots = [(row, *_dot(cost, row)) for row in rows]
    peaks = {
        p: rate for p, rate in found.ops_per_s.items() if p in {roofline.COMPUTES_IN.get(r.precision, r.precision) for r in rows}
    }
    memory = found.bytes_per_s[max(found.bytes_per_s)]
    ridges = [peak / memory for peak in peaks.values()]
    x, x_ticks = plots.log_axis([*(i for _, i, _ in dots), *ridges], plots.LEFT, plots.WIDTH - plots.RIGHT)
    low = min([rate for _, _, rate in dots] + [memory * min(i for _, i, _ in dots)])
    y_ends = [low / 1e9, max([*peaks.values(), *(rate for _, _, rate in dots)]) * _TOP_ROOM / 1e9]
    y, y_ticks = plots.log_axis(y_ends, plots.HEIGHT - plots.BOTTOM, plots.TOP)
    parts = [plots.grid(x, x_ticks, y, y_ticks, "operations a byte", "Gop/s")]
    left, right = plots.LEFT, plots.WIDTH - plots.RIGHT
    start = 10 ** _inverse(x, left)
    said_at: list[float] = []
    for precision, peak in sorted(peaks.items(), key=lambda item: -item[1]):
        ridge = peak / memory
        foot = max(start, low / memory)
        ends = [(x(max(foot, start)), y(memory * max(foot, start) / 1e9))] if foot < ridge else []
        ends += [(max(x(ridge), left), y(peak / 1e9)), (right, y(peak / 1e9))]
        parts.append('<polyline class="front" points="' + " ".join(f"{a:.1f},{b:.1f}" for a, b in ends) + '"/>')
        said = f"{precision} {cells.number(peak / 1e9)} Gop/s"
        beside = right - 4 - 150 * sum(abs(y(peak / 1e9) - other) < 14 for other in said_at)
        said_at.append(y(peak / 1e9))
        parts.append(f'<text x="{beside}" y="{y(peak / 1e9) - 5:.1f}" text-anchor="end">{escape(said)}</text>')
    colours = {name: i % plots.COLOURS for i, name in enumerate(plots.backends(report))}
    for row, intensity, rate in dots:
        said = f"{row.label}: {cells.number(rate / 1e9)} Gop/s, {row.roofline_share or 0:.0%} of its ceiling, {row.bound_by}"
        at = f'cx="{x(intensity):.1f}" cy="{y(rate / 1e9):.1f}"'
        parts.append(f'<circle class="dot c{colours[row.backend]}" {at} r="5"><title>{escape(said)}</title></circle>')
    return plots.svg(plots.WIDTH, plots.HEIGHT, parts, "Roofline")


def _dot(cost: Cost, row: Row) -> tuple[float, float]:
    """(operations a byte, operations a second) of a row: the bytes are those of the weights and of what the layers move."""
    moved = (cost.weights + cost.moved * row.batch) * roofline.VALUE_BYTES.get(row.precision, 4)
    return cost.operations(row.batch) / moved, 2 * cost.macs * (row.images_per_s or 0.0)


def _inverse(scale: plots.Scale, at: float) -> float:
    """log10 of the value that a logarithmic scale puts at a position."""
    one, ten = scale(1.0), scale(10.0)
    return (at - one) / (ten - one)


def items(lines: Sequence[tuple[str, str]]) -> str:
    """The words as an HTML list, folded where it is long."""
    if not lines:
        return ""
    found = "<ul>" + "".join(f"<li><strong>{escape(a)}</strong>: {escape(b)}</li>" for a, b in lines) + "</ul>"
    return found if len(lines) <= _OPEN_LINES else f"<details><summary>Row by row</summary>{found}</details>"
