"""TVM functions scheduled for a CPU without any search: what an untuned engine runs.

TVM leaves a function that no search has covered as plain nested loops: one thread, no blocking. The rule here is the
textbook kernel: a tile of outputs stays in vector registers while the reduction runs, the innermost axis (channels, in the
NHWC graphs that `apache_tvm_compile` makes) is the vector, and the outer loops are shared among threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MOST_LANES = 4  # vectors of the innermost axis in one tile
_LONGEST_VECTOR = 64  # elements; where no divisor of the axis fits the registers better
# TVM keeps a buffer of up to 1,024 bytes on the stack, where LLVM turns it into registers; a longer one is memory
# (kMaxStackAlloca in tvm/runtime/device_api.h).
_STACK_BYTES = 1024


@dataclass(frozen=True)
class Registers:
    """A CPU's vector registers: `lanes` floats in each, `accumulators` of them to hold sums in."""

    lanes: int
    accumulators: int


def apply(module: Any, registers: Registers) -> tuple[Any, tuple[str, ...]]:
    """The module with a schedule on each function that has none, and the names of those that no rule fitted.

    A function that came from a tuning database is marked `tirx.is_scheduled` and left as it is.
    """
    from tvm import tirx

    plain: list[str] = []
    for name, function in module.functions_items():
        if not isinstance(function, tirx.PrimFunc) or (function.attrs and function.attrs.get("tirx.is_scheduled")):
            continue
        scheduled = of_function(function, registers)
        if scheduled is None:
            plain.append(str(name.name_hint))
        else:
            module[name] = scheduled.mod["main"].with_attr("tirx.is_scheduled", True)
    return module, tuple(plain)


def of_function(function: Any, registers: Registers) -> Any | None:
    """The `tvm.s_tir.Schedule` of one function; None where its blocks are not plain spatial and reduction loops."""
    from tvm import s_tir
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    errors = (s_tir.schedule.ScheduleError, RuntimeError, ValueError)
    for rule in (_with_tiles, _without_tiles):
        schedule = s_tir.Schedule(function)
        try:
            blocks = normalize_prim_func(schedule)
            if not blocks:
                return None
            rule(schedule, _inlined(schedule, blocks, errors), registers)
        except errors:  # a primitive that does not fit this function: the next rule is simpler
            continue
        return schedule
    return None


def _inlined(schedule: Any, blocks: list[Any], errors: tuple[type[Exception], ...]) -> list[Any]:
    """The blocks left once element-wise ones are part of their consumers; a padding in front of a reduction stays apart."""
    left = []
    for at, block in enumerate(blocks):
        feeds_reduction = at + 1 < len(blocks) and blocks[at + 1].is_reduction()
        if at + 1 < len(blocks) and block.is_injective() and not feeds_reduction:
            try:
                schedule.compute_inline(block.block_rv)
                continue
            except errors:
                pass
        left.append(block)
    return left


def _with_tiles(schedule: Any, blocks: list[Any], registers: Registers) -> None:
    """Convolutions and matrix products in register tiles, with the element-wise block behind them; the rest in vectors."""
    done = -1
    for at, block in enumerate(blocks):
        if at <= done:
            continue
        if _is_contraction(schedule, block):
            behind = blocks[at + 1] if at + 1 < len(blocks) and blocks[at + 1].is_injective() else None
            _tile(schedule, block, behind, registers)
            done = at + (behind is not None)
        else:
            _vectors(schedule, block)


def _without_tiles(schedule: Any, blocks: list[Any], registers: Registers) -> None:  # noqa: ARG001 - the rules' signature
    for block in blocks:
        _vectors(schedule, block)


def _is_contraction(schedule: Any, block: Any) -> bool:
    """Whether the block multiplies two buffers and sums: a reduction that reads two beside what it writes."""
    return bool(block.is_reduction() and len(schedule.get(block.block_rv).reads) == 2 and block.dom_kind().count("S") >= 2)


def _extent(schedule: Any, loop: Any) -> int | None:
    """A loop's length; None where the batch or another symbol decides it."""
    try:
        return int(schedule.get(loop).extent)
    except TypeError:
        return None


def _loops(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """The spatial and the reduction loops of a block."""
    loops = schedule.get_loops(block.block_rv)
    kinds = block.dom_kind()
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
    return spatial, [loop for loop, kind in zip(loops, kinds, strict=True) if kind != "S"]


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def tile_sizes(rows: int, columns: int, vector_axis: int, registers: Registers) -> tuple[int, int, int]:
    """How much of the last three spatial axes one tile holds: the most multiply-adds for each load that still fits.

    A step of the reduction loads one vector of weights per `lanes` columns and one scalar per position; both feed
    positions x vectors multiply-adds.
    """
    best, chosen = -1.0, (1, 1, 1)
    for width in _divisors(vector_axis, min(_LONGEST_VECTOR, _MOST_LANES * registers.lanes)):
        vectors = -(-width // registers.lanes)
        for columns_in in _divisors(columns, registers.accumulators):
            rows_most = registers.accumulators if columns_in == columns else 1
            for rows_in in _divisors(rows, rows_most):
                positions = rows_in * columns_in
                if positions * vectors > registers.accumulators or positions * width * 4 > _STACK_BYTES:
                    continue
                score = positions * width / registers.lanes / (positions + vectors)
                if score > best:
                    best, chosen = score, (rows_in, columns_in, width)
    return chosen


def _tile(schedule: Any, block: Any, behind: Any | None, registers: Registers) -> None:
    spatial, reduction = _loops(schedule, block)
    if behind is None:
        copied = schedule.cache_write(block.block_rv, 0, "global")
    lengths = [_extent(schedule, loop) for loop in spatial]
    rows = lengths[-3] if len(spatial) > 2 else None
    inside = tile_sizes(rows or 1, lengths[-2] or 1, lengths[-1] or 1, registers)
    split = [
        schedule.split(loop, factors=[None, size]) for loop, size in zip(spatial[-3:], inside[-len(spatial[-3:]) :], strict=True)
    ]
    lead = [*spatial[:-3], *(pair[0] for pair in split)]
    tile = [pair[1] for pair in split]
    # the innermost axis's tiles outside the rows: a tile's weights are read once for all positions of the image
    order = [*lead[:1], lead[-1], *lead[1:-1]] if len(lead) > 2 else lead
    schedule.reorder(*order, *reduction, *tile)
    consumer = copied if behind is None else behind.block_rv
    schedule.reverse_compute_at(consumer, order[-1], preserve_unit_loops=True)
    shared = order[:-1] if len(order) > 1 else order
    for loop in tile[:-1]:
        schedule.unroll(loop)
    schedule.vectorize(tile[-1])
    schedule.vectorize(schedule.get_loops(consumer)[-1])
    schedule.parallel(schedule.fuse(*shared))
    schedule.decompose_reduction(block.block_rv, reduction[0])  # last: loops of the two halves take no further annotation


def _vectors(schedule: Any, block: Any) -> None:
    """Outer spatial loops shared among threads, the last one in vectors, the reduction between them."""
    spatial, reduction = _loops(schedule, block)
    if not spatial:
        return
    length = _extent(schedule, spatial[-1])
    width = max(_divisors(length, _LONGEST_VECTOR)) if length else 1
    vector = None
    outer = spatial
    if width > 1:
        last, vector = schedule.split(spatial[-1], factors=[None, width])
        outer = [*spatial[:-1], last]
        schedule.reorder(*outer, *reduction, vector)
    if vector is not None:
        schedule.vectorize(vector)
    schedule.parallel(schedule.fuse(*outer))
    if reduction:
        schedule.decompose_reduction(block.block_rv, reduction[0])
