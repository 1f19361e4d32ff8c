"""How long measuring will take, said before it starts."""

from __future__ import annotations

import pytest

from deploykit.errors import UnknownName
from deploykit.pipeline import measuring
from deploykit.stages import bench


@pytest.mark.parametrize(("n", "name", "said"), [(1, "smoke", "1 row, smoke: about 3 s"), (0, "quick", "0 rows to measure")])
def test_a_short_span_is_given_in_seconds(n: int, name: str, said: str) -> None:
    assert measuring.expectation(n, name) == said


def test_a_long_one_in_minutes_or_hours() -> None:
    assert measuring.expectation(12, "mlperf") == "12 rows, mlperf: 2.0 to 2.2 hours"
    assert measuring.expectation(12, "standard") == "12 rows, standard: 2 to 6 minutes"
    with pytest.raises(UnknownName, match="mlpref"):
        measuring.expectation(1, "mlpref")


def test_what_is_expected_grows_with_rows_and_lies_around_the_time_asked_for() -> None:
    span = bench.duration("quick")
    low, high = bench.expected_s(4, span)
    assert low == 4 * span.seconds < high
    assert bench.expected_s(8, span) == (2 * low, 2 * high)
