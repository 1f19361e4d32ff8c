"""The store: `engines/<model>/<key>/`, content-addressed, written atomically, safe for several processes at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploykit import artifact as artifacts
from deploykit import scratch
from deploykit.artifact import Artifact, Json
from deploykit.errors import InputError, OutOfSpace


def source_hash(*paths: Path) -> str:
    """A stage's version: sha256 over the source files it is made of, so that changed code never serves an old result."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Key:
    """What an artifact is made of; its digest names the folder."""

    stage: str
    stage_version: str
    parent: str | None
    options: Mapping[str, Json]
    versions: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The first 20 hex digits of the sha256 of the key's canonical JSON."""
        doc = [self.stage, self.stage_version, self.parent, dict(self.options), dict(self.versions)]
        return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Store:
    """A folder of artifacts. Two processes may make the same key at once: the first rename wins, the other is dropped."""

    root: Path

    def folder(self, model: str, key: Key) -> Path:
        """Where the artifact of `key` lies or would lie."""
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("._") or "model"
        return self.root / safe[:80] / f"{key.stage}-{key.digest}"

    def find(self, model: str, key: Key) -> Artifact | None:
        """The artifact of `key`, its bytes checked; None when it is not there. A damaged one is removed."""
        folder = self.folder(model, key)
        manifests = sorted(folder.glob("*.manifest.json"))
        if not manifests:
            return None
        try:
            return artifacts.load(manifests[0])
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def drop(self, model: str, key: Key) -> None:
        """Removes the artifact of `key`, if it is there, in one step."""
        folder = self.folder(model, key)
        doomed = folder.with_name(f"{scratch.PREFIX}dropped-{os.getpid()}-{time.monotonic_ns()}")
        try:
            os.rename(folder, doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def make(self, model: str, key: Key, build: Callable[[Path], Artifact]) -> tuple[Artifact, bool]:
        """The artifact of `key`, and whether it was reused; `build` gets an empty temporary folder to write it in.

        Raises OutOfSpace when the disk is full; whatever `build` raises passes through. Nothing half-made stays.
        """
        found = self.find(model, key)
        if found is not None:
            return found, True
        target = self.folder(model, key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.sweep(target.parent)
            with scratch.folder_in(target.parent) as folder:
                made = build(folder).save()
                os.chmod(folder, 0o755)
                for file in folder.rglob("*"):
                    if file.is_file():
                        _fsync(file)
                try:
                    os.rename(folder, target)
                except OSError as exc:
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    other = self.find(model, key)
                    if other is not None:
                        return other, True
                    os.rename(folder, target)
                _fsync(target.parent)
                return artifacts.load(target / made.path.name), False
        except OSError as exc:
            raise _disk_error(exc, self.root) from exc


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(exc: OSError, root: Path) -> Exception:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(f"no space left on the disk of {root}", "free some space or choose another folder with --store")
    if exc.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
        return InputError(f"cannot write to {root}: {exc.strerror}", "choose another folder with --store")
    return exc
