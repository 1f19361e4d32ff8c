from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.errors import InputError
from deploykit.signature import ShapeRange, Signature, TensorSpec
from deploykit.trt import profiles

IMAGE = Signature((TensorSpec("x", "float32", ("batch", 3, 8, 8)),), (TensorSpec("y", "float32", ("batch", 4)),))
SIZES = Signature((TensorSpec("x", "float32", ("batch", 3, "h", "w")),), (TensorSpec("y", "float32", ("batch", 4)),))
STATE = Signature(
    (TensorSpec("x", "float32", ("batch", 4)), TensorSpec("h", "float32", (2, "batch", 8)), TensorSpec("k", "float32", (3,))),
    (TensorSpec("y", "float32", ("batch", 4)),),
)
FIXED = Signature((TensorSpec("x", "float32", (4, 3)),), (TensorSpec("y", "float32", (4, 1)),))


@given(st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_one_profile_covers_every_batch_in_order(batches: list[int]) -> None:
    (profile,) = profiles.for_batches(IMAGE, batches)
    low, best, high = profile["x"].min[0], profile["x"].opt[0], profile["x"].max[0]
    assert low == 1
    assert low <= best <= high == max(batches)
    assert best in batches
    assert profiles.from_json(profiles.to_json((profile,))) == (profile,)


def test_one_profile_for_each_batch() -> None:
    assert [p["x"].opt[0] for p in profiles.for_batches(IMAGE, (8, 1, 8), each=True)] == [1, 8]


def test_the_batch_axis_may_be_second_and_constants_get_no_range() -> None:
    (profile,) = profiles.for_batches(STATE, (1, 8, 32))
    assert set(profile) == {"x", "h"}
    assert profile["h"] == ShapeRange((2, 1, 8), (2, 8, 8), (2, 32, 8))


def test_other_axes_take_the_given_range() -> None:
    given_range = ShapeRange((1, 3, 32, 32), (1, 3, 64, 64), (1, 3, 64, 96))
    (profile,) = profiles.for_batches(SIZES, (1, 4), {"x": given_range})
    assert profile["x"] == ShapeRange((1, 3, 32, 32), (4, 3, 64, 64), (4, 3, 64, 96))


@pytest.mark.parametrize(
    ("signature", "batches", "shapes", "said"),
    [
        (SIZES, (1,), {}, "dynamic axis 'h'"),
        (SIZES, (1,), {"z": ShapeRange((1,), (1,), (1,))}, "no input 'z'"),
        (SIZES, (1,), {"x": ShapeRange((1, 3, 64, 64), (1, 3, 32, 64), (1, 3, 64, 64))}, "min 64, opt 32, max 64"),
        (SIZES, (1,), {"x": ShapeRange((1, 3), (1, 3), (1, 3))}, "rank 2"),
        (SIZES, (1,), {"x": ShapeRange((1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8))}, "always 3"),
        (IMAGE, (0, 1), {}, "1 or more"),
        (IMAGE, (), {}, "1 or more"),
        (FIXED, (1, 8), {}, "batch 4 baked in"),
    ],
)
def test_shapes_that_cannot_be_are_named(
    signature: Signature, batches: tuple[int, ...], shapes: dict[str, ShapeRange], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        profiles.for_batches(signature, batches, shapes)


def test_a_fixed_batch_does_not_hide_the_axis_that_has_no_range() -> None:
    sizes = Signature((TensorSpec("x", "float32", (4, 3, "h", "w")),), (TensorSpec("y", "float32", (4, 4)),))
    with pytest.raises(InputError, match="dynamic axis 'h'"):
        profiles.for_batches(sizes, (4,))


def test_a_static_graph_has_no_profile() -> None:
    assert profiles.for_batches(FIXED, (1, 4)) == ()
