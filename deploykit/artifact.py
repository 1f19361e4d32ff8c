"""Artifact: one file a stage made, with its provenance in a manifest beside it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit.errors import InputError
from deploykit.signature import Signature

MANIFEST_VERSION = 1
Json = Any


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes; of a folder, that of its files' names and bytes in name order."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a whole file or none: to a temporary name in the same folder, fsynced, then renamed. A device or a pipe
    (/dev/stdout) is written to, never replaced. Raises InputError for a folder, OSError naming the file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as exc:
        exc.filename = str(path)  # not the temporary name
        raise


def manifest_path(path: Path) -> Path:
    """Where the manifest of the artifact at `path` lies: `<file>.manifest.json`."""
    return path.with_name(path.name + ".manifest.json")


@dataclass(frozen=True)
class Artifact:
    """A file (or folder) that a stage made.

    format: source | onnx | pt2 | openvino | tensorrt-rtx | ... ; precision: the one asked for. `parent` is the sha256 of
    what it was made from, `options` what the stage was told, `facts` what it found (JSON values only).
    `companions` are file names beside `path` that belong to it (external data, weights), with their sha256.
    """

    path: Path
    format: str
    precision: str
    signature: Signature
    stage: str
    sha256: str = ""
    parent: str | None = None
    options: Mapping[str, Json] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    facts: Mapping[str, Json] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of the file and its companions."""
        files = [self.path, *(self.path.parent / name for name in self.companions)]
        return sum(f.stat().st_size for p in files for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())

    def save(self) -> Artifact:
        """Writes the manifest beside the file; returns the artifact with its hashes filled in."""
        companions = {name: sha256_of(self.path.parent / name) for name in self.companions}
        full = replace(self, sha256=sha256_of(self.path), companions=companions)
        write_atomically(manifest_path(self.path), json.dumps(full.to_json(), indent=1, sort_keys=True).encode())
        return full

    def to_json(self) -> dict[str, Json]:
        """The manifest's document; the file's name stands for its path, so that a folder can be moved."""
        return {
            "manifest_version": MANIFEST_VERSION,
            "file": self.path.name,
            "format": self.format,
            "precision": self.precision,
            "signature": self.signature.to_json(),
            "stage": self.stage,
            "sha256": self.sha256,
            "parent": self.parent,
            "options": dict(self.options),
            "versions": dict(self.versions),
            "device": self.device,
            "facts": dict(self.facts),
            "companions": dict(self.companions),
        }


def load(path: Path) -> Artifact:
    """The artifact at `path` (the file itself or its manifest), its bytes checked against the manifest.

    Raises InputError when the manifest is missing, unreadable or of another version, and when the bytes have changed.
    """
    if path.name.endswith(".manifest.json"):
        path = path.with_name(path.name.removesuffix(".manifest.json"))
    side = manifest_path(path)
    try:
        doc = json.loads(side.read_text())
        if doc["manifest_version"] != MANIFEST_VERSION:
            raise InputError(
                f"{side} has manifest version {doc['manifest_version']}, expected {MANIFEST_VERSION}", "build it again"
            )
        artifact = Artifact(
            path=path,
            format=doc["format"],
            precision=doc["precision"],
            signature=Signature.from_json(doc["signature"]),
            stage=doc["stage"],
            sha256=doc["sha256"],
            parent=doc["parent"],
            options=doc["options"],
            versions=doc["versions"],
            device=doc["device"],
            facts=doc["facts"],
            companions=doc["companions"],
        )
    except FileNotFoundError as exc:
        raise InputError(f"{path} has no manifest ({side.name})", "build it with deploykit, or give the .onnx file") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{side} is not a deploykit manifest ({type(exc).__name__}: {exc})", "build the artifact again") from exc
    for name, expected in {path.name: artifact.sha256, **artifact.companions}.items():
        if Path(name).name != name:
            raise InputError(f"{side} names a file outside its folder: {name!r}", "build the artifact again")
        file = path.parent / name
        if not file.exists():
            raise InputError(f"{file} is missing, but {side.name} describes it", "build the artifact again")
        found = sha256_of(file)
        if found != expected:
            raise InputError(
                f"{file} has sha256 {found[:12]}..., its manifest says {expected[:12]}...",
                "the file was changed or truncated after it was made; build it again",
            )
    return artifact
