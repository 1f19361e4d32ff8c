"""A child process with a time and a memory limit: what a builder of native code runs in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deploykit import machine
from deploykit.children import Child, Progress
from deploykit.errors import BackendFailed, ChildDied, InputError
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S

T = TypeVar("T")
_SHARE = 0.9  # of the machine's memory: above it Linux ends a process of its own choice, perhaps not this one
_POLL_S = 0.05


@dataclass(frozen=True)
class Limits:
    """Seconds, and bytes of memory that a child and its own children may hold; None: 90 % of what the machine has."""

    seconds: float = STAGE_TIMEOUT_S
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= threading.TIMEOUT_MAX or (self.memory_bytes is not None and self.memory_bytes <= 0):
            raise InputError("a limit on time or memory must be positive", "example: --time-limit 600 --memory-limit 8")


def run(name: str, function: Callable[..., T], *args: Any, limits: Limits | None = None, progress: Progress | None = None) -> T:
    """What `function(*args)` returns, run in a child process of its own.

    Raises BackendFailed where a limit was reached, and what the function raises. Memory is what Linux tells of a process'
    own pages (RssAnon); elsewhere there is no limit on it.
    """
    chosen = limits or Limits()
    total = machine.memory_bytes()
    most = chosen.memory_bytes or (int(total * _SHARE) if total else None)
    with Child(name) as child:
        watch = _Watch(child, most)
        start = time.monotonic()
        try:
            return child.call(function, *args, timeout_s=chosen.seconds, progress=progress)
        except ChildDied as exc:
            if watch.reached is None:
                raise
            raise BackendFailed(
                f"{name}: it held {watch.reached / 2**30:.1f} GiB of memory, more than the limit of {(most or 0) / 2**30:.1f} GiB, and "
                "was stopped",
                "raise it with --memory-limit GIB, or use smaller batches",
            ) from exc
        except BackendFailed as exc:
            if time.monotonic() - start < chosen.seconds:
                raise
            raise BackendFailed(exc.message, "give it longer with --time-limit SECONDS, or use fewer or smaller batches") from exc
        finally:
            watch.stop()


class _Watch:
    """Looks at a child's memory until it is stopped; ends the child above `most`. `reached`: what it held then."""

    def __init__(self, child: Child, most: int | None) -> None:
        self.reached: int | None = None
        self._child, self._most = child, most
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if most is not None and Path("/proc").is_dir():
            self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        assert self._most is not None
        while not self._over.wait(_POLL_S):
            held = held_bytes(self._child.pid)
            if held > self._most:
                self.reached = held
                self._child.kill()
                return


def held_bytes(pid: int) -> int:
    """Bytes of memory that a process and those it started hold for themselves; 0 for one that is gone."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        below = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except (OSError, ValueError):
        return total
    return total + sum(held_bytes(int(one)) for group in below for one in group)
