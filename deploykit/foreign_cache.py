"""ForeignCache: the ranges in a calibration cache that another tool has made, in any of the forms that are about.

TensorRT's text (scales), and the three files of ONNX Runtime's `write_calibration_table`: calibration.flatbuffers and
calibration.cache (one number a tensor), calibration.json (both ends). None of them says which model or which data it was
made on, so whoever uses one holds its names against the graph.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import trt_cache
from deploykit.errors import InputError, MissingBackend

_KNOWN = "expected deploykit's calib.json, TensorRT's text cache, or ONNX Runtime's calibration.flatbuffers, .cache or .json"
# onnxruntime 1.31, quantization/quant_utils.py, write_calibration_table: max([highest, lowest])
_ONE_END = (
    "ONNX Runtime's own writer puts max(highest, lowest) into this form, not the larger magnitude: where it made this file, a "
    "tensor that goes further below zero than above it is clipped; its calibration.json has both ends"
)


@dataclass(frozen=True)
class ForeignCache:
    """`origin` in words; `ends`: (low, high) per tensor, symmetric where the file holds a magnitude only (`symmetric`)."""

    origin: str
    ends: Mapping[str, tuple[float, float]]
    symmetric: bool
    notes: tuple[str, ...] = ()

    @property
    def amax(self) -> dict[str, float]:
        """The magnitude at which a symmetric quantizer clips, per tensor."""
        return {name: max(abs(low), abs(high)) for name, (low, high) in self.ends.items()}


def is_ours(path: Path) -> bool:
    """Whether a file is deploykit's own table, by its content. Raises InputError for a file that cannot be read."""
    doc = _json(_bytes(path))
    return isinstance(doc, dict) and "calibration_version" in doc


def read(path: Path) -> ForeignCache:
    """The cache at `path`, its form found by its content.

    Raises InputError, with the file's name, for a file that cannot be read, is in no known form, is empty, or holds a range
    that is negative or no number; MissingBackend for the flatbuffers form without onnxruntime.
    """
    data = _bytes(path)
    doc = _json(data)
    if data.startswith(b"TRT-"):
        header, scales = trt_cache.read(path)
        found = _magnitudes(f"TensorRT's cache {path.name} ({header})", trt_cache.amax_of(scales).items(), path)
    elif isinstance(doc, dict):
        found = ForeignCache(f"ONNX Runtime's {path.name}", _both_ends(doc, path), symmetric=False)
    elif (lines := _lines(data)) is not None:
        found = _magnitudes(f"ONNX Runtime's {path.name}", lines, path, _ONE_END)
    else:
        found = _magnitudes(f"ONNX Runtime's {path.name}", _flatbuffers(data, path), path, _ONE_END)
    if not found.ends:
        raise InputError(f"{path} holds no ranges", "calibrate again")
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise InputError(
            f"there is no calibration table {path}", "make one with: deploykit calibrate m.onnx --data DATA -o calib.json"
        ) from exc
    except OSError as exc:
        raise InputError(f"cannot read the calibration table {path}: {exc.strerror}", "check the path") from exc


def _json(data: bytes) -> Any:
    if not data.lstrip().startswith(b"{"):
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _magnitudes(origin: str, pairs: Iterable[tuple[str, float]], path: Path, *notes: str) -> ForeignCache:
    ends = {}
    for name, amax in pairs:
        if not math.isfinite(amax) or amax < 0.0:
            remedy = (
                "give its calibration.json, which has both ends"
                if notes and amax < 0.0
                else "the cache is damaged; calibrate again"
            )
            raise InputError(f"{path}: the range of '{name}' is {amax}", remedy)
        ends[name] = (-amax, amax)
    return ForeignCache(origin, ends, symmetric=True, notes=notes)


def _both_ends(doc: Mapping[str, Any], path: Path) -> dict[str, tuple[float, float]]:
    """calibration.json: {tensor: {'lowest': x, 'highest': y, ...}}, a number or {'data': number or numbers, 'dtype': ...} each.
    What a calibrator's `compute_data` gives has the tensors one level below, under 'data'."""

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return numbers(value["data"])
        return [x for one in value for x in numbers(one)] if isinstance(value, list) else [float(value)]

    if doc.get("CLS") == "TensorsData":
        rows = doc.get("data")
        if not isinstance(rows, dict):
            raise InputError(f"{path} is no calibration table: its 'data' holds no tensors", _KNOWN)
        doc = rows
    ends = {}
    for name, row in doc.items():
        try:
            low, high = min(numbers(row["lowest"])), max(numbers(row["highest"]))
        except (KeyError, TypeError, ValueError, RecursionError) as exc:
            raise InputError(f"{path} is no calibration table: '{name}' has no lowest and highest", _KNOWN) from exc
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise InputError(f"{path}: the range of '{name}' is [{low}, {high}]", "the cache is damaged; calibrate again")
        ends[name] = (low, high)
    return ends


def _lines(data: bytes) -> list[tuple[str, float]] | None:
    """calibration.cache: 'name number' a line; None where it is something else."""
    try:
        rows = [line.rpartition(" ") for line in data.decode().splitlines() if line.strip()]
        return [(name, float(value)) for name, _, value in rows] if rows and all(name for name, _, _ in rows) else None
    except (UnicodeDecodeError, ValueError):
        return None


def _flatbuffers(data: bytes, path: Path) -> list[tuple[str, float]]:
    try:
        from onnxruntime.quantization.CalTableFlatBuffers import TrtTable
    except ImportError as exc:
        raise MissingBackend("reading ONNX Runtime's table needs onnxruntime", "pip install 'deploykit[cpu]'") from exc
    try:
        table = TrtTable.TrtTable.GetRootAs(data, 0)
        rows = [table.Dict(i) for i in range(table.DictLength())]
        return [(row.Key().decode(), float(row.Value())) for row in rows]
    except (struct.error, ValueError, TypeError, IndexError, AttributeError, UnicodeDecodeError, OverflowError) as exc:
        raise InputError(f"{path} is no calibration table that deploykit knows", _KNOWN) from exc
