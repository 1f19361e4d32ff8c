"""The article's table beside ours: its claims for a T4 as a labelled reference column, never as a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.report_document import Report
from deploykit.row import Row
from deploykit.stages.report import cells, t4_bounds
from deploykit.stages.report.markdown import escape

if TYPE_CHECKING:
    from rich.console import Group

SOURCE = (
    "claims of an article for ResNet-18, 224x224, on one NVIDIA Tesla T4, without method; batch 1 is inferred: "
    "latency x throughput is one image"
)
_FLOAT = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Claim:
    """One line of the article's table."""

    strategy: str
    images_per_s: float
    latency_ms: float
    speedup: float


CLAIMS = (
    Claim("original FP32 model", 320, 3.1, 1.00),
    Claim("TensorRT", 1200, 0.8, 3.75),
    Claim("INT8 quantized", 1800, 0.5, 5.63),
)


def beside(report: Report) -> list[tuple[Claim, Row | None, str]]:
    """(claim, our row at batch 1 or None, which row was looked for). FP32 stands beside PyTorch eager FP32; TensorRT
    beside the fastest engine in FP32, FP16 or BF16; INT8 beside the fastest INT8 engine."""
    ours: list[tuple[str, Callable[[Row], bool]]] = [
        ("PyTorch eager FP32", lambda r: (r.backend, r.precision) == ("torch", "fp32")),
        ("the fastest engine in floating point", lambda r: r.precision in _FLOAT and r.backend != "torch"),
        ("the fastest INT8 engine", lambda r: r.precision in ("int8", "mixed") and r.backend != "torch"),
    ]
    found = []
    for claim, (wanted, fits) in zip(CLAIMS, ours, strict=True):
        rows = [r for r in report.rows if r.status == "ok" and r.batch == 1 and r.images_per_s and fits(r) and not r.is_copy]
        found.append((claim, max(rows, key=lambda r: r.images_per_s or 0.0, default=None), wanted))
    return found


HEADINGS = (
    "Strategy",
    "claim img/s",
    "claim ms",
    "claim speed-up",
    "Here",
    "img/s",
    "p50 ms",
    "speed-up",
    "Top-1",
)


def lines(report: Report) -> list[list[str]]:
    """The cells of the table, row by row, under HEADINGS. With no labels the last column is agreement."""
    labelled = any(r.top1 is not None for r in report.rows)
    table = []
    for claim, row, wanted in beside(report):
        claimed = [claim.strategy, f"{claim.images_per_s:.0f}", f"{claim.latency_ms:.1f}", f"{claim.speedup:.2f}x"]
        if row is None:
            table.append([*claimed, f"no row here: {wanted}", "", "", "", ""])
            continue
        keys = ("rate", "p50", "speedup", "top1" if labelled else "agreement")
        table.append([*claimed, f"{row.backend} {row.precision}", *(cells.cell(report, row, k) for k in keys)])
    return table


def headings(report: Report) -> list[str]:
    """HEADINGS, the last one as the report has it."""
    return [*HEADINGS[:-1], "Top-1" if any(r.top1 is not None for r in report.rows) else "Agreement"]


def markdown(report: Report) -> str:
    """The table as GitHub Markdown, with what it is."""
    text = ["| " + " | ".join(headings(report)) + " |", "|---|--:|--:|--:|---|--:|--:|--:|--:|"]
    text += ["| " + " | ".join(escape(c) for c in line) + " |" for line in lines(report)]
    below = "\n".join([*text, "", *(f"{label}: {escape(said)}  " for label, said in _below(report))])
    return f"{below}\n\n{t4_bounds.markdown()}"


def _below(report: Report) -> list[tuple[str, str]]:
    machine = cells.machine_line(report.environment)
    return [("Claim", SOURCE + "."), ("Here", f"batch 1, on {machine}; speed-up over {cells.reference_line(report)}.")]


def renderable(report: Report) -> Group:
    """The table for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings(report)):
        claimed = 1 <= i <= 3
        words, figure = heading.replace("claim speed-up", "claim ratio").replace("claim ", "claim\n"), i not in (0, 4)
        table.add_column(
            words,
            justify="right" if figure else "left",
            style="dim" if claimed else "",
            no_wrap=figure,
            min_width=11 if i == 4 else None,
        )
    for line in lines(report):
        table.add_row(*(Text(c.replace(" (", "\n").rstrip(")")) for c in line))
    below = [Text.assemble((f"{label}: ", "bold"), said) for label, said in _below(report)]
    return Group(table, *below, Text(""), t4_bounds.renderable())


def text(report: Report, width: int = 100) -> str:
    """The terminal's table as plain text of that width."""
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(renderable(report))
    return out.getvalue()
