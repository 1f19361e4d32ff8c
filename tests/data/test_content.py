"""The digest of a data set: follows the content, and its cache is never believed over the files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deploykit.data import content
from deploykit.errors import DataError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deploykit" / "content"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name)
        os.utime(folder / name, (1000, 1000))
    return folder


def test_names_and_bytes_make_the_digest(root: Path, cache: Path) -> None:
    first = content.of_files(root, ["a", "b"])
    assert content.of_files(root, ["b", "a"]) == first
    assert content.of_files(root, ["a"]) != first
    (root / "a").rename(root / "c")
    renamed = content.of_files(root, ["b", "c"])
    assert renamed != first
    (root / "c").write_text("x")
    assert content.of_files(root, ["b", "c"]) != renamed


def test_unchanged_files_are_not_read_again(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = content.of_files(root, ["a", "b"])
    monkeypatch.setattr(content, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert content.of_files(root, ["a", "b"]) == first


def test_a_file_changed_just_now_is_not_remembered(root: Path, cache: Path) -> None:
    (root / "a").write_text("1")
    first = content.of_files(root, ["a"])
    stat = (root / "a").stat()
    (root / "a").write_text("2")  # same size, perhaps the same clock tick
    os.utime(root / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content.of_files(root, ["a"]) != first


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"schema": 1, "files": {"a": 3, "b": [1, 2, "x", null, ""]}}', '{"schema": 9}']
)
def test_a_damaged_cache_costs_time_only(root: Path, cache: Path, damage: str) -> None:
    first = content.of_files(root, ["a", "b"])
    (file,) = cache.glob("*.json")
    file.write_text(damage)
    assert content.of_files(root, ["a", "b"]) == first
    assert json.loads(file.read_text())["schema"] == 1
    assert not list(cache.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_no_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert content.of_files(root, ["a", "b"]) == content.of_files(root, ["a", "b"])


def test_a_missing_file_is_an_error(root: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        content.of_files(root, ["a", "gone"])
