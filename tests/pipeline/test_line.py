"""The whole line on tiny real models: rows, reuse, exit codes, bad input; nothing half-made."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

pytest.importorskip("onnxruntime")
SHORT = ["--duration", "smoke", "--threads", "1"]


def _deploykit(*arguments: str, cwd: Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "deploykit", *arguments], capture_output=True, text=True, check=False, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    if code is not None:
        assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done


def _npz(path: Path, n: int = 24, **changes: Any) -> Path:
    rng = np.random.default_rng(3)
    arrays = {"x": rng.normal(size=(n, 3, 8, 8)).astype(np.float32), "labels": rng.integers(0, 4, n)}
    arrays.update(changes)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the line ran once over a small convolutional network."""
    folder = tmp_path_factory.mktemp("line")
    tiny_models.conv_net(folder / "net.onnx")
    _npz(folder / "data.npz")
    _deploykit(
        "run",
        "net.onnx",
        "--data",
        "data.npz",
        "--backend",
        "onnxruntime,openvino",
        "--precision",
        "fp32,int8",
        *SHORT,
        "-o",
        "out",
        cwd=folder,
    )
    return folder


def _report(folder: Path, name: str = "out") -> dict[str, Any]:
    doc: dict[str, Any] = json.loads((folder / name / "report.json").read_text())
    return doc


def test_every_row_ran_and_says_what_the_contract_names(ran: Path) -> None:
    doc = _report(ran)
    assert doc["reference"]["backend"] == "onnxruntime"
    rows = {(r["backend"], r["precision"], r["batch"]): r for r in doc["rows"]}
    assert set(rows) == {(b, p, n) for b in ("onnxruntime", "openvino") for p in ("fp32", "int8") for n in (1, 8)}
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["images_per_s"] > 0
        assert row["p50_s"] > 0
        assert row["top1"] is not None
        assert row["peak_rss_bytes"] > 0
        assert row["size_bytes"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    with (ran / "out" / "report.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == len(rows)
    assert list(table[0])[:6] == ["name", "backend", "precision", "batch", "status", "reason"]


def test_calibration_and_judging_are_disjoint_and_said(ran: Path) -> None:
    samples = _report(ran)["samples"]
    assert samples["calibrate"]["n"] + samples["judge"]["n"] == 24
    assert samples["calibrate"]["digest"] != samples["judge"]["digest"]


def test_the_folder_holds_real_engines_with_manifests(ran: Path) -> None:
    engines = sorted(p.name for p in (ran / "out" / "engines").iterdir())
    assert engines == ["net-onnxruntime-fp32", "net-onnxruntime-int8", "net-openvino-fp32", "net-openvino-int8"]
    for folder in (ran / "out" / "engines").iterdir():
        assert list(folder.glob("*.manifest.json"))


def test_an_unchanged_run_is_shown_again_with_its_date(ran: Path) -> None:
    before = _report(ran)
    arguments = [
        "run",
        "net.onnx",
        "--data",
        "data.npz",
        "--backend",
        "onnxruntime,openvino",
        "--precision",
        "fp32,int8",
        *SHORT,
        "-o",
        "again",
    ]
    _deploykit(*arguments, cwd=ran)
    after = _report(ran, "again")
    assert after["measured_at"] == before["measured_at"]
    assert all("reused" in r["notes"] for r in after["rows"])
    assert [r["p50_s"] for r in after["rows"]] == [r["p50_s"] for r in before["rows"]]


def test_the_gate_passes_against_itself_and_fails_against_a_better_baseline(ran: Path) -> None:
    _deploykit("gate", "out/report.json", "--baseline", "out", "--max-drop", "50pp", "--max-slowdown", "50%", cwd=ran)
    better = _report(ran)
    for row in better["rows"]:
        if row["precision"] == "int8":
            for name in ("speedup", "speedup_low", "speedup_high"):
                row[name] *= 10
    (ran / "better.json").write_text(json.dumps(better))
    _deploykit(
        "gate", "out/report.json", "--baseline", "better.json", "--max-slowdown", "5%", "--junit", "j.xml", cwd=ran, code=1
    )
    assert "<failure" in (ran / "j.xml").read_text()


def test_few_samples_cannot_pass_a_tight_gate(ran: Path) -> None:
    done = _deploykit("gate", "out", "--max-drop", "0.1pp", cwd=ran, code=5)
    assert "inconclusive" in done.stdout.lower()


def test_an_engine_of_the_run_can_be_benched_predicted_and_compared(ran: Path) -> None:
    engine = "out/engines/net-openvino-int8"
    done = _deploykit("bench", engine, "--batch", "1", *SHORT, "--json", "-", cwd=ran)
    doc = json.loads(done.stdout)
    assert [(r["backend"], r["precision"], r["status"]) for r in doc["rows"]] == [("openvino", "int8", "ok")]
    done = _deploykit("predict", engine, "data.npz", "--json", "-", cwd=ran)
    assert len(json.loads(done.stdout)) == 24
    done = _deploykit("compare", "net.onnx", engine, "--data", "data.npz", "--json", "-", cwd=ran)
    assert json.loads(done.stdout)["drift"]["n"] == 24


def test_an_engine_that_does_not_open_is_an_error_and_one_of_a_folder_a_row(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran / "out/engines/net-onnxruntime-fp32", tmp_path / "good")
    shutil.copytree(ran / "out/engines/net-onnxruntime-int8", tmp_path / "bad")
    side = next((tmp_path / "bad").glob("*.manifest.json"))
    model = side.with_name(side.name.removesuffix(".manifest.json"))
    known = hashlib.sha256(model.read_bytes()).hexdigest()
    model.write_bytes(b"garbage")
    side.write_text(side.read_text().replace(known, hashlib.sha256(b"garbage").hexdigest()))
    assert "failed" in _deploykit("bench", "bad", "--batch", "1", *SHORT, cwd=tmp_path, code=4).stdout
    assert "failed" in _deploykit("bench", ".", "--batch", "1", *SHORT, cwd=tmp_path).stdout


def test_the_report_renders_again(ran: Path) -> None:
    (ran / "out" / "report.md").unlink()
    done = _deploykit("report", "out", cwd=ran)
    assert "openvino" in done.stdout
    assert (ran / "out" / "report.md").is_file()


def test_a_model_with_several_inputs_and_outputs_goes_through(tmp_path: Path) -> None:
    tiny_models.two_inputs(tmp_path / "two.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", a=rng.normal(size=(12, 6)).astype(np.float32), ids=rng.integers(0, 10, (12, 3)))
    done = _deploykit(
        "bench", "two.onnx", "--data", "d.npz", "--batch", "4", "--backend", "onnxruntime", *SHORT, "--json", "-", cwd=tmp_path
    )
    rows = json.loads(done.stdout)["rows"]
    assert {r["precision"]: r["status"] for r in rows}["fp32"] == "ok"
    assert all(r["status"] == "ok" or r["reason"] for r in rows)


def test_a_fixed_batch_runs_at_its_own_batch_and_skips_the_others(tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "fixed.onnx", batch=4)
    done = _deploykit(
        "bench", "fixed.onnx", "--backend", "onnxruntime", "--precision", "fp32", *SHORT, "--json", "-", cwd=tmp_path
    )
    rows = {r["batch"]: r for r in json.loads(done.stdout)["rows"]}
    assert rows[4]["status"] == "ok"
    assert rows[1]["status"] == rows[8]["status"] == "skipped"
    assert "batch 4" in rows[1]["reason"]


def test_int8_without_data_is_skipped_with_the_remedy_and_exit_3_when_named(tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "net.onnx")
    arguments = [
        "bench",
        "net.onnx",
        "--backend",
        "onnxruntime",
        "--precision",
        "int8",
        "--batch",
        "1",
        *SHORT,
        "--json",
        "r.json",
    ]
    _deploykit(*arguments, cwd=tmp_path, code=3)
    row = next(r for r in json.loads((tmp_path / "r.json").read_text())["rows"] if r["precision"] == "int8")
    assert row["status"] == "skipped"
    assert "--data" in row["reason"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "empty"], "empty"),
        (["--data", "nan.npz"], "NaN"),
        (["--data", "name.npz"], "x"),
        (["--data", "rank.npz"], "x"),
        (["--data", "labels.npz"], "label"),
        (["--data", "data.npz", "--calib", "other.json"], "other.json"),
    ],
)
def test_bad_data_is_one_error_and_leaves_nothing(arguments: list[str], said: str, tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "net.onnx")
    (tmp_path / "empty").mkdir()
    _npz(tmp_path / "data.npz")
    bad = np.zeros((8, 3, 8, 8), np.float32)
    bad[5, 0, 0, 0] = np.nan
    _npz(tmp_path / "nan.npz", 8, x=bad)
    np.savez(tmp_path / "name.npz", y=np.zeros((8, 3, 8, 8), np.float32))
    np.savez(tmp_path / "rank.npz", x=np.zeros((8, 3, 8), np.float32))
    _npz(tmp_path / "labels.npz", 8, labels=np.full(8, 9))
    (tmp_path / "other.json").write_text("{}")
    done = _deploykit(
        "run", "net.onnx", *arguments, "--backend", "onnxruntime", "--batch", "1", *SHORT, "-o", "out", cwd=tmp_path, code=None
    )
    assert done.returncode == 2 or (done.returncode == 4 and "other.json" in done.stdout), done.stderr + done.stdout
    assert said in done.stderr + done.stdout
    assert not list(tmp_path.rglob(".making-*"))


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "a.onnx", seed=1)
    tiny_models.conv_net(tmp_path / "b.onnx", seed=2)
    _npz(tmp_path / "data.npz")
    _deploykit("calibrate", "a.onnx", "--data", "data.npz", "-o", "a.json", "--trt-cache", "a.cache", cwd=tmp_path)
    assert (tmp_path / "a.cache").read_text().startswith("TRT-")
    done = _deploykit("quantize", "b.onnx", "--calib", "a.json", "-o", "b8.onnx", cwd=tmp_path, code=2)
    assert "was made for model" in done.stderr
    assert not (tmp_path / "b8.onnx").exists()
    _deploykit("quantize", "a.onnx", "--calib", "a.json", "-o", "a8.onnx", cwd=tmp_path)
    assert (tmp_path / "a8.onnx.manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_interrupted_leaves_nothing_half_made_and_goes_on_next_time(number: int, tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "net.onnx")
    _npz(tmp_path / "data.npz")
    command = [
        sys.executable,
        "-m",
        "deploykit",
        "run",
        "net.onnx",
        "--data",
        "data.npz",
        "--backend",
        "onnxruntime",
        "--batch",
        "1",
        *SHORT,
        "-o",
        "out",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "engines").glob("net/export-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "report.json").exists()
    for manifest in (tmp_path / "engines").rglob("*.manifest.json"):
        if ".making-" not in str(manifest):
            json.loads(manifest.read_text())
    _deploykit(*command[3:], cwd=tmp_path)
    assert (tmp_path / "out" / "report.json").exists()


def test_two_runs_on_one_store_at_the_same_time(tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "net.onnx")
    _npz(tmp_path / "data.npz")
    base = [
        sys.executable,
        "-m",
        "deploykit",
        "run",
        "net.onnx",
        "--data",
        "data.npz",
        "--backend",
        "onnxruntime",
        "--batch",
        "1",
        *SHORT,
    ]
    both = [
        subprocess.Popen([*base, "-o", name], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for name in ("a", "b")
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert (tmp_path / "a" / "report.json").exists()
    assert (tmp_path / "b" / "report.json").exists()
