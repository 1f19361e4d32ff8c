"""`gate` as typed: options that would do nothing are one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_rows import a_report

from deploykit.cli.main import run
from deploykit.stages import report as reports


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--update"], "--update needs the baseline to move"),
        (["--update", "--baseline", "b", "--max-drop", "1pp"], "--update moves the baseline and judges nothing"),
        (["--update", "--baseline", "b", "--junit", "j.xml"], "--update moves the baseline and judges nothing"),
        (["--update", "--baseline", "b", "--remeasure"], "--update moves the baseline and judges nothing"),
        (["--baseline", "b", "--duration", "lng"], "unknown duration 'lng'"),
        (["--baseline", "b", "--preprocess", "none"], "--preprocess says how --data is read"),
        (["--baseline", "out", "--max-drop", "1pp", "--junit", "."], "--junit . is a folder"),
        (["--baseline", "out", "--max-drop", ""], "--max-drop ''"),
        ([], "nothing to judge by"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reports.write(a_report(), tmp_path / "out")
    assert run(["gate", "out", *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
