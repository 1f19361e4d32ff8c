"""A folder replaced by another: the older one is never lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.pipeline import baselines
from deploykit.pipeline.delivered import put_in_place


def _folder(path: Path, text: str, name: str = "file") -> Path:
    path.mkdir()
    (path / name).write_text(text)
    return path


def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("one", "two"):
        put_in_place(_folder(tmp_path / "made", text), out)
        assert (out / "file").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_where_the_new_one_cannot_be_put_the_old_one_stays(tmp_path: Path) -> None:
    out = _folder(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "nothing", out)
    assert (out / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_baseline_s_folder_is_replaced_by_a_copy(tmp_path: Path) -> None:
    run, base = (_folder(tmp_path / name, text, "report.json") for name, text in (("run", "new"), ("base", "old")))
    baselines._replace_folder(run, base)
    assert (base / "report.json").read_text() == (run / "report.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "run"]
