"""Option texts into values, each with an error that shows the right form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.errors import InputError, UnknownName

if TYPE_CHECKING:
    from pathlib import Path

    from deploykit.pipeline.request import Int8Request
    from deploykit.signature import ShapeRange, TensorSpec
    from deploykit.stages.gate import LimitSet
    from deploykit.stages.mixed import Budget


def batches(text: str) -> tuple[int, ...]:
    """Batch sizes from `1,8,32`, in the order given, without repeats."""
    try:
        sizes = tuple(dict.fromkeys(int(t) for t in text.split(",")))
    except ValueError as exc:
        raise InputError(f"--batch '{text}' is not a list of whole numbers", "example: --batch 1,8") from exc
    if not sizes or min(sizes) < 1 or max(sizes) > 65536:
        raise InputError(f"--batch '{text}': every size must lie between 1 and 65536", "example: --batch 1,8")
    return sizes


def names(text: str | None) -> tuple[str, ...] | None:
    """Names from `a,b`; None when nothing was given."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(t.strip() for t in text.split(",") if t.strip()))
    if not found:
        raise InputError("an empty list of names was given", "leave the option out to have the default")
    return found


def inputs(texts: list[str] | None) -> tuple[TensorSpec, ...]:
    """Tensor specs from `NAME:DTYPE:SHAPE` texts."""
    from deploykit.source_spec import parse_input

    return tuple(parse_input(text) for text in texts or ())


def shapes(texts: list[str] | None) -> dict[str, ShapeRange]:
    """Ranges from `NAME=1x3x320x320:8x3x320x320:32x3x640x640` (min:opt:max) texts; one shape serves for all three."""
    from deploykit.signature import ShapeRange

    found: dict[str, ShapeRange] = {}
    for text in texts or ():
        name, mark, rest = text.rpartition("=")
        parts = rest.split(":")
        if not mark or not name or len(parts) not in (1, 3):
            raise InputError(
                f"--shapes '{text}' is not NAME=min:opt:max", "example: --shapes x=1x3x320x320:8x3x320x320:32x3x640x640"
            )
        try:
            low, opt, high = (tuple(int(d) for d in p.split("x")) for p in (parts * 3 if len(parts) == 1 else parts))
        except ValueError as exc:
            raise InputError(f"--shapes '{text}': a shape is whole numbers joined by x", "example: 1x3x224x224") from exc
        if not len(low) == len(opt) == len(high):
            raise InputError(f"--shapes '{text}': min, opt and max have different ranks")
        if any(not 0 < a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
            raise InputError(f"--shapes '{text}': every axis needs 0 < min <= opt <= max")
        found[name] = ShapeRange(low, opt, high)
    return found


def positive(value: int | None, option: str) -> int | None:
    """The value itself; InputError below 1."""
    if value is not None and value < 1:
        raise InputError(f"{option} {value} must be at least 1")
    return value


def io(text: str, backend: str, precision: str) -> str:
    """What a static INT8 file takes and gives, 'float' or 'int8'; InputError for a backend or precision that has no choice."""
    if text not in ("float", "int8"):
        raise UnknownName("kind of inputs and outputs", text, ("float", "int8"))
    if text != "float" and (backend, precision) != ("litert", "int8"):
        raise InputError(f"--io {text} is for --backend litert --precision int8", "leave --io out")
    return text


def gib(value: float | None, option: str) -> int | None:
    """Bytes from GiB; InputError for what is no size."""
    if value is not None and not 0 < value < 2**33:
        raise InputError(f"{option} {value} is no size in GiB", f"example: {option} 8")
    return None if value is None else max(int(value * 2**30), 1)


def count_or_all(text: str, option: str) -> int | None:
    """A whole number of at least 0; None for 'all'."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise InputError(f"{option} '{text}' is neither a whole number nor 'all'", f"example: {option} 10")
    return int(text)


def counts(text: str | None, option: str) -> tuple[int, ...] | None:
    """Whole numbers of at least 1 from `1,2,4`; None when nothing was given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} '{text}' is not a list of whole numbers of at least 1", f"example: {option} 1,2")
    return tuple(dict.fromkeys(int(part) for part in parts))


def seconds(text: str, option: str) -> float:
    """Seconds from '90s', '2m' or '1h'."""
    number, scale = (text[:-1], {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:]))
    try:
        found = float(number) * (scale or 0.0)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e7:
        raise InputError(f"{option} '{text}' is no length of time", f"example: {option} 60s")
    return found


def memory_bytes(text: str, option: str) -> int:
    """Bytes from '500MB' or '2GB' (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        number = text.upper().removesuffix(unit)
        if number != text.upper():
            try:
                found = float(number) * scale
            except ValueError:
                break
            if 0 < found < 1e15:
                return int(found)
    raise InputError(f"{option} '{text}' is no amount of memory", f"example: {option} 500MB")


@dataclass(frozen=True)
class Load:
    """How a row is run and loaded: requests at once, layout in memory, LoadGen's scenario, Server's bound."""

    streams: int
    layout: str
    scenario: str | None
    server_latency_s: float


def load(streams: int, layout: str, scenario: str | None, server_latency: str) -> Load:
    """The options of the load. Raises UnknownName for a scenario or a layout, InputError for a latency or a count that is none."""
    from deploykit import loadgen

    positive(streams, "--streams")
    layouts(layout)
    name = loadgen.scenario(scenario) if scenario is not None else None
    return Load(streams, layout, name, loadgen.latency_s(server_latency, "--server-latency"))


def layouts(text: str | None) -> tuple[str, ...] | None:
    """Layouts in memory, separated by commas; None for None. Raises UnknownName."""
    from deploykit.session import LAYOUTS

    found = names(text)
    for name in found or ():
        if name not in LAYOUTS:
            raise UnknownName("layout", name, LAYOUTS)
    return found


def budget(max_drop: str | None, min_sqnr: float | None, min_agreement: float | None) -> Budget | None:
    """The budget of mixed precision; None where no limit was given."""
    from deploykit.stages import gate
    from deploykit.stages.mixed import Budget

    if max_drop is None and min_sqnr is None and min_agreement is None:
        return None
    return Budget(gate.parse_drop(max_drop) if max_drop is not None else None, min_sqnr, min_agreement)


def limits(
    max_drop: str | None,
    max_slowdown: str | None,
    max_size_growth: str | None,
    max_memory_growth: str | None,
    max_startup_growth: str | None,
    max_disagreement: str | None,
    file: Path | None,
) -> LimitSet:
    """The gate's limits: the options stand for every row, the file's `limits` list for the rows it names."""
    from deploykit.stages import gate

    def growth(text: str | None, option: str) -> float | None:
        return gate.parse_growth(text, option) if text is not None else None

    default = gate.Limits(
        gate.parse_drop(max_drop) if max_drop is not None else None,
        gate.parse_slowdown(max_slowdown) if max_slowdown is not None else None,
        growth(max_size_growth, "--max-size-growth"),
        growth(max_memory_growth, "--max-memory-growth"),
        growth(max_startup_growth, "--max-startup-growth"),
        gate.parse_disagreement(max_disagreement) if max_disagreement is not None else None,
    )
    from deploykit.cli import config

    return gate.LimitSet(default, config.rules(file) if file is not None else ())


def int8(
    bias_correct: bool | None,
    scale_correct: bool | None,
    weight_scales: str,
    reduce_range: bool,
    rounding: str,
    equalize: bool = False,
) -> Int8Request:
    """The switches of INT8. Raises UnknownName for a name that is no choice."""
    from deploykit.errors import UnknownName
    from deploykit.pipeline.request import Int8Request
    from deploykit.stages import precision

    for kind, name, choices in (
        ("weight scale", weight_scales, precision.WEIGHT_SCALES),
        ("rounding", rounding, precision.ROUNDINGS),
    ):
        if name not in choices:
            raise UnknownName(kind, name, choices)
    return Int8Request(bias_correct, weight_scales, reduce_range, rounding, equalize, scale_correct)
