"""The page's figures as inline SVG: throughput against accuracy with the Pareto front, and latency distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from deploykit.report_document import Report, row_id
from deploykit.row import Row
from deploykit.stages.report import cells

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 14, 44
COLOURS = 8
_BINS = 90
_LABEL_WIDTH, _LANE = 236, 30


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: more of the first, less of the second, by rising first figure."""
    front: list[int] = []
    least = math.inf
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        if points[i][1] < least:
            front.append(i)
            least = points[i][1]
    return front[::-1]


def backends(report: Report) -> list[str]:
    """The measured backends in order; their position is their colour."""
    return list(dict.fromkeys(r.backend for r in report.rows if r.status == "ok"))


def trade_off(report: Report) -> str:
    """SVG: throughput to the right; down the accuracy lost (percentage points of top-1, else samples that disagree, else
    the median latency). Empty with fewer than two measured rows."""
    rows = [r for r in report.rows if r.status == "ok" and r.images_per_s]
    kinds: list[tuple[str, Callable[[Row], float | None], bool]] = [
        ("top-1 lost against the reference, percentage points", lambda r: _lost(report, r), False),
        ("samples with another top-1 than the reference, %", _disagreeing, False),
        ("p50 latency, ms", lambda r: r.p50_s * 1e3 if r.p50_s else None, True),
    ]
    for heading, figure, logarithmic in kinds:
        known = [(r, y) for r in rows if (y := figure(r)) is not None]
        if len(known) >= 2 and any(not report.is_reference(r) for r, _ in known):
            return _scatter(report, known, heading, logarithmic)
    return ""


def _lost(report: Report, row: Row) -> float | None:
    return 0.0 if report.is_reference(row) and row.top1 is not None else row.top1_drop_pp


def _disagreeing(row: Row) -> float | None:
    return None if row.agreement is None else 100 * (1 - row.agreement)


def _scatter(report: Report, known: Sequence[tuple[Row, float]], heading: str, logarithmic: bool) -> str:
    xs = [r.images_per_s or 0.0 for r, _ in known]
    ys = [y for _, y in known]
    x, x_ticks = log_axis(xs, LEFT, WIDTH - RIGHT)
    # better is up: less lost, less latency
    y, y_ticks = log_axis(ys, HEIGHT - BOTTOM, TOP, flip=True) if logarithmic else _loss_axis(ys)
    parts = [grid(x, x_ticks, y, y_ticks, "img/s", heading)]
    front = pareto_front(list(zip(xs, ys, strict=True)))
    line = " ".join(f"{x(xs[i]):.1f},{y(ys[i]):.1f}" for i in front)
    parts.append(f'<polyline class="front" points="{line}"/>')
    colours = {name: i % COLOURS for i, name in enumerate(backends(report))}
    for i, (row, value) in enumerate(known):
        px, py = x(xs[i]), y(value)
        if not logarithmic and row.top1_drop_low is not None and row.top1_drop_high is not None:
            ends = [min(max(y(v), TOP), HEIGHT - BOTTOM) for v in (row.top1_drop_low, row.top1_drop_high)]
            parts.append(
                f'<line class="bar c{colours[row.backend]}" x1="{px:.1f}" x2="{px:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
        said = f"{row.label}: {cells.number(row.images_per_s)} img/s, {heading}: {value:.3g}"
        dot = f'<circle class="dot c{colours[row.backend]}" cx="{px:.1f}" cy="{py:.1f}" r="{6 if i in front else 4}">'
        parts.append(f"{dot}<title>{escape(said)}</title></circle>")
    taken: list[tuple[float, float]] = []
    for i in sorted(front, key=lambda i: -xs[i]):
        row, px, py = known[i][0], x(xs[i]), y(ys[i])
        spot = next((at for at in (py - 11, py + 20, py - 25, py + 34) if _free(taken, px, at)), None)
        if spot is None or not TOP <= spot <= HEIGHT - BOTTOM:
            continue
        taken.append((px, spot))
        anchor = "end" if px > WIDTH * 0.7 else "start" if px < WIDTH * 0.25 else "middle"
        parts.append(f'<text x="{px:.1f}" y="{spot:.1f}" text-anchor="{anchor}">{escape(_short(row))}</text>')
    return svg(WIDTH, HEIGHT, parts, f"Throughput against {heading}")


def _free(taken: Iterable[tuple[float, float]], x: float, y: float) -> bool:
    return all(abs(x - a) > 150 or abs(y - b) > 13 for a, b in taken)


def _short(row: Row) -> str:
    return f"{row.backend} {row.precision}, batch {row.batch}"


Scale = Callable[[float], float]
Ticks = list[tuple[float, str]]


def log_axis(values: Sequence[float], start: float, end: float, *, flip: bool = False) -> tuple[Scale, Ticks]:
    """A logarithmic scale over the values, with a little room, and its ticks; `flip`: the least at the end."""
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08
    if flip:
        start, end = end, start

    def scale(value: float) -> float:
        return start + (math.log10(value) - low) / (high - low) * (end - start)

    steps = (1, 2, 5) if high - low < 3 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    ticks = [s * 10.0**e for e in exponents for s in steps if low <= math.log10(s * 10.0**e) <= high]
    if len(ticks) < 2:
        ticks = [10**low, 10 ** ((low + high) / 2), 10**high]
    return scale, [(t, f"{t:.3g}" if t < 1000 else f"{t:,.0f}") for t in ticks]


def _loss_axis(values: Sequence[float]) -> tuple[Scale, Ticks]:
    """Linear within half a point, logarithmic beyond: a row that lost everything must not squeeze the others."""

    def bent(value: float) -> float:
        return math.copysign(math.log1p(abs(value) / 0.5), value)

    low, high = bent(min(0.0, *values)) - 0.45, bent(max(0.0, *values)) + 0.45

    def scale(value: float) -> float:
        return TOP + (bent(value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    marks = (-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100)
    return scale, [(m, f"{m:g}") for m in marks if low <= bent(m) <= high]


def grid(x: Scale, x_ticks: Ticks, y: Scale, y_ticks: Ticks, below: str, beside: str) -> str:
    """Grid lines, tick labels and the names of both axes."""
    parts = []
    for value, said in x_ticks:
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{said}</text>')
    for value, said in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{said}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{below}</text>')
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{escape(beside)}</text>')
    return "".join(parts)


def latencies(report: Report) -> str:
    """SVG: a lane for each measured row with the distribution of its runs (from the raw seconds) and marks at p50, p90 and
    p99; without raw seconds the marks alone. Empty when nothing was measured."""
    rows = [r for r in report.rows if r.status == "ok" and r.p50_s]  # a time of zero has no place on a logarithmic axis
    if not rows:
        return ""
    raw = [_seconds(report, r) for r in rows]
    marks = [[v * 1e3 for v in (r.p50_s, r.p90_s, r.p99_s) if v] for r in rows]
    ends = [v for m in marks for v in m] + [float(v) for s in raw if s.size for v in np.quantile(s, [0.001, 0.999])]
    scale, ticks = log_axis(ends, _LABEL_WIDTH, WIDTH - RIGHT)
    height = TOP + _LANE * len(rows) + BOTTOM
    parts = []
    for value, said in ticks:
        at = f"{scale(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{height - BOTTOM + 16}" text-anchor="middle">{said}</text>')
    parts.append(f'<text x="{(_LABEL_WIDTH + WIDTH) / 2}" y="{height - 8}" text-anchor="middle">ms a run, logarithmic</text>')
    colours = {name: i % COLOURS for i, name in enumerate(backends(report))}
    for i, row in enumerate(rows):
        base = TOP + _LANE * (i + 1) - 5
        said = f"{row.label}: p50 {cells.milliseconds(row.p50_s)} ms, p90 {cells.milliseconds(row.p90_s) or 'not supported'}"
        shape = _shape(raw[i], scale, base)
        middle = f'<line class="lane" x1="{_LABEL_WIDTH}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
        area = f'<path class="area c{colours[row.backend]}" d="{shape}"/>' if shape else ""
        ticks_here = "".join(
            f'<line class="mark" x1="{scale(v):.1f}" x2="{scale(v):.1f}" y1="{base - h}" y2="{base + 2}"/>'
            for v, h in zip(marks[i], (20, 13, 7), strict=False)
        )
        label = f'<text x="{_LABEL_WIDTH - 8}" y="{base - 4}" text-anchor="end">{escape(_short(row))}</text>'
        parts.append(f"<g><title>{escape(said)}</title>{middle}{area}{ticks_here}{label}</g>")
    return svg(WIDTH, height, parts, "Latency distributions")


def _seconds(report: Report, row: Row) -> NDArray[np.float64]:
    """Milliseconds of every run of the row; empty where the report has no raw seconds."""
    launches = report.measurements.get(row_id(row), {}).get("launches") or []
    try:
        windows = [np.asarray(w["seconds"], dtype=np.float64) for launch in launches for w in launch]
    except (KeyError, TypeError, ValueError):
        return np.empty(0)
    found = np.concatenate(windows) * 1e3 if windows else np.empty(0)
    return found[np.isfinite(found) & (found > 0)]


def _shape(values: NDArray[np.float64], scale: Scale, base: float) -> str:
    """The outline of the histogram over the scale, 20 units high at its peak."""
    if values.size < 8:
        return ""
    low, high = np.quantile(values, [0.001, 0.999])
    if not low < high:
        return ""
    counts, edges = np.histogram(np.log10(values), bins=_BINS, range=(math.log10(low), math.log10(high)))
    tops = base - 20 * counts / counts.max()
    points = []
    for count_top, left, right in zip(tops, edges[:-1], edges[1:], strict=True):
        points += [f"L{scale(10**left):.1f} {count_top:.1f}", f"L{scale(10**right):.1f} {count_top:.1f}"]
    start, end = scale(float(10 ** edges[0])), scale(float(10 ** edges[-1]))
    return f"M{start:.1f} {base} {' '.join(points)} L{end:.1f} {base}Z"


def svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    """The figure around its parts."""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    return head + "".join(parts) + "</svg>"
