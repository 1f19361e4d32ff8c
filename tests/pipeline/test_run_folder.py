"""The folder of a run: one run at a time, never the store's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploykit import scratch
from deploykit.errors import InputError
from deploykit.pipeline import delivery


@pytest.mark.parametrize("out", [".", "engines", "engines/report"])
def test_a_runs_engines_never_lie_in_the_store(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="and the store is engines"), delivery.held(Path(out), Path("engines")):
        pass
    assert not list(tmp_path.iterdir())
    with delivery.held(Path(out), Path("elsewhere")):
        pass


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "out" / ".making-4711" / "engines").mkdir(parents=True)
    (tmp_path / "out" / "report.json").write_text("{}")
    with delivery.held(tmp_path / "out", tmp_path / "store"):
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_second_run_into_one_folder_is_one_error(tmp_path: Path) -> None:
    import tiny_models

    pytest.importorskip("onnxruntime")
    tiny_models.conv_net(tmp_path / "net.onnx")
    command = [sys.executable, "-m", "deploykit", "run", "net.onnx", "-o", "out", "--backend", "onnxruntime"]
    with scratch.held(tmp_path / "out"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "another deploykit is writing into out" in done.stderr
    assert not (tmp_path / "engines").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"), delivery.held(tmp_path / "out", tmp_path / "store"):
        pass


def test_a_run_killed_between_two_files_leaves_a_folder_that_nobody_trusts_until_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_models

    from deploykit import report_document
    from deploykit.pipeline import line
    from deploykit.pipeline.request import DataRequest, RowsRequest, Silent, SourceRequest

    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    model = tiny_models.conv_net(tmp_path / "net.onnx")
    rows = RowsRequest(("onnxruntime",), ("fp32",), (1,), threads=1, duration="smoke")
    result = line.run(line.LineRequest((SourceRequest(str(model)),), DataRequest("random:4"), rows, tmp_path / "store"))
    delivery.deliver(result.report, result, out, Silent())
    assert report_document.load(out).rows

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(delivery, "_swap_engines", killed)
        with pytest.raises(Killed):
            delivery.deliver(result.report, result, out, Silent())
    for path in (out, out / "report.json"):
        with pytest.raises(InputError, match="in the middle of replacing"):
            report_document.load(path)
    delivery.deliver(result.report, result, out, Silent())
    assert report_document.load(out).rows
