"""Split: where a run's time went on the GPU, and what that says about the figure beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TIMED = (
    "timed with both copies, waiting by cudaStreamSynchronize under CUDA's default schedule; trtexec 11 leaves the copies out and "
    "spins, by default"
)
ENQUEUE_BOUND = 0.8  # trtexec warns above this share of compute (sampleReporting.cpp, printEpilog)


@dataclass(frozen=True)
class Split:
    """Seconds of one run: host to device, compute, device to host (CUDA events), and enqueue (host clock)."""

    h2d_s: float
    compute_s: float
    d2h_s: float
    enqueue_s: float

    @property
    def latency_s(self) -> float:
        """H2D + compute + D2H, trtexec's latency."""
        return self.h2d_s + self.compute_s + self.d2h_s


def median(splits: Sequence[Split]) -> Split:
    """The median of each part. Raises ValueError when there are none."""
    return Split(
        statistics.median(s.h2d_s for s in splits),
        statistics.median(s.compute_s for s in splits),
        statistics.median(s.d2h_s for s in splits),
        statistics.median(s.enqueue_s for s in splits),
    )


def warnings(split: Split, *, captured: bool) -> tuple[str, ...]:
    """What the median split warns of: enqueue-bound (enqueue > 0.8 x compute), transfer-bound (copies > compute)."""
    found = []
    if split.enqueue_s > ENQUEUE_BOUND * split.compute_s:
        advice = "even as a CUDA graph" if captured else "a CUDA graph may help"
        found.append(
            f"enqueue-bound: the host takes {split.enqueue_s * 1e6:.0f} us to enqueue {split.compute_s * 1e6:.0f} us of work; {advice}"
        )
    if split.h2d_s + split.d2h_s > split.compute_s:
        found.append(
            f"transfer-bound: copies take {(split.h2d_s + split.d2h_s) * 1e6:.0f} us, compute {split.compute_s * 1e6:.0f} us"
        )
    return tuple(found)


def words(split: Split) -> str:
    """The split in one line of microseconds."""
    return f"H2D {split.h2d_s * 1e6:.0f} us, compute {split.compute_s * 1e6:.0f} us, D2H {split.d2h_s * 1e6:.0f} us (CUDA events, medians)"
