"""Child processes: native engines crash, so they build, measure and infer in processes of their own.

The parent speaks to `python -m deploykit.worker` through its standard input and output: a length, then a pickle of
(function, arguments) one way and of the answer the other. Only deploykit's own values cross (paths, small values);
bulk arrays go through files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, TypeVar

from deploykit.errors import BackendFailed, ChildDied, DeploykitError

T = TypeVar("T")
Progress = Callable[[str, float], None]  # (what, share done 0..1)
_TAIL_LINES = 12


@dataclass(frozen=True)
class Answer:
    """What a child sends back: a value, a DeploykitError, or the traceback of a bug."""

    kind: str  # value | error | bug | progress
    value: Any


class BugInChild(Exception):
    """An unexpected exception in a child, with its traceback: a bug, not the user's doing."""


def in_a_line(exc: DeploykitError | BugInChild) -> str:
    """What went wrong in a child, without remedy or traceback."""
    return exc.message if isinstance(exc, DeploykitError) else str(exc).strip().splitlines()[-1]


def write_message(stream: IO[bytes], message: object) -> None:
    """Sends one message: 8 bytes of length, then the pickle."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def read_message(stream: IO[bytes]) -> Any:
    """Receives one message. Raises EOFError when the other side is gone."""
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


_alive: weakref.WeakSet[Child] = weakref.WeakSet()


class Child:
    """One child process. `call` runs a module-level function there; `close` ends it. A context manager."""

    def __init__(self, name: str, *, threads: int | None = None, environment: dict[str, str] | None = None) -> None:
        self.name = name
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        env.pop("OMP_WAIT_POLICY", None)  # ACTIVE spins between runs, PASSIVE slows every run; the default does neither
        if threads is not None:
            for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                env[variable] = str(threads)
        self._log = tempfile.TemporaryFile()  # closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploykit.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            start_new_session=True,
        )
        self._pending: str | None = None
        _alive.add(self)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def call(self, function: Callable[..., T], *args: Any, timeout_s: float | None = None, progress: Progress | None = None) -> T:
        """What `function(*args)` returns in the child. Raises the DeploykitError it raised there, ChildDied when the
        child was killed, BackendFailed after `timeout_s`."""
        self.start(function, *args)
        return self.finish(timeout_s=timeout_s, progress=progress)  # type: ignore[no-any-return]

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Sends the call without waiting; `finish` takes its answer."""
        assert self._process.stdin is not None
        self._pending = f"{function.__module__}:{function.__qualname__}"
        try:
            write_message(self._process.stdin, (self._pending, args))
        except (BrokenPipeError, ValueError) as exc:
            raise self._died() from exc

    def finish(self, *, timeout_s: float | None = None, progress: Progress | None = None) -> Any:
        """The answer of the call that `start` sent."""
        assert self._process.stdout is not None
        timed_out = threading.Event()

        def expire() -> None:
            timed_out.set()
            self._process.kill()

        timer = threading.Timer(timeout_s, expire) if timeout_s is not None else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            while True:
                answer: Answer = read_message(self._process.stdout)
                if answer.kind == "progress":
                    if progress:
                        progress(*answer.value)
                    continue
                break
        except EOFError as exc:
            if timed_out.is_set():
                raise BackendFailed(f"{self.name}: no answer within {timeout_s:g} s, stopped") from exc
            raise self._died() from exc
        except BaseException:
            self.kill()
            raise
        finally:
            if timer:
                timer.cancel()
        if answer.kind == "error":
            raise answer.value
        if answer.kind == "bug":
            raise BugInChild(f"in {self.name} ({self._pending}):\n{answer.value}")
        return answer.value

    def _died(self) -> ChildDied:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            how = f"killed by {name}"
            if name == "SIGKILL":
                how += " (out of memory?)"
        else:
            how = f"ended with code {code}"
        tail = self.log_tail()
        return ChildDied(
            f"{self.name}: its process was {how} in {self._pending}" + (f"; last output: {tail}" if tail else ""),
            "run it again, with smaller batches where memory is short; finished steps are kept",
        )

    def log_tail(self) -> str:
        """The last lines the child's native libraries printed."""
        self._log.seek(0, os.SEEK_END)
        size = self._log.tell()
        self._log.seek(max(0, size - 8192))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-_TAIL_LINES:])

    def pause(self) -> None:
        """Stops the child (SIGSTOP), so that the threads an idle runtime keeps spinning take nothing from a measured one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused child go on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Ends the child at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Asks the child to end, and makes it end after two seconds."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout:
            self._process.stdout.close()
        if not self._log.closed:
            self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.kill()
        self.close()


def run(
    name: str,
    function: Callable[..., T],
    *args: Any,
    threads: int | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> T:
    """What `function(*args)` returns, run in a child process of its own."""
    with Child(name, threads=threads) as child:
        return child.call(function, *args, timeout_s=timeout_s, progress=progress)


def side_by_side(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of jobs that mostly wait for children, in order, two at a time.

    A child that outlives its job must have been started before: Linux kills it with the thread that started it
    (PR_SET_PDEATHSIG). The first exception is raised once all jobs have ended; an interrupt kills every child, so that none is waited for.
    """
    with ThreadPoolExecutor(max_workers=min(2, available_threads())) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException as exc:
            for future in futures:
                future.cancel()
            if not isinstance(exc, Exception):
                for child in list(_alive):
                    child.kill()
            raise


_report: Progress | None = None


@contextlib.contextmanager
def reporting(progress: Progress | None) -> Iterator[None]:
    """Sends what `report_progress` says to `progress` while inside."""
    global _report
    before, _report = _report, progress
    try:
        yield
    finally:
        _report = before


def report_progress(what: str, share: float) -> None:
    """Tells whoever waits how far a long step is (0..1); costs nothing when nobody listens."""
    if _report is not None:
        _report(what, share)


def available_threads() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def has_module(name: str) -> bool:
    """Whether a top-level package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
