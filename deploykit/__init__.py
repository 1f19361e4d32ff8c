"""deploykit: the fastest engine for the hardware at hand that keeps the accuracy, with the evidence.

import deploykit
with deploykit.open("out/engines/resnet18-openvino-int8") as engine:
    outputs = engine.infer({"x": images})
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploykit.pipeline.predicting import Runner

__version__ = "0.1.0"


def open(path: str | Path, *, batch: int = 1, threads: int | None = None) -> Runner:
    """An engine (its file or folder) or .onnx file, opened at `batch` in a process of its own.

    `.infer({name: array})` gives the finished outputs by name; use it in a `with` block, or call `.close()`.
    Raises InputError for what is no engine, MissingBackend where it cannot run here (a GPU engine without a GPU).
    """
    from deploykit.pipeline.predicting import Runner

    return Runner(Path(path), batch, threads=threads)
