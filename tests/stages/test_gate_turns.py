"""Engines measured in turns: what is called a change, what is not, and what the machine's own spread does to both."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_rows import an_ok_row

from deploykit.measurement import Measurement, Window
from deploykit.stages.gate import Limits, Settled, Turns, timed, undecided
from deploykit.stages.gate.turns import (
    Contrasts,
    _student,
    contrasts,
    doubtful,
    grown,
    judged,
    lost,
    seconds_an_item,
    undisturbed_seconds,
)

ROW = an_ok_row()


def _row_of(rng: np.random.Generator, launches: int, seconds: float, process: float, noise: float, scale: float) -> Measurement:
    """Windows of 20 runs; `process`: spread between launches, `noise`: within one; some runs take ten times as long."""
    found = []
    for _ in range(launches):
        own = seconds * scale * math.exp(process * rng.normal())
        rounds = []
        for _ in range(6):
            runs = own * np.exp(noise * np.abs(rng.normal(size=20))) * np.where(rng.random(20) < 0.05, 10, 1)
            rounds.append(Window(tuple(runs.tolist()), float(runs.sum()) * 1.001))
        found.append(tuple(rounds))
    peaks = tuple(int(1e8 * scale) for _ in range(launches))
    return Measurement(1, tuple(found), loads_s=tuple(0.1 * scale for _ in range(launches)), peaks_rss_bytes=peaks)


def turns(slower: float = 1.0, *, launches: int = 8, process: float = 0.01, noise: float = 0.02, seed: int = 0) -> Turns:
    rng = np.random.default_rng(seed)
    return Turns(*(_row_of(rng, launches, 0.001, process, noise, scale) for scale in (1.0, 1.0, slower)))


def outcomes(found: Turns, **limits: float) -> dict[str, str]:
    return {r.check: r.outcome for r in timed(ROW, found, Limits(**limits))}


def test_an_engine_against_itself_passes_and_a_slower_one_fails() -> None:
    assert outcomes(turns(), max_slowdown=0.05)["speed"] == "pass"
    assert outcomes(turns(1.12), max_slowdown=0.05)["speed"] == "fail"
    assert outcomes(turns(0.8), max_slowdown=0.05)["speed"] == "pass"


def test_a_noisy_machine_is_inconclusive_not_a_failure() -> None:
    found = [outcomes(turns(process=0.2, seed=s), max_slowdown=0.05)["speed"] for s in range(20)]
    assert "fail" not in found
    assert found.count("inconclusive") >= 15


def test_runs_that_others_break_into_do_not_hide_that_nothing_changed() -> None:
    """One run in twenty takes ten times as long: the wall clock is far noisier than the lower quartile of the runs."""
    found = turns(noise=0.01)
    quiet, wall = (contrasts(found, cost).spread()[0] for cost in (undisturbed_seconds, seconds_an_item))
    assert quiet < wall / 3


def test_stalls_of_the_new_engine_alone_are_seen_by_the_wall_clock() -> None:
    found = turns(noise=0.01)
    stalled = tuple(tuple(replace(w, wall_s=w.wall_s * 2) for w in launch) for launch in found.new.launches)
    judged_so = outcomes(replace(found, new=replace(found.new, launches=stalled)), max_slowdown=0.05)
    assert judged_so == {"speed": "pass", "throughput": "fail"}


def test_memory_and_start_up_are_judged_by_their_growth() -> None:
    found = turns(1.3)
    assert outcomes(found, max_memory_growth=0.2, max_startup_growth=0.2) == {"memory": "fail", "start-up": "fail"}
    assert outcomes(found, max_memory_growth=0.4, max_startup_growth=0.4) == {"memory": "pass", "start-up": "pass"}


def test_too_few_launches_pass_nothing() -> None:
    assert outcomes(turns(launches=4), max_slowdown=0.05)["speed"] == "inconclusive"


def test_a_change_below_the_floor_is_none_even_where_nothing_may_be_lost() -> None:
    tiny = turns(1.004, process=0.0001, noise=0.0005, launches=10)
    assert outcomes(tiny, max_slowdown=0.0)["speed"] == "pass"


def test_an_engine_that_differs_from_itself_by_more_fails_nobody() -> None:
    """The A/A row says that the job, not the engine, makes the difference."""
    found = Contrasts(np.full(8, 0.2), np.full(8, 0.25))
    outcome, why = judged(found, lost, 0.05)
    assert outcome != "fail"
    assert why


def test_more_launches_are_asked_for_only_where_they_could_tell() -> None:
    assert undecided(turns(process=0.1), Limits(max_slowdown=0.02))
    assert not undecided(turns(), Limits(max_slowdown=0.10))
    assert not undecided(turns(), Limits(max_memory_growth=0.10))


def test_what_is_settled_without_measuring_is_said_for_every_limit() -> None:
    reasons = timed(ROW, Settled("pass", "the same engine"), Limits(max_slowdown=0.05, max_memory_growth=0.1))
    assert [(r.check, r.outcome, r.message) for r in reasons] == [
        ("speed", "pass", "the same engine"),
        ("memory", "pass", "the same engine"),
    ]


@pytest.mark.parametrize(
    "window",
    [
        Window((0.001, -0.001), 0.01),
        Window((0.001, 0.0), 0.01),
        Window((0.001, math.nan), 0.01),
        Window((0.001, 0.002), 0.001),
        Window((0.001,), -1.0),
        Window((), 0.1),
    ],
)
def test_a_clock_that_jumps_is_seen(window: Window) -> None:
    good = turns()
    assert doubtful(good.new) == ""
    bad = replace(good, new=replace(good.new, launches=((window, *good.new.launches[0][1:]), *good.new.launches[1:])))
    assert "clock" in doubtful(bad.new)
    assert set(outcomes(bad, max_slowdown=0.05).values()) == {"inconclusive"}


def test_launches_that_do_not_match_are_refused() -> None:
    found = turns()
    with pytest.raises(ValueError, match="same launches"):
        contrasts(replace(found, new=replace(found.new, launches=found.new.launches[1:])), undisturbed_seconds)


@pytest.mark.parametrize("launches", [1, 2, 5])
def test_the_rank_p_is_exact(launches: int) -> None:
    """Against counting: each launch's new process is 1st, 2nd or 3rd, equally likely."""
    for ranks in product((1, 2, 3), repeat=launches):
        found = Contrasts(np.array([r - 2.0 for r in ranks]), np.full(launches, 0.1))
        at_least = sum(sum(other) >= sum(ranks) for other in product((1, 2, 3), repeat=launches))
        assert found.rank_p == pytest.approx(at_least / 3**launches)


def test_students_t_agrees_with_scipy() -> None:
    t = pytest.importorskip("scipy.stats").t
    for freedom in (1, 2, 3, 9, 19, 39):
        for level in (0.9, 0.95, 0.99):
            assert _student(level, freedom) == pytest.approx(t.ppf(0.5 + level / 2, freedom), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(5, 20), st.floats(-0.5, 0.5), st.floats(1e-4, 0.2), st.integers(0, 2**31))
def test_an_interval_holds_its_value_both_ways_of_saying_it(launches: int, shift: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = Contrasts(shift + spread * rng.normal(size=launches), spread * rng.normal(size=launches))
    for measured in (lost, grown):
        change = measured(found)
        assert change.low <= change.value <= change.high
    assert lost(found).value == pytest.approx(1 - 1 / (1 + grown(found).value))


def test_few_of_many_comparisons_of_equal_engines_fail() -> None:
    """Processes whose spread is normal: at most 1 % of comparisons with the tightest limit there is."""
    rng, fails = np.random.default_rng(0), 0
    for _ in range(2000):
        launch = 0.03 * rng.normal(size=(10, 3))
        found = Contrasts(launch[:, 2] - launch[:, :2].mean(axis=1), launch[:, 1] - launch[:, 0])
        fails += judged(found, lost, 0.0)[0] == "fail"
    assert fails <= 20


def test_a_limit_below_the_floor_says_what_it_is_held_as() -> None:
    for limit, said in ((0.0, True), (0.005, True), (0.05, False)):
        (reason, _) = timed(ROW, turns(), Limits(max_slowdown=limit))
        assert ("held as 1 %" in reason.message) is said


@pytest.mark.parametrize("gone", [{"peaks_rss_bytes": (0,) * 8}, {"peaks_rss_bytes": ()}, {"loads_s": ()}])
def test_what_was_not_measured_in_every_launch_is_inconclusive(gone: dict[str, tuple[int, ...]]) -> None:
    found = turns()
    check = "start-up" if "loads_s" in gone else "memory"
    limits = {"max_memory_growth": 0.5, "max_startup_growth": 0.5}
    assert outcomes(found, **limits)[check] == "pass"
    assert outcomes(replace(found, new=replace(found.new, **gone)), **limits)[check] == "inconclusive"
