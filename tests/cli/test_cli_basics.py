"""The command line's manners: exit codes, one message with a remedy, pipeline files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from deploykit.cli import parsing
from deploykit.errors import InputError


def _run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deploykit", *arguments], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, ""),
        (["no-such-command"], 2, "No such command"),
        (["check", "missing.onnx"], 2, "there is no file"),
        (["run", "model.onnx", "-o", "out", "--batch", "1,x"], 2, "--batch"),
        (["run", "model.onnx", "-o", "out", "--batch", "0"], 2, "--batch"),
        (["run", "model.onnx", "-o", "out", "--backend", "opnvino"], 2, "did you mean 'openvino'"),
        (["run", "model.onnx", "-o", "out", "--precision", "int9"], 2, "did you mean"),
        (["run", "model.onnx", "-o", "out", "--target", "sm74"], 2, "sm75"),
        (["run", "model.onnx", "-o", "out", "--max-drop", "0.5"], 2, "0.5pp"),
        (["run", "model.onnx", "-o", "out", "--max-slowdown", "5%"], 2, "--baseline"),
        (["bench", "no/such/model.onnx"], 2, "no/such/model.onnx"),
        (["gate", "nowhere/report.json", "--max-drop", "1pp"], 2, "nowhere"),
        (["report", "nowhere"], 2, "nowhere"),
    ],
)
def test_exit_code_and_message(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "model.onnx")
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"model.onnx", "out", "engines"}


def test_debug_shows_where_it_came_from(tmp_path: Path) -> None:
    done = _run("check", "missing.onnx", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_shapes_are_parsed_and_bad_ones_refused() -> None:
    found = parsing.shapes(["x=1x3x32x32:8x3x64x64:32x3x96x96", "a=b=2x2"])
    assert found["x"].opt == (8, 3, 64, 64)
    assert found["a=b"].min == found["a=b"].max == (2, 2)
    for bad in ("x", "x=1x2:3x4", "x=1x2:1x2x3:1x2", "x=2x2:1x2:3x3", "x=0:1:2", "=1"):
        with pytest.raises(InputError):
            parsing.shapes([bad])


@pytest.mark.parametrize("content", [b"", b"hello world", bytes(range(256)) * 4, b"\x08\x08\x12"])
@pytest.mark.parametrize("command", ["check", "bench", "export", "quantize", "calibrate"])
def test_what_is_no_onnx_file_is_one_error(command: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    more = {
        "export": ["-o", "out.onnx"],
        "quantize": ["--mode", "fp16", "-o", "out.onnx"],
        "calibrate": ["--data", "random:4", "-o", "c.json"],
    }
    done = _run(command, "bad.onnx", *more.get(command, []), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "bad.onnx" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "c.json").exists()


def test_a_closed_standard_output_is_no_error(tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "m.onnx")
    command = f"{sys.executable} -m deploykit check m.onnx >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    tiny_models.conv_net(tmp_path / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    done = _run("quantize", "m.onnx", "--mode", "fp16", "-o", "folder.onnx", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: -o folder.onnx is a folder\n  -> name a file\n")
