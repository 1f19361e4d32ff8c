"""What deploykit's harness costs under MLPerf's LoadGen: its rows beside LoadGen driven by hand, in turns, on one model.

    python benchmarks/loadgen_parity.py [--turns 24] [--seconds 3] [--model M.onnx] [--json FILE]

Each turn starts both afresh, in alternating order: a deploykit child as `bench --scenario` uses it, and a script of thirty
lines that opens the same file in OpenVINO with the same properties, binds the same samples and answers LoadGen itself. Batch 1,
SingleStream (median and 90th percentile of latency) and Offline (samples a second). The answer is the median ratio over the
turns with its bootstrap interval; above 1, deploykit is the faster one. Goal: within 2 %. Without --model: sixteen 3x3
convolutions of 64 channels at 28x28.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import backends, graph, hosted, hosted_loadgen, loadgen, machine
from deploykit.artifact import Artifact
from deploykit.children import Child
from deploykit.loadgen import LoadRequest
from deploykit.measurement import bootstrap_ratio
from deploykit.session import OpenRequest
from deploykit.stages import ceilings

GOAL = 0.02
SAMPLES = 16
SCENARIOS = ("SingleStream", "Offline")


def samples(model: Path) -> list[dict[str, Any]]:
    """The same random samples on both sides."""
    rng = np.random.default_rng(0)
    shapes = graph.signature(graph.load(model)).shapes(1)
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(SAMPLES)]


def ours(model: Path, scenario: str, seconds: float, threads: int) -> dict[str, float]:
    """deploykit's figures, from a child of its own."""
    with Child("deploykit", threads=threads) as child:
        child.call(hosted.open_engine, "openvino", model, OpenRequest("fp32", 1, threads))
        found = child.call(hosted_loadgen.run, LoadRequest(scenario, seconds), samples(model), 1)
    return {"valid": float(found.valid), "value": found.value or 0.0, **found.percentiles_s}


def by_hand(model: Path, scenario: str, seconds: float, threads: int) -> dict[str, float]:
    """The same by LoadGen and OpenVINO alone; runs in a process of its own."""
    import mlperf_loadgen as lg
    import openvino as ov

    core = ov.Core()
    network = core.read_model(str(model))
    network.reshape({0: next(iter(graph.signature(graph.load(model)).shapes(1).values()))})
    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(network, "CPU", {**config, "INFERENCE_PRECISION_HINT": "f32"})
    requests = []
    for feeds in samples(model):
        request = compiled.create_infer_request()
        request.set_input_tensor(0, ov.Tensor(next(iter(feeds.values()))))
        requests.append(request)
    spent = []
    for i in range(100):
        start = time.perf_counter()
        requests[i % SAMPLES].infer(share_outputs=True)
        spent.append(time.perf_counter() - start)

    def issue(queries: list[Any]) -> None:
        for query in queries:
            requests[query.index].infer(share_outputs=True)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, 0, 0)])

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(seconds * 1e3)
    settings.min_query_count = 1
    settings.single_stream_expected_latency_ns = round(min(spent) * 0.8e9)
    settings.offline_expected_qps = 1.3 * len(spent) / sum(spent)
    logging, output = lg.LogSettings(), lg.LogOutputSettings()
    with tempfile.TemporaryDirectory() as folder:
        output.outdir = folder
        logging.log_output, logging.enable_trace = output, False
        system = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
        lg.StartTestWithLogSettings(system, library, settings, logging, str(Path(folder) / "none"))
        lg.DestroyQSL(library)
        lg.DestroySUT(system)
        detail = (Path(folder) / "mlperf_log_detail.txt").read_text()
    found = loadgen.outcome(LoadRequest(scenario, seconds), detail, {})
    return {"valid": float(found.valid), "value": found.value or 0.0, **found.percentiles_s}


def compare(model: Path, scenario: str, options: argparse.Namespace) -> dict[str, Any]:
    """All turns of one scenario, and the ratios over them."""
    turns: list[dict[str, Any]] = []
    for turn in range(options.turns):
        command = [sys.executable, __file__, "--by-hand", scenario, "--model", str(model), "--seconds", str(options.seconds)]
        command += ["--threads", str(options.threads)]
        found: dict[str, Any] = {"load": os.getloadavg()[0]}
        for side in ("deploykit", "by hand") if turn % 2 else ("by hand", "deploykit"):
            if side == "deploykit":
                found[side] = ours(model, scenario, options.seconds, options.threads)
            else:
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[side] = json.loads(said.strip().splitlines()[-1])
        turns.append(found)
        print(
            f"{scenario} turn {turn + 1}: {found['deploykit']['value']:.5g}, by hand {found['by hand']['value']:.5g}",
            file=sys.stderr,
        )
    result: dict[str, Any] = {"scenario": scenario, "turns": turns}
    keys = ("p50", "p90") if scenario == "SingleStream" else ("value",)
    for key in keys:
        pairs = [(t["deploykit"][key], t["by hand"][key]) for t in turns]
        ratios = [theirs / mine if scenario == "SingleStream" else mine / theirs for mine, theirs in pairs]
        ratio = bootstrap_ratio([np.array([r]) for r in ratios])
        met = ratio.low >= 1 - GOAL and ratio.high <= 1 + GOAL
        missed = ratio.high < 1 - GOAL
        result[key] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "spread": [min(ratios), max(ratios)]}
        result[key]["outcome"] = "met" if met else "missed" if missed else "inconclusive"
    return result


def main() -> int:
    """Runs the comparison; 0 when the goal is met, 1 when it is missed, 5 when a noisy machine leaves it open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--model", type=Path)
    parser.add_argument("--by-hand", choices=SCENARIOS)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "loadgen_parity.json")
    options = parser.parse_args()
    if options.by_hand:
        print(json.dumps(by_hand(options.model, options.by_hand, options.seconds, options.threads)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model.onnx"
        made = graph.load(options.model) if options.model else ceilings.chain(64, 28, 16, integer=False)
        graph.save(made, model)
        Artifact(model, "onnx", "fp32", graph.signature(graph.load(model)), "engine").save()
        results = [compare(model, scenario, options) for scenario in SCENARIOS]
    loads = [turn["load"] for result in results for turn in result["turns"]]
    doc = {
        "benchmark": "loadgen_parity",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": backends.get("openvino").versions(),
        "threads": options.threads,
        "seconds": options.seconds,
        "load_average": {"median": float(np.median(loads)), "max": max(loads)},
        "goal": GOAL,
        "results": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(doc, indent=1) + "\n")
    outcomes = set()
    for result in results:
        for key in ("p50", "p90", "value"):
            if key in result:
                r = result[key]
                outcomes.add(r["outcome"])
                print(
                    f"{result['scenario']} {key}: {r['ratio']:.3f} of by hand ({r['low']:.3f} to {r['high']:.3f}): {r['outcome']}"
                )
    print(f"load average: median {doc['load_average']['median']:.1f}, at most {max(loads):.1f}, on {machine.threads()} CPUs")
    return 1 if "missed" in outcomes else 5 if "inconclusive" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
