"""Two reports side by side (`deploykit report --compare A B`): figures, no verdict; what makes them unlike comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.report_document import Report
from deploykit.row import Row
from deploykit.stages.report import cells
from deploykit.stages.report.markdown import escape

if TYPE_CHECKING:
    from rich.console import Group

HEADINGS = ("Row", "Speed-up A", "Speed-up B", "B/A", "Drop pp A", "Drop pp B", "Status")


def unlike(a: Report, b: Report) -> list[str]:
    """What differs between the two runs besides their figures, a sentence each."""
    said = []
    if a.model.get("sha256") != b.model.get("sha256") or a.model.get("digest") != b.model.get("digest"):
        said.append("they are of different models")
    mine, theirs = (r.environment.get("fingerprint") or dict(r.environment) for r in (a, b))
    if mine != theirs:
        said.append(f"machine A: {cells.machine_line(a.environment)}; machine B: {cells.machine_line(b.environment)}")
    for name in sorted(set(a.versions) | set(b.versions)):
        if a.versions.get(name) != b.versions.get(name):
            said.append(f"{name}: {a.versions.get(name, 'not there')} in A, {b.versions.get(name, 'not there')} in B")
    if dict(a.reference) != dict(b.reference):
        said.append(f"reference A: {cells.reference_line(a)}; reference B: {cells.reference_line(b)}")
    if a.samples.get("judge", {}).get("digest") != b.samples.get("judge", {}).get("digest"):
        said.append("they were judged on different samples")
    return said


def lines(a: Report, b: Report) -> list[list[str]]:
    """The cells of the table under HEADINGS, for every row of either report but the A/A copies of the reference."""
    mine, theirs = (
        {(r.name, r.backend, r.precision, r.batch, _target(r)): r for r in report.rows if not r.is_copy} for report in (a, b)
    )
    table = []
    for key in dict.fromkeys([*mine, *theirs]):
        one, other = mine.get(key), theirs.get(key)
        shown = one or other
        assert shown is not None
        ratio = ""
        if one and other and one.speedup and other.speedup:
            ratio = f"{other.speedup / one.speedup:.3f}"
        state = [r.status if r else "missing" for r in (one, other)]
        table.append(
            [
                shown.label,
                cells.speedup(one) if one else "",
                cells.speedup(other) if other else "",
                ratio,
                cells.drop(one) if one else "",
                cells.drop(other) if other else "",
                state[0] if state[0] == state[1] else f"{state[0]} -> {state[1]}",
            ]
        )
    return table


def _target(row: Row) -> str:
    return row.device if row.device and row.device.startswith("sm") else ""


def markdown(a: Report, b: Report) -> str:
    """The comparison as GitHub Markdown."""
    text = [f"- {escape(said)}" for said in unlike(a, b)]
    text += ["", "| " + " | ".join(HEADINGS) + " |", "|---|--:|--:|--:|--:|--:|---|"]
    text += ["| " + " | ".join(escape(c) for c in line) + " |" for line in lines(a, b)]
    return "\n".join(text) + "\n"


def renderable(a: Report, b: Report) -> Group:
    """The comparison for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("Row", "Status") else "right", overflow="fold")
    for line in lines(a, b):
        changed = "->" in line[-1]
        table.add_row(*(Text(c.replace(" (", "\n").rstrip(")")) for c in line), style="bold red" if changed else "")
    return Group(*(Text.assemble(("unlike: ", "bold yellow"), said) for said in unlike(a, b)), table)


def text(a: Report, b: Report, width: int = 100) -> str:
    """The terminal's form as plain text of that width."""
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(renderable(a, b))
    return out.getvalue()
