"""What a run is asked for, as one value; the command line and the Python API both make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deploykit.calibration_table import DEFAULT_METHOD
from deploykit.loadgen import SERVER_LATENCY_S
from deploykit.session import LAYOUTS
from deploykit.signature import ShapeRange, TensorSpec
from deploykit.stages.mixed import Budget

DEFAULT_STORE = Path("engines")
DEFAULT_BATCHES = (1, 8)
DEFAULT_CALIBRATION_N = 512


@dataclass(frozen=True)
class SourceRequest:
    """Where a model comes from: SOURCE, and the options that go with it."""

    text: str
    weights: str | None = None
    num_classes: int | None = None
    inputs: tuple[TensorSpec, ...] = ()
    opset: int | None = None
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Int8Request:
    """How INT8 is made. bias_correct: None means wherever there are samples to correct with, scale_correct wherever biases are
    corrected; equalize: `quantize` alone takes it."""

    bias_correct: bool | None = None
    weight_scales: str = "max"
    reduce_range: bool = False
    rounding: str = "nearest"
    equalize: bool = False
    scale_correct: bool | None = None


@dataclass(frozen=True)
class DataRequest:
    """Which samples judge and calibrate; None where there are none."""

    data: str | None = None
    calib_data: str | None = None
    preprocess: str | None = None
    classes: Path | None = None
    limit: int | None = None
    calib_n: int = DEFAULT_CALIBRATION_N
    method: str = DEFAULT_METHOD
    calib_table: Path | None = None
    recalibrate: bool = False
    int8: Int8Request = field(default_factory=Int8Request)
    budget: Budget | None = None


@dataclass(frozen=True)
class RowsRequest:
    """Which rows: None means everything this machine has. Named rows that cannot run set the exit code."""

    backends: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    batches: tuple[int, ...] = DEFAULT_BATCHES
    targets: tuple[str, ...] | None = None
    threads: int | None = None
    duration: str = "quick"
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    aa: bool = False
    remeasure: bool = False
    max_rows: int | None = None
    streams: int = 1
    layout: str = LAYOUTS[0]
    scenario: str | None = None
    server_latency_s: float = SERVER_LATENCY_S


class Narrator(Protocol):
    """Hears what the line is doing; the command line shows it, a test ignores it."""

    def step(self, text: str) -> None:
        """A new step has begun."""
        ...

    def progress(self, what: str, share: float) -> None:
        """How far a long step is (0..1)."""
        ...


class Silent:
    """A narrator that says nothing."""

    def step(self, text: str) -> None:
        """Says nothing."""

    def progress(self, what: str, share: float) -> None:
        """Says nothing."""


Say = Callable[[str, float], None]
