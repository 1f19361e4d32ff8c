"""INT8 against the float model: deploykit's recipes, each switch alone and together, beside ONNX Runtime's quantizer, NNCF and ModelOpt.

    python benchmarks/quantization/photographs.py --folder build/photographs
    deploykit export benchmarks/quantization/efficientnet_lite0.py:model --input x:float32:batchx3x224x224 -o lite0.onnx
    python benchmarks/quantization/compare.py lite0.onnx --calib-data build/photographs/calibrate --data build/photographs/judge \\
        --preprocess crop=224,resize=224,mean=0.5,std=0.5 --name efficientnet_lite0 [--modelopt ENV/bin/python]

DATA as deploykit takes it; with --calib-data alone left out, it is split. Each row is quantized in a process of its own,
calibration included: its seconds and its peak memory. Accuracy and speed are taken in OpenVINO (float parts in FP32, batch 1): all
rows in turns, the ratio to FP32 being the median over rounds. Agreement: the share of judged samples with the float model's
top-1. SQNR = 10 log10(sum y^2 / sum (y - q)^2) over all outputs. With labels: top-1, and its drop in percentage points.
Writes results/quantization_NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import peers
from numpy.typing import NDArray

from deploykit import data, graph, preprocess
from deploykit.hosted import peak_rss_bytes
from deploykit.pipeline import ranges
from deploykit.samples import Samples
from deploykit.stages import precision
from deploykit.stages.precision import Int8Options

RESULTS = Path(__file__).parent.parent / "results"
DEFAULT_ROW = "deploykit (default)"


@dataclass(frozen=True)
class Recipe:
    """One of deploykit's rows."""

    method: str = ranges.BEST
    corrected: bool = True
    options: Int8Options = field(default_factory=Int8Options)
    equalized: bool = False


RECIPES = {
    DEFAULT_ROW: Recipe(),
    "minmax, nothing else": Recipe("minmax", corrected=False),
    "minmax": Recipe("minmax"),
    "entropy": Recipe("entropy"),
    "percentile": Recipe("percentile"),
    "mse": Recipe("mse"),
    "best, no bias correction": Recipe(corrected=False),
    "best, weight scales mse": Recipe(options=Int8Options(weight_scales="mse")),
    "best, gptq": Recipe(options=Int8Options(rounding="gptq")),
    "best, equalize": Recipe(equalized=True),
    "best, equalize, gptq": Recipe(equalized=True, options=Int8Options(rounding="gptq")),
}


def shares(asked: argparse.Namespace) -> tuple[Samples, Samples]:
    """(what calibrates, what judges)."""
    signature = graph.signature(graph.load(asked.model))
    own = preprocess.parse(asked.preprocess) if asked.preprocess else None

    def opened(spec: str) -> Samples:
        return data.open(spec, signature, preprocess=own)

    calib = opened(asked.calib_data) if asked.calib_data else None
    everything = opened(asked.data)
    calibrate, judge = data.split(everything, calib=calib, calib_n=asked.n, exclude=_trained_on(asked, everything))
    return calibrate, judge.take(range(min(len(judge), asked.most or len(judge))), judge.role)


def _trained_on(asked: argparse.Namespace, samples: Samples) -> list[int]:
    """The samples that the weights have seen, where --trained-on names what `deploykit finetune` wrote beside them."""
    if asked.trained_on is None:
        return []
    seen = json.loads(asked.trained_on.read_text())["trained_on"]
    if seen["content"] != samples.content:
        raise SystemExit(f"{asked.trained_on} is of other data")
    return [int(i) for i in seen["indices"]]


def array_of(samples: Samples) -> NDArray[np.float32]:
    """All samples of a model with one input, [n, ...]."""
    name = samples.signature.inputs[0].name
    return np.concatenate([np.asarray(feeds[name][:count], np.float32) for feeds, count in samples.batches(16)])


def ours(model: Path, samples: Samples, recipe: Recipe) -> Callable[[Path], object]:
    """What writes the graph of one of our recipes."""

    def write(out: Path) -> object:
        source = model
        if recipe.equalized:
            source = out.with_name("equalized.onnx")
            precision.equalize(model, samples, source)
        table = ranges.collect(source, samples, recipe.method)
        if recipe.corrected:
            return precision.bias_correct(source, table, "cpu", samples, out, recipe.options)
        return precision.to_int8(source, table, "cpu", out, recipe.options)

    return write


def in_openvino(path: Path, name: str, judge: NDArray[np.float32], hint: str = "f32") -> tuple[NDArray[np.float64], Any]:
    """The first output for every judged sample, from OpenVINO at batch 1, and the infer request for timing."""
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


def against(wanted: NDArray[np.float64], found: NDArray[np.float64], labels: NDArray[np.int64] | None) -> dict[str, float]:
    """Agreement and SQNR; with labels top-1 and its drop."""
    noise = float(np.square(wanted - found).sum())
    row = {
        "agreement": float((found.argmax(1) == wanted.argmax(1)).mean()),
        "sqnr_db": float(10 * np.log10(np.square(wanted).sum() / max(noise, 1e-30))),
    }
    if labels is not None:
        top1, before = float((found.argmax(1) == labels).mean()), float((wanted.argmax(1) == labels).mean())
        row |= {"top1": top1, "top1_drop_pp": 100 * (before - top1)}
    return row


def speeds(requests: dict[str, Any], rounds: int = 24, runs: int = 5, base: str = "fp32") -> dict[str, float]:
    """Times as fast as the row `base`, by row: the median over rounds of its time / time of the row, each a window in turn."""
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
            ratios[label].append(spent[base] / spent[label])
    return {label: float(np.median(values)) for label, values in ratios.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="what judges")
    parser.add_argument("--calib-data", help="what calibrates; default: a share of --data")
    parser.add_argument("--preprocess")
    parser.add_argument("-n", type=int, default=256, help="calibration samples, at most")
    parser.add_argument("--trained-on", type=Path, help="the manifest of the weights: what they have seen does not calibrate")
    parser.add_argument("--most", type=int, help="judge on at most so many samples")
    parser.add_argument("--only", default="", help="rows whose name is one of these, separated by ';'")
    parser.add_argument("--add", action="store_true", help="keep the rows of an earlier run that this one does not take again")
    parser.add_argument("--modelopt", type=Path, help="the python of an environment with ModelOpt")
    parser.add_argument("--mixed", type=Path, help="a graph made by `deploykit quantize --mode mixed`, as a row of its own")
    parser.add_argument("--note", default="", help="kept with the result, e.g. that the machine was shared")
    parser.add_argument("--name", required=True, help="of the result's files")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_one(asked: argparse.Namespace) -> None:
    """Quantizes one row, and says what it took; runs in a process of its own."""
    name = graph.signature(graph.load(asked.model)).inputs[0].name
    if asked.row in RECIPES:
        calibrate, _ = shares(asked)
        write = ours(asked.model, calibrate, RECIPES[asked.row])
    else:
        write = peers.rows(asked.model, name, np.load(asked.samples), asked.samples, asked.modelopt)[asked.row]
    start = time.perf_counter()
    write(asked.out)
    spent = time.perf_counter() - start
    inside = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # ModelOpt runs in a child
    print(json.dumps({"quantize_s": spent, "quantize_peak_rss_bytes": max(peak_rss_bytes(), inside)}))


def _quantized(label: str, folder: Path, samples: Path) -> tuple[Path | None, dict[str, Any]]:
    """The graph of one row, made in a process of its own, and what it took or why there is none."""
    home = folder / label.replace(" ", "-").replace("(", "").replace(")", "").replace(",", "")
    home.mkdir()
    out = home / "model.onnx"
    command = [sys.executable, __file__, *sys.argv[1:], "--row", label, "--out", str(out), "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    made = out if out.is_file() else out.with_suffix(".xml")
    return made, json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Prints a row a recipe, and writes them all."""
    asked = _arguments()
    logging.disable(logging.WARNING)
    if asked.row:
        _write_one(asked)
        return
    calibrate, judged = shares(asked)
    judge, labels, name = array_of(judged), judged.label_array(), judged.signature.inputs[0].name
    words = [word.strip() for word in asked.only.split(";") if word.strip()]
    exact, float_request = in_openvino(asked.model, name, judge)
    bf16, bf16_request = in_openvino(asked.model, name, judge, "bf16")
    requests = {"fp32": float_request, "bf16": bf16_request}
    result: list[dict[str, Any]] = [
        {"name": "fp32", **against(exact, exact, labels)},
        {"name": "bf16", **against(exact, bf16, labels)},
    ]
    with tempfile.TemporaryDirectory() as scratch:
        samples = Path(scratch) / "calibrate.npy"
        np.save(samples, array_of(calibrate))
        labelled = [*RECIPES, *peers.rows(asked.model, name, judge[:1], samples, asked.modelopt)]
        for label in [
            *(sorted((x for x in labelled if x in words), key=words.index) if words else labelled),
            *(["deploykit mixed"] if asked.mixed else []),
        ]:
            made, cost = (asked.mixed, {}) if label == "deploykit mixed" else _quantized(label, Path(scratch), samples)
            row: dict[str, Any] = {"name": label, **cost}
            if made is not None:
                found, requests[label] = in_openvino(made, name, judge)
                row |= against(exact, found, labels)
            result.append(row)
            print(_line(row), flush=True)
        for label, ratio in speeds(requests).items():
            next(row for row in result if row["name"] == label)["times_fp32_speed"] = ratio
    document = {
        "model": asked.model.name,
        "calibration_samples": calibrate.describe(),
        "judging_samples": judged.describe(),
        "versions": {package: _version(package) for package in ("deploykit", "onnxruntime", "openvino", "nncf")},
        "note": asked.note,
        "rows": result,
    }
    _save(asked, document)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _save(asked: argparse.Namespace, document: dict[str, Any]) -> None:
    file = RESULTS / f"quantization_{asked.name}.json"
    if asked.add and file.is_file():
        taken = {row["name"] for row in document["rows"]}
        document["rows"] += [row for row in json.loads(file.read_text())["rows"] if row["name"] not in taken]
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")
    head = ["", "agreement", "SQNR dB", "top-1 drop pp", "times FP32's speed", "quantizing s", "MB", ""]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in document["rows"]]
    text = f"{document['model']}, judged on {document['judging_samples']['n']} samples, calibrated on "
    text += (
        f"{document['calibration_samples']['n']}; OpenVINO {document['versions']['openvino']}, batch 1. {document['note']}\n\n"
    )
    file.with_suffix(".md").write_text(text + "\n".join(lines) + "\n")
    print("\n".join(lines))


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if row.get(key) is not None else ""

    return [
        row["name"],
        cell("agreement", ".1%"),
        cell("sqnr_db", ".1f") if row["name"] != "fp32" else "",
        cell("top1_drop_pp", ".2f"),
        cell("times_fp32_speed", ".2f"),
        cell("quantize_s", ".0f"),
        cell("quantize_peak_rss_bytes", ".0f", 1e-6),
        row.get("failed", ""),
    ]


def _line(row: dict[str, Any]) -> str:
    return "  ".join(cell for cell in _cells(row) if cell)


if __name__ == "__main__":
    main()
