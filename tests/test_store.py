"""The store: content-addressed, atomic, safe for two processes, nothing half-made."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploykit import artifact as artifacts
from deploykit.artifact import Artifact, manifest_path
from deploykit.errors import InputError, OutOfSpace
from deploykit.signature import Signature, TensorSpec
from deploykit.store import Key, Store

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 2)),))
KEY = Key("export", "v1", "parent", {"opset": 20}, {"onnx": "1"})


def _make(folder: Path, text: str = "bytes") -> Artifact:
    (folder / "model.onnx").write_text(text)
    (folder / "weights.bin").write_text("w")
    return Artifact(folder / "model.onnx", "onnx", "fp32", SIGNATURE, "export", companions={"weights.bin": ""})


def test_made_once_then_reused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, reused = store.make("m", KEY, _make)
    again, reused_again = store.make("m", KEY, lambda _: pytest.fail("made again"))
    assert (reused, reused_again) == (False, True)
    assert again.path == first.path and again.sha256 == first.sha256
    assert artifacts.load(first.path).signature == SIGNATURE


@pytest.mark.parametrize(
    "other",
    [
        Key("export", "v2", "parent", {"opset": 20}, {"onnx": "1"}),
        Key("export", "v1", "other", {"opset": 20}, {"onnx": "1"}),
        Key("export", "v1", "parent", {"opset": 21}, {"onnx": "1"}),
        Key("export", "v1", "parent", {"opset": 20}, {"onnx": "2"}),
        Key("check", "v1", "parent", {"opset": 20}, {"onnx": "1"}),
    ],
)
def test_anything_that_went_in_changes_the_key(tmp_path: Path, other: Key) -> None:
    store = Store(tmp_path)
    store.make("m", KEY, _make)
    assert store.find("m", other) is None


@pytest.mark.parametrize("victim", ["model.onnx", "weights.bin", "model.onnx.manifest.json"])
def test_damaged_artifact_is_made_anew(tmp_path: Path, victim: str) -> None:
    store = Store(tmp_path)
    made, _ = store.make("m", KEY, _make)
    (made.path.parent / victim).write_text("damaged")
    fixed, reused = store.make("m", KEY, _make)
    assert not reused
    assert artifacts.load(fixed.path).path.read_text() == "bytes"


def test_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Artifact:
        (folder / "half").write_text("half")
        raise InputError("no")

    with pytest.raises(InputError):
        Store(tmp_path).make("m", KEY, fail)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not list((tmp_path / "m").iterdir())


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> Artifact:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutOfSpace, match="no space left"):
        Store(tmp_path).make("m", KEY, full)
    assert not list((tmp_path / "m").iterdir())


def test_really_full_file_system(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(OutOfSpace):
            Store(mount).make("m", KEY, lambda folder: _make(folder, "x" * 200_000))
        assert not [p for p in mount.rglob("*") if p.is_file()]
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def test_drop_removes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make("m", KEY, _make)
    store.drop("m", KEY)
    assert store.find("m", KEY) is None
    store.drop("m", KEY)


def _racer(root: Path, results: multiprocessing.Queue[str]) -> None:
    def slow(folder: Path) -> Artifact:
        time.sleep(0.3)
        return _make(folder)

    made, _ = Store(root).make("m", KEY, slow)
    results.put(made.sha256)


def test_two_processes_make_the_same_key_at_once(tmp_path: Path) -> None:
    results: multiprocessing.Queue[str] = multiprocessing.Queue()
    racers = [multiprocessing.Process(target=_racer, args=(tmp_path, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    found = {results.get(timeout=20) for _ in racers}
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert len(found) == 1
    assert [p.name for p in (tmp_path / "m").iterdir()] == [Store(tmp_path).folder("m", KEY).name]


def test_killed_process_leaves_no_half_artifact(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from deploykit.store import Store
from test_store import KEY, _make
def slow(folder):
    made = _make(folder)
    print("making", flush=True)
    time.sleep(30)
    return made
Store(Path({str(tmp_path)!r})).make("m", KEY, slow)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = Store(tmp_path)
    assert store.find("m", KEY) is None
    made, reused = store.make("m", KEY, _make)
    assert not reused and made.path.is_file()
    assert not list((tmp_path / "m").glob(".making-*"))


def test_load_refuses_changed_bytes_and_missing_or_foreign_manifests(tmp_path: Path) -> None:
    made = _make(tmp_path).save()
    made.path.write_text("changed")
    with pytest.raises(InputError, match="changed or truncated"):
        artifacts.load(made.path)
    manifest_path(made.path).write_text("{")
    with pytest.raises(InputError, match="not a deploykit manifest"):
        artifacts.load(made.path)
    manifest_path(made.path).unlink()
    with pytest.raises(InputError, match="has no manifest"):
        artifacts.load(made.path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    made = _make(tmp_path).save()
    side = manifest_path(made.path)
    doc = json.loads(side.read_text())
    doc["companions"] = {"../secret": "0" * 64}
    side.write_text(json.dumps(doc))
    with pytest.raises(InputError, match="outside its folder"):
        artifacts.load(made.path)
