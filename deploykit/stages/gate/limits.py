"""What may be lost, and how a person writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from deploykit.errors import InputError
from deploykit.row import Row


@dataclass(frozen=True)
class Limits:
    """What may be lost: top-1 in percentage points, throughput as a fraction (0.05 = 5 % slower), by what share size, peak
    memory and the time to open the engine may grow (0.1 = 10 % more), and for how many samples in a hundred the top-1 may be
    another than the reference's (which needs no labels); None: not asked for."""

    max_drop_pp: float | None = None
    max_slowdown: float | None = None
    max_size_growth: float | None = None
    max_memory_growth: float | None = None
    max_startup_growth: float | None = None
    max_disagreement_pp: float | None = None

    @property
    def timed(self) -> bool:
        """Whether a limit asks for what only running both engines in one job can show well."""
        return any(x is not None for x in (self.max_slowdown, self.max_memory_growth, self.max_startup_growth))

    def over(self, default: Limits) -> Limits:
        """These limits, the ones not asked for taken from `default`."""
        return Limits(**{f.name: getattr(default if getattr(self, f.name) is None else self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Rule:
    """Limits of some rows: every row that has the values of `where` (name, backend, precision, batch)."""

    where: Mapping[str, str | int]
    limits: Limits

    def covers(self, row: Row) -> bool:
        """Whether the row is one of them."""
        return all(getattr(row, key) == value for key, value in self.where.items())


@dataclass(frozen=True)
class LimitSet:
    """Limits of every row: of the rules that cover it, the last one stands first; what none of them says, `default` does."""

    default: Limits = Limits()
    rules: tuple[Rule, ...] = ()

    def of(self, row: Row) -> Limits:
        """The row's limits."""
        found = Limits()
        for rule in reversed(self.rules):
            if rule.covers(row):
                found = found.over(rule.limits)
        return found.over(self.default)

    def all(self) -> tuple[Limits, ...]:
        """Every set of limits that a row could have, for a look at what is asked for at all."""
        return (self.default, *(rule.limits for rule in self.rules))

    def asks(self, name: str) -> bool:
        """Whether any row has that limit."""
        return any(getattr(limits, name) is not None for limits in self.all())

    @property
    def timed(self) -> bool:
        """Whether any row has a limit that asks for both engines to run in one job."""
        return any(limits.timed for limits in self.all())


def parse_drop(text: str) -> float:
    """'0.5pp' as 0.5: percentage points of top-1. Raises InputError for another unit: '0.5%' could be meant relatively."""
    return _parse(text, r"pp", "--max-drop", "percentage points of top-1, like 0.5pp")


def parse_disagreement(text: str) -> float:
    """'1pp' as 1.0: samples in a hundred whose top-1 is not the reference's. Raises InputError for another unit."""
    return _parse(text, r"pp", "--max-disagreement", "percentage points of the samples, like 1pp")


def parse_growth(text: str, option: str) -> float:
    """'10%' as 0.1: by what share something may grow. Raises InputError for another unit."""
    return _parse(text, r"%", option, "a percentage, like 10%") / 100


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
