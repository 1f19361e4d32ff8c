"""The report as one self-contained page: no script, nothing from the network, light and dark, printable."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from deploykit.report_document import Report
from deploykit.stages.report import cells, layers_page, plots, roofline_plot
from deploykit.stages.report.page_style import STYLE

# The page asks for nothing but itself, and the browser holds it to that.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(report: Report) -> str:
    """The page: verdict, best row, table, trade-off and latency plots, what the rows say, accuracy, findings, machine,
    and the command that makes it again. Every text of the user's is escaped."""
    title = escape(cells.title(report))
    body = [
        f"<header><p class='kind'>deploykit report</p><h1>{title}</h1>{_measured(report)}</header>",
        _verdict(report),
        _headline(report),
        _section("Measurements", _table(report) + _footer(report)),
        _section("Speed and accuracy", _figure(report, plots.trade_off(report), _TRADE_OFF)),
        _section("Latency distributions", _figure(report, plots.latencies(report), _LATENCIES)),
        _section("Roofline", _roofline(report)),
        _section("What the rows say", _remarks(report)),
        _section("Why INT8 is not faster", _explanations(report)),
        _section("Accuracy in detail", _drifts(report)),
        _section("Layer by layer", _layer_drifts(report)),
        _section("Findings in the graph", _findings(report)),
        _section("Data", _records(report.samples)),
        _section("Model", _facts(report.model)),
        _section("Machine", _facts(report.environment)),
        _section("Versions", _facts(report.versions)),
        _section("Run it again", _command(report)),
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title} - deploykit report</title><style>{STYLE}</style></head>"
    )
    return f"{head}<body><main>{''.join(body)}</main></body></html>\n"


_TRADE_OFF = (
    "Up and to the right is better. The line is the Pareto front: no row is both faster and more accurate. Bars: 95 % intervals."
)
_LATENCIES = (
    "Every timed run of each row; tall, middle and short marks: p50, p90, p99 (left out where the runs cannot support them)."
)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _measured(report: Report) -> str:
    return f"<p class='when'>measured {escape(report.measured_at)}</p>" if report.measured_at else ""


def _verdict(report: Report) -> str:
    if report.verdict is None:
        return ""
    first, *others = cells.verdict_lines(report)
    listed = "".join(f"<li>{escape(line)}</li>" for line in others)
    skipped = "".join(f"<li>{escape(line)}</li>" for line in report.verdict.skipped)
    more = (
        f"<details><summary>{len(report.verdict.skipped)} not compared</summary><ul>{skipped}</ul></details>" if skipped else ""
    )
    outcome = escape(report.verdict.outcome)
    return f"<div class='verdict {outcome}'><strong>{escape(first)}</strong><ul>{listed}</ul>{more}</div>"


def _headline(report: Report) -> str:
    best = report.best()
    if best is None or report.is_reference(best):
        return ""
    facts = [
        (cells.number(best.images_per_s), "images per second"),
        (cells.milliseconds(best.p50_s), "ms, median"),
        (f"{cells.number(best.speedup)}x" if best.speedup else "", "the reference's throughput"),
        (cells.drop(best), "pp of top-1 lost (95 %)"),
        (cells.percent(best.agreement) if best.top1 is None else "", "same top-1 as the reference"),
    ]
    tiles = "".join(f"<li><b>{escape(value)}</b><span>{said}</span></li>" for value, said in facts if value)
    return f"<div class='headline'><p>Fastest that keeps the accuracy: <strong>{escape(best.label)}</strong></p><ul>{tiles}</ul></div>"


def _table(report: Report) -> str:
    columns = cells.columns(report)
    best = report.best()
    remarks = {i: n for n, (indices, _, _) in enumerate(cells.remarks(report), start=1) for i in indices}
    head = "".join(f"<th scope='col' class='{'fig' if c.figure else ''}'>{escape(c.heading)}</th>" for c in columns)
    lines = []
    for i, row in enumerate(report.rows):
        found = []
        for column in columns:
            said = escape(cells.cell(report, row, column.key))
            if column.key in ("speedup", "drop") and " " in said:
                value, _, interval = said.partition(" ")
                said = f"{value} <small>{interval}</small>"
            said = (
                said.replace(cells.UNSTABLE, f"<span class='unstable'>{cells.UNSTABLE}</span>") if column.key == "rate" else said
            )
            if column.key == "status":
                note = f" <a href='#note{remarks[i]}'>[{remarks[i]}]</a>" if i in remarks else ""
                said = f"<span class='state {escape(row.status)}'>{said}</span>{note}"
            found.append(f"<td class='{'fig' if column.figure else ''}'>{said}</td>")
        first = i == 0 or report.rows[i - 1].batch != row.batch
        marks = " ".join(x for x in ("best" if row is best else "", row.status, "first" if first else "") if x)
        lines.append(f"<tr class='{escape(marks)}'>{''.join(found)}</tr>")
    if not lines:
        return "<p>The report has no rows.</p>"
    return f"<div class='scroll' tabindex='0'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _footer(report: Report) -> str:
    return _definitions([(k, v) for k, v in cells.footer(report) if k not in ("machine", "measured")])


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs) + "</dl>" if pairs else ""


def _figure(report: Report, svg: str, caption: str) -> str:
    if not svg:
        return ""
    keys = "".join(
        f"<span class='key'><svg viewBox='0 0 12 12' aria-hidden='true'><circle class='dot c{i % plots.COLOURS}' cx='6' cy='6' r='5'/>"
        f"</svg>{escape(name)}</span>"
        for i, name in enumerate(plots.backends(report))
    )
    return f"<figure><div class='scroll' tabindex='0'>{svg}</div><figcaption><p class='keys'>{keys}</p>{caption}</figcaption></figure>"


_ROOFLINE = (
    "Dashed: what this machine can do at most, measured. Under the slope a row is held up by memory, under the flat by compute; "
    "far below both, by neither: calls, layers that do not multiply, kernels below the ceiling."
)


def _roofline(report: Report) -> str:
    figure = _figure(report, roofline_plot.svg(report), _ROOFLINE)
    found = roofline_plot.items(roofline_plot.words(report))
    notes = "".join(f"<li>{escape(line)}</li>" for line in roofline_plot.footnotes(report)) if found else ""
    return f"{figure}{found}" + (f"<details><summary>The ceilings</summary><ul>{notes}</ul></details>" if notes else "")


def _remarks(report: Report) -> str:
    lines = [
        f"<li id='note{n}'><strong>{escape(who)}</strong>: {escape(said)}</li>"
        for n, (_, who, said) in enumerate(cells.remarks(report), start=1)
    ]
    return f"<ol>{''.join(lines)}</ol>" if lines else ""


def _explanations(report: Report) -> str:
    """Of each INT8 engine the verdict of its runtime's own profile, and what costs most."""
    parts = []
    for name, found in report.explanations.items():
        lines = []
        for finding in (f for f in _listed(found.get("findings")) if isinstance(f, Mapping)):
            share = finding.get("share")
            cost = f" <b>{share:.0%} of the time</b>" if isinstance(share, float) else ""
            lines.append(f"<li>{escape(str(finding.get('text')))}{cost} <em>{escape(str(finding.get('remedy')))}</em></li>")
        listed = f"<ul class='findings'>{''.join(lines)}</ul>" if lines else ""
        at = f" (profile at batch {found['batch']})" if found.get("batch") else ""
        parts.append(f"<p><strong>{escape(name)}</strong>{escape(at)}: {escape(str(found.get('verdict')))}</p>{listed}")
    return "".join(parts)


def _findings(report: Report) -> str:
    lines = []
    for finding in report.findings:
        where = f" <code>{escape(finding.node)}</code>" if finding.node else ""
        who = "" if finding.target == "any" else f" ({escape(finding.target)})"
        kind = escape(finding.severity)
        lines.append(
            f"<li class='{kind}'><b>{escape(finding.code)}</b> {kind}{who}{where}: {escape(finding.message)}"
            f" <em>{escape(finding.remedy)}</em></li>"
        )
    return f"<ul class='findings'>{''.join(lines)}</ul>" if lines else ""


_DRIFT = {
    "n": "samples",
    "mcnemar_p": "McNemar p",
    "smallest_visible_drop_pp": "smallest drop they show, pp",
    "kl": "KL, nats",
    "cosine": "cosine",
    "max_abs": "max abs error",
    "sqnr_db": "SQNR, dB",
}


def _drifts(report: Report) -> str:
    shown = [k for k in _DRIFT if any(d.get(k) is not None for d in report.drifts.values())]
    if not shown:
        return ""
    head = "".join(f"<th scope='col' class='fig'>{escape(_DRIFT[k])}</th>" for k in shown)
    lines: dict[str, None] = {}  # the rows of one engine at several batches have one drift
    for key, drift in report.drifts.items():
        name, backend, precision = [*key.split("|"), "", "", ""][:3]
        found = "".join(f"<td class='fig'>{_short(drift.get(k))}</td>" for k in shown)
        lines[f"<tr><td>{escape(name)} {escape(backend)} {escape(precision)}</td>{found}</tr>"] = None
    table = f"<table><thead><tr><th scope='col'>Engine</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


_WORST = 10  # layers shown of each graph; report.json holds all


def _layer_drifts(report: Report) -> str:
    """Of each quantized graph: SQNR along it, and its worst layers."""
    parts = []
    for name, found in report.layer_drifts.items():
        rows = found.get("layers") or []
        made = ", ".join(str(row) for row in _listed(found.get("rows")))
        said = f"<h3>{escape(name)}</h3>" + (f"<p>read by {escape(made)}; {_short(found.get('n'))} samples</p>" if made else "")
        if rows:
            caption = (
                "SQNR of each layer's result against the float graph, with the error of all layers before it. Higher is better."
            )
            said += f"<figure><div class='scroll' tabindex='0'>{layers_page.plot(rows)}</div><figcaption>{caption}</figcaption></figure>"
            worst = f"The {min(_WORST, len(rows))} worst of {len(rows)} layers"
            said += f"<details><summary>{worst}</summary>{layers_page.table(rows[:_WORST])}</details>"
        notes = "".join(f"<li>{escape(str(note))}</li>" for note in _listed(found.get("notes")))
        parts.append(said + (f"<ul class='findings'>{notes}</ul>" if notes else ""))
    return "".join(parts)


def _listed(value: Any) -> Sequence[Any]:
    """The value where it is a list: a report edited by hand may hold anything there."""
    return value if isinstance(value, (list, tuple)) else ()


def _short(value: Any) -> str:
    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _records(found: Mapping[str, Mapping[str, Any]]) -> str:
    return "".join(f"<h3>{escape(name)}</h3>{_facts(record)}" for name, record in found.items())


_MAX_FACT = 2000


def _facts(found: Mapping[str, Any]) -> str:
    """A definition list; what is nested stands folded, as JSON."""
    plain, nested = [], []
    for key, value in found.items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping) or (
            isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list)) for v in value)
        ):
            said = json.dumps(value, indent=1, default=str, ensure_ascii=False)
            cut = "\n... (whole in report.json)" if len(said) > _MAX_FACT else ""
            nested.append(f"<details><summary>{escape(str(key))}</summary><pre>{escape(said[:_MAX_FACT])}{cut}</pre></details>")
        else:
            said = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            if key.endswith("_bytes") and isinstance(value, int):
                said = cells.size(value)
            plain.append((str(key), said[:_MAX_FACT]))
    return _definitions(plain) + "".join(nested)


def _command(report: Report) -> str:
    return f"<pre><code>{escape(shlex.join(report.command))}</code></pre>" if report.command else ""
