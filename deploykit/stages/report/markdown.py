"""The report as GitHub Markdown that fits a pull-request comment."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

from deploykit.report_document import Report
from deploykit.stages.report import cells

# GitHub refuses a comment longer than 65,536 characters.
MAX_CHARS = 65_000
_MAX_REASON = 300
_EDGE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is no emphasis
_ISSUE = re.compile(r"(?<![&\w])#(?=\d)")


def text(report: Report, *, limit: int = MAX_CHARS) -> str:
    """Verdict, table, the reasons of the rows without figures, and the footer; at most `limit` characters.

    Rows that do not fit are left out from the end, and the text says how many and where they are.
    """
    whole = _text(report, report, 0)
    kept = len(report.rows)
    while len(whole) > limit and kept:
        kept = min(kept - 1, max(0, kept * limit // len(whole)))
        # columns and 'best' stay those of the whole report
        whole = _text(replace(report, rows=report.rows[:kept]), report, len(report.rows) - kept)
    return whole if len(whole) <= limit else whole[: limit - 4] + "...\n"


def _text(shown: Report, report: Report, left_out: int) -> str:
    lines = [f"### deploykit: {escape(cells.title(report))}", ""]
    for i, line in enumerate(cells.verdict_lines(report)):
        lines.append(f"**{escape(line)}**" if i == 0 else f"- {escape(line)}")
    if report.verdict is not None:
        lines.append("")
    lines += table(shown, report)
    if left_out:
        lines += ["", f"{left_out} more rows are in report.csv."]
    said = cells.remarks(shown)
    if said:
        lines += ["", "<details><summary>What the rows say</summary>", ""]
        lines += [f"- **{escape(who)}**: {escape(_cut(line))}" for _, who, line in said]
        lines += ["", "</details>"]
    lines.append("")
    lines += [f"- {escape(label)}: {escape(_cut(line))}" for label, line in cells.footer(report)]
    if report.command:
        lines += ["", "```sh", *_code(report.command), "```"]
    return "\n".join(lines) + "\n"


def table(shown: Report, report: Report) -> list[str]:
    """The lines of the table: the rows of `shown` with the columns of `report`."""
    chosen = cells.columns(report)
    lines = ["| " + " | ".join(c.heading for c in chosen) + " |"]
    lines.append("|" + "|".join("--:" if c.figure else "---" for c in chosen) + "|")
    best = report.best()
    for row in shown.rows:
        found = [escape(cells.cell(report, row, c.key)) for c in chosen]
        if row is best:
            found = [f"**{x}**" if x else x for x in found]
        lines.append("| " + " | ".join(found) + " |")
    return lines


def escape(text: str) -> str:
    """Text that Markdown shows as it is, inside a table cell too; it mentions nobody and no issue."""
    text = text.replace("&", "&amp;")
    for char in "\\`*[]|~":
        text = text.replace(char, "\\" + char)
    text = _EDGE.sub(r"\\_", text)
    text = _ISSUE.sub("&#35;", text.replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;"))
    return " ".join(text.split())


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 3] + "..."


def _code(command: tuple[str, ...]) -> list[str]:
    return shlex.join(command).replace("```", "'''").splitlines()
