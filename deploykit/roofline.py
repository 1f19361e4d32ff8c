"""Roofline: what a run must at least cost, from the graph, against what the machine can do at most.

Williams, Waterman and Patterson, 'Roofline: an insightful visual performance model' (2009): a run takes at least as long as
its operations at the compute ceiling, and as its bytes at the memory ceiling; the slower of the two is the nearer ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Bytes of a stored value where the engine computes in that precision; integer and mixed graphs keep some values in more.
VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "int8-dynamic": 1, "mixed": 1}
# The ceiling that a precision is held against: the fastest kernels a graph of that precision could use.
COMPUTES_IN = {"int8-dynamic": "int8", "mixed": "int8"}
NEAR = 0.5  # below half of the nearer ceiling, something else takes most of the time


@dataclass(frozen=True)
class Cost:
    """What one model asks for. macs: multiply-accumulates a sample; weights: stored values, read once a run; moved: values
    a sample that the layers which multiply read and write, what lies between them taken as fused."""

    macs: int
    weights: int
    moved: int

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Cost | None:
        """The cost in a model's summary; None where it holds no count (an unknown shape, an operator without a formula)."""
        found = [summary.get(key) for key in ("macs", "parameters", "moved_values")]
        if not all(isinstance(v, int) and v >= 0 for v in found) or not found[0] or not any(found[1:]):
            return None
        return cls(*(int(v) for v in found if v is not None))

    def operations(self, batch: int) -> int:
        """Operations of a run: a multiply-accumulate is two."""
        return 2 * self.macs * batch


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most. ops_per_s: operations a second by precision; bytes_per_s: bytes a second by the size
    of the working set it was found at (0: any); `source` says whether it was measured here or stands in a datasheet."""

    name: str
    source: str
    ops_per_s: Mapping[str, float]
    bytes_per_s: Mapping[int, float]
    how: Mapping[str, str] = field(default_factory=dict)

    def bandwidth(self, working_set: int) -> float:
        """Bytes a second for a working set of that many bytes: of the largest one measured that is not larger, so that the
        answer errs upwards."""
        sizes = sorted(self.bytes_per_s)
        return self.bytes_per_s[max([s for s in sizes if s <= working_set], default=sizes[0])]

    def to_json(self) -> dict[str, Any]:
        """The ceilings as JSON values."""
        return {
            "name": self.name,
            "source": self.source,
            "ops_per_s": dict(self.ops_per_s),
            "bytes_per_s": {str(size): rate for size, rate in self.bytes_per_s.items()},
            "how": dict(self.how),
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Ceilings:
        """The ceilings that `to_json` wrote. Raises KeyError, TypeError, ValueError or AttributeError for another document: what is
        missing, no number, or not above zero."""
        rates = {int(size): float(rate) for size, rate in doc["bytes_per_s"].items()}
        operations = {str(precision): float(rate) for precision, rate in doc["ops_per_s"].items()}
        if not rates or not all(0 < rate < math.inf for rate in (*rates.values(), *operations.values())):
            raise ValueError("a ceiling is a positive number")
        how = {str(precision): str(said) for precision, said in doc["how"].items()}
        return cls(str(doc["name"]), str(doc["source"]), operations, rates, how)


@dataclass(frozen=True)
class Bound:
    """The least a run can take: compute_s for its operations, memory_s for its bytes."""

    compute_s: float
    memory_s: float

    @property
    def least_s(self) -> float:
        """Seconds no run can be faster than."""
        return max(self.compute_s, self.memory_s)

    @property
    def nearer(self) -> str:
        """Which ceiling that is: 'compute' or 'memory'."""
        return "compute" if self.compute_s >= self.memory_s else "memory"


def bound(cost: Cost, precision: str, batch: int, ceilings: Ceilings) -> Bound | None:
    """The least a run of that precision and batch can take; None where the ceilings have no such precision.

    Errs to the low side: activations are counted at the fastest level of memory, since they may stay in a cache, and
    weights at the level that holds all of them, since each is read once a run.
    """
    peak = ceilings.ops_per_s.get(COMPUTES_IN.get(precision, precision))
    if not peak or not ceilings.bytes_per_s or precision not in VALUE_BYTES:
        return None
    size = VALUE_BYTES[precision]
    weights, activations = cost.weights * size, cost.moved * size * batch
    memory_s = weights / ceilings.bandwidth(weights) + activations / max(ceilings.bytes_per_s.values())
    return Bound(cost.operations(batch) / peak, memory_s)


@dataclass(frozen=True)
class Place:
    """Where a row stands: its share of the nearer ceiling (a fraction), what bounds it, and both in words."""

    share: float
    bound_by: str
    words: str


def place(cost: Cost, precision: str, batch: int, seconds: float, ceilings: Ceilings) -> Place | None:
    """Where a run of `seconds` stands under the ceilings; None where they have no such precision.

    bound_by: 'compute' or 'memory' where at least half of the time is what the nearer ceiling asks for, else 'overhead'.
    """
    least = bound(cost, precision, batch, ceilings)
    if least is None or seconds <= 0:
        return None
    share = least.least_s / seconds
    bound_by = least.nearer if share >= NEAR else "overhead"
    if least.nearer == "compute":
        rate, peak = cost.operations(batch) / seconds, cost.operations(batch) / least.compute_s
        figures = f"{_giga(rate)} of {_giga(peak)} Gop/s in {COMPUTES_IN.get(precision, precision)}"
    else:
        figures = f"{least.memory_s * 1e3:.3g} of {seconds * 1e3:.3g} ms"
    said = f"{share:.0%} of the {least.nearer} ceiling ({figures}): bound by {bound_by}"
    if share > 1.02:
        said = (
            f"{share:.0%} of the {least.nearer} ceiling ({figures}): faster than what was measured as the ceiling; the machine "
            "was busier then, or the kernels need fewer operations than the graph has"
        )
    return Place(share, bound_by, said)


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.0f}" if rate >= 1e10 else f"{rate / 1e9:.2g}"
