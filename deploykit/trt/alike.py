"""How two plans of one graph differ, byte by byte: the builder numbers what it names, and the numbers change from build to build."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

# Names and their numbers stand in the plan as text; behind it lie kernels and weights, each at an offset that the header tells.
_NUMBER = re.compile(rb"[0-9]+")
_PADDING = re.compile(rb"\0+")
_OFFSETS = 32  # bytes of lengths and offsets that change with a number's digits; seen: 6 or 7


@dataclass(frozen=True)
class Difference:
    """sizes: of both, in bytes; beyond: bytes that differ once numbers in text, and padding, are taken out; None for too many to be
    lengths and offsets, or where the rest has another length too."""

    sizes: tuple[int, int]
    beyond: int | None

    @property
    def names_only(self) -> bool:
        """Whether nothing but numbers in text differs, and the lengths and offsets that follow from them: where the size is the same,
        there are none."""
        return self.beyond == 0 or (self.beyond is not None and self.sizes[0] != self.sizes[1])

    def __str__(self) -> str:
        a, b = self.sizes
        size = f"both have {a} bytes" if a == b else f"{a} and {b} bytes"
        if not self.names_only:
            return f"{size}, and not only in numbers inside the builder's internal names"
        more = f", and in {self.beyond} bytes of lengths and offsets" if self.beyond else " alone"
        return f"{size}, which differ in numbers inside the builder's internal names{more}: same kernels, same weights"


def difference(one: bytes, other: bytes) -> Difference:
    """How two plans differ. Seen with TensorRT-RTX 1.7.1: in numbers like that of '__mye8540', and the bytes of lengths behind them."""
    start, end = _same_ends(one, other)
    heads = [plan[start : len(plan) - end] for plan in (one, other)]
    # a number may be cut where the ends meet: its digits go with those before and after it
    heads = [_digits_before(one, start) + head + _digits_after(one, end) for head in heads]
    bare = [_PADDING.sub(b"\0", _NUMBER.sub(b"#", head)) for head in heads]
    sizes = len(one), len(other)
    if abs(len(bare[0]) - len(bare[1])) > _OFFSETS:
        return Difference(sizes, None)
    size = min(map(len, bare))
    a, b = (np.frombuffer(text, np.uint8)[:size] for text in bare)
    beyond = int(np.count_nonzero(a != b)) + abs(len(bare[0]) - len(bare[1]))
    return Difference(sizes, beyond if beyond <= _OFFSETS else None)


def _same_ends(one: bytes, other: bytes) -> tuple[int, int]:
    """How many bytes are the same at the beginning, and of the rest at the end."""
    size = min(len(one), len(other))
    a, b = np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)
    apart = np.flatnonzero(a[:size] != b[:size])
    start = int(apart[0]) if len(apart) else size
    left = size - start
    if not left:
        return start, 0
    apart = np.flatnonzero(a[len(a) - left :] != b[len(b) - left :])
    return start, int(left - 1 - apart[-1]) if len(apart) else left


def _digits_before(plan: bytes, start: int) -> bytes:
    found = re.search(rb"[0-9]*$", plan[max(0, start - 20) : start])
    return found[0] if found else b""


def _digits_after(plan: bytes, end: int) -> bytes:
    found = _NUMBER.match(plan[len(plan) - end :][:20])
    return found[0] if found else b""
