"""The report as a rich table for a terminal of 80 columns or more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.report_document import Report
from deploykit.stages.report import cells

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

WIDE = 112
_STYLES = {"ok": "", "built": "cyan", "skipped": "dim", "failed": "red"}
_OUTCOMES = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}


def renderable(report: Report, width: int = 100) -> Group:
    """What the CLI prints: title, table, what the rows say, footer, verdict. Intervals stand under their
    figure. Below 112 columns precision stands under backend, the tail under p50, and the size is left out."""
    from rich.console import Group
    from rich.text import Text

    remarks = cells.remarks(report)
    numbers = {i: n for n, (indices, _, _) in enumerate(remarks, start=1) for i in indices}
    parts: list[Text | Table] = [Text(cells.title(report), style="bold")]
    parts.append(_table(report, numbers, wide=width >= WIDE))
    for n, (indices, who, said) in enumerate(remarks, start=1):
        style = _STYLES[report.rows[indices[0]].status]
        parts.append(Text.assemble((f"[{n}] {who}", style), f": {said}"))
    if remarks:
        parts.append(Text(""))
    for label, line in cells.footer(report):
        parts.append(Text.assemble((f"{label}: ", "bold"), line))
    for i, line in enumerate(cells.verdict_lines(report)):
        style = _OUTCOMES.get(report.verdict.outcome, "") if report.verdict and i == 0 else ""
        parts.append(Text.assemble(("gate: ", "bold"), (line, style)) if i == 0 else Text(f"  {line}"))
    return Group(*parts)


def text(report: Report, width: int = 100) -> str:
    """The same as plain text of that width."""
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(renderable(report, width))
    return out.getvalue()


def _table(report: Report, numbers: dict[int, int], *, wide: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = cells.columns(report)
    groups = [[c] for c in columns] if wide else _stacked(columns)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1 if wide else 0), collapse_padding=True)
    for group in groups:
        heading = "\n".join(c.heading for c in group)
        table.add_column(heading, justify="right" if group[0].figure else "left", overflow="fold", no_wrap=group[0].key == "size")
    best = report.best()
    for i, row in enumerate(report.rows):
        found = []
        for group in groups:
            said = "\n".join(x for x in (cells.cell(report, row, c.key) for c in group) if x)
            if group[-1].key == "status" and i in numbers:
                said += f" [{numbers[i]}]"
            if group[0].figure:
                said = said.replace(" ", "\n", 1).replace("(", "").replace(")", "")
            found.append(Text(said, style="bold red" if cells.UNSTABLE in said else ""))
        last_of_batch = i + 1 < len(report.rows) and report.rows[i + 1].batch != row.batch
        table.add_row(*found, style="bold green" if row is best else _STYLES[row.status], end_section=last_of_batch)
    return table


def _stacked(columns: list[cells.Column]) -> list[list[cells.Column]]:
    """The columns of the narrow table: those that share a column stand under each other."""
    under = {"precision": "backend", "p90": "p50", "p99": "p50", "threads": "batch", "roofline": "batch"}
    groups: list[list[cells.Column]] = []
    for column in columns:
        host = next((g for g in groups if g[0].key == under.get(column.key)), None)
        if host is not None:
            host.append(column)
        elif column.key != "size":
            groups.append([column])
    return groups
