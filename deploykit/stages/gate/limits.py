"""What may be lost, and how a person writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deploykit.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What may be lost: top-1 in percentage points, throughput as a fraction (0.05 = 5 % slower); None: not asked for."""

    max_drop_pp: float | None = None
    max_slowdown: float | None = None


def parse_drop(text: str) -> float:
    """'0.5pp' as 0.5: percentage points of top-1. Raises InputError for another unit: '0.5%' could be meant relatively."""
    return _parse(text, r"pp", "--max-drop", "percentage points of top-1, like 0.5pp")


def parse_slowdown(text: str) -> float:
    """'5%' as 0.05: the share of the throughput that may be lost. Raises InputError for another unit, and from 100 % on."""
    value = _parse(text, r"%", "--max-slowdown", "a percentage, like 5%") / 100
    if value >= 1:
        raise InputError(f"--max-slowdown {text!r} allows any slow-down", "give less than 100%")
    return value


def _parse(text: str, unit: str, option: str, wanted: str) -> float:
    found = re.fullmatch(rf"\s*(\d+(?:\.\d*)?|\.\d+)\s*{unit}\s*", text)
    if found is None:
        raise InputError(f"{option} {text!r} is not {wanted}", f"write {option} {wanted.split('like ')[1]}")
    return float(found[1])
