"""Npz: an .npz file whose arrays are named after the model's inputs."""

from __future__ import annotations

import difflib
import functools
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.data import content
from deploykit.errors import DataError
from deploykit.samples import Samples
from deploykit.signature import Outputs, Signature, TensorSpec

_LABELS = "labels"


@dataclass(frozen=True)
class NpzReader:
    """Reads an .npz file, kept in memory once it is open; stamp: its modification time when the samples were made."""

    path: str
    signature: Signature
    stamp: int

    def read(self, indices: Sequence[int]) -> Outputs:
        """Inputs by name, samples taken along each input's batch axis. Raises DataError when the file has changed."""
        try:
            stamp = Path(self.path).stat().st_mtime_ns
        except OSError as exc:
            raise DataError(f"{self.path} cannot be read: {exc.strerror}", "run again with the file in place") from exc
        if stamp != self.stamp:
            raise DataError(f"{self.path} has changed since it was opened", "run again")
        arrays = _arrays(self.path, self.signature, self.stamp)
        feeds: Outputs = {}
        for spec in self.signature.inputs:
            axis = self.signature.batch_axis(spec)
            array = arrays[spec.name]
            feeds[spec.name] = array if axis is None else np.ascontiguousarray(np.take(array, list(indices), axis=axis))
        return feeds


def open_npz(path: Path, signature: Signature) -> Samples:
    """The samples of an .npz file; `labels` beside the inputs are class indices.

    Raises DataError for an array that is no input or does not fit: rank, sizes, type, count, NaN.
    """
    raw = _load(path)
    names = [spec.name for spec in signature.inputs]
    for name in raw:
        if name not in names and name != _LABELS:
            close = difflib.get_close_matches(name, names, n=1)
            raise DataError(
                f"array '{name}' in {path} is no input of the model; its inputs are: {', '.join(names)}",
                (f"did you mean '{close[0]}'? " if close else "") + "name the arrays after the inputs; 'labels' may be added",
            )
    missing = [name for name in names if name not in raw]
    if missing:
        raise DataError(
            f"{path} has no array for the input(s) {', '.join(missing)}; it has: {', '.join(raw) or 'none'}",
            "name the arrays after the model's inputs",
        )
    _, notes = _fit(path, raw, signature)
    n = _count(path, raw, signature)
    labels = _labels(path, raw[_LABELS], n) if _LABELS in raw and _LABELS not in names else None
    resolved = path.resolve()
    return Samples(
        spec=str(path),
        content=content.of_files(resolved.parent, [resolved.name]),
        reader=NpzReader(str(resolved), signature, resolved.stat().st_mtime_ns),
        signature=signature,
        preprocess=None,
        indices=tuple(range(n)),
        labels=labels,
        notes=notes,
    )


@functools.lru_cache(maxsize=2)
def _arrays(path: str, signature: Signature, _stamp: int) -> Outputs:
    return _fit(Path(path), _load(Path(path)), signature)[0]


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as stream:
            if stream.read(2) not in (b"PK", b"\x93N"):  # numpy takes whatever is neither .npz nor .npy for a pickle
                raise DataError(f"{path} is no .npz file", "write it with numpy.savez(path, INPUT=array)")
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path} holds one array, not several by name", "write it with numpy.savez(path, INPUT=array)")
        with archive:
            return {name: archive[name] for name in archive.files}
    except ValueError as exc:
        if "pickle" in str(exc).lower():
            raise DataError(f"{path} holds pickled objects, which could run code: refused", "save plain numeric arrays") from exc
        raise DataError(f"{path} cannot be read as .npz: {exc}", "write it with numpy.savez") from exc
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError, MemoryError) as exc:
        raise DataError(f"{path} cannot be read as .npz: {exc}", "write it with numpy.savez") from exc


def _fit(path: Path, raw: dict[str, NDArray[Any]], signature: Signature) -> tuple[Outputs, tuple[str, ...]]:
    """The arrays in the model's types, and what was converted."""
    arrays: Outputs = {}
    notes: list[str] = []
    free: dict[str, tuple[int, str]] = {}
    for spec in signature.inputs:
        array = raw[spec.name]
        _check_shape(path, array, spec, signature.batch_axis(spec), free)
        arrays[spec.name] = _cast(path, array, spec)
        if array.dtype != arrays[spec.name].dtype:
            notes.append(f"'{spec.name}' was converted from {array.dtype.name} to {spec.dtype}")
        if arrays[spec.name].dtype.kind == "f":
            _check_nan(path, arrays[spec.name], spec, signature.batch_axis(spec))
    return arrays, tuple(notes)


def _check_shape(
    path: Path, array: NDArray[Any], spec: TensorSpec, batch_axis: int | None, free: dict[str, tuple[int, str]]
) -> None:
    if array.ndim != len(spec.shape):
        raise DataError(
            f"'{spec.name}' in {path} has rank {array.ndim} and shape {array.shape}, the model takes {spec}",
            "stack the samples along the input's batch axis",
        )
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if axis == batch_axis:
            continue
        if isinstance(dim, int) and size != dim:
            raise DataError(f"'{spec.name}' in {path} has shape {array.shape}, the model takes {spec}: axis {axis} must be {dim}")
        if isinstance(dim, str) and free.setdefault(dim, (size, spec.name))[0] != size:
            other_size, other = free[dim]
            raise DataError(f"axis '{dim}' is {other_size} in '{other}' and {size} in '{spec.name}' ({path})")


def _cast(path: Path, array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """Floats may become other floats, integers other integers that hold every value; nothing else is converted."""
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError as exc:
        raise DataError(f"input {spec} has a type that no .npz can hold") from exc
    if array.dtype == wanted:
        return array.astype(wanted.newbyteorder("="), copy=False)
    if array.dtype.kind == "f" and wanted.kind == "f":
        with np.errstate(over="ignore"):
            cast = array.astype(wanted)
        if np.isfinite(array).sum() != np.isfinite(cast).sum():
            raise DataError(f"'{spec.name}' in {path} holds values too large for {spec.dtype}", "scale the array")
        return cast
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        limits = np.iinfo(wanted)
        if not array.size or (int(array.min()) >= limits.min and int(array.max()) <= limits.max):
            return array.astype(wanted)
        raise DataError(f"'{spec.name}' in {path} holds values outside {spec.dtype}: {array.min()} to {array.max()}")
    raise DataError(
        f"'{spec.name}' in {path} is {array.dtype.name}, the model takes {spec.dtype}",
        f"save it as {spec.dtype}, scaled as the model was trained",
    )


def _check_nan(path: Path, array: NDArray[Any], spec: TensorSpec, batch_axis: int | None) -> None:
    bad = np.isnan(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        sample = "" if batch_axis is None else f" (sample {where[batch_axis]})"
        raise DataError(
            f"'{spec.name}' in {path} holds {int(bad.sum())} NaN, the first at {where}{sample}", "mend or leave out those samples"
        )


def _count(path: Path, raw: dict[str, NDArray[Any]], signature: Signature) -> int:
    counts = {
        spec.name: raw[spec.name].shape[axis] for spec in signature.inputs if (axis := signature.batch_axis(spec)) is not None
    }
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise DataError(f"the arrays of {path} hold different numbers of samples: {shown}")
    n = next(iter(counts.values()), 1)
    if n == 0:
        raise DataError(f"{path} holds no samples", "give at least one along the batch axis")
    return int(n)


def _labels(path: Path, labels: NDArray[Any], n: int) -> tuple[int, ...]:
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise DataError(
            f"'labels' in {path} is {labels.dtype.name} of shape {labels.shape}; expected {n} integers",
            "one class index a sample",
        )
    if labels.min() < 0:
        first = int(np.flatnonzero(labels < 0)[0])
        raise DataError(f"'labels' in {path} holds {int(labels[first])} at {first}: a class index is never negative")
    return tuple(labels.astype(np.int64).tolist())
