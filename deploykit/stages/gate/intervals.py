"""Changes with their 95 % interval, how two of them are combined, and the rule that decides.

For a - b of independent estimates with intervals [l, u], MOVER gives lower = a - b - sqrt((a - l_a)^2 + (u_b - b)^2), upper
likewise (Zou and Donner, Statistics in Medicine 27, 2008). It needs no symmetry. Speed-ups are combined so in logarithms,
where a ratio's error is nearly normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.paired import Paired

_MAX_EXPONENT = 700.0  # math.exp raises from 710 on


@dataclass(frozen=True)
class Change:
    """How much was lost, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_number(self) -> bool:
        """Whether it can be judged: a finite value, and ends that are no NaN (they may be infinite)."""
        return math.isfinite(self.value) and not math.isnan(self.low) and not math.isnan(self.high)


def decide(change: Change, limit: float) -> str:
    """'fail' when the lower end is over the limit or a figure is NaN, 'pass' when the upper end is within it, else
    'inconclusive'."""
    if not change.is_number:
        return "fail"
    if change.low > limit:
        return "fail"
    return "pass" if change.high <= limit else "inconclusive"


def paired_drop(new: NDArray[np.bool_], old: NDArray[np.bool_]) -> tuple[Change, float]:
    """(drop in percentage points, p): how many fewer samples `new` gets right than `old`, with the interval and the exact
    McNemar p-value of `Paired`. Raises ValueError when the two are not of the same samples."""
    if new.shape != old.shape or new.ndim != 1 or not len(new):
        raise ValueError(f"outcomes of {new.shape} and {old.shape} samples cannot be paired")
    paired = Paired.of(old, new)
    return Change(paired.drop_pp, *paired.interval_pp()), paired.mcnemar_p


def difference(new: Change, old: Change) -> Change:
    """new - old, with its interval (MOVER)."""
    value = new.value - old.value
    low = math.hypot(new.value - new.low, old.high - old.value)
    return Change(value, value - low, value + math.hypot(new.high - new.value, old.value - old.low))


def slowdown(new: Change, old: Change) -> Change:
    """1 - new/old of two speed-ups, with its interval (MOVER on the logarithms)."""
    logs = [Change(_log(x.value), _log(x.low), _log(x.high)) for x in (new, old)]
    ratio = difference(*logs)
    value, low, high = (1 - math.exp(min(x, _MAX_EXPONENT)) for x in (ratio.value, ratio.high, ratio.low))
    return Change(value, low, high)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
