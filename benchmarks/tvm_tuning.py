"""TVM against PyTorch eager, FP32, one thread, in turns: with our default schedules, then after each slice of a search's budget, when the
library of default schedules runs in the same turns.

    python benchmarks/tvm_tuning.py --model resnet18.onnx --budget 3600 --slices 6 --out benchmarks/results/tvm_tuning.json

The .onnx is ResNet-18 at 224 x 224 (`deploykit export resnet18 -o resnet18.onnx`). The search keeps its database in the user's
cache, so that a second run goes on where the first one stopped: the seconds reported are this run's. Needs xgboost-cpu and psutil.

estimate_ms: the sum of the best times of the functions; over_default_in_build: what the build itself measured before it kept or left out
what was found. log: every round of every search that filled the database, the seconds since its search began. A budget of a few
seconds searches no further, and measures what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact as artifacts
from deploykit import backends, graph, machine
from deploykit.artifact import Artifact
from deploykit.backends import apache_tvm_compile, apache_tvm_tuning
from deploykit.session import BuildRequest, OpenRequest


def log() -> list[dict[str, Any]]:
    """The rounds of all searches of this database."""
    file = apache_tvm_tuning.database_folder(apache_tvm_compile.here(), 1) / apache_tvm_tuning.CURVE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def turns(runs: Mapping[str, Callable[[], object]], count: int) -> list[dict[str, float]]:
    """Seconds of one run of each, taken in turns, the first of a turn another one each time."""
    names = list(runs)
    found = []
    for at in range(count + 3):
        times = {}
        for name in names[at % len(names) :] + names[: at % len(names)]:
            start = time.perf_counter()
            runs[name]()
            times[name] = time.perf_counter() - start
        if at >= 3:
            found.append(times)
    return found


def curve(folder: Path) -> list[list[float]] | None:
    """[seconds of this slice, estimated ms of a run] after each round of its search; None without one."""
    log = folder / "tuning.json"
    if not log.is_file():
        return None
    (found,) = json.loads(log.read_text()).values()
    return [[seconds, run_s * 1e3] for seconds, run_s in found["curve"]]


def ratio(found: list[dict[str, float]], of: str, over: str) -> dict[str, float]:
    """How many times as fast `of` is as `over`: the median of the turns' ratios, with its quartiles."""
    low, middle, high = statistics.quantiles((t[over] / t[of] for t in found), n=4)
    return {"median": middle, "q1": low, "q3": high}


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    """Medians in ms, and how many times as fast the library is as eager and as the library of default schedules."""
    medians = {f"{name}_ms": statistics.median(t[name] for t in found) * 1e3 for name in found[0]}
    over_default = {"over_default": ratio(found, "tvm", "default")} if "default" in found[0] else {}
    return {**medians, "over_eager": ratio(found, "tvm", "eager"), **over_default, "turns": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds of search in all")
    parser.add_argument("--slices", type=int, default=6)
    parser.add_argument("--turns", type=int, default=40)
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
    default: dict[str, Callable[[], object]] = {}
    scratch = tempfile.TemporaryDirectory(prefix="tvm-tuning-")  # gone when the script ends
    for at in range(given.slices + 1):
        options = {"threads": 1} if at == 0 else {"threads": 1, "tune": given.budget / given.slices}
        folder = Path(scratch.name, str(at))
        folder.mkdir()
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
            "over_default_in_build": search.get("searched_over_default", search.get("over_default")),
            "curve": curve(folder),
            "build_s": took,
            **summary(turns({"tvm": session.bind({spec.name: data}), "eager": eager, **default}, given.turns)),
            "load": [load, os.getloadavg()[0]],
        }
        rows.append(row)
        if default:
            session.close()
        else:
            default = {"default": session.bind({spec.name: data})}
        print(json.dumps(row), flush=True)
        document = {
            "what": "ResNet-18 224x224, batch 1, one thread, FP32: TVM against PyTorch eager, in turns",
            "cpu": machine.cpu_model(),
            "cores": os.cpu_count(),
            "note": "load: the machine's 1-minute load average before the build and after the timing; above the number of cores, others ran",
            "versions": {**backend.versions(), "torch": torch.__version__},
            "rows": rows,
            "log": log(),
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
