"""Paired outcomes against scipy, published intervals, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from deploykit.paired import Paired, wilson

COUNTS = st.builds(Paired, st.integers(0, 400), st.integers(0, 40), st.integers(0, 40), st.integers(1, 100))


def test_published_interval_of_tango() -> None:
    # Fagerland, Lydersen and Laake 2014, airway hyper-responsiveness before and after stem cell transplantation: n = 21,
    # discordant 1 and 7: Tango's 95 % interval is -0.517 to -0.026.
    low, high = Paired(1, 1, 7, 12).interval_pp()
    assert low == pytest.approx(-51.7, abs=0.05)
    assert high == pytest.approx(-2.6, abs=0.05)


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_the_interval_inverts_the_score_test_of_the_constrained_likelihood(counts: Paired) -> None:
    """At each end the statistic, with gained/n found by maximising the likelihood numerically, is +-z."""
    n, lost, gained = counts.n, counts.lost, counts.gained
    low, high = (x / 100 for x in counts.interval_pp())
    point = (lost - gained) / n
    assert -1 <= low <= point + 1e-12
    assert point - 1e-12 <= high <= 1
    for end, z in ((low, 1.959964), (high, -1.959964)):
        if not -0.999 < end < 0.999 or abs(end) < 1e-9:
            continue

        def minus_likelihood(q: float, end: float = end) -> float:
            terms = ((lost, q + end), (gained, q), (n - lost - gained, 1 - 2 * q - end))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

        bounds = (max(0.0, -end), (1 - end) / 2)
        best = optimize.minimize_scalar(minus_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
        best = min((best, *bounds), key=minus_likelihood)  # a bounded search only approaches a maximum at the edge
        variance = n * (2 * best + end * (1 - end))
        if variance > 1e-9:
            assert (lost - gained - n * end) / math.sqrt(variance) == pytest.approx(z, abs=2e-3)


@given(COUNTS)
def test_swapping_the_two_mirrors_the_interval(counts: Paired) -> None:
    low, high = counts.interval_pp()
    other_low, other_high = Paired(counts.both, counts.gained, counts.lost, counts.neither).interval_pp()
    assert (-other_high, -other_low) == pytest.approx((low, high), abs=1e-9)


def test_nothing_changed_still_has_a_width() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    assert Paired(360, 0, 0, 0).interval_pp() == pytest.approx((-100 * z2 / (360 + z2), 100 * z2 / (360 + z2)))


@pytest.mark.parametrize(("n", "p_lost", "p_gained"), [(300, 0.03, 0.02), (360, 0.01, 0.01), (1000, 0.02, 0.005)])
def test_the_interval_covers_the_truth_about_95_times_in_100(n: int, p_lost: float, p_gained: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], size=1500)
    truth = 100 * (p_lost - p_gained)
    cache: dict[tuple[int, int], bool] = {}
    for lost, gained, _ in draws:
        key = (int(lost), int(gained))
        if key not in cache:
            low, high = Paired(n - sum(key), *key, 0).interval_pp()
            cache[key] = low <= truth <= high
    covered = np.mean([cache[int(a), int(b)] for a, b, _ in draws])
    assert 0.93 <= covered <= 0.98


def test_the_bootstrap_agrees_where_samples_are_many() -> None:
    rng = np.random.default_rng(1)
    reference = rng.random(4000) < 0.9
    flips = rng.random(4000)
    candidate = np.where(reference, flips > 0.03, flips < 0.1)
    counts = Paired.of(reference, candidate)
    difference = 100 * (reference.astype(float) - candidate)
    boot = [difference[rng.integers(0, 4000, 4000)].mean() for _ in range(2000)]
    assert counts.drop_pp == pytest.approx(difference.mean())
    assert counts.interval_pp() == pytest.approx(tuple(np.percentile(boot, [2.5, 97.5])), abs=0.08)


@given(st.integers(0, 3000), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert Paired(10, lost, gained, 5).mcnemar_p == pytest.approx(expected, rel=1e-6, abs=1e-300)


@given(st.integers(1, 5000), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipys(n: int, share: float) -> None:
    count = round(n * share)
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.integers(20, 5000), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_the_smallest_visible_drop_is_the_first_whose_interval_is_above_zero(n: int, gained: int) -> None:
    visible = Paired(n - gained, 0, gained, 0).smallest_visible_pp if gained <= n else None
    if visible is None:
        assert n < 4 + 2 * gained + 30 * math.sqrt(gained + 1)
        return
    least = round(visible * n / 100)
    assert Paired(n - least - 2 * gained, least + gained, gained, 0).interval_pp()[0] > 0
    if n >= least - 1 + 2 * gained:
        assert Paired(n - least + 1 - 2 * gained, least - 1 + gained, gained, 0).interval_pp()[0] <= 1e-9


def test_four_of_n_is_the_least_that_shows() -> None:
    assert Paired(10_000, 0, 0, 0).smallest_visible_pp == pytest.approx(0.04)
    assert Paired(3, 0, 0, 0).smallest_visible_pp is None


def test_counts_come_from_arrays_of_the_same_samples() -> None:
    counts = Paired.of(np.array([1, 1, 0, 0, 1], dtype=bool), np.array([1, 0, 1, 0, 1], dtype=bool))
    assert counts == Paired(2, 1, 1, 1)
    assert (counts.reference_share, counts.candidate_share) == (0.6, 0.6)
    assert Paired.from_json(counts.to_json()) == counts
    with pytest.raises(ValueError, match="cannot be paired"):
        Paired.of(np.ones(3, dtype=bool), np.ones(4, dtype=bool))
