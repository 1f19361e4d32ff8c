"""A calibration killed with SIGKILL goes on where it stopped, and ends with the same table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiny_models

from deploykit.pipeline import single
from deploykit.pipeline.request import DataRequest, Silent

# The command's own stage on the command's own samples, with a reader slow enough to be caught half-way.
SLOW = """
import sys, time
from dataclasses import replace
from pathlib import Path
from deploykit import data
from deploykit.pipeline import ranges, single
from deploykit.pipeline.request import DataRequest
from deploykit.stages import calibration

class Slow:
    def __init__(self, inner): self.inner = inner
    def read(self, indices):
        time.sleep(0.1)
        return self.inner.read(indices)

calibration.CHECKPOINT_S = 0.0
model, spec, progress = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
opened = single.open_model(model)
samples = data.calibration_share(single.open_data(opened, spec, DataRequest(spec), {}), 512)
ranges.collect(model, replace(samples, reader=Slow(samples.reader)), "mse", progress)
"""


class Heard(Silent):
    """Keeps what was told."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def progress(self, what: str, share: float) -> None:
        self.labels.append(what)


def test_a_killed_calibration_goes_on_and_gives_the_same_table(tmp_path: Path) -> None:
    model = tiny_models.conv_net(tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(400, 3, 8, 8)).astype(np.float32))
    request = DataRequest(str(tmp_path / "data.npz"), method="mse")
    whole = single.calibrate_file(model, request, tmp_path / "whole.json", None, Silent(), {})

    progress = tmp_path / "calib.json.progress"
    command = [sys.executable, "-c", SLOW, str(model), str(tmp_path / "data.npz"), str(progress)]
    killed = subprocess.Popen(command, env=dict(os.environ))
    deadline = time.monotonic() + 120.0
    while not progress.is_file() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert progress.is_file()

    heard = Heard()
    resumed = single.calibrate_file(model, request, tmp_path / "calib.json", None, heard, {})
    assert any("resumed at sample" in label for label in heard.labels)
    assert resumed.fingerprint == whole.fingerprint
    assert not progress.exists()


def test_progress_of_other_samples_is_not_taken(tmp_path: Path) -> None:
    model = tiny_models.conv_net(tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(40, 3, 8, 8)).astype(np.float32))
    (tmp_path / "calib.json.progress").write_bytes(b"something else")
    heard = Heard()
    request = DataRequest(str(tmp_path / "data.npz"))
    table = single.calibrate_file(model, request, tmp_path / "calib.json", None, heard, {})
    assert table.n == 40
    assert not any("resumed" in label for label in heard.labels)
    assert not (tmp_path / "calib.json.progress").exists()
