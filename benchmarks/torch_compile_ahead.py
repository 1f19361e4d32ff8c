"""torch.compile ahead of time (our engine) beside `torch.compile` by hand in each process, in turns.

    python benchmarks/torch_compile_ahead.py [--networks resnet18,mobilenet_v2] [--turns 6] [--seconds 2] [--json FILE]

Batch 1 at 224x224, random weights, this machine's threads. Each turn starts both afresh, in alternating order, and runs the same
input: a deploykit child that opens the engine as `bench` does, and a script that compiles the same network with the same
settings (freezing, autocast for BF16). What is compared: seconds until the first output is there (imports, reading or
compiling the model, one run), and the throughput afterwards: median ratios with their bootstrap intervals; above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact, backends, hosted, machine
from deploykit.artifact import Artifact
from deploykit.children import Child
from deploykit.measurement import bootstrap_ratio
from deploykit.session import OpenRequest

PRECISIONS = ("fp32", "bf16")


def ours(engine: Artifact, precision: str, seconds: float) -> dict[str, float]:
    """Our engine, in a child of its own."""
    pool = [{name: np.ones(shape, np.float32) for name, shape in engine.signature.shapes(1).items()}]
    start = time.perf_counter()
    with Child("deploykit", threads=machine.threads()) as child:
        child.call(hosted.open_engine, "torch-compile", engine.path, OpenRequest(precision, 1, machine.threads()))
        child.call(hosted.bind_inputs, pool)
        opened = time.perf_counter() - start
        child.call(hosted.window, 0.5)
        window = child.call(hosted.window, seconds)
    return {"first_output_s": opened, "images_per_s": len(window.seconds) / window.wall_s}


def by_hand(network: str, precision: str, seconds: float) -> dict[str, float]:
    """PyTorch alone, in a process of its own."""
    command = [sys.executable, __file__, "--child", network, precision, str(seconds)]
    start = time.perf_counter()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return {"first_output_s": found["first_output_at"] - start, "images_per_s": found["images_per_s"]}


def child(network: str, precision: str, seconds: float) -> None:
    """What `by_hand` runs."""
    import torch
    import torch._inductor.config as inductor
    import torchvision

    torch.set_num_threads(machine.threads())
    torch.manual_seed(0)
    module = torchvision.models.get_model(network, weights=None).eval()
    x = torch.ones(1, 3, 224, 224)

    def step(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return module(x)

    with torch.inference_mode():
        with inductor.patch({"freezing": True}):
            compiled = torch.compile(step, dynamic=False)
            compiled(x)
        first = time.perf_counter()  # CLOCK_MONOTONIC: the same for all processes of a machine
        while time.perf_counter() < first + 0.5:
            compiled(x)
        n, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            compiled(x)
            n += 1
        rate = n / (time.perf_counter() - start)
    print(json.dumps({"first_output_at": first, "images_per_s": rate}))


def built(network: str, precision: str, folder: Path) -> tuple[Artifact, float]:
    """The engine by `deploykit build`, and how long that took."""
    out = folder / f"{network}-{precision}"
    command = [sys.executable, "-m", "deploykit", "build", network, "--weights", "none", "--backend", "torch-compile"]
    command += ["--precision", precision, "--batch", "1", "-o", str(out)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    return artifact.load(next(out.rglob("*.manifest.json"))), seconds


def main() -> int:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet18,mobilenet_v2")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "torch_compile_ahead.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for network in options.networks.split(","):
            for precision in PRECISIONS:
                engine, build_s = built(network, precision, Path(name))
                turns: list[dict[str, dict[str, float]]] = []
                for turn in range(options.turns):
                    pair = {}
                    for side in ("ours", "by hand") if turn % 2 else ("by hand", "ours"):
                        if side == "ours":
                            pair[side] = ours(engine, precision, options.seconds)
                        else:
                            pair[side] = by_hand(network, precision, options.seconds)
                    turns.append(pair)
                opening = bootstrap_ratio(
                    [np.array([t["by hand"]["first_output_s"] / t["ours"]["first_output_s"]]) for t in turns]
                )
                speed = bootstrap_ratio([np.array([t["ours"]["images_per_s"] / t["by hand"]["images_per_s"]]) for t in turns])
                rows.append({"network": network, "precision": precision, "build_s": build_s, "turns": turns})
                for key, ratio in (("first_output", opening), ("throughput", speed)):
                    rows[-1][key] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
                seconds = np.median([[t[side]["first_output_s"] for side in ("ours", "by hand")] for t in turns], axis=0)
                print(
                    f"{network} {precision}: built in {build_s:.0f} s; first output after {seconds[0]:.1f} s, by hand {seconds[1]:.1f} s "
                    f"({opening.value:.1f}x, {opening.low:.1f} to {opening.high:.1f}); throughput {speed.value:.2f} of by hand "
                    f"({speed.low:.2f} to {speed.high:.2f})",
                    flush=True,
                )
    doc = {
        "benchmark": "torch_compile_ahead",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": backends.get("torch-compile").versions(),
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(doc, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        sys.exit(main())
