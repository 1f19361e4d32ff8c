"""sweep: the search over made-up machines, whose best configuration is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from deploykit.configuration import Configuration, Limits, Quality, Score
from deploykit.stages import sweep

COST_S = {"glimpse": 1.2, "look": 2.0, "final": 6.0}
NOISE = {"glimpse": 0.08, "look": 0.03, "final": 0.01}


class Machine:
    """A machine where a run takes overhead + batch x cost, by engine; streams hide a part of the overhead."""

    def __init__(self, seed: int, *, noisy: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.noisy = noisy
        engines = list(itertools.product(("onnxruntime", "openvino"), ("fp32", "bf16", "int8")))
        self.cost = {e: float(self.rng.uniform(0.3e-3, 4e-3)) for e in engines}
        self.overhead = {e: float(self.rng.uniform(0.1e-3, 2e-3)) for e in engines}
        self.spent_s = 0.0
        self.asked: list[tuple[Configuration, str]] = []
        self.space = [Configuration(*e, b, 2, s) for e in engines for b in (1, 2, 4, 8, 16, 32) for s in (1, 2)]

    def run_s(self, c: Configuration) -> float:
        return self.overhead[c.engine] + c.batch * self.cost[c.engine]

    def rate(self, c: Configuration) -> float:
        return c.batch / (self.overhead[c.engine] / c.streams + c.batch * self.cost[c.engine])

    def evaluate(self, configurations: Sequence[Configuration], effort: str) -> Mapping[Configuration, Score | str]:
        found: dict[Configuration, Score | str] = {}
        for c in configurations:
            self.asked.append((c, effort))
            self.spent_s += COST_S[effort]
            off = float(np.exp(self.rng.normal(0, NOISE[effort]))) if self.noisy else 1.0
            runs_s = self.run_s(c) * c.streams
            found[c] = Score(self.rate(c) * off, runs_s / off, runs_s / off * 1.05, 500, 100 << 20)
        return found


def test_the_recommendation_is_near_the_best_at_a_fraction_of_the_cost() -> None:
    reached, cost = [], []
    for seed in range(80):
        machine = Machine(seed)
        found = sweep.search(machine.space, {}, Limits(), machine.evaluate)
        assert found.best is not None
        reached.append(machine.rate(found.best) / max(machine.rate(c) for c in machine.space))
        cost.append(machine.spent_s / (COST_S["final"] * len(machine.space)))
    assert np.mean(np.array(reached) >= 0.97) >= 0.9
    assert min(reached) >= 0.9
    assert np.median(cost) <= 0.27


def test_a_latency_limit_is_kept_and_larger_batches_are_not_even_opened() -> None:
    machine = Machine(3, noisy=False)
    limit = 6e-3
    found = sweep.search(machine.space, {}, Limits(max_latency_s=limit), machine.evaluate)
    able = [c for c in machine.space if machine.run_s(c) * c.streams * 1.05 <= limit]
    assert found.best in able
    assert machine.rate(found.best) >= 0.97 * max(machine.rate(c) for c in able)
    skipped = [t for t in found.trials if not t.scores]
    assert skipped
    assert all("not measured" in t.out for t in skipped)


def test_an_engine_that_loses_too_much_is_never_measured() -> None:
    machine = Machine(5, noisy=False)
    qualities = {c.engine: Quality(2.0 if c.precision == "int8" else 0.1, 0.4, 0.99, 1000) for c in machine.space}
    found = sweep.search(machine.space, qualities, Limits(max_drop_pp=0.5), machine.evaluate)
    assert found.best is not None
    assert found.best.precision != "int8"
    assert all(c.precision != "int8" for c, _ in machine.asked)
    assert "loses 2.00 pp" in next(t.out for t in found.trials if t.configuration.precision == "int8")


def test_an_engine_whose_drop_is_unknown_is_refused_where_a_limit_asks_for_one() -> None:
    machine = Machine(5, noisy=False)
    found = sweep.search(machine.space, {}, Limits(max_drop_pp=0.5), machine.evaluate)
    assert found.best is None
    assert machine.asked == []
    assert all("not measured" in t.out for t in found.trials)


def test_nothing_is_recommended_where_nothing_keeps_the_limits() -> None:
    machine = Machine(1, noisy=False)
    found = sweep.search(machine.space, {}, Limits(max_latency_s=1e-6), machine.evaluate)
    assert found.best is None
    assert all(t.out for t in found.trials)


def test_memory_is_judged_in_the_last_round_and_others_have_their_turn() -> None:
    machine = Machine(2, noisy=False)

    def evaluate(configurations: Sequence[Configuration], effort: str) -> Mapping[Configuration, Score | str]:
        found = dict(machine.evaluate(configurations, effort))
        for c, score in found.items():
            assert isinstance(score, Score)
            found[c] = Score(score.images_per_s, score.p50_s, score.p90_s, score.n, c.batch * 10_000_000)
        return found

    found = sweep.search(machine.space, {}, Limits(max_memory_bytes=40_000_000), evaluate)
    assert found.best is not None
    assert found.best.batch <= 4
    assert any("its process holds" in t.out for t in found.trials)


def test_a_failing_configuration_costs_only_itself() -> None:
    machine = Machine(4, noisy=False)
    broken = max(machine.space, key=machine.rate)

    def evaluate(configurations: Sequence[Configuration], effort: str) -> Mapping[Configuration, Score | str]:
        return {c: "no memory" if c == broken else s for c, s in machine.evaluate(configurations, effort).items()}

    found = sweep.search(machine.space, {}, Limits(), evaluate)
    assert found.best is not None
    assert found.best != broken
    assert found.trial(broken).out == "failed: no memory"


def test_after_the_budget_the_best_so_far_is_still_measured_in_full() -> None:
    machine = Machine(6, noisy=False)
    now = itertools.count(0.0, 10.0)
    found = sweep.search(machine.space, {}, Limits(), machine.evaluate, budget_s=45.0, clock=lambda: next(now))
    assert found.best is not None
    assert "final" in found.trial(found.best).scores
    assert any(t.out == "not measured: the time was up" for t in found.trials)


def test_latency_as_the_objective_takes_the_smallest_batch() -> None:
    machine = Machine(7, noisy=False)
    found = sweep.search(machine.space, {}, Limits(), machine.evaluate, objective="latency")
    assert found.best is not None
    assert machine.run_s(found.best) == min(machine.run_s(c) for c in machine.space)


def test_nothing_on_the_front_is_beaten_in_everything() -> None:
    machine = Machine(8, noisy=False)
    qualities = {c.engine: Quality(0.1 * i, None, None, 1000 + i) for i, c in enumerate(machine.space)}
    found = sweep.search(machine.space, qualities, Limits(), machine.evaluate)
    points = {}
    for c in found.front:
        score = found.trial(c).score
        assert score is not None
        points[c] = (-score.images_per_s, score.p50_s, qualities[c.engine].drop_pp or 0, qualities[c.engine].size_bytes or 0)
    assert found.best in points
    for one, other in itertools.permutations(points, 2):
        better = all(a <= b for a, b in zip(points[one], points[other], strict=True))
        assert other == found.best or points[one] == points[other] or not better


@pytest.mark.parametrize(("drop", "high", "shown"), [(0.1, 0.4, True), (0.1, 0.9, False), (0.1, None, False)])
def test_shown_means_the_whole_interval(drop: float, high: float | None, shown: bool) -> None:
    quality = Quality(drop, high)
    assert quality.refuses(Limits(max_drop_pp=0.5)) == ""
    assert quality.shown(Limits(max_drop_pp=0.5)) is shown


class Lucky(Machine):
    """A machine whose first short measurement of one configuration is three times too good."""

    def __init__(self) -> None:
        super().__init__(11, noisy=False)
        self.space = [c for c in self.space if c.batch >= 8]
        ranked = sorted(self.space, key=self.rate)
        self.lucky = ranked[len(ranked) // 2]

    def evaluate(self, configurations: Sequence[Configuration], effort: str) -> Mapping[Configuration, Score | str]:
        found = dict(super().evaluate(configurations, effort))
        score = found.get(self.lucky)
        if effort == "glimpse" and isinstance(score, Score):
            best = max(self.rate(c) for c in self.space)
            found[self.lucky] = Score(3 * best, score.p50_s / 3, score.p90_s, score.n, score.peak_rss_bytes)
        return found


def test_those_a_lucky_glimpse_put_out_are_measured_in_full_with_it() -> None:
    machine = Lucky()
    found = sweep.search(machine.space, {}, Limits(), machine.evaluate)
    assert found.best is not None
    assert found.best != machine.lucky
    best = found.trial(found.best)
    assert best.effort == "final"
    others = [t for t in found.trials if t.score is not None and t.configuration != found.best]
    assert all(t.score.images_per_s <= best.scores["final"].images_per_s for t in others if t.score is not None)


def test_no_glimpse_stands_on_the_front_beside_full_measurements() -> None:
    machine = Machine(9)
    found = sweep.search(machine.space, {}, Limits(), machine.evaluate)
    glimpsed = [t for t in found.trials if t.effort == "glimpse"]
    assert glimpsed
    assert len(found.front) > 1
    assert all(found.trial(c).effort in ("look", "final") for c in found.front)
    asked = [c for c, effort in machine.asked if effort == "look"]
    assert found.best in asked  # in turns with it


def test_without_a_recommendation_the_front_is_what_was_glimpsed() -> None:
    machine = Machine(9, noisy=False)
    found = sweep.search(machine.space, {}, Limits(max_latency_s=1e-9), machine.evaluate)
    assert found.best is None
    assert found.front


def test_layouts_are_ladders_of_their_own() -> None:
    usual = Configuration("torch", "fp32", 8, 2)
    other = Configuration("torch", "fp32", 8, 2, layout="channels-last")
    assert usual.engine == other.engine
    assert usual.ladder != other.ladder
    assert str(other) == f"{usual} channels-last"
