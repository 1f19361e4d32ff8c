"""Implicit INT8, as TensorRT up to 10 knows it: a calibrator that never sees data, only our cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import calibration_table, foreign_cache, trt_cache
from deploykit.calibration_table import CalibrationTable
from deploykit.errors import InputError

if TYPE_CHECKING:
    import onnx

FLAGS = ("FP16", "INT8")


def available(trt: Any) -> bool:
    """Whether this module still has calibrators: TensorRT 11 and TensorRT-RTX have none."""
    return hasattr(trt, "IInt8EntropyCalibrator2") and hasattr(trt.BuilderFlag, "INT8")


def cache_text(trt: Any, path: Path) -> str:
    """The cache at `path` (our JSON table, TensorRT's text or a table of ONNX Runtime's) with the header that this TensorRT
    takes.

    TensorRT calibrates anew, without a word, when the header is of another version; so it is written for this one.
    Raises InputError for a file that is neither.
    """
    if foreign_cache.is_ours(path):
        table: CalibrationTable = calibration_table.load(path)
        return trt_cache.to_text(table, version=trt.__version__)
    if not path.read_bytes().startswith(b"TRT-"):
        return trt_cache.text_of(foreign_cache.read(path).amax, version=trt.__version__)
    _, scales = trt_cache.read(path)
    lines = path.read_text().replace("\r\n", "\n").split("\n")
    if not scales:
        raise InputError(f"{path} holds no scales", "calibrate again")
    header = trt_cache.Header(trt_cache.version_number(trt.__version__), "EntropyCalibration2")
    return "\n".join([str(header), *(line for line in lines[1:] if line.strip())]) + "\n"


def check_names(text: str, model: onnx.ModelProto) -> tuple[str, ...]:
    """Warnings where the cache and the graph name different tensors. Raises InputError when they share none.

    A tensor without a scale stays in float there, without a word from TensorRT.
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
    if bare := tensors - scales.keys():
        found.append(f"{len(bare)} tensors of the graph have no scale in the cache and stay in float: {_some(bare)}")
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
