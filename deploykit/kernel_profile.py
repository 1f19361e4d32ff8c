"""KernelProfile: what a runtime says of its own time, kernel by kernel, in one vocabulary for all runtimes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# kind -> in words
KINDS: Mapping[str, str] = {
    "integer": "convolutions and matrix products in integers",
    "float": "convolutions and matrix products in float",
    "quantize": "quantize and dequantize steps of their own",
    "reformat": "reordering and converting data",
    "other-integer": "other operators in integers",
    "other-float": "other operators in float",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a run. op: the runtime's operator; kind: one of KINDS; precision: what it computes in, as the runtime
    calls it; seconds: the median over the runs; detail: the implementation, where the runtime names it; sources: names of
    the graph's nodes it stands for, as far as they are known."""

    name: str
    op: str
    kind: str
    precision: str
    seconds: float
    detail: str
    sources: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "sources": list(self.sources)}


@dataclass(frozen=True)
class KernelProfile:
    """The kernels of one engine in the order they ran; `run_s`: the median wall seconds of a run, profiling included."""

    backend: str
    kernels: tuple[Kernel, ...]
    run_s: float
    runs: int
    batch: int
    threads: int

    @property
    def seconds(self) -> float:
        """The sum over all kernels, in seconds a run."""
        return sum(kernel.seconds for kernel in self.kernels)

    def share(self, kernels: Sequence[Kernel]) -> float:
        """Which share of the kernels' time these take."""
        return sum(kernel.seconds for kernel in kernels) / self.seconds if self.seconds else 0.0

    def of_kind(self, *kinds: str) -> tuple[Kernel, ...]:
        """The kernels of those kinds."""
        return tuple(kernel for kernel in self.kernels if kernel.kind in kinds)


def per_run(durations: Sequence[float], runs: int) -> float:
    """Seconds a run of one kernel: the median where it ran once a run, else the mean (a loop's body)."""
    if not durations:
        return 0.0
    return statistics.median(durations) if len(durations) == runs else sum(durations) / runs
