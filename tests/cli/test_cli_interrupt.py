"""Ctrl-C and SIGTERM in the middle of a run: the exit code, one line, no child left, nothing half-made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"deploykit.worker" in command and str(pid).encode() in command:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for children in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "m.onnx")
    command = ["run", "m.onnx", "-o", "out", "--backend", "onnxruntime", "--duration", "quick", "--data", "random:8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploykit", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not _children(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    # as a terminal does: the whole group hears it
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert err.startswith("interrupted;")
    assert "Traceback" not in err
    assert not list(tmp_path.rglob(".making-*"))
    assert not _children(process.pid)
