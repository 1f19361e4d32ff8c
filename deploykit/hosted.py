"""What runs inside a measuring child: one open session, timed in windows or asked for outputs.

The timed region of a run is `bind(feeds)()`: host in, host out (MEASURING: one method for all engines).
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deploykit import artifact as artifacts
from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import BackendFailed
from deploykit.measurement import Window
from deploykit.session import OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature

T = TypeVar("T")
WARMUP_S = 0.2  # trtexec's default warm-up
WARMUP_RUNS = 10
WARMUP_MAX_S = 1.0
WARMUP_AGREE = 0.03
SETTLE_S = 0.05  # after a switch between children, caches and clocks belong to the other one


@dataclass(frozen=True)
class Opened:
    """What a session says of itself once it is open."""

    signature: Signature
    precision: str
    device: str
    threads: int
    notes: tuple[str, ...]
    load_s: float
    streams: int = 1


_session: Session | None = None
# A lane is what one thread runs in turn; a session that runs several requests at once (Session.streams) has as many.
_lanes: list[list[Callable[[], object]]] = []
_next: list[int] = []


def open_engine(backend: str, engine: Path, request: OpenRequest) -> Opened:
    """Opens the engine at `engine` in this process. Raises what the backend raises."""
    return open_bare(backend, artifacts.load(engine), request)


def open_bare(backend: str, engine: Artifact, request: OpenRequest) -> Opened:
    """Opens an artifact that has no manifest of its own: a user's .onnx file."""
    global _session
    close_engine()
    start = time.perf_counter()
    _session = backends.get(backend).open(engine, request)
    load_s = time.perf_counter() - start
    said = (_session.signature, _session.precision, _session.device, _session.threads, tuple(_session.notes))
    return Opened(*said, load_s, concurrency(_session))


def bind_inputs(pool: list[Feeds]) -> float:
    """Binds a pool of different inputs and warms the session up; returns the warm-up's seconds.

    Warm-up: at least 200 ms and 10 runs, then until two stretches of runs agree within 3 %, 1 s at most.
    """
    _bind(pool)
    start = time.perf_counter()
    before = _stretch(WARMUP_S / 2, WARMUP_RUNS // 2)
    while True:
        after = _stretch(WARMUP_S / 2, WARMUP_RUNS // 2)
        spent = time.perf_counter() - start
        if abs(after - before) <= WARMUP_AGREE * before or spent > WARMUP_MAX_S:
            return spent
        before = after


def bind_briefly(pool: list[Feeds]) -> None:
    """Binds a pool of inputs for a glimpse: three runs of each lane are warm-up enough to rule out what is far behind."""
    _bind(pool)
    _stretch(0.0, 3)


def _bind(pool: list[Feeds]) -> None:
    global _lanes, _next
    session = open_session()
    streams = concurrency(session)
    _lanes = [[session.bind(feeds) for feeds in pool] for _ in range(streams)]
    _next = [lane % len(pool) for lane in range(streams)]


def concurrency(session: Session) -> int:
    """How many calls of the session run at once: its `streams`, where it has any."""
    return max(1, getattr(session, "streams", 1))


def window(seconds: float) -> Window:
    """Runs back to back for about `seconds` (at least one run a lane), each timed, after 50 ms that are dropped. Several lanes
    run at once; the wall clock goes from the first start to the last end."""
    _stretch(SETTLE_S, 1)
    if len(_lanes) == 1:
        return _lane_window(0, seconds)
    windows, wall_s = _in_threads(functools.partial(_lane_window, seconds=seconds))
    return Window(tuple(itertools.chain.from_iterable(w.seconds for w in windows)), wall_s)


def _in_threads(work: Callable[[int], T]) -> tuple[list[T], float]:
    """What `work(lane)` returns for every lane, each in a thread of its own, and the seconds until the last ended. Raises what
    the first failing lane raised."""
    if len(_lanes) == 1:
        start = time.perf_counter()
        return [work(0)], time.perf_counter() - start
    with ThreadPoolExecutor(len(_lanes)) as pool:
        barrier = threading.Barrier(len(_lanes) + 1)

        def after_all(lane: int) -> T:
            barrier.wait()
            return work(lane)

        futures = [pool.submit(after_all, lane) for lane in range(len(_lanes))]
        barrier.wait()
        start = time.perf_counter()
        results = [future.result() for future in futures]
        return results, time.perf_counter() - start


def _lane_window(lane: int, seconds: float) -> Window:
    calls, index, clock = _lanes[lane], _next[lane], time.perf_counter
    times: list[float] = []
    start = before = clock()
    end = start + seconds
    while True:
        calls[index]()
        now = clock()
        times.append(now - before)
        index = index + 1 if index + 1 < len(calls) else 0
        if now >= end:
            break
        before = clock()
    _next[lane] = index
    return Window(tuple(times), now - start)


def infer(feeds: Feeds) -> Outputs:
    """The open session's outputs for one batch."""
    return open_session().infer(feeds)


def peak_rss_bytes() -> int:
    """The most memory this process itself ever held, in bytes: VmHWM of Linux, since `ru_maxrss` starts at the peak of the
    process that forked this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def close_engine() -> None:
    """Closes the open session, if any."""
    global _session, _lanes
    _lanes = []
    if _session is not None:
        _session.close()
        _session = None


def open_session() -> Session:
    """The session that is open in this process. Raises BackendFailed when there is none."""
    if _session is None:
        raise BackendFailed("no engine is open in this process")
    return _session


def _stretch(seconds: float, runs: int) -> float:
    """Mean seconds of a run over at least `seconds` and `runs` untimed runs of every lane."""
    means, _ = _in_threads(functools.partial(_lane_stretch, seconds=seconds, runs=runs))
    return sum(means) / len(means)


def _lane_stretch(lane: int, seconds: float, runs: int) -> float:
    calls, start, done = _lanes[lane], time.perf_counter(), 0
    while True:
        calls[_next[lane]]()
        _next[lane] = (_next[lane] + 1) % len(calls)
        done += 1
        spent = time.perf_counter() - start
        if spent >= seconds and done >= runs:
            return spent / done
