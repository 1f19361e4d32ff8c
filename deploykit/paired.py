"""Paired: two yes/no outcomes of the same samples, and what may be said of their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 80  # halves an interval of width 2 to below float64's resolution
_EXACT_SUM = 1000  # up to so many changed samples the binomial sum is exact in integers


@dataclass(frozen=True)
class Paired:
    """How many samples both got right, only the reference (lost), only the candidate (gained), neither."""

    both: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, reference: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> Paired:
        """The counts of two arrays [n] of the same samples."""
        if reference.shape != candidate.shape or reference.ndim != 1:
            raise ValueError(f"outcomes of {reference.shape} and {candidate.shape} samples cannot be paired")
        both = int((reference & candidate).sum())
        lost = int((reference & ~candidate).sum())
        gained = int((~reference & candidate).sum())
        return cls(both, lost, gained, len(reference) - both - lost - gained)

    @property
    def n(self) -> int:
        """How many samples."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def reference_share(self) -> float:
        """The share the reference got right."""
        return (self.both + self.lost) / self.n

    @property
    def candidate_share(self) -> float:
        """The share the candidate got right."""
        return (self.both + self.gained) / self.n

    @property
    def drop_pp(self) -> float:
        """Percentage points the candidate lost: 100 * (lost - gained) / n, positive = worse."""
        return 100.0 * (self.lost - self.gained) / self.n

    def interval_pp(self, level: float = 0.95) -> tuple[float, float]:
        """(low, high) of the drop: Tango's asymptotic score interval for paired proportions.

        Tango, Statistics in Medicine 17 (1998) 891-908: the drops d whose score statistic lies within +-z,
        z(d) = (lost - gained - n d) / sqrt(n (2 q + d (1 - d))), q the likelihood's estimate of gained/n under d.
        It has a width where nothing changed sides (+- z^2 / (n + z^2)), which Wald's has not; recommended by Fagerland,
        Lydersen and Laake, Statistics in Medicine 33 (2014) 2850-2875.
        """
        z = NormalDist().inv_cdf(0.5 + level / 2)
        point = (self.lost - self.gained) / self.n
        low = self._solve(z, -1.0, point)
        high = self._solve(-z, point, 1.0)
        return 100.0 * low, 100.0 * high

    def _solve(self, z: float, low: float, high: float) -> float:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._score(middle) > z:  # the statistic falls as the drop grows
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def _score(self, drop: float) -> float:
        n, lost, gained = self.n, self.lost, self.gained
        a = 2.0 * n
        b = -lost - gained + (2 * n - lost + gained) * drop
        c = -gained * drop * (1 - drop)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * (2 * q + drop * (1 - drop))
        distance = lost - gained - n * drop
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    @property
    def mcnemar_p(self) -> float:
        """Exact two-sided McNemar p-value: min(1, 2 P(X <= min(lost, gained))), X binomial(lost + gained, 1/2).

        McNemar, Psychometrika 12 (1947); 1 when nothing changed sides.
        """
        changed, few = self.lost + self.gained, min(self.lost, self.gained)
        if changed <= _EXACT_SUM:
            tail = float(sum(math.comb(changed, k) for k in range(few + 1)) / 2**changed)
        else:
            top = math.lgamma(changed + 1) - changed * math.log(2)
            tail = math.fsum(math.exp(top - math.lgamma(k + 1) - math.lgamma(changed - k + 1)) for k in range(few + 1))
        return min(1.0, 2.0 * tail)

    @property
    def smallest_visible_pp(self) -> float | None:
        """The smallest drop in percentage points that these n samples could have shown: whose 95 % interval would lie above 0.

        With as many gained as were seen, the least `lost` with (lost - gained) / sqrt(lost + gained) > 1.96 (the interval's
        own statistic at 0). None when even losing every other sample would not have shown.
        """
        z2 = NormalDist().inv_cdf(0.975) ** 2
        least = math.floor((z2 + math.sqrt(z2 * (z2 + 8 * self.gained))) / 2) + 1
        return 100.0 * least / self.n if least + 2 * self.gained <= self.n else None

    def to_json(self) -> dict[str, int]:
        """JSON values that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Paired:
        """The counts that `to_json` wrote."""
        return cls(*(int(doc[name]) for name in ("both", "lost", "gained", "neither")))


def wilson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of a share: Wilson's score interval (Journal of the American Statistical Association 22, 1927)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (0.0 if count == 0 else centre - half), (1.0 if count == n else centre + half)
