"""PlanHeader: what the first 64 bytes of a TensorRT-RTX plan say, so that a foreign or cut file is named before a GPU is.

Seen with tensorrt-rtx 1.7.1 (undocumented): magic 'vtrt' at 0, u64 length of the whole file at 16, version in bytes 24 to
27 (major, minor, patch, build), u64 mask of targets at 32.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import InputError

MAGIC = b"vtrt"
SIZE = 64
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")  # bit 0 upwards
_REBUILD = "build it again with `deploykit build-trt`"


@dataclass(frozen=True)
class PlanHeader:
    """The length a plan claims, the builder's version and the GPU generations it holds kernels for."""

    length: int
    version: str
    targets: tuple[str, ...]


def read(path: Path) -> PlanHeader:
    """The header of a TensorRT-RTX plan, its length held against the file's.

    Raises InputError for a file that is missing, no such plan, cut short, or without any target.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(SIZE)
        size = path.stat().st_size
    except FileNotFoundError as exc:
        raise InputError(f"there is no engine {path}", "check the path") from exc
    except IsADirectoryError as exc:
        raise InputError(f"{path} is a folder, not an engine", "name the engine file in it") from exc
    except OSError as exc:
        raise InputError(f"cannot read the engine {path}: {exc.strerror}", "check the path and who may read it") from exc
    if data[:4] != MAGIC:
        found = "an ONNX file" if path.suffix == ".onnx" else "perhaps full TensorRT's" if data[1:4] == b"trt" else "not known"
        raise InputError(f"{path.name} is no TensorRT-RTX plan: it starts with {data[:4]!r}, {found}", _REBUILD)
    if len(data) < SIZE:
        raise InputError(f"{path.name} is cut off after {len(data)} bytes", _REBUILD)
    (length,) = struct.unpack_from("<Q", data, 16)
    (mask,) = struct.unpack_from("<Q", data, 32)
    if length != size:
        raise InputError(f"{path.name} has {size} bytes, its header says {length}", f"it is truncated or damaged; {_REBUILD}")
    targets = tuple(name for bit, name in enumerate(TARGETS) if mask >> bit & 1)
    if not targets:
        raise InputError(f"{path.name} names no GPU generation that deploykit knows (mask {mask:#x})", _REBUILD)
    return PlanHeader(length, ".".join(str(b) for b in struct.unpack_from("<BBBB", data, 24)), targets)
