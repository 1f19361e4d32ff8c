"""Signature: which axis is the batch, in graphs that say so and in those that do not."""

from __future__ import annotations

import pytest

from deploykit.signature import Signature, TensorSpec


def _signature(input_shape: tuple[int | str, ...], *outputs: tuple[int | str, ...]) -> Signature:
    return Signature(
        (TensorSpec("x", "float32", input_shape),), tuple(TensorSpec(f"y{i}", "float32", s) for i, s in enumerate(outputs))
    )


@pytest.mark.parametrize(
    ("given", "outputs", "fixed"),
    [
        (("batch", 3, 8, 8), [("batch", 4)], None),
        ((4, 3, 8, 8), [(4, 10)], 4),
        ((4, 3, 8, 8), [()], 4),  # four pictures in, one number out
        ((4, 8), [("found", 6)], 4),
        ((3, 8, 8), [(10,)], 1),  # one picture: its three channels are no batch
        ((), [()], 1),
    ],
)
def test_the_fixed_batch(given: tuple[int | str, ...], outputs: list[tuple[int | str, ...]], fixed: int | None) -> None:
    assert _signature(given, *outputs).fixed_batch == fixed


def test_an_input_without_a_batch_is_fed_as_it_is() -> None:
    signature = _signature((3, 8, 8), (10,))
    assert signature.batch_axis(signature.inputs[0]) is None
    assert signature.shapes(1) == {"x": (3, 8, 8)}
