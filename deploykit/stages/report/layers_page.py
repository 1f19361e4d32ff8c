"""Where the accuracy was lost, as one self-contained page: a plot along the graph, and the table of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from deploykit.stages.report.page_style import STYLE

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 300, 56, 16, 12, 40
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_HIGHEST_DB = 60.0


def text(comparison: Mapping[str, Any], lines: Sequence[str]) -> str:
    """The page of a comparison's JSON document; `lines` say the whole of it. Every text of the user's is escaped."""
    title = escape(f"{comparison['candidate']} against {comparison['reference']}, layer by layer")
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
    )
    said = "".join(f"<li>{escape(line)}</li>" for line in [*lines, *comparison["layer_notes"]])
    rows = comparison["layers"]
    body = (
        f"<header><p class='kind'>deploykit compare</p><h1>{title}</h1></header><ul class='findings'>{said}</ul>"
        f"<section><h2>SQNR along the graph</h2><figure><div class='scroll'>{plot(rows)}</div><figcaption>Line: the result of each "
        "layer, with the error of all before it. Dots: the model's output with that layer alone quantized. Higher is better."
        f"</figcaption></figure></section><section><h2>Layers, the worst first</h2>{table(rows)}</section>"
    )
    return f"{head}<body><main>{body}</main></body></html>\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG: SQNR in dB over the layers' places in the graph, of their results (line) and of each alone (dots)."""
    ordered = sorted(rows, key=lambda row: int(row["position"]))
    known = [float(v) for row in ordered for v in (row["sqnr_db"], row["own_sqnr_db"]) if v is not None]
    if not known:
        return ""
    low = min(0.0, *known)
    high = max(20.0, min(_HIGHEST_DB, max(known)))

    def x(place: int) -> float:
        return _LEFT + (place + 0.5) * (_WIDTH - _LEFT - _RIGHT) / len(ordered)

    def y(db: float) -> float:
        return _HEIGHT - _BOTTOM - (min(db, high) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for db in range(int(low // 10) * 10, int(high) + 1, 10):
        if low <= db <= high:
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(db):.1f}" y2="{y(db):.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y(db) + 4:.1f}" text-anchor="end">{db} dB</text>')
    points = " ".join(
        f"{x(i):.1f},{y(_HIGHEST_DB if row['sqnr_db'] is None else row['sqnr_db']):.1f}"
        for i, row in enumerate(ordered)
        if row["sqnr_db"] is not None or row["identical"]
    )
    parts.append(f'<polyline class="front" points="{points}"/>')
    for i, row in enumerate(ordered):
        why = "; ".join(reason["text"] for reason in row["reasons"])
        for key, colour, radius in (("sqnr_db", "c0", 3), ("own_sqnr_db", "c1", 5)):
            if row[key] is not None:
                said = escape(f"{row['layer']} ({row['op']}): {key} {row[key]:.1f}. {why}")
                dot = f'<circle class="dot {colour}" cx="{x(i):.1f}" cy="{y(row[key]):.1f}" r="{radius}">'
                parts.append(f"{dot}<title>{said}</title></circle>")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">layers in graph order, input to output</text>')
    head = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="SQNR along the graph" xmlns="http://www.w3.org/2000/svg">'
    )
    return head + "".join(parts) + "</svg>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """HTML: the layers in the order given, with their figures in dB and the reasons."""
    heads = ("layer", "operator", "SQNR, dB", "alone, dB", "weights, dB", "input, dB", "why")
    body = []
    for row in rows:
        figures = [row[key] for key in ("sqnr_db", "own_sqnr_db", "weights_sqnr_db", "input_sqnr_db")]
        cells = [f"<td class='fig'>{'' if v is None else f'{v:.1f}'}</td>" for v in figures]
        why = escape("; ".join(reason["text"] for reason in row["reasons"]))
        body.append(f"<tr><td>{escape(row['layer'])}</td><td>{escape(row['op'])}</td>{''.join(cells)}<td>{why}</td></tr>")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
