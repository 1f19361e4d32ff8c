"""Children: values and errors cross, a crash is one error, nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import child_functions as functions
import pytest

from deploykit import children
from deploykit.children import BugInChild, Child
from deploykit.errors import BackendFailed, ChildDied, UnknownName


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))


def test_a_value_comes_back_and_noise_on_standard_output_does_not_break_it() -> None:
    assert children.run("noisy", functions.noisy, 20) == 21


def test_an_error_keeps_its_type_and_remedy() -> None:
    with pytest.raises(UnknownName, match="did you mean 'openvino'"):
        children.run("names", functions.unknown)


@pytest.mark.parametrize(
    ("signal_name", "number"), [("SIGSEGV", signal.SIGSEGV), ("SIGABRT", signal.SIGABRT), ("SIGKILL", signal.SIGKILL)]
)
def test_a_crash_is_one_error_that_names_the_signal(signal_name: str, number: int) -> None:
    with pytest.raises(ChildDied, match=signal_name):
        children.run("crash", functions.die, int(number))


def test_what_a_crashing_library_printed_is_in_the_error() -> None:
    with pytest.raises(ChildDied, match="the last words"):
        children.run("crash", functions.speak_and_die)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(BugInChild, match="ZeroDivisionError"):
        children.run("bug", functions.bug)


def test_a_time_limit_ends_it() -> None:
    with pytest.raises(BackendFailed, match="no answer within"):
        children.run("slow", functions.sleep, 30.0, timeout_s=0.5)


def test_progress_is_told() -> None:
    heard: list[tuple[str, float]] = []
    assert children.run("steps", functions.steps, progress=lambda what, share: heard.append((what, share))) == "done"
    assert heard == [("step", 0.0), ("step", 0.5), ("step", 1.0)]


def test_one_child_serves_many_calls_and_pauses_in_between() -> None:
    with Child("many") as child:
        assert child.call(functions.noisy, 1) == 2
        child.pause()
        time.sleep(0.05)
        state = open(f"/proc/{child.pid}/stat").read().split()[2]
        assert state == "T"
        child.resume()
        assert child.call(functions.noisy, 2) == 3


def test_a_child_dies_with_its_killed_parent() -> None:
    code = """
import child_functions, time
from deploykit.children import Child
child = Child("orphan")
child.call(child_functions.noisy, 1)
child.pause()
print(child.pid, flush=True)
time.sleep(30)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if open(f"/proc/{pid}/stat").read().split()[2] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    pytest.fail(f"child {pid} outlived its parent")
