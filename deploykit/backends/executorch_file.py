"""A .pte file and the runtime that loads it: the header checked before native code sees the file, and what the runtime logs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploykit.errors import MissingBackend, ModelError

# executorch/exir/_serialize/_program.py: flatbuffer root and identifier, then the extended header
_IDENTIFIER = re.compile(rb"ET\d\d")
_EXTENDED = b"eh00"
_HEAD_BYTES = 40
_NOISE = re.compile(r"^\[cpuinfo_utils\.cpp")
_PLACE = re.compile(r"^\[[\w.]+:\d+\]\s*")


def check(path: Path) -> None:
    """Raises ModelError for a file that is no .pte, or that is shorter than its header says.

    The runtime itself ends the process on random bytes (1.5.1: an uncaught UnicodeDecodeError in its own error message).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror}", "build the engine again") from exc
    if len(head) < _HEAD_BYTES or not _IDENTIFIER.fullmatch(head[4:8]) or head[8:12] != _EXTENDED:
        raise ModelError(f"{path.name} is not an ExecuTorch program (.pte)", "build it again with --backend executorch")
    program, segments, segment_bytes = (int.from_bytes(head[at : at + 8], "little") for at in (16, 24, 32))
    wanted = max(program, segments + segment_bytes)
    if size < wanted:
        raise ModelError(f"{path.name} has {size} bytes of {wanted}: it was cut short", "build it again, or copy it again")


def runtime() -> Any:
    """ExecuTorch's runtime as a module. Raises MissingBackend where it cannot be loaded with this torch."""
    import torch  # noqa: F401 - loads the libraries that the extension links to

    try:
        with native_log():
            from executorch.extension.pybindings import _C
    except ImportError as exc:
        raise MissingBackend(
            f"ExecuTorch's runtime cannot be loaded: {' '.join(str(exc).split())[:200]}",
            "its release must fit torch's: pip install 'deploykit[executorch]'",
        ) from exc
    return _C


class Log:
    """What native code has written to standard error since it was opened."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def text(self) -> str:
        """All of it so far."""
        self._file.seek(0)
        return str(self._file.read().decode(errors="replace"))


@contextlib.contextmanager
def native_log() -> Iterator[Log]:
    """Catches what native code writes to standard error (file descriptor 2): ExecuTorch says there why something failed,
    and reads CPU registers of ARM on every machine."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield Log(file)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def reason(said: str) -> str:
    """The first lines that tell the reason, without source places; '' when nothing was said."""
    lines = [_PLACE.sub("", line).strip() for line in said.splitlines() if line.strip() and not _NOISE.match(line)]
    text = "; ".join(lines[:2])
    return text if len(text) <= 300 else text[:297] + "..."
