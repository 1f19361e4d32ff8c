"""INT8 against the float model: deploykit's recipes beside ONNX Runtime's own quantizer, same samples, same runtime.

    python benchmarks/int8_accuracy.py MODEL.onnx --calib calib.npy --judge judge.npy --json result.json

calib.npy and judge.npy: float32 arrays [n, ...] for the model's one input, ready for it (preprocessed), from different
pictures. Every graph is computed literally (Q/DQ as written), so that the figures don't depend on this CPU's kernels.
Agreement: the share of judged samples with the float model's top-1. SQNR = 10 log10(sum y^2 / sum (y - q)^2) over all outputs.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from deploykit import graph
from deploykit.samples import Samples
from deploykit.stages import calibration
from deploykit.stages.precision import Int8Options, bias_correct, predict_session_options, to_fp16, to_int8

METHODS = ("minmax", "entropy", "percentile", "mse")
_BATCH = 16


@dataclass
class InMemory:
    """A Reader over one array."""

    name: str
    array: NDArray[np.float32]

    def read(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        return {self.name: self.array[list(indices)]}


class Feed(CalibrationDataReader):  # type: ignore[misc]
    """The same samples for ONNX Runtime's calibrator."""

    def __init__(self, name: str, array: NDArray[np.float32]) -> None:
        self._batches = iter([{name: array[i : i + 1]} for i in range(len(array))])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)


def outputs(path: Path, name: str, judge: NDArray[np.float32]) -> NDArray[np.float64]:
    """The first output for every judged sample, Q/DQ computed as written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in predict_session_options().items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {name: judge[i : i + _BATCH]})[0] for i in range(0, len(judge), _BATCH)]
    return np.concatenate(parts).astype(np.float64)


def recipes(model: Path, name: str, calib: NDArray[np.float32]) -> dict[str, Callable[[Path], object]]:
    """name of a row -> what writes its graph."""
    signature = graph.signature(graph.load(model))
    samples = Samples("calib.npy", "0" * 64, InMemory(name, calib), signature, None, tuple(range(len(calib))), role="calibrate")
    tables = calibration.collect(model, samples, methods=METHODS)
    rows: dict[str, Callable[[Path], object]] = {"fp16": lambda out: to_fp16(model, out)}
    for layout in ("cpu", "tensorrt"):
        for method, table in tables.items():
            for scales in ("max", "mse"):
                chosen = Int8Options(weight_scales=scales)
                label = f"int8 {layout} {method} weights-{scales}"
                rows[label] = lambda out, t=table, y=layout, o=chosen: to_int8(model, t, y, out, o)  # type: ignore[misc]
                if method in ("minmax", "percentile"):
                    rows[label + " bias"] = lambda out, t=table, y=layout, o=chosen: bias_correct(model, t, y, samples, out, o)  # type: ignore[misc]
    for kind in ("MinMax", "Percentile"):
        rows[f"onnxruntime {kind.lower()}"] = lambda out, k=kind: quantize_static(  # type: ignore[misc]
            str(model),
            str(out),
            Feed(name, calib),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, k),
        )
    return rows


def main() -> None:
    """Prints a row a recipe, and writes them all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name holds one of these words, separated by commas")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    calib, judge = np.load(asked.calib), np.load(asked.judge)
    name = graph.signature(graph.load(asked.model)).inputs[0].name
    wanted = outputs(asked.model, name, judge)
    words = [word for word in asked.only.split(",") if word]
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for label, write in recipes(asked.model, name, calib).items():
            if words and not any(word in label for word in words):
                continue
            out, start = Path(folder) / "candidate.onnx", time.perf_counter()
            write(out)
            seconds = time.perf_counter() - start
            found = outputs(out, name, judge)
            agreement = float((found.argmax(1) == wanted.argmax(1)).mean())
            sqnr = float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))
            result.append({"name": label, "agreement": agreement, "sqnr_db": sqnr, "quantize_s": seconds, "n": len(judge)})
            print(f"{label:46s} agreement {agreement:6.1%}  SQNR {sqnr:5.1f} dB  {seconds:5.1f} s", flush=True)
    if asked.json:
        document = {"model": asked.model.name, "calibration_samples": len(calib), "onnxruntime": onnxruntime.__version__}
        asked.json.write_text(json.dumps({**document, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
