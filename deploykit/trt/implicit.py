"""Implicit INT8, as TensorRT up to 10 knows it: a calibrator that never sees data, only our cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import calibration_table, foreign_cache, graph, trt_cache
from deploykit.calibration_table import CalibrationTable
from deploykit.errors import InputError
from deploykit.trt.layers import QUANTIZED_OPS

if TYPE_CHECKING:
    import onnx

FLAGS = ("FP16", "INT8")


def available(trt: Any) -> bool:
    """Whether this module still has calibrators: TensorRT 11 and TensorRT-RTX have none."""
    return hasattr(trt, "IInt8EntropyCalibrator2") and hasattr(trt.BuilderFlag, "INT8")


def cache_text(trt: Any, path: Path, model: Path | None = None) -> str:
    """The cache at `path` (our JSON table, TensorRT's text or a table of ONNX Runtime's) with the header that this TensorRT
    takes.

    TensorRT calibrates anew, without a word, when the header is of another version; so it is written for this one.
    Raises InputError for a file that is neither, StaleCalibration for our table of another model than that at `model`.
    """
    if foreign_cache.is_ours(path):
        table: CalibrationTable = calibration_table.load(path)
        if model is not None:
            table.require_match(model_sha256=graph.digest(graph.load(model)))
        return trt_cache.to_text(table, version=trt.__version__)
    if not path.read_bytes().startswith(b"TRT-"):
        return trt_cache.text_of(foreign_cache.read(path).amax, version=trt.__version__)
    _, scales = trt_cache.read(path)
    lines = path.read_bytes().decode().replace("\r\n", "\n").split("\n")
    if not scales:
        raise InputError(f"{path} holds no scales", "calibrate again")
    header = trt_cache.Header(trt_cache.version_number(trt.__version__), "EntropyCalibration2")
    return "\n".join([str(header), *(line for line in lines[1:] if line.strip())]) + "\n"


def check_names(text: str, model: onnx.ModelProto) -> tuple[str, ...]:
    """Warnings where the cache and the graph name different tensors. Raises InputError when they share none.

    A layer whose input has no scale stays in float there.
    """
    _, scales = trt_cache.from_text(text)
    stored = {t.name for t in model.graph.initializer}
    tensors = {name for node in model.graph.node for name in node.output if name}
    tensors |= {v.name for v in model.graph.input if v.name not in stored}
    shared = tensors & scales.keys()
    if not shared:
        raise InputError(
            f"the calibration cache names {len(scales)} tensors, and none is in the graph ({_some(scales)} ...)",
            "it was made for another model or another export of it; calibrate this one",
        )
    found = []
    if strays := scales.keys() - tensors:
        found.append(f"the cache has scales for {len(strays)} tensors that are not in the graph: {_some(strays)}")
    read = {node.input[0] for node in model.graph.node if node.op_type in QUANTIZED_OPS and node.input} & tensors
    if bare := read - scales.keys():
        found.append(
            f"{len(bare)} of {len(read)} tensors that convolutions and matrix products read have no scale in the cache; those "
            f"layers stay in float: {_some(bare)}"
        )
    return tuple(found)


def calibrator(trt: Any, text: str) -> Any:
    """An IInt8EntropyCalibrator2 that answers with the cache. It must outlive the build."""
    data = text.encode()

    class FromCache(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> None:
            """No data: TensorRT asks only when it refuses the cache, and then the build must fail, not calibrate on nothing."""

        def read_calibration_cache(self) -> bytes:
            return data

        def write_calibration_cache(self, cache: Any) -> None:
            """The cache is ours already."""

    return FromCache()


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])
