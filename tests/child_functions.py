"""Functions for test_children.py to call in a child process."""

from __future__ import annotations

import os
import sys
import time

from deploykit.children import report_progress
from deploykit.errors import UnknownName


def noisy(value: int) -> int:
    print("noise on standard output")
    os.write(1, b"native noise\n")
    return value + 1


def unknown() -> None:
    raise UnknownName("backend", "opnvino", ["openvino", "torch"])


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


def speak_and_die() -> None:
    sys.stderr.write("the last words\n")
    sys.stderr.flush()
    os.abort()


def bug() -> float:
    return 1 / 0


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def steps() -> str:
    for share in (0.0, 0.5, 1.0):
        report_progress("step", share)
    return "done"


def hold(size: int) -> int:
    kept = bytearray(size)
    for at in range(0, size, 4096):
        kept[at] = 1
    time.sleep(20)
    return len(kept)


def hold_in_a_grandchild(size: int) -> int:
    from deploykit.pipeline import limited

    return limited.run("inner", hold, size)
