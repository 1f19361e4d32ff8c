"""What goes into a tuned library: for each function the searched schedule or our default one, whichever is faster when both run in turns.

The search's own times cannot decide that: a schedule that was measured while the machine was busy loses to one measured while
it was not. Here the best few of a function run one after another, round by round.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploykit import children
from deploykit.backends import apache_tvm_schedule
from deploykit.backends.apache_tvm_compile import Machine, failures

_BEST = 3  # of the database's schedules for a function, beside our own
_ROUNDS = 7
_REPEAT_MS = 10
_WARM_UP, _PAIRS = 3, 24
_FASTER = 0.98  # a searched schedule is taken where it needs less than so much of our own's time


@contextmanager
def workers(threads: int, scratch: Path) -> Iterator[None]:
    """Lets TVM, here and in the processes it starts, run loops on so many threads, none pinned to a core, and has those processes
    keep their files in `scratch`.

    Left alone, they take one thread for two CPUs, whatever the engine is for, and a search that is killed leaves files in /tmp.
    """
    place = scratch / "candidates"
    place.mkdir()
    wanted = {"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0", "TMPDIR": str(place)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(place, ignore_errors=True)


def applied(module: Any, machine: Machine, threads: int, database: Any, seconds: float) -> tuple[Any, dict[str, int]]:
    """Inside `workers`: the module with a schedule of the database on each function where that is the faster one, and how many there are:
    'searched' and 'default' (which stay unscheduled here, for our own); 'untried' for those that `seconds` were too short for,
    which have what the search measured as the best. Raises BackendFailed."""
    from tvm import relax
    from tvm.s_tir import meta_schedule as ms

    end = time.perf_counter() + seconds
    target = machine.target(threads)
    counts = {"searched": 0, "default": 0, "untried": 0}
    with failures("TVM cannot apply its tuning database"), target:
        kept = ms.database.MemoryDatabase()
        for name, function, records in _known(module, database, target):
            children.report_progress(f"tune: the searched and the default schedule of {name} in turns", 1.0)
            late = time.perf_counter() >= end
            best = records[0] if late else _faster(function, records, machine, target)
            counts["untried" if late else "default" if best is None else "searched"] += 1
            if best is not None:
                workload = kept.commit_workload(function)
                kept.commit_tuning_record(
                    ms.database.TuningRecord(best.trace, workload, best.run_secs, best.target, best.args_info)
                )
        with kept:
            return relax.transform.MetaScheduleApplyDatabase()(module), counts


def _known(module: Any, database: Any, target: Any) -> list[tuple[str, Any, list[Any]]]:
    """(name, function, best records) of each function that the database has schedules of, what costs most first."""
    from tvm.s_tir import meta_schedule as ms

    found = []
    for task in ms.relax_integration.extract_tasks(module, target):
        function = task.dispatched[0]
        if database.has_workload(function):
            records = list(database.get_top_k(database.commit_workload(function), _BEST))
            if records:
                found.append((int(task.weight) * mean_s(records[0]), str(task.task_name), function, records))
    return [(name, function, records) for _, name, function, records in sorted(found, key=lambda each: -each[0])]


def _faster(function: Any, records: Sequence[Any], machine: Machine, target: Any) -> Any | None:
    """The record that is fastest when all run in turns; None where our default schedule is as fast."""
    from tvm import s_tir

    ours = apache_tvm_schedule.of_function(function["main"], machine.registers)
    modules = [] if ours is None else [ours.mod]
    candidates = []
    for record in records:
        schedule = s_tir.Schedule(function)
        record.trace.apply_to_schedule(schedule, remove_postproc=False)
        if ours is None or not _same(schedule.mod, ours.mod):
            candidates.append(record)
            modules.append(schedule.mod)
    if not candidates:
        return None
    times = in_turns([_timer(each, function, target) for each in modules])
    if ours is None:
        return candidates[min(range(len(times)), key=times.__getitem__)]
    best = min(range(1, len(times)), key=times.__getitem__)
    return candidates[best - 1] if times[best] < _FASTER * times[0] else None


def _same(left: Any, right: Any) -> bool:
    from tvm_ffi import structural_equal

    return bool(structural_equal(left, right))


def _timer(module: Any, function: Any, target: Any) -> Callable[[], float]:
    """Seconds of one run of a scheduled function, averaged over a few milliseconds."""
    import tvm
    from tvm.s_tir import meta_schedule as ms

    built = tvm.tirx.build(tvm.s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target)
    device = tvm.cpu()
    fill = tvm.get_global_func("tvm.contrib.random.random_fill_for_measure")
    arguments = []
    for each in ms.arg_info.ArgInfo.from_prim_func(function["main"]):
        tensor = tvm.runtime.empty(shape=tuple(each.shape), dtype=each.dtype, device=device)
        fill(tensor)
        arguments.append(tensor)
    timed = built.time_evaluator("main", device, number=1, repeat=1, min_repeat_ms=_REPEAT_MS)
    return lambda: float(timed(*arguments).mean)


def in_turns(timers: Sequence[Callable[[], float]]) -> list[float]:
    """The median seconds of each over rounds in which all run, the first of a round another one each time."""
    times: list[list[float]] = [[] for _ in timers]
    for turn in range(_ROUNDS):
        for at in range(len(timers)):
            place = (at + turn) % len(timers)
            times[place].append(timers[place]())
    return [statistics.median(each) for each in times]


def times_as_fast(before: Callable[[], object], after: Callable[[], object]) -> tuple[float, bool]:
    """How many times as fast `after` is as `before`: the median of the ratios of runs in turns; and whether that makes it the
    slower one."""
    ratios = []
    for turn in range(_WARM_UP + _PAIRS):
        seconds: dict[bool, float] = {}
        for new in (True, False) if turn % 2 else (False, True):
            start = time.perf_counter()
            (after if new else before)()
            seconds[new] = time.perf_counter() - start
        ratios.append(seconds[False] / seconds[True])
    middle = statistics.median(ratios[_WARM_UP:])
    return middle, middle < 1


def mean_s(record: Any) -> float:
    """The mean of a record's repeats: what meta-schedule itself ranks by."""
    times = [float(s) for s in record.run_secs]
    return sum(times) / len(times)
