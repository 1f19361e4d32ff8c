"""Mixed precision on a budget: which layers stay in float so that an INT8 graph keeps the accuracy asked for, at the least cost.

Layers are ranked once by the noise each brings into the output, quantized alone, for each second that keeping it in float
costs. Noise powers of layers add up (nearly), so the length of the ranked list that meets a budget is predicted, tried, and
bracketed: a handful of trials instead of one a layer. Then the dearest of the kept layers are given back where that does not
break the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from deploykit.errors import InputError

MOST_TRIALS = 12
_GIVE_BACK = 3
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True)
class Score:
    """How close a graph's outputs are to the float model's over n samples; None where it is no number.

    sqnr_db: infinite for identical outputs; drop_pp: top-1 lost in percentage points, with labels only.
    """

    n: int
    sqnr_db: float | None = None
    agreement: float | None = None
    drop_pp: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values; an infinite SQNR is the text 'inf'."""
        doc = asdict(self)
        return {**doc, "sqnr_db": "inf"} if self.sqnr_db == math.inf else doc

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Score:
        """The score that `to_json` wrote."""
        values = {f.name: doc[f.name] for f in fields(cls)}
        return cls(**{**values, "sqnr_db": math.inf if values["sqnr_db"] == "inf" else values["sqnr_db"]})

    def in_words(self) -> str:
        """The figures in one line."""
        said = []
        if self.drop_pp is not None:
            said.append(f"top-1 drop {self.drop_pp:.2f} pp")
        if self.agreement is not None:
            said.append(f"agreement {100 * self.agreement:.1f} %")
        if self.sqnr_db is not None:
            said.append("identical outputs" if self.sqnr_db == math.inf else f"SQNR {self.sqnr_db:.1f} dB")
        return ", ".join(said) + f" ({self.n} samples)"


@dataclass(frozen=True)
class Budget:
    """What may be lost; every limit that is given must hold. Raises InputError for none at all, and for impossible ones."""

    max_drop_pp: float | None = None
    min_sqnr_db: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if (self.max_drop_pp, self.min_sqnr_db, self.min_agreement) == (None, None, None):
            raise InputError("mixed precision needs a budget", "add --max-drop 0.5pp, --min-sqnr 25 or --min-agreement 0.99")
        if self.min_agreement is not None and not 0.0 < self.min_agreement <= 1.0:
            raise InputError(f"--min-agreement {self.min_agreement:g} is no share of the samples", "give a fraction such as 0.99")
        if self.min_sqnr_db is not None and not 0.0 < self.min_sqnr_db <= 120.0:
            raise InputError(
                f"--min-sqnr {self.min_sqnr_db:g} dB cannot be a budget: INT8 gives 10 to 40 dB, float32 itself about 120",
                "give decibels such as 25",
            )
        if self.max_drop_pp is not None and not 0.0 <= self.max_drop_pp < 100.0:
            raise InputError(f"--max-drop {self.max_drop_pp:g}pp is no drop in top-1", "give percentage points such as 0.5pp")

    def shortfall(self, score: Score) -> float:
        """How far a score is from the budget: 0 where it meets it, else the largest miss, each as a share of its limit.

        Raises InputError where the budget asks for what these samples or this model cannot tell.
        """
        missed = [0.0]
        for limit, found, option, needs in (
            (self.max_drop_pp, score.drop_pp, "--max-drop", "labels and an output of classes"),
            (self.min_agreement, score.agreement, "--min-agreement", "an output of shape [batch, classes]"),
            (self.min_sqnr_db, score.sqnr_db, "--min-sqnr", "an output that is not zero throughout"),
        ):
            if limit is None:
                continue
            if found is None:
                raise InputError(f"{option} needs {needs}, and there is none", "give another budget, e.g. --min-sqnr 25")
            miss = found - limit if option == "--max-drop" else limit - found
            missed.append(miss / max(abs(limit), 0.1))
        return max(missed)

    def in_words(self) -> str:
        """The limits in one line."""
        said = []
        if self.max_drop_pp is not None:
            said.append(f"top-1 drop at most {self.max_drop_pp:g} pp")
        if self.min_agreement is not None:
            said.append(f"agreement at least {100 * self.min_agreement:g} %")
        if self.min_sqnr_db is not None:
            said.append(f"SQNR at least {self.min_sqnr_db:g} dB")
        return ", ".join(said)


@dataclass(frozen=True)
class Layer:
    """A layer that could stay in float. noise: noise power / signal power in the model's output with this layer alone in
    INT8; cost: what it takes longer in float than in INT8, in the unit of whoever measured it (seconds, or MACs)."""

    name: str
    noise: float
    cost: float


@dataclass(frozen=True)
class Trial:
    """One evaluated choice."""

    kept: frozenset[str]
    score: Score


@dataclass(frozen=True)
class Found:
    """The best choice; `met`: whether it meets the budget; `shortfall`: how far it is (a share of the limit); trials in order."""

    best: Trial
    met: bool
    shortfall: float
    trials: tuple[Trial, ...]


Evaluate = Callable[[frozenset[str]], Score]


def ranked(layers: Sequence[Layer]) -> list[Layer]:
    """Layers whose float form removes the most noise for its cost first."""
    least = max(max((layer.cost for layer in layers), default=0.0) * 1e-3, _LEAST_SECONDS)
    return sorted(layers, key=lambda layer: (-layer.noise / max(layer.cost, least), layer.name))


def search(
    layers: Sequence[Layer],
    evaluate: Evaluate,
    budget: Budget,
    *,
    better: Callable[[Trial], None] = lambda _: None,
    most: int = MOST_TRIALS,
) -> Found:
    """The cheapest choice of layers to keep in float that meets the budget, among at most `most` trials.

    `better` hears of each trial that is the best so far, at once, so that whoever is interrupted has it. Where no choice meets
    the budget (all layers in float would be the float model itself), the closest one comes back with `met` False.
    Raises InputError without layers, and what `evaluate` and `Budget.shortfall` raise.
    """
    if not layers:
        raise InputError("no layer of this model can be quantized", "use fp32 or fp16 for this model")
    state = _Search(ranked(layers), evaluate, budget, better, most)
    state.bracket()
    if state.best is not None and state.met:
        state.give_back()
    assert state.best is not None
    return Found(state.best, state.met, budget.shortfall(state.best.score), tuple(state.trials))


class _Search:
    """The trials of one search, and the best of them."""

    def __init__(
        self, order: Sequence[Layer], evaluate: Evaluate, budget: Budget, better: Callable[[Trial], None], most: int
    ) -> None:
        self.order, self.evaluate, self.budget, self.better, self.most = order, evaluate, budget, better, most
        self.cost = {layer.name: max(layer.cost, 0.0) for layer in order}
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.met = False

    def bracket(self) -> None:
        """Between nothing in float and everything but the last: the shortest length of the ranked list that meets the budget."""
        low, high = 0, len(self.order)
        if self.attempt(0):
            return
        while high - low > 1 and len(self.trials) < self.most:
            length = min(max(self.predicted(), low + 1), high - 1)
            if self.attempt(length):
                high = length
            else:
                low = length

    def predicted(self) -> int:
        """How many layers to try: for an SQNR limit what the additive model keeps, scaled by the trial that came closest; else,
        and by each third trial, the middle of the bracket. Where nothing has met the budget yet, steps grow from trial to trial."""
        failed = [len(t.kept) for t in self.trials if self.budget.shortfall(t.score) > 0]
        met = [len(t.kept) for t in self.trials if self.budget.shortfall(t.score) == 0]
        low, high = max(failed, default=0), min(met, default=len(self.order))
        length = self.by_noise()
        if length is None:
            if met:
                return low + max(1, (high - low) // 2)
            return low + max(1, low, math.isqrt(high - low))  # doubling: the end of a long list is reached in a few trials
        if not met:
            return max(length, low + (1 << (len(failed) - 1)))
        return length if low < length < high and len(self.trials) % 3 else (low + high) // 2

    def by_noise(self) -> int | None:
        """The shortest length whose layers left in INT8 bring no more noise than an SQNR limit allows; None without one."""
        limit = self.budget.min_sqnr_db
        known = [t for t in self.trials if t.score.sqnr_db is not None and math.isfinite(t.score.sqnr_db)]
        if limit is None or not known:
            return None
        nearest = min(known, key=lambda t: abs((t.score.sqnr_db or 0.0) - limit))
        rest = [layer.noise for layer in self.order]
        left = sum(rest[len(nearest.kept) :])
        scale = 10 ** (-(nearest.score.sqnr_db or 0.0) / 10) / max(left, 1e-30)
        return next((k for k in range(len(rest)) if scale * sum(rest[k:]) <= 10 ** (-limit / 10)), len(rest))

    def attempt(self, length: int) -> bool:
        """Whether the first `length` layers in float meet the budget."""
        return self.attempt_set(frozenset(layer.name for layer in self.order[:length]))

    def attempt_set(self, kept: frozenset[str]) -> bool:
        """Whether those layers in float meet the budget."""
        trial = Trial(kept, self.evaluate(kept))
        self.trials.append(trial)
        missed = self.budget.shortfall(trial.score)
        if self.best is None:
            improves = True
        elif self.met:
            improves = missed == 0 and self.total(kept) < self.total(self.best.kept)
        else:
            improves = missed < self.budget.shortfall(self.best.score)
        if improves:
            self.best, self.met = trial, missed == 0
            self.better(trial)
        return missed == 0

    def total(self, kept: frozenset[str]) -> float:
        """Cost of a choice; that of another layer, however cheap, is never nothing."""
        return sum(self.cost[name] for name in kept) + _LEAST_SECONDS * len(kept)

    def give_back(self) -> None:
        """Tries the dearest kept layers in INT8 again, each once."""
        assert self.best is not None
        for name in sorted(self.best.kept, key=lambda n: -self.cost[n])[:_GIVE_BACK]:
            if len(self.trials) >= self.most or len(self.best.kept) < 2:
                return
            self.attempt_set(self.best.kept - {name})
