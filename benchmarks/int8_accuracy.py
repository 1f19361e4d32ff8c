"""INT8 against the float model: deploykit's recipes beside ONNX Runtime's quantizer and NNCF; same samples, same runtime.

    python benchmarks/int8_accuracy.py MODEL.onnx --calib calib.npy --judge judge.npy --json result.json [--mixed mixed.onnx]

calib.npy and judge.npy: float32 arrays [n, ...] for the model's one input, ready for it (preprocessed), from different
pictures. Each row is quantized in a process of its own, calibration included: its seconds and its peak memory. Accuracy is
taken twice: in ONNX Runtime with Q/DQ computed literally, and in OpenVINO (float parts in FP32), where the speed is taken too:
all rows in turns, the ratio to FP32 being the median over rounds.
Agreement: the share of judged samples with the float model's top-1. SQNR = 10 log10(sum y^2 / sum (y - q)^2) over all outputs.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
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
from deploykit.hosted import peak_rss_bytes
from deploykit.samples import Samples
from deploykit.stages import calibration
from deploykit.stages.precision import Int8Options, bias_correct, literal_session, to_int8

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


def recipes(model: Path, name: str, calib: NDArray[np.float32]) -> dict[str, Callable[[Path], object]]:
    """name of a row -> what writes its graph, calibration included."""
    signature = graph.signature(graph.load(model))
    samples = Samples("calib.npy", "0" * 64, InMemory(name, calib), signature, None, tuple(range(len(calib))), role="calibrate")

    def ours(method: str, layout: str, options: Int8Options, corrected: bool) -> Callable[[Path], object]:
        def write(out: Path) -> object:
            table = calibration.collect(model, samples, methods=(method,))[method]
            if corrected:
                return bias_correct(model, table, layout, samples, out, options)
            return to_int8(model, table, layout, out, options)

        return write

    rows: dict[str, Callable[[Path], object]] = {}
    for method in METHODS:
        rows[f"deploykit {method}"] = ours(method, "cpu", Int8Options(), False)
        rows[f"deploykit {method} bias"] = ours(method, "cpu", Int8Options(), True)
    rows["deploykit mse bias weights-mse"] = ours("mse", "cpu", Int8Options(weight_scales="mse"), True)
    rows["deploykit mse bias gptq"] = ours("mse", "cpu", Int8Options(rounding="gptq"), True)
    for kind in ("MinMax", "Entropy", "Percentile"):
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
    rows["nncf default"] = lambda out: _nncf(model, name, calib, out)
    return rows


def _nncf(model: Path, name: str, calib: NDArray[np.float32], out: Path) -> None:
    """NNCF's default preset on the ONNX model; its SmoothQuant and bias correction as they come."""
    import nncf
    import onnx

    data = nncf.Dataset([{name: calib[i : i + 1]} for i in range(len(calib))])
    onnx.save(nncf.quantize(onnx.load(str(model)), data, subset_size=len(calib)), str(out))


def literal(path: Path, name: str, judge: NDArray[np.float32]) -> NDArray[np.float64]:
    """The first output for every judged sample, Q/DQ computed as written."""
    session = literal_session(graph.load(path), None)
    parts = [session.run(None, {name: judge[i : i + _BATCH]})[0] for i in range(0, len(judge), _BATCH)]
    return np.concatenate(parts).astype(np.float64)


def in_openvino(path: Path, name: str, judge: NDArray[np.float32], hint: str = "f32") -> tuple[NDArray[np.float64], Any]:
    """The same from OpenVINO at batch 1, and the infer request for timing."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    model.reshape({name: [1, *judge.shape[1:]]})
    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": hint}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    parts = []
    for i in range(len(judge)):
        request.infer({name: judge[i : i + 1]})
        parts.append(np.array(request.get_output_tensor(0).data))
    return np.concatenate(parts).astype(np.float64), request


def against(wanted: NDArray[np.float64], found: NDArray[np.float64]) -> dict[str, float]:
    """Agreement and SQNR."""
    noise = float(np.square(wanted - found).sum())
    return {
        "agreement": float((found.argmax(1) == wanted.argmax(1)).mean()),
        "sqnr_db": float(10 * np.log10(np.square(wanted).sum() / max(noise, 1e-30))),
    }


def speeds(requests: dict[str, Any], rounds: int = 30, runs: int = 5) -> dict[str, float]:
    """Times as fast as FP32, by row: the median over rounds of time of FP32 / time of the row, each a window in turn."""
    ratios: dict[str, list[float]] = {label: [] for label in requests}
    for _ in range(rounds):
        spent = {}
        for label, request in requests.items():
            request.infer()
            start = time.perf_counter()
            for _ in range(runs):
                request.infer()
            spent[label] = time.perf_counter() - start
        for label in requests:
            ratios[label].append(spent["fp32"] / spent[label])
    return {label: float(np.median(values)) for label, values in ratios.items()}


def _write_one(asked: argparse.Namespace) -> None:
    calib = np.load(asked.calib)
    name = graph.signature(graph.load(asked.model)).inputs[0].name
    start = time.perf_counter()
    recipes(asked.model, name, calib)[asked.row](asked.out)
    print(json.dumps({"quantize_s": time.perf_counter() - start, "quantize_peak_rss_bytes": peak_rss_bytes()}))


def main() -> None:
    """Prints a row a recipe, and writes them all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name is one of these, separated by commas")
    parser.add_argument("--mixed", type=Path, help="a graph made by `deploykit quantize --mode mixed`, as a row of its own")
    parser.add_argument("--note", default="", help="kept with the result, e.g. that the machine was shared")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    if asked.row:
        _write_one(asked)
        return
    judge = np.load(asked.judge)
    name = graph.signature(graph.load(asked.model)).inputs[0].name
    words = {word for word in asked.only.split(",") if word}
    labels = [label for label in recipes(asked.model, name, np.load(asked.calib)) if not words or label in words]
    wanted = literal(asked.model, name, judge)
    exact, float_request = in_openvino(asked.model, name, judge)
    requests, result = {"fp32": float_request}, [{"name": "fp32", "openvino": against(exact, exact)}]
    bf16, requests["bf16"] = in_openvino(asked.model, name, judge, "bf16")
    result.append({"name": "bf16", "openvino": against(exact, bf16)})
    with tempfile.TemporaryDirectory() as folder:
        for label in [*labels, *(["deploykit mixed"] if asked.mixed else [])]:
            out, cost = asked.mixed, {}
            if label in labels:
                out = Path(folder) / f"{len(result)}.onnx"
                command = [sys.executable, __file__, asked.model, "--calib", asked.calib, "--judge", asked.judge]
                done = subprocess.run([*command, "--row", label, "--out", out], capture_output=True, text=True, check=False)
                if done.returncode:
                    result.append({"name": label, "failed": done.stderr.strip().splitlines()[-1]})
                    print(f"{label:32s} failed: {result[-1]['failed']}", flush=True)
                    continue
                cost = json.loads(done.stdout.strip().splitlines()[-1])
            found, requests[label] = in_openvino(out, name, judge)
            row = {
                "name": label,
                "literal": against(wanted, literal(out, name, judge)),
                "openvino": against(exact, found),
                **cost,
            }
            result.append(row)
            figures = "  ".join(f"{k} {row[k]['agreement']:6.1%} {row[k]['sqnr_db']:5.1f} dB" for k in ("literal", "openvino"))
            spent = f"{cost['quantize_s']:6.1f} s {cost['quantize_peak_rss_bytes'] / 1e6:6.0f} MB" if cost else ""
            print(f"{label:32s} {figures}  {spent}", flush=True)
        ratios = speeds(requests)
    for row in result:
        if row["name"] in ratios:
            row["times_fp32_speed"] = ratios[row["name"]]
            print(f"{row['name']:32s} {ratios[row['name']]:.2f} times FP32's speed in OpenVINO at batch 1")
    if asked.json:
        document = {
            "model": asked.model.name,
            "calibration_samples": len(np.load(asked.calib, mmap_mode="r")),
            "judging_samples": len(judge),
            "onnxruntime": onnxruntime.__version__,
            "note": asked.note,
        }
        asked.json.write_text(json.dumps({**document, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
