"""roofline: the bound from the counts, and where a row stands under it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit import datasheet, roofline
from deploykit.roofline import Ceilings, Cost

MACHINE = Ceilings("test", "measured", {"fp32": 1e11, "int8": 8e11}, {1 << 10: 1e11, 1 << 20: 2e10})
COST = Cost(macs=1_000_000_000, weights=1_000_000, moved=500_000)


def test_a_multiply_accumulate_is_two_operations() -> None:
    least = roofline.bound(COST, "fp32", 4, MACHINE)
    assert least is not None
    assert least.compute_s == pytest.approx(4 * 2e9 / 1e11)
    assert least.nearer == "compute"


def test_weights_move_once_a_run_and_activations_with_the_batch() -> None:
    one, four = roofline.bound(COST, "fp32", 1, MACHINE), roofline.bound(COST, "fp32", 4, MACHINE)
    assert one is not None
    assert four is not None
    weights = 4e6 / 2e10  # 4 MB: the level of 1 MiB and more
    assert one.memory_s == pytest.approx(weights + 2e6 / 1e11)
    assert four.memory_s == pytest.approx(weights + 4 * 2e6 / 1e11)


def test_a_model_of_weights_alone_is_bound_by_memory() -> None:
    least = roofline.bound(Cost(1_000_000, 10_000_000, 10), "fp32", 1, MACHINE)
    assert least is not None
    assert least.nearer == "memory"
    assert least.least_s == pytest.approx(40e6 / 2e10, rel=1e-3)


def test_what_bounds_a_row() -> None:
    near = roofline.place(COST, "fp32", 1, 0.025, MACHINE)
    far = roofline.place(COST, "fp32", 1, 0.1, MACHINE)
    above = roofline.place(COST, "fp32", 1, 0.01, MACHINE)
    assert near is not None
    assert far is not None
    assert above is not None
    assert (near.share, near.bound_by) == (pytest.approx(0.8), "compute")
    assert (far.share, far.bound_by) == (pytest.approx(0.2), "overhead")
    assert near.words == "80% of the compute ceiling (80 of 100 Gop/s in fp32): bound by compute"
    assert "faster than what was measured as the ceiling" in above.words


def test_a_precision_without_a_ceiling_has_no_place() -> None:
    assert roofline.place(COST, "bf16", 1, 0.01, MACHINE) is None
    assert roofline.place(COST, "fp32", 1, 0.0, MACHINE) is None


def test_mixed_and_dynamic_graphs_are_held_against_the_integer_ceiling() -> None:
    dynamic, integer = (roofline.bound(COST, p, 1, MACHINE) for p in ("int8-dynamic", "int8"))
    assert dynamic == integer


@given(st.integers(1, 1 << 40), st.integers(1, 64), st.integers(1, 64))
def test_a_larger_batch_never_takes_less(macs: int, batch: int, more: int) -> None:
    cost = Cost(macs, 1000, 1000)
    small, large = roofline.bound(cost, "fp32", batch, MACHINE), roofline.bound(cost, "fp32", batch + more, MACHINE)
    assert small is not None
    assert large is not None
    assert small.least_s <= large.least_s


def test_a_summary_without_counts_has_no_cost() -> None:
    assert Cost.from_summary({"macs": None, "parameters": 3, "moved_values": 4}) is None
    assert Cost.from_summary({"macs": 0, "parameters": 3, "moved_values": 4}) is None
    assert Cost.from_summary({"macs": 5, "parameters": 3}) is None
    assert Cost.from_summary({"macs": 5, "parameters": 3, "moved_values": 4}) == Cost(5, 3, 4)


def test_ceilings_survive_json() -> None:
    assert Ceilings.from_json(MACHINE.to_json()) == MACHINE


def test_a_t4_has_no_bf16_and_an_unknown_card_no_bound() -> None:
    card = datasheet.ceilings("sm75")
    assert card is not None
    assert roofline.bound(COST, "bf16", 1, card) is None
    fp32, int8 = roofline.bound(COST, "fp32", 1, card), roofline.bound(COST, "int8", 1, card)
    assert fp32 is not None
    assert int8 is not None
    assert fp32.compute_s / int8.compute_s == pytest.approx(130 / 8.1)
    assert datasheet.ceilings("sm999") is None


@pytest.mark.parametrize("rates", [{}, {"1": 0}, {"1": float("inf")}, {"1": float("nan")}])
def test_ceilings_that_are_none_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Ceilings.from_json({**MACHINE.to_json(), "bytes_per_s": rates})
    with pytest.raises(AttributeError):
        Ceilings.from_json({**MACHINE.to_json(), "ops_per_s": 5})
