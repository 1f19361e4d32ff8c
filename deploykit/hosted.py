"""What runs inside a measuring child: one open session, timed in windows or asked for outputs.

The timed region of a run is `bind(feeds)()`: host in, host out (MEASURING: one method for all engines).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploykit import artifact as artifacts
from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import BackendFailed
from deploykit.measurement import Window
from deploykit.session import OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature

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


_session: Session | None = None
_calls: list[Callable[[], object]] = []
_next = 0


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
    return Opened(_session.signature, _session.precision, _session.device, _session.threads, tuple(_session.notes), load_s)


def bind_inputs(pool: list[Feeds]) -> float:
    """Binds a pool of different inputs and warms the session up; returns the warm-up's seconds.

    Warm-up: at least 200 ms and 10 runs, then until two stretches of runs agree within 3 %, 1 s at most.
    """
    global _calls, _next
    session = _open_session()
    _calls = [session.bind(feeds) for feeds in pool]
    _next = 0
    start = time.perf_counter()
    before = _stretch(WARMUP_S / 2, WARMUP_RUNS // 2)
    while True:
        after = _stretch(WARMUP_S / 2, WARMUP_RUNS // 2)
        spent = time.perf_counter() - start
        if abs(after - before) <= WARMUP_AGREE * before or spent > WARMUP_MAX_S:
            return spent
        before = after


def window(seconds: float) -> Window:
    """Runs back to back for about `seconds` (at least one run), each timed, after 50 ms that are dropped."""
    global _next
    _stretch(SETTLE_S, 1)
    calls, index, clock = _calls, _next, time.perf_counter
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
    _next = index
    return Window(tuple(times), now - start)


def infer(feeds: Feeds) -> Outputs:
    """The open session's outputs for one batch."""
    return _open_session().infer(feeds)


def peak_rss_bytes() -> int:
    """The most memory this process itself ever held, in bytes: VmHWM of Linux, since `ru_maxrss` starts at the peak of the
    process that forked this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def close_engine() -> None:
    """Closes the open session, if any."""
    global _session, _calls
    _calls = []
    if _session is not None:
        _session.close()
        _session = None


def _open_session() -> Session:
    if _session is None:
        raise BackendFailed("no engine is open in this process")
    return _session


def _stretch(seconds: float, runs: int) -> float:
    """Mean seconds of a run over at least `seconds` and `runs` untimed runs."""
    global _next
    start, done = time.perf_counter(), 0
    while True:
        _calls[_next]()
        _next = (_next + 1) % len(_calls)
        done += 1
        spent = time.perf_counter() - start
        if spent >= seconds and done >= runs:
            return spent / done
