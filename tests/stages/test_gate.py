"""The gate: fails on the interval, passes on the interval, and is never open when something is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_rows import REFERENCE, a_report, an_ok_row

from deploykit.errors import InputError
from deploykit.report_document import Report, row_id
from deploykit.row import Row
from deploykit.stages import gate
from deploykit.stages.gate import Limits, RowOutcomes, judge
from deploykit.stages.gate.intervals import Change, decide, paired_drop, slowdown
from deploykit.stages.report import junit
from deploykit.verdict import Verdict

BOTH = Limits(max_drop_pp=0.5, max_slowdown=0.05)


def reference(**given: Any) -> Row:
    one = {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0, "top1_drop_low": 0.0, "top1_drop_high": 0.0, "top1": 0.971}
    return an_ok_row(**{"backend": "torch", "precision": "fp32", "images_per_s": 100.0, "top1_drop_pp": 0.0, **one, **given})


def with_row(launches: int = 5, **given: Any) -> Report:
    """The reference and one OpenVINO row, measured in five launches."""
    doc: dict[str, Any] = {"top1": 0.97, "top1_drop_pp": 0.1, "speedup": 5.0} | given
    if doc["speedup"]:
        doc = {"images_per_s": 100.0 * doc["speedup"]} | doc
    row = an_ok_row(**doc)
    return a_report(rows=(reference(), row), measurements={row_id(r): {"launches": [[]] * launches} for r in (reference(), row)})


def outcome_of(verdict: Verdict, check: str) -> str:
    return next(r.outcome for r in verdict.reasons if r.check == check)


def outcomes(report: Report, correct: np.ndarray[Any, Any], samples: str = "s") -> dict[str, RowOutcomes]:
    return {row_id(r): RowOutcomes(samples, correct) for r in report.rows}


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("0.5pp", 0.5), ("1 pp", 1.0), (".25pp", 0.25), ("0pp", 0.0)])
def test_a_drop_is_given_in_percentage_points(text: str, value: float) -> None:
    assert gate.parse_drop(text) == value


@pytest.mark.parametrize("text", ["0.5", "0.5%", "", "pp", "-1pp", "1e1pp", "nanpp", "0,5pp"])
def test_a_drop_in_another_unit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="percentage points"):
        gate.parse_drop(text)


def test_a_slowdown_is_given_in_per_cent() -> None:
    assert gate.parse_slowdown("5%") == pytest.approx(0.05)
    for text in ("5", "0.05", "5pp", "-5%", "100%", "inf%"):
        with pytest.raises(InputError):
            gate.parse_slowdown(text)


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_a_limit_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="no limit"):
        judge(a_report(), None, Limits(max_drop_pp=value))


# -- without a baseline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(-0.2, 0.4, "pass"), (-0.2, 0.5, "pass"), (-0.2, 0.6, "inconclusive"), (0.6, 2.0, "fail")]
)
def test_the_interval_decides(low: float, high: float, outcome: str) -> None:
    drop = (low + high) / 2
    report = with_row(top1=0.971 - drop / 100, top1_drop_pp=drop, top1_drop_low=low, top1_drop_high=high)
    assert judge(report, None, Limits(max_drop_pp=0.5)).outcome == outcome


def test_rows_that_did_not_run_are_listed_and_do_not_pass_by_themselves() -> None:
    verdict = judge(a_report(), None, Limits(max_drop_pp=0.5))
    assert verdict.outcome == "fail"  # the ONNX Runtime row lost 7 pp
    assert sum("failed: killed by SIGSEGV" in s for s in verdict.skipped) == 2
    nothing = a_report(rows=tuple(r for r in a_report().rows if r.status != "ok"))
    assert judge(nothing, None, Limits(max_drop_pp=0.5)).outcome == "inconclusive"


@pytest.mark.parametrize("samples", [{}, {"judge": {"n": 9, "random": True}}, {"judge": {"n": 9, "labelled": False}}])
def test_without_labels_a_drop_cannot_be_judged(samples: dict[str, Any]) -> None:
    row = an_ok_row(top1=None, top5=None, top1_drop_pp=None)
    verdict = judge(a_report(rows=(row,), samples=samples), None, Limits(max_drop_pp=0.5))
    assert verdict.outcome == "inconclusive"
    assert "asks for statistics it cannot have" in verdict.reasons[0].message


def test_a_slowdown_needs_a_baseline() -> None:
    assert judge(with_row(), None, BOTH).outcome == "inconclusive"


def test_no_limit_is_no_pass() -> None:
    assert judge(with_row(), None, Limits()).outcome == "inconclusive"
    assert judge(with_row(), with_row(), Limits()).outcome == "inconclusive"


def test_nan_fails() -> None:
    bad = with_row(top1_drop_pp=math.nan)
    assert judge(bad, None, Limits(max_drop_pp=0.5)).outcome == "fail"
    slow = with_row(speedup=math.nan, images_per_s=500.0)
    assert outcome_of(judge(slow, with_row(), BOTH), "speed") == "fail"


def test_no_changed_sample_passes_only_where_one_sample_is_within_the_limit() -> None:
    for n, outcome in ((360, "pass"), (100, "inconclusive"), (None, "inconclusive")):
        report = with_row(top1=0.971, top1_drop_pp=0.0, top1_drop_low=0.0, top1_drop_high=0.0)
        report = replace(report, samples={"judge": {"n": n, "labelled": True}})
        assert judge(report, None, Limits(max_drop_pp=0.5)).outcome == outcome


def test_a_report_that_contradicts_itself_does_not_pass() -> None:
    assert judge(with_row(top1=0.90), None, Limits(max_drop_pp=0.5)).outcome == "inconclusive"
    assert judge(with_row(images_per_s=300.0), with_row(), Limits(max_slowdown=0.05)).outcome == "inconclusive"


def test_a_report_that_contradicts_itself_fails_where_what_it_says_fails() -> None:
    assert judge(with_row(top1=0.971, top1_drop_pp=9.0), None, Limits(max_drop_pp=0.5)).outcome == "fail"
    assert judge(with_row(speedup=2.0, images_per_s=500.0), with_row(), Limits(max_slowdown=0.05)).outcome == "fail"


# -- against a baseline ------------------------------------------------------------------------------------------------


def test_the_same_report_passes() -> None:
    verdict = judge(with_row(), with_row(), BOTH)
    assert verdict.outcome == "pass"
    assert {r.check for r in verdict.reasons} == {"top-1 drop", "speed"}


@settings(max_examples=60, deadline=None)
@given(
    speed=st.floats(0.05, 500),
    width=st.floats(0, 0.5),
    drop=st.floats(-20, 20),
    half=st.floats(0, 10),
    slow=st.floats(0, 0.5),
    pp=st.floats(0, 10),
    launches=st.integers(1, 9),
)
def test_a_row_against_itself_never_fails(
    speed: float, width: float, drop: float, half: float, slow: float, pp: float, launches: int
) -> None:
    given_row = {
        "speedup": speed,
        "speedup_low": speed * (1 - width),
        "speedup_high": speed * (1 + width),
        "top1": 0.5 - drop / 100,
        "top1_drop_pp": drop,
        "top1_drop_low": drop - half,
        "top1_drop_high": drop + half,
    }
    row = an_ok_row(images_per_s=100 * speed, **given_row)
    report = a_report(rows=(reference(top1=0.5), row), measurements={row_id(row): {"launches": [[]] * launches}})
    again = replace(report, rows=(report.rows[0], replace(row, p50_s=0.00201, sqnr_db=30.1)))  # measured anew, the same result
    verdict = judge(again, report, Limits(pp, slow))
    assert verdict.outcome in ("pass", "inconclusive"), verdict


@settings(max_examples=40, deadline=None)
@given(lost=st.floats(0.15, 0.9), width=st.floats(0, 0.03))
def test_a_clear_slowdown_fails(lost: float, width: float) -> None:
    speed = 5.0 * (1 - lost)
    now = with_row(speedup=speed, speedup_low=speed * (1 - width), speedup_high=speed * (1 + width))
    assert outcome_of(judge(now, with_row(), BOTH), "speed") == "fail"


def test_a_wide_interval_is_inconclusive() -> None:
    wide = with_row(speedup=4.9, speedup_low=4.0, speedup_high=6.0)
    assert outcome_of(judge(wide, with_row(), BOTH), "speed") == "inconclusive"
    unsure = with_row(top1=0.971 - 0.001, top1_drop_pp=0.1, top1_drop_low=-2.0, top1_drop_high=2.0, sqnr_db=29.0)
    assert outcome_of(judge(unsure, with_row(), BOTH), "top-1 drop") == "inconclusive"


def test_few_launches_widen_the_interval() -> None:
    tight = {"speedup_low": 4.99, "speedup_high": 5.01}
    slower = {"speedup": 4.85, "speedup_low": 4.84, "speedup_high": 4.86}  # 3 % slower
    assert outcome_of(judge(with_row(5, **slower), with_row(5, **tight), BOTH), "speed") == "pass"
    assert outcome_of(judge(with_row(1, **slower), with_row(1, **tight), BOTH), "speed") == "inconclusive"


def test_an_unstable_row_passes_never_and_fails_only_clearly() -> None:
    shaky = with_row(stable=False, cov=0.05, speedup=4.99)
    assert outcome_of(judge(shaky, with_row(), BOTH), "speed") == "inconclusive"
    slower = with_row(stable=False, cov=0.05, speedup=4.4)
    assert outcome_of(judge(slower, with_row(), BOTH), "speed") == "inconclusive"
    much = with_row(stable=False, cov=0.05, speedup=2.5)
    assert outcome_of(judge(much, with_row(), BOTH), "speed") == "fail"
    assert outcome_of(judge(with_row(speedup=4.9), with_row(stable=False), BOTH), "speed") == "inconclusive"


def test_a_faster_row_passes() -> None:
    assert judge(with_row(speedup=8.0), with_row(), BOTH).outcome == "pass"


@pytest.mark.parametrize("status", ["skipped", "failed", "built"])
def test_a_row_that_no_longer_runs_fails(status: str) -> None:
    now = with_row()
    gone = replace(now, rows=(now.rows[0], Row("tiny", "openvino", "int8", 1, status, reason="why")))
    verdict = judge(gone, with_row(), BOTH)
    assert verdict.outcome == "fail"
    assert f"now {status}: why" in verdict.reasons[0].message


def test_a_missing_row_fails_and_an_extra_one_is_noted() -> None:
    now = with_row()
    assert judge(replace(now, rows=now.rows[:1]), with_row(), BOTH).outcome == "fail"
    more = replace(now, rows=(*now.rows, an_ok_row(backend="litert")))
    verdict = judge(more, with_row(), BOTH)
    assert verdict.outcome == "pass"
    assert any("litert" in s and "not in the baseline" in s for s in verdict.skipped)


def test_a_row_that_ran_in_neither_is_listed() -> None:
    verdict = judge(a_report(), a_report(), BOTH)
    assert sum("tensorrt fp16" in s for s in verdict.skipped) == 2
    assert not any("tensorrt" in r.row for r in verdict.reasons)


def test_an_engine_that_no_longer_builds_fails() -> None:
    rows = tuple(replace(r, status="failed", reason="out of memory") if r.status == "built" else r for r in a_report().rows)
    assert any(r.check == "row" and r.outcome == "fail" for r in judge(a_report(rows=rows), a_report(), BOTH).reasons)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"model": {"name": "tiny", "digest": "ef" * 32}}, "fail"),
        ({"model": {}}, "inconclusive"),
        ({"samples": {"judge": {"n": 360, "labelled": True, "digest": "xx"}}}, "fail"),
        ({"environment": {"cpu": "another CPU"}}, "inconclusive"),
        ({"environment": {}}, "inconclusive"),
        ({"versions": {"torch": "2.15.0"}}, "inconclusive"),
        ({"versions": {}}, "inconclusive"),
        ({"reference": {**REFERENCE, "backend": "onnxruntime"}}, "inconclusive"),
        ({"rows": ()}, "fail"),
    ],
)
def test_another_run_is_no_comparison(change: dict[str, Any], outcome: str) -> None:
    assert judge(replace(with_row(), **change), with_row(), BOTH).outcome == outcome
    if "rows" not in change:
        assert judge(with_row(), replace(with_row(), **change), BOTH).outcome == outcome


def test_an_empty_baseline_passes_nothing() -> None:
    assert judge(with_row(), replace(with_row(), rows=()), BOTH).outcome == "inconclusive"


@pytest.mark.parametrize(
    "change",
    [{"threads": 4}, {"device": "cuda"}, {"clock": "other"}, {"boundary": "device"}, {"speedup_low": None}, {"speedup": None}],
)
def test_speed_of_unlike_rows_is_not_judged(change: dict[str, Any]) -> None:
    assert outcome_of(judge(with_row(**change), with_row(), BOTH), "speed") == "inconclusive"


@pytest.mark.parametrize("key", ["top1_drop_pp", "top1_drop_low", "top1_drop_high"])
def test_a_missing_drop_is_not_judged(key: str) -> None:
    gone = with_row(**{"sqnr_db": 1.0, key: None})
    for pair in ((gone, with_row()), (with_row(), gone)):
        assert outcome_of(judge(*pair, BOTH), "top-1 drop") == "inconclusive"


def test_rows_of_one_name_are_told_apart_by_threads_or_not_at_all() -> None:
    one, two = an_ok_row(images_per_s=500.0), an_ok_row(threads=1, images_per_s=500.0)
    both = replace(with_row(), rows=(reference(), one, two))
    assert judge(both, both, BOTH).outcome == "pass"
    twice = replace(both, rows=(reference(), one, one))
    assert judge(twice, twice, BOTH).outcome == "inconclusive"


def test_an_aa_copy_is_neither_judged_nor_missed() -> None:
    copy = reference(notes="A/A: the reference again, in processes of its own", speedup=1.0)
    base = with_row()
    assert judge(base, replace(base, rows=(*base.rows, copy)), BOTH).outcome == "pass"
    assert judge(replace(base, rows=(*base.rows, copy)), base, BOTH).outcome == "pass"


# -- paired outcomes ---------------------------------------------------------------------------------------------------


def test_a_planted_point_on_ten_thousand_samples_fails_paired() -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        old = rng.random(10_000) < 0.9
        flips = rng.random(10_000)
        new = np.where(old, flips > 0.015, flips < 0.035)  # loses 1.35 pp, wins 0.35 pp back: 1 pp net
        change, p = paired_drop(new, old)
        found.append(decide(change, 0.5))
        assert 0 <= p <= 1
    assert found.count("fail") >= 190
    assert "pass" not in found


def test_paired_intervals_cover_the_truth() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        u = rng.random(2000)
        old, new = u < 0.9, (u < 0.88) | (u > 0.99)  # truly 1 pp worse
        change, _ = paired_drop(new, old)
        inside += change.low <= 1.0 <= change.high
    assert inside >= 370


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.randoms(use_true_random=False))
def test_a_paired_interval_holds_its_value_and_turns_with_the_sides(n: int, random: Any) -> None:
    a, b = (np.array([random.random() < 0.8 for _ in range(n)]) for _ in range(2))
    there, p = paired_drop(a, b)
    back, q = paired_drop(b, a)
    assert there.low <= there.value <= there.high
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert p == pytest.approx(q)


def test_mcnemar_agrees_with_the_binomial_test() -> None:
    from scipy.stats import binomtest

    old = np.array([True] * 12 + [False] * 5 + [True] * 100)
    new = np.array([False] * 12 + [True] * 5 + [True] * 100)
    assert paired_drop(new, old)[1] == pytest.approx(binomtest(5, 17).pvalue)


def test_paired_outcomes_are_used_where_both_sides_have_them() -> None:
    now, was = with_row(), with_row()
    right = np.ones(10_000, dtype=bool)
    wrong = right.copy()
    wrong[:200] = False
    same = judge(now, was, BOTH, outcomes=outcomes(now, right), baseline_outcomes=outcomes(was, right))
    assert same.outcome == "pass"
    worse = judge(now, was, BOTH, outcomes=outcomes(now, wrong), baseline_outcomes=outcomes(was, right))
    assert worse.outcome == "fail"
    assert "McNemar" in next(r.message for r in worse.reasons if r.outcome == "fail")


def test_a_reference_that_changed_is_judged_on_its_outcomes() -> None:
    now, was = with_row(), with_row()
    right = np.ones(10_000, dtype=bool)
    wrong = right.copy()
    wrong[:300] = False
    mine = outcomes(now, right) | {row_id(now.rows[0]): RowOutcomes("s", wrong)}
    verdict = judge(now, was, BOTH, outcomes=mine, baseline_outcomes=outcomes(was, right))
    assert [r.row for r in verdict.reasons if r.outcome == "fail"] == [now.rows[0].label]


def test_few_samples_that_stay_the_same_are_inconclusive_unless_the_outputs_are_the_same() -> None:
    was, right = with_row(), np.ones(360, dtype=bool)
    for sqnr, outcome in ((30.0, "pass"), (30.000001, "inconclusive")):
        now = with_row(sqnr_db=sqnr)
        verdict = judge(now, was, BOTH, outcomes=outcomes(now, right), baseline_outcomes=outcomes(was, right))
        assert outcome_of(verdict, "top-1 drop") == outcome


def test_outcomes_of_other_samples_fail() -> None:
    now, was = with_row(), with_row()
    right = np.ones(1000, dtype=bool)
    now = replace(now, rows=(now.rows[0], replace(now.rows[1], sqnr_db=29.0)))
    for other in (outcomes(was, right, "t"), outcomes(was, right[:10]), outcomes(was, right[:0])):
        assert judge(now, was, BOTH, outcomes=outcomes(now, right), baseline_outcomes=other).outcome == "fail"


# -- the figures -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 1), st.floats(0, 1))
def test_a_slowdown_lies_in_its_interval(new: float, old: float, a: float, b: float) -> None:
    change = slowdown(Change(new, new * (1 - a), new * (1 + a)), Change(old, old * (1 - b), old * (1 + b)))
    assert change.low <= change.value + 1e-12
    assert change.value <= change.high + 1e-12
    assert change.high <= 1
    assert change.value == pytest.approx(1 - new / old)


# -- JUnit -------------------------------------------------------------------------------------------------------------


def test_junit_counts_and_escapes() -> None:
    report = with_row(name='<&"\x00>')
    verdict = judge(report, report, BOTH)
    suite = ElementTree.fromstring(junit.text(verdict))[0]
    assert suite.get("tests") == str(len(verdict.reasons) + len(verdict.skipped))
    worse = judge(a_report(), None, Limits(max_drop_pp=0.5))
    suite = ElementTree.fromstring(junit.text(worse))[0]
    assert (suite.get("failures"), suite.get("skipped")) == ("2", "8")
    assert len(suite.findall("testcase/failure")) == 2


def test_junit_never_shows_inconclusive_as_green() -> None:
    verdict = judge(with_row(), None, Limits())
    suite = ElementTree.fromstring(junit.text(verdict))[0]
    assert suite.get("errors") == "1"


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "outcome"), [("ok", "pass"), ("failed", "inconclusive"), ("skipped", "inconclusive")])
def test_a_limit_on_rows_of_which_none_ran_is_no_pass(status: str, outcome: str) -> None:
    report = with_row(backend="openvino")
    other = an_ok_row(backend="litert", images_per_s=500.0) if status == "ok" else Row("tiny", "litert", "int8", 1, status, "why")
    rules = (gate.Rule({"backend": "litert"}, Limits(max_drop_pp=0.5)),)
    verdict = judge(replace(report, rows=(*report.rows, other)), None, gate.LimitSet(Limits(max_drop_pp=0.5), rules))
    assert verdict.outcome == outcome
    assert any("none of them ran" in r.message for r in verdict.reasons) is (outcome != "pass")


# -- without labels ----------------------------------------------------------------------------------------------------


def unlabelled(agreement: float | None, n: int = 1000, **judge_: Any) -> Report:
    row = an_ok_row(agreement=agreement, top1=None, top1_drop_pp=None, top1_drop_low=None, top1_drop_high=None)
    return a_report(rows=(reference(top1=None), row), samples={"judge": {"n": n, "labelled": False, **judge_}})


@pytest.mark.parametrize(
    ("agreement", "n", "outcome"),
    [(0.999, 1000, "pass"), (0.95, 1000, "fail"), (0.99, 1000, "inconclusive"), (1.0, 50, "inconclusive"), (1.0, 1000, "pass")],
)
def test_disagreement_is_held_on_its_interval(agreement: float, n: int, outcome: str) -> None:
    verdict = judge(unlabelled(agreement, n), None, Limits(max_disagreement_pp=1.0))
    assert outcome_of(verdict, "disagreement") == outcome
    assert judge(unlabelled(agreement, n), unlabelled(1.0, n), Limits(max_disagreement_pp=1.0)).outcome == outcome


def test_disagreement_that_nothing_measured_never_passes() -> None:
    for report in (unlabelled(None), unlabelled(1.0, random=True), a_report(rows=unlabelled(1.0).rows, samples={})):
        verdict = judge(report, None, Limits(max_disagreement_pp=1.0))
        assert outcome_of(verdict, "disagreement") == "inconclusive"
    assert judge(unlabelled(1.5), None, Limits(max_disagreement_pp=1.0)).outcome == "fail"


def test_a_drop_without_labels_names_the_limit_that_needs_none() -> None:
    verdict = judge(unlabelled(1.0), None, Limits(max_drop_pp=1.0))
    assert "--max-disagreement 1pp" in next(r.message for r in verdict.reasons if r.check == "top-1 drop")


def test_another_layout_is_a_doubt_about_speed() -> None:
    base = with_row()
    assert judge(with_row(), base, Limits(max_slowdown=0.5)).outcome == "pass"
    verdict = judge(with_row(layout="channels-last"), base, Limits(max_slowdown=0.5))
    assert outcome_of(verdict, "speed") == "inconclusive"
    assert any("another layout" in r.message for r in verdict.reasons)
