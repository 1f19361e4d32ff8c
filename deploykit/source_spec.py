"""SourceSpec: what SOURCE, --weights, --num-classes and --input say about a model, without importing torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from deploykit.artifact import sha256_of
from deploykit.errors import InputError, ModelError
from deploykit.signature import Dim, TensorSpec

Kind = Literal["torchvision", "timm", "factory", "onnx", "pt2", "keras"]
KINDS: tuple[str, ...] = get_args(Kind)
BATCH = "batch"
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PACKAGES: dict[str, tuple[str, ...]] = {
    "torchvision": ("torch", "torchvision"),
    "timm": ("torch", "timm"),
    "factory": ("torch",),
    "pt2": ("torch",),
    "keras": ("torch", "keras"),
    "onnx": (),
}
_SOURCES = "a torchvision name (resnet18), timm:NAME, path/to/file.py:factory, an .onnx, .pt2 or .keras file"
_FILES: dict[str, Kind] = {".onnx": "onnx", ".pt2": "pt2", ".keras": "keras"}


@dataclass(frozen=True)
class SourceSpec:
    """One model to deploy.

    text: the SOURCE, with a file's path made absolute; weights: 'none' (seeded initialisation; for a factory, .onnx,
    .pt2 or .keras: what it holds itself), 'default' (the library's own, downloaded) or the absolute path of a checkpoint;
    inputs: empty = the kind's default; name: a short name, fit for a folder.
    """

    text: str
    kind: Kind
    weights: str
    num_classes: int | None
    inputs: tuple[TensorSpec, ...]
    name: str

    @property
    def reference(self) -> str:
        """The model's name in its library or the factory's name in its file; '' for a file that is the model."""
        if self.kind in _FILES.values():
            return ""
        return self.text.rpartition(":")[2]

    @property
    def file(self) -> Path | None:
        """The file that SOURCE names, or None for a library's model."""
        if self.kind == "factory":
            return Path(self.text.rpartition(":")[0])
        return Path(self.text) if self.kind in _FILES.values() else None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that --weights names, or None."""
        return None if self.weights in ("none", "default") else Path(self.weights)

    def versions(self) -> dict[str, str]:
        """Versions of the packages that determine the model; 'missing' for one that is not installed."""
        found: dict[str, str] = {}
        for package in _PACKAGES[self.kind]:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = "missing"
        return found

    def digest(self) -> str:
        """sha256 over everything that determines the model: names, options, the bytes of the files it names, package
        versions. The files' paths don't count, so that a moved project keeps its engines.

        Modules that a factory imports are not in it: `Source.local_files` holds them, `changed_files` compares them.
        Raises ModelError for a file that has gone since.
        """
        files = {}
        for role, file in (("source", self.file), ("weights", self.checkpoint)):
            if file is not None:
                if not file.is_file():
                    raise ModelError(f"there is no file {file}", "it was there when the model was named; put it back")
                files[role] = sha256_of(file)
        doc = {
            "kind": self.kind,
            "reference": self.reference,
            "weights": "file" if self.checkpoint else self.weights,
            "num_classes": self.num_classes,
            "inputs": [str(spec) for spec in self.inputs],
            "files": files,
            "versions": self.versions(),
        }
        return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A JSON document that `from_json` reads back."""
        return {
            "text": self.text,
            "kind": self.kind,
            "weights": self.weights,
            "num_classes": self.num_classes,
            "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in self.inputs],
            "name": self.name,
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> SourceSpec:
        """The spec that `to_json` wrote. Raises InputError for a document that is not one."""
        try:
            if doc["kind"] not in KINDS:
                raise ValueError(f"kind {doc['kind']!r}")
            inputs = tuple(TensorSpec(r["name"], r["dtype"], tuple(r["shape"])) for r in doc["inputs"])
            return cls(doc["text"], doc["kind"], doc["weights"], doc["num_classes"], inputs, doc["name"])
        except (KeyError, TypeError, ValueError) as exc:
            raise InputError(f"this is not the description of a source ({type(exc).__name__}: {exc})", "make it again") from exc


def parse(
    text: str, *, weights: str | None = None, num_classes: int | None = None, inputs: Sequence[str | TensorSpec] = ()
) -> SourceSpec:
    """The spec that SOURCE and its options describe. `weights` None means 'default' for a library's model, else 'none'.

    A library's names are looked up in `stages.source.load`, which has the library at hand.
    Raises InputError (ModelError for a missing file) saying what is wrong and what a SOURCE looks like.
    """
    kind, full, name = _recognise(text.strip())
    if num_classes is not None and num_classes < 1:
        raise InputError(f"--num-classes {num_classes} is not a number of classes", "give 1 or more")
    specs = tuple(parse_input(i) if isinstance(i, str) else i for i in inputs)
    twice = {s.name for s in specs if sum(other.name == s.name for other in specs) > 1}
    if twice:
        raise InputError(f"--input names '{min(twice)}' twice", "give each input once")
    if kind in _FILES.values():
        given = [("--num-classes", num_classes is not None), ("--input", bool(specs))]
        if kind != "keras":  # its layers are PyTorch's once loaded, and take what finetune writes
            given.append(("--weights PATH", weights not in (None, "none", "default")))
        for option, used in given:
            if used:
                raise InputError(f"{option} cannot change {full}: the file holds its graph and weights", "leave it out")
    return SourceSpec(full, kind, _weights(kind, weights), num_classes, specs, name)


def _weights(kind: Kind, weights: str | None) -> str:
    if weights in (None, "default", "none"):
        if kind not in ("torchvision", "timm"):
            return "none"
        return weights or "default"
    assert weights is not None
    path = Path(weights).expanduser().resolve()
    if not path.is_file():
        raise ModelError(f"--weights: there is no file {weights}", "give a checkpoint, 'none' or 'default'")
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise ModelError(
            f"--weights: {path.name} has no known suffix of a checkpoint", "save a state_dict as .safetensors, .pt or .pth"
        )
    return str(path)


def _recognise(text: str) -> tuple[Kind, str, str]:
    """(kind, text with an absolute path, short name)."""
    if not text:
        raise InputError("SOURCE is empty", f"give {_SOURCES}")
    for kind in ("timm", "torchvision"):
        if text.startswith(f"{kind}:"):
            name = text.removeprefix(f"{kind}:")
            if not name:
                raise InputError(f"'{text}' names no model", f"example: {kind}:resnet18")
            return kind, text, _slug(name)
    factory = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", text)
    path = Path(factory[1] if factory else text).expanduser()
    suffix = path.suffix.lower()
    if factory:
        if not path.is_file():
            raise ModelError(f"there is no file {path}", "check the path")
        name = path.stem if factory[2] in ("make", "model", "factory", "create") else f"{path.stem}-{factory[2]}"
        return "factory", f"{path.resolve()}:{factory[2]}", _slug(name)
    if suffix in _FILES:
        if not path.is_file():
            raise ModelError(f"there is no file {path}", "check the path")
        return _FILES[suffix], str(path.resolve()), _slug(path.stem)
    if suffix in (".h5", ".hdf5"):
        raise InputError(
            f"{path.name}: HDF5 files of Keras are not read", "load it once in Keras and save it with model.save('m.keras')"
        )
    if suffix == ".py" or ".py:" in text:
        raise InputError(f"'{text}' does not name a factory", f"write it as {path.name.split(':')[0]}:FUNCTION")
    if suffix in CHECKPOINT_SUFFIXES:
        raise InputError(f"{path.name} holds weights, not a model", f"name the model, and this file with --weights {path}")
    if not re.fullmatch(r"[A-Za-z_]\w*", text):
        what = f"unknown suffix '{suffix}'" if suffix else "not a model's name"
        raise InputError(f"SOURCE '{text}': {what}", f"give {_SOURCES}")
    return "torchvision", text, _slug(text)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"


def parse_input(text: str) -> TensorSpec:
    """The input that NAME:DTYPE:SHAPE describes, e.g. `x:float32:batchx3x32x32`, `ids:int64:batch,seq`, `t:float32:scalar`.

    A token that is no number is a dynamic axis; when all are numbers, the first is taken for the batch. A shape whose
    symbols are all other than 'batch' keeps them, and has no batch axis.
    Raises InputError saying which part is wrong.
    """
    example = "example: --input x:float32:batchx3x224x224"
    parts = text.split(":")
    if len(parts) == 2:
        raise InputError(f"--input '{text}' has no dtype", f"write NAME:DTYPE:SHAPE; {example}")
    if len(parts) != 3 or not parts[0]:
        raise InputError(f"--input '{text}' is not NAME:DTYPE:SHAPE", example)
    name, dtype_text, shape_text = (p.strip() for p in parts)
    try:
        dtype = np.dtype(dtype_text)
    except TypeError as exc:
        raise InputError(f"--input '{text}': '{dtype_text}' is no dtype", "use float32, int64, uint8, bool, ...") from exc
    if dtype.kind not in "fiub":
        raise InputError(f"--input '{text}': dtype {dtype} is not a number", "use float32, int64, uint8, bool, ...")
    if shape_text in ("", "scalar"):
        return TensorSpec(name, dtype.name, ())
    shape = _shape(text, shape_text)
    if all(isinstance(dim, int) for dim in shape):
        shape = (BATCH, *shape[1:])
    return TensorSpec(name, dtype.name, shape)


def _shape(text: str, shape_text: str) -> tuple[Dim, ...]:
    # 'x' separates sizes, and stands inside no symbol: 'max_len' must be written with commas.
    tokens = shape_text.split(",") if "," in shape_text else shape_text.split("x")
    dims: list[Dim] = []
    for token in (t.strip() for t in tokens):
        if token.isdecimal():
            if int(token) == 0:
                raise InputError(f"--input '{text}': a size of 0", "every axis needs at least one element")
            dims.append(int(token))
        elif re.fullmatch(r"[A-Za-z_]\w*", token):
            dims.append(token)
        else:
            raise InputError(f"--input '{text}': '{token}' is neither a size nor a name", "separate axes with x or a comma")
    return tuple(dims)


def changed_files(spec: SourceSpec, local_files: Mapping[str, str]) -> tuple[str, ...]:
    """Those of a factory's own files (`Source.local_files`: path relative to the factory's folder -> sha256) that have
    changed or gone since."""
    folder = spec.file.parent if spec.file is not None else Path()
    return tuple(name for name, sha in local_files.items() if not (folder / name).is_file() or sha256_of(folder / name) != sha)
