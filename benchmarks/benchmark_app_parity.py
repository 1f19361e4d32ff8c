"""What deploykit's harness costs: its OpenVINO rows beside OpenVINO's own `benchmark_app`, in turns, on the same IR file.

    python benchmarks/benchmark_app_parity.py [--turns 24] [--seconds 2] [--streams 1] [--fp32 M.onnx --int8 M.onnx] [--json FILE]

Each turn starts both afresh, in alternating order, on the same file, batch 1, threads, latency hint and precision hint:
`benchmark_app -api sync`, and a deploykit child as `bench` uses it (open, four different inputs bound, warm-up, one
window). The throughput ratio of a turn is ours over theirs, runs over wall clock on both sides; the latency ratio is
theirs over ours of the medians (benchmark_app's latency is taken inside the library, without the call from Python).
With --streams 2 both keep two requests running (`benchmark_app -hint throughput -api async`), and only the throughput is compared.
The answer is the median over the turns with its bootstrap interval. benchmark_app against itself varies by 6 % a pair.

Goals: within 2 % for FP32 and 4 % for INT8. Without --fp32 and --int8: ResNet-18 at 224x224 with random weights, INT8 by
ONNX Runtime's quantizer in the CPU's layout from random images (for timing, values do not matter).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import backends, graph, hosted, machine
from deploykit.artifact import Artifact
from deploykit.children import Child
from deploykit.measurement import bootstrap_ratio
from deploykit.session import BuildRequest, OpenRequest

GOALS = {"fp32": 0.02, "int8": 0.04}
POOL = 4
_SAID = ("Median", "Throughput", "Count", "INFERENCE_NUM_THREADS", "NUM_STREAMS")


def resnet18(folder: Path) -> dict[str, Path]:
    """ResNet-18 with random weights in FP32 and INT8."""
    import torch
    import torchvision
    from onnxruntime import quantization as q

    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    paths = {"fp32": folder / "resnet18.onnx", "int8": folder / "resnet18-int8.onnx"}
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    example = (torch.randn(2, 3, 224, 224),)
    torch.onnx.export(model, example, str(paths["fp32"]), input_names=["x"], dynamic_shapes=shapes, external_data=False)
    rng = np.random.default_rng(0)
    images = iter([{"x": rng.normal(size=(2, 3, 224, 224)).astype(np.float32)} for _ in range(3)])

    class Images(q.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(images, None)

    kinds = {"activation_type": q.QuantType.QUInt8, "weight_type": q.QuantType.QInt8}
    q.quantize_static(paths["fp32"], paths["int8"], Images(), per_channel=True, **kinds)
    return paths


def theirs(engine: Artifact, threads: int, streams: int, seconds: float, folder: Path) -> dict[str, float]:
    """benchmark_app's throughput and median latency. Its -nthreads and -nstreams rule out -hint, so they go by a config file."""
    config = folder / "config.json"
    properties = {"INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": str(streams)}
    config.write_text(json.dumps({"CPU": properties}))
    shapes = ",".join(f"{n}[{','.join(map(str, s))}]" for n, s in engine.signature.shapes(1).items())
    app = Path(sys.executable).with_name("benchmark_app")
    way = (
        ["-hint", "latency", "-api", "sync"] if streams == 1 else ["-hint", "throughput", "-api", "async", "-nireq", str(streams)]
    )
    command = [str(app), "-m", str(engine.path), "-d", "CPU", *way, "-shape", shapes]
    command += ["-t", str(max(1, round(seconds))), "-load_config", str(config)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k: re.search(rf"{k}:\s+([\d.]+)", said) for k in _SAID}
    values = {k: float(m[1]) for k, m in found.items() if m is not None}
    assert len(values) == len(found), said
    assert (values["INFERENCE_NUM_THREADS"], values["NUM_STREAMS"]) == (threads, streams), said
    return {"images_per_s": values["Throughput"], "p50_s": values["Median"] / 1e3, "n": values["Count"]}


def ours(engine: Artifact, precision: str, threads: int, streams: int, seconds: float) -> dict[str, float]:
    """deploykit's, from a child process of its own."""
    rng = np.random.default_rng(1)
    shapes = engine.signature.shapes(1)
    pool = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(POOL)]
    with Child("deploykit", threads=threads) as child:
        request = OpenRequest(precision, 1, threads, options=backends.opening_options("openvino", streams, None))
        opened = child.call(hosted.open_engine, "openvino", engine.path, request)
        assert (opened.precision, opened.threads, opened.streams) == (precision, threads, streams), opened
        child.call(hosted.bind_inputs, pool)
        window = child.call(hosted.window, seconds)
    return {
        "images_per_s": len(window.seconds) / window.wall_s,
        "p50_s": float(np.median(window.seconds)),
        "n": len(window.seconds),
    }


def compare(model: Path, precision: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All turns of one model, and the ratios over them."""
    signature = graph.signature(graph.load(model))
    given = Artifact(model, "onnx", precision, signature, "given")
    out = folder / precision
    out.mkdir()
    engine = backends.get("openvino").build(given, BuildRequest(precision), out).save()
    turns = []
    for turn in range(options.turns):
        load = os.getloadavg()[0]
        if turn % 2:
            mine = ours(engine, precision, options.threads, options.streams, options.seconds)
            other = theirs(engine, options.threads, options.streams, options.seconds, folder)
        else:
            other = theirs(engine, options.threads, options.streams, options.seconds, folder)
            mine = ours(engine, precision, options.threads, options.streams, options.seconds)
        turns.append({"deploykit": mine, "benchmark_app": other, "load": load})
        print(
            f"{precision} turn {turn + 1}: {mine['p50_s'] * 1e3:.3f} ms, benchmark_app {other['p50_s'] * 1e3:.3f} ms",
            file=sys.stderr,
        )
    result: dict[str, Any] = {"precision": precision, "goal": GOALS[precision], "turns": turns}
    ratios_of = {"throughput": [t["deploykit"]["images_per_s"] / t["benchmark_app"]["images_per_s"] for t in turns]}
    if options.streams == 1:
        ratios_of["latency"] = [t["benchmark_app"]["p50_s"] / t["deploykit"]["p50_s"] for t in turns]
    for name, ratios in ratios_of.items():
        ratio = bootstrap_ratio([np.array([r]) for r in ratios])
        result[name] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "spread": [min(ratios), max(ratios)]}
    result["outcome"] = outcome(result["throughput"]["low"], result["throughput"]["high"], GOALS[precision])
    return result


def outcome(low: float, high: float, goal: float) -> str:
    """'met' when the whole interval lies within the goal, 'missed' when none of it does, else 'inconclusive'."""
    if 1 - goal <= low and high <= 1 + goal:
        return "met"
    return "missed" if high < 1 - goal or low > 1 + goal else "inconclusive"


def main() -> int:
    """Runs the comparison; 0 when both goals are met, 1 when one is missed, 5 when a noisy machine leaves it open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", type=Path)
    parser.add_argument("--int8", type=Path)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mode = f"_{options.streams}_streams" if options.streams > 1 else ""
    kept = options.json or Path(__file__).parent / "results" / f"benchmark_app_parity{mode}.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = {"fp32": options.fp32, "int8": options.int8}
        models = {k: v for k, v in given.items() if v} or resnet18(folder)
        results = [compare(path, precision, options, folder) for precision, path in models.items()]
    loads = [turn["load"] for result in results for turn in result["turns"]]
    doc = {
        "benchmark": "benchmark_app_parity",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": backends.get("openvino").versions(),
        "threads": options.threads,
        "streams": options.streams,
        "seconds": options.seconds,
        "load_average": {"median": float(np.median(loads)), "max": max(loads)},
        "results": results,
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(doc, indent=1) + "\n")
    for result in results:
        print(f"{result['precision']}: {result['outcome']}")
        for kind in [k for k in ("throughput", "latency") if k in result]:
            r = result[kind]
            print(
                f"{result['precision']} {kind}: {r['ratio']:.3f} of benchmark_app (95 % interval {r['low']:.3f} to {r['high']:.3f}, "
                f"turns {r['spread'][0]:.3f} to {r['spread'][1]:.3f}); goal within {result['goal']:.0%}"
            )
    print(f"load average: median {doc['load_average']['median']:.1f}, at most {max(loads):.1f}, on {machine.threads()} CPUs")
    outcomes = {result["outcome"] for result in results}
    return 1 if "missed" in outcomes else 5 if "inconclusive" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
