"""What commands print: tables for a person, or one JSON document on standard output."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.report_document import Report


def width() -> int:
    """Columns to print in: the terminal's, or 120 where it is a file or a pipe."""
    return shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120


def show_json(doc: Any, target: str) -> None:
    """One JSON document, to standard output for '-', else to that file."""
    text = json.dumps(doc, indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    from deploykit.artifact import write_atomically

    write_atomically(Path(target), text.encode())


def show_report(report: Report, json_file: str | None, lines: list[str], *, seeds: bool = False) -> None:
    """The table and what follows it; with `--json -` the document alone."""
    if json_file is not None:
        show_json(report.to_json(), json_file)
        if json_file == "-":
            return
        lines = [*lines, f"wrote {json_file}"]
    from rich.console import Console

    from deploykit.stages.report import terminal

    console = Console(width=width())
    console.print(terminal.renderable(report, console.width))
    if seeds:
        from deploykit.stages.report import seeds_table

        console.print(seeds_table.renderable(report))
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def show_comparison(before: Report, after: Report) -> None:
    """Two runs beside each other."""
    from rich.console import Console

    from deploykit.stages.report import compare

    console = Console(width=width())
    console.print(compare.renderable(before, after))


def show_rows(title: str, header: list[str], rows: list[list[str]], *, wrap: tuple[int, ...] = ()) -> None:
    """A small table; the columns in `wrap` may fold."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, overflow="fold", ratio=1 if number in wrap else None, no_wrap=number not in wrap)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=width()).print(table)


def say(text: str) -> None:
    """One line on standard output."""
    print(text)
