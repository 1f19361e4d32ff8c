"""How two plans differ: in numbers inside text alone, or in more."""

from __future__ import annotations

import random

import pytest

from deploykit.trt.alike import difference


def _plan(*numbers: int, weights: int = 7) -> bytes:
    """Offsets, text with numbered names, padding to 8 bytes, and 4 kB of weights, as a plan has them."""
    text = b"".join(b'tensor={ name="__mye%d" type=int64 }\n' % n for n in numbers)
    text += b"\0" * (-len(text) % 8)
    return b"vtrt" + len(text).to_bytes(8, "little") + text + random.Random(weights).randbytes(4096)


def test_numbers_of_the_same_length_are_all_that_differs() -> None:
    found = difference(_plan(7298, 8540), _plan(7346, 8732))
    assert found.names_only
    assert found.beyond == 0
    assert str(found).endswith("differ only in numbers inside the builder's internal names: same kernels, same weights")


def test_numbers_of_another_length_move_the_lengths_too() -> None:
    one, other = _plan(*range(9990, 9998)), _plan(*range(9995, 10003))
    assert len(one) != len(other)
    found = difference(one, other)
    assert found.names_only
    assert found.beyond
    assert f"{len(one)} and {len(other)} bytes" in str(found)
    assert "bytes of lengths and offsets" in str(found)


def test_a_list_that_goes_by_the_numbers_may_be_in_another_order() -> None:
    texts = b'list={ "shape_mye%d" "proxy_mye%d" }', b'list={ "proxy_mye%d" "shape_mye%d" }'
    one, other = (_plan(1) + text % (120, 121) + bytes(64) for text in texts)
    found = difference(one, other)
    assert found.names_only
    assert "and in the order in which these are listed" in str(found)
    assert not difference(one, other.replace(b"shape", b"shade")).names_only


@pytest.mark.parametrize("where", [40, 2000, -1])
def test_one_byte_of_anything_else_is_told(where: int) -> None:
    one = _plan(7298, 8540)
    other = bytearray(one)
    other[where] ^= 0x80
    found = difference(one, bytes(other))
    assert not found.names_only
    assert "not only in numbers" in str(found)


def test_other_weights_are_told_whatever_the_size() -> None:
    for numbers in ((7298, 8540), (7298, 18540, 1, 2)):
        assert not difference(_plan(7298, 8540), _plan(*numbers, weights=8)).names_only


def test_the_same_plan_differs_in_nothing() -> None:
    assert difference(_plan(1), _plan(1)).beyond == 0


def _listed(order: int, number: int) -> bytes:
    """A plan whose list of numbered names stands in that order; 64 kB of weights."""
    names = [f'"{name}_mye{number + i}"' for i, name in enumerate(("shape", "proxy", "value", "stack", "scale", "index"))]
    text = "list={ " + " ".join(names[::order]) + " }"
    head = b"vtrt" + (5000 + len(text)).to_bytes(8, "little") + b"\x80 "
    return head + text.encode() + bytes(64) + random.Random(7).randbytes(65536)


def test_lists_in_another_order_and_numbers_of_another_length_at_once() -> None:
    one, other = _listed(1, 98), _listed(-1, 99)
    assert len(one) != len(other)
    found = difference(one, other)
    assert found.names_only
    assert found.reordered
    assert found.beyond
    assert not difference(one, other.replace(b"shape", b"shade")).names_only


@pytest.mark.parametrize(("order", "number"), [(1, 98), (-1, 99), (1, 98765)])
def test_one_byte_of_the_weights_is_told_whatever_else_differs(order: int, number: int) -> None:
    for at in (-1, -30000):
        other = bytearray(_listed(order, number))
        other[at] ^= 0x80
        assert difference(_listed(1, 98), _listed(order, number)).names_only
        assert not difference(_listed(1, 98), bytes(other)).names_only
