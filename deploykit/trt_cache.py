"""TensorRT's calibration cache in its text form, and the table that ONNX Runtime's TensorRT provider reads.

The text: `TRT-<version>-<algorithm>`, then a line `name: hex` per tensor, hex being the big-endian float32 of the scale,
amax / 127. A header of another version or algorithm makes TensorRT calibrate anew without a word. Serves TensorRT up
to 10: TensorRT 11 and TensorRT-RTX have no calibrators and read Q/DQ from the graph.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploykit.artifact import write_atomically
from deploykit.calibration_table import CalibrationTable
from deploykit.errors import InputError, MissingBackend, UnknownName

ALGORITHMS = ("EntropyCalibration2", "MinMaxCalibration", "EntropyCalibration", "LegacyCalibration")
DEFAULT_VERSION = "10.14.1"
LEVELS = 127.0
_HEADER = re.compile(r"TRT-(\d{3,6})-(\w+)$")
_SCALE = re.compile(r"[0-9a-fA-F]{1,8}$")


@dataclass(frozen=True)
class Header:
    """The first line: TensorRT's version as a number (8.6.1 is 8601, 10.14.1 is 101401), and the calibrator's algorithm."""

    version: int
    algorithm: str

    def __str__(self) -> str:
        return f"TRT-{self.version}-{self.algorithm}"


def version_number(version: str) -> int:
    """The number in a cache's header for a version such as '8.6.1' or '10.14.1', as NV_TENSORRT_VERSION counts it.

    Raises InputError for text that is no version, and from TensorRT 11 on, which has no calibration cache.
    """
    found = re.fullmatch(r"(\d{1,2})\.(\d{1,2})(?:\.(\d{1,2}))?(?:\.\d+)?", version)
    if not found:
        raise InputError(f"'{version}' is no TensorRT version", f"give one like {DEFAULT_VERSION}")
    major, minor, patch = (int(part or 0) for part in found.groups())
    if major >= 11:
        raise InputError(
            f"TensorRT {version} has no calibration cache", "quantize the graph with --layout tensorrt; it reads Q/DQ from there"
        )
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def to_text(table: CalibrationTable, *, version: str = DEFAULT_VERSION, algorithm: str = "EntropyCalibration2") -> str:
    """The cache that a TensorRT of that version takes from its calibrator of that algorithm: 'EntropyCalibration2' for
    IInt8EntropyCalibrator2, 'MinMaxCalibration' for IInt8MinMaxCalibrator.

    The algorithm names the calibrator class that will read the cache, whichever method found the ranges. Raises
    InputError for a tensor name that the format cannot hold.
    """
    return text_of({name: table.amax(name) for name in table.ranges}, version=version, algorithm=algorithm)


def text_of(amax: Mapping[str, float], *, version: str = DEFAULT_VERSION, algorithm: str = "EntropyCalibration2") -> str:
    """`to_text` of the magnitudes themselves."""
    if algorithm not in ALGORITHMS:
        raise UnknownName("TensorRT calibration algorithm", algorithm, ALGORITHMS)
    lines = [str(Header(version_number(version), algorithm))]
    for name in sorted(amax):
        if name.splitlines() != [name]:
            raise InputError(f"tensor name {name!r} cannot stand in TensorRT's cache, which has a line a tensor")
        lines.append(f"{name}: {_hex(name, amax[name] / LEVELS)}")
    return "\n".join(lines) + "\n"


def _hex(name: str, scale: float) -> str:
    try:
        bits = int.from_bytes(struct.pack(">f", scale), "big")
    except OverflowError as exc:
        raise InputError(f"the range of '{name}' is beyond float32", "leave the tensor out") from exc
    return f"{bits:08x}" if bits else "0"  # TensorRT writes zero without its leading zeros


def from_text(text: str) -> tuple[Header, dict[str, float]]:
    """The header, and the scale (amax / 127) of each tensor.

    Raises InputError with the line's number for a malformed header or line, a tensor named twice, and a scale that is
    negative, NaN or infinite.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    found = _HEADER.match(lines[0].strip())
    if not found:
        raise InputError(
            f"line 1: {lines[0][:60]!r} is no header of a TensorRT calibration cache",
            "expected something like TRT-8601-EntropyCalibration2",
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        name, colon, value = line.rpartition(":")  # names may hold colons, values don't
        value = value.strip()
        if not colon or not name or not _SCALE.match(value):
            raise InputError(f"line {number}: {line[:60]!r} is not 'name: scale in hex'", "the cache is damaged; calibrate again")
        (scale,) = struct.unpack(">f", bytes.fromhex(value.zfill(8)))
        if not math.isfinite(scale) or scale < 0.0:
            raise InputError(f"line {number}: the scale of '{name}' is {scale}", "the cache is damaged; calibrate again")
        if name in scales:
            raise InputError(f"line {number}: '{name}' stands there twice", "keep one of the two lines")
        scales[name] = scale
    return Header(int(found[1]), found[2]), scales


def amax_of(scales: Mapping[str, float]) -> dict[str, float]:
    """amax per tensor from the scales of a cache."""
    return {name: scale * LEVELS for name, scale in scales.items()}


def read(path: Path) -> tuple[Header, dict[str, float]]:
    """`from_text` of a file. Raises InputError, with the file's name, for one that is missing or not a cache."""
    try:
        return from_text(path.read_bytes().decode())
    except OSError as exc:
        raise InputError(f"cannot read the calibration cache {path}: {exc.strerror}", "check the path") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"{path} is not a text cache of TensorRT", "give the file that --trt-cache wrote") from exc
    except InputError as exc:
        raise InputError(f"{path}, {exc.message}", exc.remedy) from exc


def write(table: CalibrationTable, path: Path, *, version: str = DEFAULT_VERSION, algorithm: str = "EntropyCalibration2") -> None:
    """Writes `to_text`, whole or not at all."""
    write_atomically(path, to_text(table, version=version, algorithm=algorithm).encode())


def to_onnxruntime(table: CalibrationTable) -> bytes:
    """The flatbuffers table that ONNX Runtime's TensorRT provider reads without
    trt_int8_use_native_calibration_table: amax per tensor, as decimal text.

    Its own write_calibration_table (onnxruntime 1.31, quantization/quant_utils.py) writes max(highest, lowest), which
    makes [-5, 1] a 1.0; here it is the amax. With the option set to 1 it reads `to_text` instead, but splits at the first
    colon: this form is the safer one for names with a colon. Raises MissingBackend without onnxruntime, which brings
    flatbuffers.
    """
    try:
        import flatbuffers  # type: ignore[import-untyped]
        from onnxruntime.quantization.CalTableFlatBuffers import KeyValue, TrtTable
    except ImportError as exc:
        raise MissingBackend("writing ONNX Runtime's table needs onnxruntime", "pip install 'deploykit[cpu]'") from exc

    builder = flatbuffers.Builder(1024)
    entries = []
    for name in sorted(table.ranges):
        key, value = builder.CreateString(name), builder.CreateString(repr(table.amax(name)))
        KeyValue.KeyValueStart(builder)
        KeyValue.KeyValueAddKey(builder, key)
        KeyValue.KeyValueAddValue(builder, value)
        entries.append(KeyValue.KeyValueEnd(builder))
    TrtTable.TrtTableStartDictVector(builder, len(entries))
    for entry in reversed(entries):  # a vector is built from its end
        builder.PrependUOffsetTRelative(entry)
    vector = builder.EndVector()
    TrtTable.TrtTableStart(builder)
    TrtTable.TrtTableAddDict(builder, vector)
    builder.Finish(TrtTable.TrtTableEnd(builder))
    return bytes(builder.Output())
