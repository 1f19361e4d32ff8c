"""The mixed-precision search: meets the budget at the least cost, in few trials; says so where nothing can."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.errors import InputError
from deploykit.stages.mixed import MOST_TRIALS, Budget, Layer, Score, Trial, ranked, search


class Additive:
    """A network whose layers' noise powers add up; counts its evaluations."""

    def __init__(self, layers: list[Layer]) -> None:
        self.noise = {layer.name: layer.noise for layer in layers}
        self.seen: list[frozenset[str]] = []

    def __call__(self, kept: frozenset[str]) -> Score:
        self.seen.append(kept)
        left = sum(noise for name, noise in self.noise.items() if name not in kept)
        return Score(100, -10 * math.log10(left) if left else math.inf, agreement=max(0.0, 1 - left))


LAYERS = [Layer("dear", 1e-2, 50.0), Layer("cheap", 1e-2, 1.0), Layer("small", 1e-4, 1.0), Layer("tiny", 1e-6, 5.0)]


def test_the_noisiest_layer_for_its_cost_comes_first() -> None:
    assert [layer.name for layer in ranked(LAYERS)] == ["cheap", "dear", "small", "tiny"]
    assert ranked([Layer("free", 1e-9, 0.0), Layer("other", 1e-9, 1.0)])[0].name == "free"


def test_one_cheap_layer_is_enough() -> None:
    found = search(LAYERS, Additive(LAYERS), Budget(min_sqnr_db=19.0))
    assert found.met and found.shortfall == 0
    assert found.best.kept == {"cheap"}


def test_a_budget_that_int8_meets_needs_one_trial() -> None:
    network = Additive(LAYERS)
    found = search(LAYERS, network, Budget(min_sqnr_db=10.0))
    assert found.met and not found.best.kept and network.seen == [frozenset()]


def test_what_is_not_needed_is_given_back() -> None:
    """'dear' lies before 'b' in the ranking, and is not needed once 'b' is in float."""
    layers = [Layer("a", 1.0, 1.0), Layer("dear", 0.02, 0.5), Layer("b", 0.03, 1.0), Layer("c", 0.001, 9.0)]
    found = search(layers, Additive(layers), Budget(min_sqnr_db=-10 * math.log10(0.0225)))
    assert found.met and found.best.kept == {"a", "b"}


def test_an_unreachable_budget_gives_the_closest_and_how_far_it_is() -> None:
    found = search(LAYERS, Additive(LAYERS), Budget(min_sqnr_db=100.0))
    assert not found.met and found.shortfall > 0
    assert found.best.kept == {"dear", "cheap", "small"}


def test_each_best_so_far_is_told_at_once_and_improves() -> None:
    told: list[Trial] = []
    budget = Budget(min_agreement=0.995)
    found = search(LAYERS, Additive(LAYERS), budget, better=told.append)
    assert told[-1] == found.best and told[0].kept == frozenset()
    assert [budget.shortfall(t.score) for t in told] == sorted((budget.shortfall(t.score) for t in told), reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-9, 1.0), st.floats(0.0, 10.0)), min_size=1, max_size=60), st.floats(1.0, 60.0))
def test_additive_networks(values: list[tuple[float, float]], limit: float) -> None:
    layers = [Layer(f"n{i}", noise, cost) for i, (noise, cost) in enumerate(values)]
    network, budget = Additive(layers), Budget(min_sqnr_db=limit)
    found = search(layers, network, budget)
    assert len(network.seen) == len(found.trials) <= MOST_TRIALS
    assert found.met == (budget.shortfall(found.best.score) == 0)
    reachable = -10 * math.log10(ranked(layers)[-1].noise) >= limit
    if reachable:
        assert found.met


@pytest.mark.parametrize(
    "limits",
    [{}, {"min_agreement": 1.2}, {"min_agreement": 0.0}, {"min_sqnr_db": 500.0}, {"min_sqnr_db": -3.0}, {"max_drop_pp": -1.0}],
)
def test_impossible_budgets(limits: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Budget(**limits)


def test_a_budget_that_the_samples_cannot_judge() -> None:
    with pytest.raises(InputError, match="labels"):
        search(LAYERS, Additive(LAYERS), Budget(max_drop_pp=0.5))
    with pytest.raises(InputError, match="no layer"):
        search([], Additive([]), Budget(min_sqnr_db=20.0))


def test_scores_come_back_from_json() -> None:
    for score in (Score(5, math.inf, 1.0, 0.0), Score(5, 20.5, 0.9), Score(5)):
        assert Score.from_json(score.to_json()) == score


@pytest.mark.parametrize("wanted", [3, 40, 190, 198])
def test_a_long_list_is_searched_to_its_end(wanted: int) -> None:
    """Of 200 like layers so many must stay in float; an agreement says nothing of how many."""
    layers = [Layer(f"n{i:03}", 1e-3, 1.0) for i in range(200)]
    found = search(layers, Additive(layers), Budget(min_agreement=1 - (200 - wanted) * 1e-3 - 1e-9))
    assert found.met and wanted <= len(found.best.kept) <= 1.4 * wanted + 4


def test_a_prediction_that_falls_short_is_mended_by_small_steps() -> None:
    """Layers bring half as much noise again as they did alone, the later ones in the ranking most of it: a near miss is no reason to
    keep nearly all of them."""
    layers = [Layer(f"n{i:02}", 1e-3 * 0.9**i, 1.0) for i in range(50)]
    network = Additive([Layer(x.name, x.noise * (1 + i / 50), 1.0) for i, x in enumerate(layers)])
    found = search(layers, network, Budget(min_sqnr_db=28.0))
    needed = next(k for k in range(50) if network(frozenset(x.name for x in layers[:k])).sqnr_db >= 28.0)  # type: ignore[operator]
    assert found.met and len(found.best.kept) == needed
    assert len(found.trials) <= 8 and max(len(t.kept) for t in found.trials) <= needed + 6
