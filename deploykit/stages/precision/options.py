"""What a user can choose about INT8."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from deploykit.artifact import Json
from deploykit.errors import UnknownName

Layout = Literal["cpu", "tensorrt"]
LAYOUTS = ("cpu", "tensorrt")
WEIGHT_SCALES = ("max", "mse")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class Int8Options:
    """reduce_range: weights in 7 bits, for CPUs without VNNI, whose 16-bit sums of U8S8 products saturate.
    weight_scales: 'max' of each channel, or the clipping with the least squared error ('mse').
    rounding: 'nearest', or 'gptq': learnt on samples, together with bias correction.
    scale_correct: bias correction also gives back what quantizing does to the spread of each channel, through its weight scale.
    keep_float: names of nodes that stay in float."""

    reduce_range: bool = False
    weight_scales: str = "max"
    keep_float: tuple[str, ...] = ()
    rounding: str = "nearest"
    scale_correct: bool = True

    def __post_init__(self) -> None:
        if self.weight_scales not in WEIGHT_SCALES:
            raise UnknownName("weight scale", self.weight_scales, WEIGHT_SCALES)
        if self.rounding not in ROUNDINGS:
            raise UnknownName("rounding", self.rounding, ROUNDINGS)

    @property
    def levels(self) -> int:
        """Weights are integers in [-levels, levels]."""
        return 63 if self.reduce_range else 127

    def to_json(self) -> dict[str, Json]:
        """The options as JSON values."""
        return {**asdict(self), "keep_float": sorted(self.keep_float)}
