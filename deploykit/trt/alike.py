"""How two plans of one graph differ, byte by byte: the builder numbers what it names, and the numbers change from build to build."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

# Names and their numbers stand in the plan as text; behind it lie kernels and weights, each at an offset that the header tells.
_NUMBER = re.compile(rb"[0-9]+")
_PADDING = re.compile(rb"\0+")
_WORD = re.compile(rb"[\s\"]+")
_AROUND = 4096
_OFFSETS = 32  # bytes of lengths and offsets that change with a number's digits; seen: 6 to 10
_HEADERS = 1024  # bytes of the plan's and the kernels' headers that stand between blanks together with them
_BINARY = 4096  # bytes that are no text, from the first difference to the last; seen: 250 to 2,300 in 4 MB


@dataclass(frozen=True)
class Difference:
    """sizes: of both, in bytes; beyond: bytes that differ once numbers in text, and padding, are taken out; None for too many to be
    lengths and offsets, or where the rest has another length too; reordered: whether what is left is the same in another order, as
    lists that go by those numbers are; longer: whether the numbers of one have more digits in all, which padding may hide."""

    sizes: tuple[int, int]
    beyond: int | None
    reordered: bool = False
    longer: bool = False

    @property
    def names_only(self) -> bool:
        """Whether nothing but numbers in text differs, and the lengths and offsets that follow from them: there are none where size,
        order and the count of digits are the same."""
        moved = self.sizes[0] != self.sizes[1] or self.reordered or self.longer
        return self.beyond == 0 or (self.beyond is not None and moved)

    def __str__(self) -> str:
        a, b = self.sizes
        size = f"both have {a} bytes" if a == b else f"{a} and {b} bytes"
        if not self.names_only:
            return f"{size}, and not only in numbers inside the builder's internal names"
        found = ["numbers inside the builder's internal names"]
        if self.reordered:
            found.append("the order in which these are listed")
        if self.beyond:
            found.append(f"{self.beyond} bytes of lengths and offsets")
        return f"{size}, which differ only in {', and in '.join(found)}: same kernels, same weights"


def difference(one: bytes, other: bytes) -> Difference:
    """How two plans differ. Seen with TensorRT-RTX 1.7.1: in numbers like that of '__mye8540', and the bytes of lengths behind them."""
    same = _same_ends(one, other)
    if max(_binary(plan[same[0] : len(plan) - same[1]]) for plan in (one, other)) > _BINARY:
        return Difference((len(one), len(other)), None)  # it reaches into kernels or weights
    start, end = (max(0, length - _AROUND) for length in same)  # what differs may begin inside a number
    heads = [plan[start : len(plan) - end] for plan in (one, other)]
    bare = [_PADDING.sub(b"", _NUMBER.sub(b"#", head)) for head in heads]
    sizes = len(one), len(other)
    digits = [sum(map(len, _NUMBER.findall(head))) for head in heads]
    if abs(len(bare[0]) - len(bare[1])) > _OFFSETS:
        return Difference(sizes, None)
    left = _words_apart(bare[0], bare[1])
    if any(word.isascii() and word.decode().isprintable() for words in left for word in words):
        return Difference(sizes, None)  # lengths and offsets are no text
    size = min(map(len, bare))
    a, b = (np.frombuffer(text, np.uint8)[:size] for text in bare)
    beyond = int(np.count_nonzero(a != b)) + abs(len(bare[0]) - len(bare[1]))
    moved = _apart(*(b" ".join(words) for words in left))
    if moved < beyond:
        return Difference(sizes, moved if moved <= _OFFSETS else None, reordered=True)
    return Difference(sizes, beyond if beyond <= _OFFSETS else None, longer=digits[0] != digits[1])


def _binary(part: bytes) -> int:
    """How many bytes are neither text nor padding."""
    values = np.frombuffer(part, np.uint8)
    text = ((values >= 0x20) & (values < 0x7F)) | ((values >= 0x09) & (values <= 0x0D)) | (values == 0)
    return int(np.count_nonzero(~text))


def _words_apart(one: bytes, other: bytes) -> tuple[list[bytes], list[bytes]]:
    """The words of each that the other does not have, or has fewer times, in their order."""
    words = [_WORD.split(text) for text in (one, other)]
    counts = [Counter(each) for each in words]
    extra = counts[0] - counts[1], counts[1] - counts[0]
    mine, theirs = ([word for word in each if word in more] for each, more in zip(words, extra, strict=True))
    return mine, theirs


def _apart(one: bytes, other: bytes) -> int:
    """How many bytes of the longer one the other does not have at their place in line; all of them where they are too long to be
    headers."""
    longer = max(len(one), len(other))
    if longer > _HEADERS:
        return longer
    return longer - sum(block.size for block in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks())


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
