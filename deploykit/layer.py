"""One layer of a graph as it is quantized: the pairs around it and the places where its result can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BARE = "bare"  # before any activation function


@dataclass(frozen=True)
class Pair:
    """The parameters of a Q/DQ pair: x is kept as clip(round(x / scale) + zero, low, high). scale, zero: [] or [channels]
    along `axis`; dtype: the integers' numpy name."""

    scale: NDArray[Any]
    zero: NDArray[Any]
    dtype: str
    axis: int | None = None

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and highest value that a per-tensor pair can hold."""
        low, high = self.levels
        scale, zero = float(self.scale.reshape(-1)[0]), float(self.zero.reshape(-1)[0])
        return (low - zero) * scale, (high - zero) * scale

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves all values."""
        return bool(self.scale.size == 1)


@dataclass(frozen=True)
class Point:
    """One place where a layer's result can be read: `kind` is 'bare' or the activation function applied; `names` are all
    names it goes by (the float tensor and the dequantized one that stands in for it); `read` the one to read."""

    kind: str
    names: tuple[str, ...]
    read: str
    pair: Pair | None = None


@dataclass(frozen=True)
class Layer:
    """One Conv, ConvTranspose, Gemm or MatMul. data: the float tensor it reads; weight: its float (or dequantized) weight
    where that is constant; points: where its result can be read, in graph order; norms: batch normalizations in between; scaled:
    whether the channels of its weight may have gains (the graph says that its scales were corrected)."""

    index: int
    name: str
    op: str
    data: str
    data_pair: Pair | None
    weight: NDArray[Any] | None
    weight_pair: Pair | None
    second_pair: Pair | None
    bias: NDArray[Any] | None
    axis: int
    points: tuple[Point, ...]
    norms: tuple[int, ...]
    scaled: bool = False

    @property
    def quantized(self) -> bool:
        """Whether its input or its weight goes through integers."""
        return self.data_pair is not None or self.weight_pair is not None

    @property
    def bare(self) -> Point:
        """Its result before any activation function, normalization folded."""
        return [point for point in self.points if point.kind == BARE][-1]
