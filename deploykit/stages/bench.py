"""bench: engines measured in turns, in processes of their own.

A group of rows (always with its reference) is launched several times; in each launch every row gets a window in each
round, in an order that is shuffled anew. A drifting machine so hits all rows alike, and a ratio of two rows of a round is
a fair one. The launch is the unit of replication: identical processes differ by about 3 % for as long as they live.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit import hosted
from deploykit.children import BugInChild, Child, in_a_line, side_by_side
from deploykit.errors import BackendFailed, DeploykitError, InputError, UnknownName
from deploykit.measurement import MIN_RUNS, Measurement, Window
from deploykit.session import OpenRequest
from deploykit.signature import Feeds

Progress = Callable[[str, float], None]
OPEN_TIMEOUT_S = 600.0
WINDOW_TIMEOUT_S = 120.0
_MEMORY_RESERVE_BYTES = 2 << 30


@dataclass(frozen=True)
class Duration:
    """How long each row is measured: `seconds` over `launches` x `rounds` windows; then further rounds until
    `enough_runs` are timed or `limit_s` is spent."""

    name: str
    launches: int
    rounds: int
    seconds: float
    limit_s: float
    enough_runs: int = MIN_RUNS[99]


DURATIONS = {
    "smoke": Duration("smoke", launches=2, rounds=2, seconds=0.2, limit_s=0.2),  # does everything run? rough ratios
    "quick": Duration("quick", launches=3, rounds=4, seconds=3.0, limit_s=6.0),
    "standard": Duration("standard", launches=5, rounds=8, seconds=10.0, limit_s=20.0),
    "mlperf": Duration("mlperf", launches=5, rounds=60, seconds=600.0, limit_s=660.0, enough_runs=6636),
}


def duration(name: str) -> Duration:
    """The duration of that name. Raises UnknownName."""
    if name not in DURATIONS:
        raise UnknownName("duration", name, DURATIONS)
    return DURATIONS[name]


@dataclass(frozen=True)
class Target:
    """One row to measure: which engine, opened how. `group` rows are measured in turns; `id` names the row."""

    id: str
    backend: str
    engine: Path
    request: OpenRequest
    group: str
    reference: bool = False


@dataclass
class _Running:
    """A row in one launch: its child and the windows so far."""

    target: Target
    child: Child
    opened: hosted.Opened
    warmup_s: float
    windows: list[Window] = field(default_factory=list)
    peak_rss_bytes: int = 0


@dataclass
class _Collected:
    """A row over all launches."""

    launches: list[tuple[Window, ...]] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)
    peaks_rss_bytes: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    last: _Running | None = None
    error: DeploykitError | None = None


Result = Measurement | DeploykitError


def measure(
    targets: Sequence[Target],
    pools: Mapping[int, list[Feeds]],
    span: Duration,
    *,
    progress: Progress | None = None,
    environment: Mapping[str, Any] | None = None,
    seed: int = 0,
    together: bool = False,
) -> dict[str, Result]:
    """A Measurement, or the error that ended it, for every target, by id.

    `pools` holds, per batch, the different inputs that every row of that batch is fed in turn. A group too large for the
    memory is measured in parts, each beside the reference, unless `together` asks for all its rows in every launch.
    Raises InputError when a group has more than one reference.
    """
    rng = random.Random(seed)
    collected = {target.id: _Collected() for target in targets}
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    total = sum(len(rows) for rows in groups.values()) * span.launches
    done = 0
    for name, rows in groups.items():
        if sum(row.reference for row in rows) > 1:
            raise InputError(f"group {name} has more than one reference row")
        parts = [rows] if together else _parts(rows)
        for launch in range(span.launches):
            for number, part in enumerate(parts):
                alive = [row for row in part if collected[row.id].error is None]
                if alive:
                    _launch(alive, pools, span, rng, collected, launch * len(parts) + number)
            done += len(rows)
            if progress:
                progress(f"measuring {name}, launch {launch + 1} of {span.launches}", done / total)
    return {key: _result(item, span, environment or {}) for key, item in collected.items()}


def expected_s(openings_s: Sequence[float], span: Duration) -> tuple[float, float]:
    """How long `measure` will take for rows that open in so many seconds each: where two open at a time and each row is measured
    just long enough; and one after the other, each for its full time."""
    n, opening = len(openings_s), span.launches * sum(openings_s)
    return n * span.seconds + opening / 2, n * max(span.seconds, span.limit_s) + opening


def _parts(rows: Sequence[Target]) -> list[list[Target]]:
    """Rows split so that the children open at once fit in memory, each part with the reference."""
    reference = [row for row in rows if row.reference]
    others = [row for row in rows if not row.reference]
    if not others:
        return [list(reference)] if reference else []
    need = max(_footprint(row) for row in rows)
    room = max(1, int((_available_bytes() - _MEMORY_RESERVE_BYTES) // need) - len(reference))
    room = min(room, 15)
    return [reference + others[i : i + room] for i in range(0, len(others), room)]


def _footprint(row: Target) -> int:
    """A generous guess of a child's resident bytes: the runtime itself and four times the engine's size."""
    size = sum(f.stat().st_size for f in row.engine.parent.iterdir() if f.is_file())
    return (700 << 20) + 4 * size


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 << 30


def _launch(
    rows: Sequence[Target],
    pools: Mapping[int, list[Feeds]],
    span: Duration,
    rng: random.Random,
    collected: Mapping[str, _Collected],
    turn: int,
) -> None:
    """One launch of one part, number `turn` of its group: opens the children, measures them in turns, closes them."""
    running: list[_Running] = []
    started: list[Child] = []
    try:
        # started here, not in the pool's threads: a child dies with the thread that started it
        started.extend(Child(row.id, threads=row.request.threads) for row in rows)
        opened = side_by_side([functools.partial(_try_open, row, child, pools) for row, child in zip(rows, started, strict=True)])
        for row, item in zip(rows, opened, strict=True):
            if isinstance(item, DeploykitError):
                collected[row.id].error = item
            else:
                running.append(item)
        _take_turns(running, span, rng, collected)
        for item in running:
            state = collected[item.target.id]
            if state.error is None:
                state.launches.append(tuple(item.windows))
                state.turns.append(turn)
                state.loads_s.append(item.opened.load_s)
                state.peaks_rss_bytes.append(item.peak_rss_bytes)
                state.last = item
    finally:
        for child in started:
            child.kill()
            child.close()


def _try_open(row: Target, child: Child, pools: Mapping[int, list[Feeds]]) -> _Running | DeploykitError:
    try:
        return _open(row, child, pools)
    except DeploykitError as exc:
        return exc
    except BugInChild as exc:
        return BackendFailed(f"{row.id}: {in_a_line(exc)}")


def _open(row: Target, child: Child, pools: Mapping[int, list[Feeds]]) -> _Running:
    opened = child.call(hosted.open_engine, row.backend, row.engine, row.request, timeout_s=OPEN_TIMEOUT_S)
    warmup_s = child.call(hosted.bind_inputs, pools[row.request.batch], timeout_s=OPEN_TIMEOUT_S)
    child.pause()
    return _Running(row, child, opened, warmup_s)


def _take_turns(running: Sequence[_Running], span: Duration, rng: random.Random, collected: Mapping[str, _Collected]) -> None:
    seconds = span.seconds / (span.launches * span.rounds)
    extra = round((span.limit_s - span.seconds) / (span.launches * seconds))
    enough = -(-span.enough_runs // span.launches)
    for number in range(span.rounds + extra):
        waiting = [r for r in running if collected[r.target.id].error is None]
        if number >= span.rounds:
            short = [r for r in waiting if sum(len(w.seconds) for w in r.windows) < enough]
            if not short:
                break
            waiting = [r for r in waiting if r in short or r.target.reference]
        rng.shuffle(waiting)
        for item in waiting:
            _one_window(item, seconds, collected[item.target.id])


def _one_window(item: _Running, seconds: float, state: _Collected) -> None:
    item.child.resume()
    try:
        item.windows.append(item.child.call(hosted.window, seconds, timeout_s=WINDOW_TIMEOUT_S))
        item.peak_rss_bytes = item.child.call(hosted.peak_rss_bytes)
    except DeploykitError as exc:
        state.error = exc
    except BugInChild as exc:
        state.error = BackendFailed(f"{item.target.id}: {in_a_line(exc)}")
    else:
        item.child.pause()


def _result(item: _Collected, span: Duration, environment: Mapping[str, Any]) -> Result:
    if item.error is not None:
        return item.error
    if item.last is None or not item.launches:
        return BackendFailed("was not measured")
    last = item.last
    return Measurement(
        batch=last.target.request.batch,
        launches=tuple(item.launches),
        warmup_s=last.warmup_s,
        load_s=last.opened.load_s,
        peak_rss_bytes=last.peak_rss_bytes,
        device=last.opened.device,
        threads=last.opened.threads,
        precision=last.opened.precision,
        notes=last.opened.notes,
        environment={**environment, "duration": span.name},
        loads_s=tuple(item.loads_s),
        peaks_rss_bytes=tuple(item.peaks_rss_bytes),
        turns=tuple(item.turns),
        streams=last.opened.streams,
    )


def again(target: Target, suffix: str) -> Target:
    """A second copy of a row, for an A/A row: the same engine, in processes of its own."""
    return replace(target, id=target.id + suffix, reference=False)
