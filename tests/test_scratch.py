"""Scratch folders and held folders: a killed process's leavings go, a living one's stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploykit import scratch
from deploykit.errors import InputError

_HOLDER = """
import sys, time
from pathlib import Path
from deploykit import scratch
with scratch.folder_in(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("made")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_scratch_folder_is_gone_afterwards_unless_it_was_renamed(tmp_path: Path) -> None:
    with scratch.folder_in(tmp_path) as folder:
        (folder / "a").write_text("a")
    assert not list(tmp_path.iterdir())
    with scratch.folder_in(tmp_path) as folder:
        (folder / "a").write_text("a")
        os.rename(folder, tmp_path / "done")
    assert [p.name for p in tmp_path.iterdir()] == ["done"]
    assert (tmp_path / "done" / "a").is_file()


def test_sweeping_leaves_a_living_process_its_folder_and_takes_a_killed_ones(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    scratch.sweep(tmp_path)
    assert (left / "half").is_file()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left.is_dir()
    scratch.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_making_survives_those_who_sweep(tmp_path: Path) -> None:
    def work(number: int) -> int:
        lost = 0
        for _ in range(60):
            if number % 2:
                scratch.sweep(tmp_path)
            else:
                with scratch.folder_in(tmp_path) as folder:
                    time.sleep(0.001)
                    lost += not folder.is_dir()
        return lost

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0
    assert not list(tmp_path.iterdir())


def test_sweeping_touches_nothing_else_and_needs_no_folder(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / ".hidden").mkdir()
    scratch.sweep(tmp_path)
    scratch.sweep(tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "engine"]


def test_a_folder_is_held_once_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with scratch.held(out):
        with pytest.raises(InputError, match="another deploykit is writing"), scratch.held(out):
            pass
        with scratch.held(tmp_path / "other"):
            pass
    with scratch.held(out):
        (out / "report").write_text("kept")
    assert (out / "report").is_file()


def test_holding_a_folder_that_stays_empty_leaves_nothing(tmp_path: Path) -> None:
    with scratch.held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with scratch.held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
