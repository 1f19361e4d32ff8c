"""Which figures for a T4 are possible at all: the article's claims and published measurements under the datasheet's bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit import datasheet, roofline
from deploykit.roofline import Cost

if TYPE_CHECKING:
    from rich.table import Table

# torchvision's models at 224x224: multiply-accumulates and stored values, as `deploykit check` counts them; activations have
# no bound here, since they may stay in the cache.
COSTS = {"ResNet-18": Cost(1_814_073_344, 11_689_512, 0), "ResNet-50": Cost(4_089_184_256, 25_557_032, 0)}
ARTICLE = "the article"
MEASURED = "libingwei/AI-Infer-Acc, TensorRT, CUDA events, no transfers"
MLPERF = "MLPerf Inference v1.0, Offline (batch not given)"


@dataclass(frozen=True)
class Figure:
    """A figure for one T4 that others gave; `claim`: without method."""

    who: str
    model: str
    precision: str
    batch: int
    images_per_s: float
    claim: bool = False


FIGURES = (
    Figure(ARTICLE, "ResNet-18", "fp32", 1, 320, claim=True),
    # its 'TensorRT' row names no precision: held against both that it could be
    Figure(f"{ARTICLE}, TensorRT in FP32?", "ResNet-18", "fp32", 1, 1200, claim=True),
    Figure(f"{ARTICLE}, TensorRT in FP16?", "ResNet-18", "fp16", 1, 1200, claim=True),
    Figure(ARTICLE, "ResNet-18", "int8", 1, 1800, claim=True),
    Figure(MEASURED, "ResNet-18", "fp32", 1, 1 / 2.26e-3),
    Figure(MEASURED, "ResNet-18", "fp16", 1, 1 / 1.01e-3),
    Figure(MEASURED, "ResNet-18", "int8", 1, 1 / 0.806e-3),
    Figure(MEASURED, "ResNet-18", "fp32", 32, 1242),
    Figure(MEASURED, "ResNet-18", "fp16", 32, 3987),
    Figure(MEASURED, "ResNet-18", "int8", 32, 7097),
    Figure(MLPERF, "ResNet-50", "int8", 32, 6084),
)


@dataclass(frozen=True)
class Judged:
    """A figure under the bound. share: of the most the datasheet allows; over: how many times the published measurement of
    the same thing, for a claim."""

    figure: Figure
    most_images_per_s: float
    bound_by: str
    share: float
    over: float | None

    @property
    def possible(self) -> bool:
        """Whether the datasheet allows it."""
        return self.share <= 1.0

    @property
    def words(self) -> str:
        """The judgement in a few words."""
        if not self.possible:
            return "impossible"
        if self.over is None:
            return "measured" if not self.figure.claim else "possible"
        return f"possible; {self.over:.1f}x the published measurement"


def judged() -> list[Judged]:
    """Every figure under the T4's bound."""
    card = datasheet.CARDS["sm75"]
    found = []
    for figure in FIGURES:
        least = roofline.bound(COSTS[figure.model], figure.precision, figure.batch, card)
        assert least is not None
        most = figure.batch / least.least_s
        found.append(Judged(figure, most, least.nearer, figure.images_per_s / most, _over(figure)))
    return found


def _over(figure: Figure) -> float | None:
    same = (
        f for f in FIGURES if not f.claim and (f.model, f.precision, f.batch) == (figure.model, figure.precision, figure.batch)
    )
    other = next(same, None)
    return figure.images_per_s / other.images_per_s if figure.claim and other is not None else None


HEADINGS = ("On one T4", "Model", "Precision", "Batch", "img/s", "bound img/s", "of it", "So")
TITLE = "What a T4 could do at most, by its datasheet; a bound, not a measurement"


def source() -> str:
    """Where the bound is from."""
    return f"{datasheet.CARDS['sm75'].source}; two operations a multiply-accumulate; weights are read once a run."


def lines() -> list[list[str]]:
    """The cells of the table under HEADINGS."""
    return [
        [
            j.figure.who,
            j.figure.model,
            j.figure.precision,
            str(j.figure.batch),
            f"{j.figure.images_per_s:,.0f}",
            f"{j.most_images_per_s:,.0f} ({j.bound_by})",
            f"{j.share:.0%}",
            j.words,
        ]
        for j in judged()
    ]


def markdown() -> str:
    """The table as GitHub Markdown."""
    text = [f"**{TITLE}**", "", "| " + " | ".join(HEADINGS) + " |", "|---|---|---|--:|--:|--:|--:|---|"]
    text += ["| " + " | ".join(line) + " |" for line in lines()]
    return "\n".join([*text, "", f"Bound: {source()}  "]) + "\n"


def renderable() -> Table:
    """The table for a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=TITLE, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption=f"Bound: {source()}"
    )
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if 3 <= i <= 6 else "left", overflow="fold")
    for line in lines():
        table.add_row(*line)
    return table
