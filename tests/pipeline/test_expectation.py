"""How long measuring will take, said before it starts."""

from __future__ import annotations

import pytest

from deploykit import backends
from deploykit.errors import UnknownName
from deploykit.pipeline import measuring
from deploykit.stages import bench

ORT = "onnxruntime"


@pytest.mark.parametrize(("n", "name", "said"), [(1, "smoke", "1 row, smoke: about 3 s"), (0, "quick", "0 rows to measure")])
def test_a_short_span_is_given_in_seconds(n: int, name: str, said: str) -> None:
    assert measuring.expectation([ORT] * n, name) == said


def test_a_long_one_in_minutes_or_hours() -> None:
    assert measuring.expectation([ORT] * 12, "mlperf") == "12 rows, mlperf: 2.0 to 2.2 hours"
    assert measuring.expectation([ORT] * 12, "standard") == "12 rows, standard: 3 to 6 minutes"
    with pytest.raises(UnknownName, match="mlpref"):
        measuring.expectation([ORT], "mlpref")


def test_what_is_expected_grows_with_rows_and_lies_around_the_time_asked_for() -> None:
    span = bench.duration("quick")
    low, high = bench.expected_s([1.0] * 4, span)
    assert 4 * span.seconds < low < high
    assert bench.expected_s([1.0] * 8, span) == (2 * low, 2 * high)


def test_a_backend_that_opens_slowly_takes_longer() -> None:
    span = bench.duration("quick")
    slow = bench.expected_s([backends.opening_s("torch")], span)
    assert slow[0] > bench.expected_s([backends.opening_s(ORT)], span)[0] + span.launches
