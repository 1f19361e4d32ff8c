"""Bad input through the command line: one message with the remedy, the right exit code, nothing left behind."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from deploykit.cli.main import run
from deploykit.errors import ChildDied

QUICK = ["--backend", "onnxruntime", "--precision", "fp32", "--batch", "1", "--duration", "smoke", "--threads", "1"]
Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """A command's exit code and what it said on standard error, run in a folder with m.onnx in it."""
    monkeypatch.chdir(tmp_path)
    tiny_models.conv_net(tmp_path / "m.onnx")

    def call(*arguments: str) -> tuple[int, str]:
        code = run(list(arguments))
        return code, capsys.readouterr().err

    return call


def _samples(path: Path, **arrays: object) -> None:
    x = np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32)
    np.savez(path, **({"x": x} | arrays))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "entrpy"], "did you mean 'entropy'"),
        (["--duration", "quik"], "did you mean 'quick'"),
        (["--calib", "nowhere.json"], "nowhere.json"),
        (["--calib", "cut.json"], "no calibration table"),
        (["--data", "text.npz"], "is no .npz file"),
        (["--shapes", "x=1x3x9x9"], "axis 2 is always 8"),
    ],
)
def test_refused_before_anything_is_made(options: list[str], said: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"calibration_version": 1, "tensors": {')
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    code, err = cli("run", "m.onnx", "-o", "out", *QUICK, *options)
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_model_ends_the_run(cli: Cli, tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "other.onnx", seed=5)
    assert cli("calibrate", "other.onnx", "--data", "random:4", "-o", "c.json")[0] == 0
    code, err = cli("run", "m.onnx", "-o", "out", "--calib", "c.json", *QUICK[:2], "--precision", "int8", *QUICK[4:])
    assert code == 2, err
    assert "was made for model" in err
    assert "--recalibrate" in err


def test_class_folders_of_a_bare_graph_need_the_order_of_its_classes(cli: Cli, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 2, 3)).save(tmp_path / "data" / name / f"{i}.png")
    options = [*QUICK, "--data", "data", "--preprocess", "none"]
    code, err = cli("bench", "m.onnx", *options)
    assert code == 2
    assert "--classes" in err
    (tmp_path / "classes.txt").write_text("dog\ncat\nbird\nfish\n")
    assert cli("bench", "m.onnx", *options, "--classes", "classes.txt", "--json", "report.json")[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["top1"] is not None


def test_the_sample_at_fault_is_named_by_its_number_in_the_data(cli: Cli, tmp_path: Path) -> None:
    x = np.zeros((12, 3, 8, 8), dtype=np.float32)
    x[7, 0, 0, 0] = np.inf
    _samples(tmp_path / "d.npz", x=x)
    code, err = cli("bench", "m.onnx", *QUICK, "--data", "d.npz", "--json", "report.json")
    assert code == 0, err  # it was timed; its accuracy is what could not be measured
    doc = json.loads((tmp_path / "report.json").read_text())
    assert "first for sample 7" in str(doc["rows"][0])
    assert any("node 'conv2'" in note for note in doc["notes"])


def test_a_backend_for_pytorch_sources_is_a_skipped_row_of_a_graph(cli: Cli, tmp_path: Path) -> None:
    options = ["--backend", "onnxruntime,executorch", *QUICK[2:]]
    assert cli("bench", "m.onnx", *options, "--json", "report.json")[0] == 3
    rows = {row["backend"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["onnxruntime"]["status"] == "ok"
    assert rows["executorch"]["status"] == "skipped"
    assert "PyTorch" in rows["executorch"]["reason"]
    code, err = cli("build", "m.onnx", "--backend", "executorch", "-o", "engines-x")
    assert (code, "PyTorch" in err) == (2, True)


def test_a_device_is_written_to_and_never_replaced(cli: Cli) -> None:
    code, err = cli("check", "m.onnx", "--json", "/dev/full")
    assert code == 2
    assert "no space left on the disk (/dev/full)" in err
    assert not Path("/dev/full").is_file()
    assert cli("check", "m.onnx", "--json", ".") == (2, "error: . is a folder\n  -> name a file\n")


def test_a_run_that_cannot_be_written_leaves_the_one_before(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("run", "m.onnx", "-o", "out", *QUICK)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full(text: str, path: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("deploykit.stages.report.write_text", full)
    code, err = cli("run", "m.onnx", "-o", "out", *QUICK, "--data", "random:8")
    assert (code, "no space left on the disk of out" in err) == (2, True), err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert cli("run", "m.onnx", "-o", "new/out", *QUICK)[0] == 2
    assert not (tmp_path / "new" / "out").exists()


def test_a_process_that_dies_while_the_reference_is_judged_leaves_the_speed(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise ChildDied("m onnxruntime fp32: its process was killed by SIGKILL")

    monkeypatch.setattr("deploykit.stages.accuracy.measure", killed)
    code, err = cli("bench", "m.onnx", *QUICK, "--data", "random:8", "--json", "report.json")
    assert code == 4, err
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["images_per_s"] > 0
    assert "accuracy was not measured" in row["notes"]


def test_two_runs_beside_each_other_are_one_json_document(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("run", "m.onnx", "-o", "out", *QUICK)[0] == 0
    assert run(["report", "out", "--compare", "out", "--json", "-"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"before", "after"}
    assert run(["report", "out", "--compare", "out", "--markdown", "new/beside.md"]) == 0
    assert "| m onnxruntime fp32 batch 1 |" in (tmp_path / "new" / "beside.md").read_text()
    code, err = cli("report", "out", "--markdown", "lone.md")
    assert (code, "there is none" in err) == (2, True), err
    (tmp_path / "file").write_text("")
    code, err = cli("report", "out", "--compare", "out", "--markdown", "file/beside.md")
    assert (code, "cannot write" in err) == (2, True), err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "m.onnx", "--data", "random:8", "-n", "0", "-o", "q.onnx"], "-n 0 must be at least 1"),
        (["quantize", "m.onnx", "--data", "random:8", "-n", "-3", "-o", "q.onnx"], "-n -3 must be at least 1"),
        (["build", "m.onnx", "--backend", "onnxruntime", "--precision", "int8", "-n", "0", "-o", "e"], "-n 0"),
        (["build", "m.onnx", "--backend", "onnxruntime", "--io", "int8", "-o", "e"], "--io int8 is for --backend litert"),
        (["build", "m.onnx", "--backend", "litert", "--precision", "fp32", "--io", "int8", "-o", "e"], "--io int8 is for"),
        (["build", "m.onnx", "--backend", "litert", "--precision", "int8", "--io", "int4", "-o", "e"], "float, int8"),
        (["build", "m.onnx", "--backend", "onnxruntime", "--weights", "w.pt", "-o", "e"], "--weights"),
        (["compare", "m.onnx", "m.onnx", "--data", "random:8", "--alone", "3"], "add --per-layer"),
        (["bench", "m.onnx", "--logs", "logs"], "add --scenario"),
    ],
)
def test_options_that_make_no_sense(arguments: list[str], said: str, cli: Cli, tmp_path: Path) -> None:
    code, err = cli(*arguments)
    assert (code, said in err) == (2, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]
