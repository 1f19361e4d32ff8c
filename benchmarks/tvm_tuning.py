"""TVM against PyTorch eager, FP32, one thread, in turns: with our default schedules, then after each slice of a search's budget.

    python benchmarks/tvm_tuning.py --model resnet18.onnx --budget 3600 --slices 6 --out benchmarks/results/tvm_tuning.json

The .onnx is ResNet-18 at 224 x 224 (`deploykit export resnet18 -o resnet18.onnx`). The search keeps its database in the user's
cache, so that a second run goes on where the first one stopped: the seconds reported are this run's. Needs xgboost-cpu and psutil.

estimate_ms: the sum of the best times of the functions; over_default: how many times as fast as default schedules the library is, by
the build itself, in turns ('of the search': where what was found was slower, and was left out).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact as artifacts
from deploykit import backends, graph, machine
from deploykit.artifact import Artifact
from deploykit.session import BuildRequest, OpenRequest


def pairs(tvm: Any, eager: Any, count: int) -> list[tuple[float, float]]:
    """Seconds of one run of each, taken in turns, the first of a pair alternating."""
    found = []
    for at in range(count + 3):
        times = {}
        for name in ("tvm", "eager") if at % 2 else ("eager", "tvm"):
            run = tvm if name == "tvm" else eager
            start = time.perf_counter()
            run()
            times[name] = time.perf_counter() - start
        if at >= 3:
            found.append((times["tvm"], times["eager"]))
    return found


def curve(folder: Path) -> list[list[float]] | None:
    """[seconds of this slice, estimated ms of a run] after each round of its search; None without one."""
    log = folder / "tuning.json"
    if not log.is_file():
        return None
    (found,) = json.loads(log.read_text()).values()
    return [[seconds, run_s * 1e3] for seconds, run_s in found["curve"]]


def summary(found: list[tuple[float, float]]) -> dict[str, float]:
    """Medians in ms, and the median of the pairs' ratios (eager over TVM: above 1, TVM is faster) with its quartiles."""
    ratios = sorted(eager / tvm for tvm, eager in found)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "tvm_ms": statistics.median(t for t, _ in found) * 1e3,
        "eager_ms": statistics.median(e for _, e in found) * 1e3,
        "speedup": middle,
        "speedup_q1": low,
        "speedup_q3": high,
        "pairs": len(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds of search in all")
    parser.add_argument("--slices", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tvm_tuning.json"))
    given = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = "1"

    import torch
    import torchvision

    torch.set_num_threads(1)
    backend = backends.get("tvm")
    model = Artifact(given.model, "onnx", "fp32", graph.signature(graph.load(given.model)), "given")
    spec = model.signature.inputs[0]
    data = np.random.default_rng(0).normal(size=model.signature.shapes(1)[spec.name]).astype(np.float32)
    network = torchvision.models.resnet18(weights=None).eval()
    tensor = torch.from_numpy(data)

    def eager() -> object:
        with torch.inference_mode():
            return network(tensor).numpy()

    rows: list[dict[str, Any]] = []
    for at in range(given.slices + 1):
        options = {"threads": 1} if at == 0 else {"threads": 1, "tune": given.budget / given.slices}
        folder = Path(tempfile.mkdtemp(prefix="tvm-tuning-"))
        start = time.perf_counter()
        load = os.getloadavg()[0]
        built = backend.build(model, BuildRequest("fp32", "cpu", (1,), {}, options), folder).save()
        took = time.perf_counter() - start
        session = backend.open(artifacts.load(built.path), OpenRequest("fp32", 1, 1))
        search = built.facts.get("tuning", {}).get("model-b1.so", {})
        row = {
            "searched_s": search.get("seconds", 0.0) + (rows[-1]["searched_s"] if rows else 0.0),
            "candidates": search.get("measured", 0) + (rows[-1]["candidates"] if rows else 0),
            "estimate_ms": search["curve"][1] * 1e3 if search else None,
            "functions": search.get("functions"),
            "over_default": search.get("over_default"),
            "over_default_of_the_search": search.get("searched_over_default"),
            "curve": curve(folder),
            "build_s": took,
            **summary(pairs(session.bind({spec.name: data}), eager, given.pairs)),
            "load": [load, os.getloadavg()[0]],
        }
        rows.append(row)
        session.close()
        shutil.rmtree(folder)
        print(json.dumps(row), flush=True)
        document = {
            "what": "ResNet-18 224x224, batch 1, one thread, FP32: TVM against PyTorch eager, in turns",
            "cpu": machine.cpu_model(),
            "cores": os.cpu_count(),
            "note": "load: the machine's 1-minute load average before the build and after the timing; above the number of cores, others ran",
            "versions": {**backend.versions(), "torch": torch.__version__},
            "rows": rows,
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
