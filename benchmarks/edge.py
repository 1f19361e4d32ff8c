"""The edge's runtimes: INT8 against PyTorch eager FP32 and against the library driven by hand, and INT8's accuracy.

    python benchmarks/edge.py speed    [--backend executorch,litert] [--turns 12] [--seconds 2] [--threads 2]
    python benchmarks/edge.py accuracy [--backend executorch,litert] [--model resnet18] [--weights FILE] [--limit N]

speed: ResNet-18, 224x224, batch 1, random weights and images (for timing, values do not matter). Each turn starts three
processes afresh, in rotating order: PyTorch eager FP32 and the INT8 engine as `deploykit bench` runs them, and the library's
own recipe by hand (edge_by_hand.py: its converter and runtime at batch 1, nothing of deploykit). A ratio is taken within a
turn, of median latencies. Goals: INT8 over eager FP32 4.5x (ExecuTorch) and 6.8x (LiteRT), seen by hand on a CPU with AMX; on
any other CPU the goal is 0.95 of the library driven by hand in the same run.

accuracy: the network trained on Fashion-MNIST (benchmarks/fashion_mnist.py makes the weights), every INT8 row of every backend,
static ones calibrated on 512 training images; top-1 on the test images against PyTorch's FP32 on the same ones. Goal of each row:
a drop of at most 0.3 pp. Where a row's engine runs most layers in FP32, its 'precision' says so.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import backends, data, hosted, machine, source_spec
from deploykit.artifact import Artifact
from deploykit.children import Child, run
from deploykit.data import calibration_share
from deploykit.measurement import bootstrap_ratio
from deploykit.paired import Paired
from deploykit.pipeline import prepare
from deploykit.preprocess import NONE
from deploykit.samples import Samples
from deploykit.session import BuildRequest, OpenRequest
from deploykit.signature import Signature, TensorSpec

RESULTS = Path(__file__).parent / "results"
BY_HAND = Path(__file__).parent / "edge_by_hand.py"
GOALS = {"executorch": 4.5, "litert": 6.8}
OF_BY_HAND = 0.95
DROP_PP = 0.3
POOL = 4


def source(folder: Path, name: str, size: int, classes: int, weights: str) -> Artifact:
    """A torchvision network as the artifact that the line hands to a backend which quantizes by itself."""
    given = TensorSpec("x", "float32", ("batch", 3, size, size))
    spec = source_spec.parse(name, weights=weights, num_classes=classes, inputs=(given,))
    path = folder / "source.json"
    path.write_text(json.dumps(spec.to_json()))
    signature = Signature((given,), (TensorSpec("logits", "float32", ("batch", classes)),))
    return Artifact(path, "source", "fp32", signature, "benchmark").save()


def built(backend: str, precision: str, given: Artifact, calibration: Samples, folder: Path) -> Artifact:
    """The engine, built in a child process."""
    out = folder / f"{backend}-{precision}"
    out.mkdir()
    request = BuildRequest(precision, calibration=calibration)
    made: Artifact = run(f"build {backend}", prepare.build_engine, backend, given, request, out)
    return made.save()


def ours(backend: str, engine: Artifact, precision: str, threads: int, seconds: float) -> float:
    """Median seconds of a run at batch 1 in a child of its own."""
    rng = np.random.default_rng(1)
    pool = [{"x": rng.normal(size=(1, 3, 224, 224)).astype(np.float32)} for _ in range(POOL)]
    with Child(backend, threads=threads) as child:
        opened = child.call(hosted.open_engine, backend, engine.path, OpenRequest(precision, 1, threads))
        assert (opened.precision, opened.threads) == (precision, threads), opened
        child.call(hosted.bind_inputs, pool)
        return float(np.median(child.call(hosted.window, seconds).seconds))


def by_hand(backend: str, file: Path, threads: int, seconds: float) -> float:
    """The same of the library alone, on the file that its own converter made."""
    command = [sys.executable, str(BY_HAND), "time", backend, str(file), str(threads), str(seconds)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(said.splitlines()[-1])["p50_s"])


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All turns of every backend, and the ratios over them."""
    given = source(folder, "resnet18", 224, 1000, "none")
    images = data.open("random:32", given.signature)
    result: dict[str, Any] = {"turns": options.turns, "seconds": options.seconds, "threads": options.threads, "backends": {}}
    for backend in options.backend.split(","):
        engine = built(backend, "int8", given, images, folder)
        file = folder / f"{backend}-by-hand"
        subprocess.run([sys.executable, str(BY_HAND), "build", backend, str(file)], check=True, capture_output=True)
        reference = built("torch", "fp32", given, images, folder) if "eager" not in result else result["eager"]
        result["eager"] = reference
        jobs: dict[str, Callable[[], float]] = {
            "eager": functools.partial(ours, "torch", reference, "fp32", options.threads, options.seconds),
            "int8": functools.partial(ours, backend, engine, "int8", options.threads, options.seconds),
            "by_hand": functools.partial(by_hand, backend, file, options.threads, options.seconds),
        }
        turns: list[dict[str, float]] = []
        for turn in range(options.turns):
            names = list(jobs)
            order = names[turn % 3 :] + names[: turn % 3]
            turns.append({name: jobs[name]() for name in order} | {"load": os.getloadavg()[0]})
            shown = ", ".join(f"{name} {turns[-1][name] * 1e3:.2f} ms" for name in names)
            print(f"{backend} turn {turn + 1}: {shown}", file=sys.stderr)
        row: dict[str, Any] = {"facts": dict(engine.facts), "versions": dict(engine.versions), "turns": turns}
        for name, over in (("over_eager", "eager"), ("over_by_hand", "by_hand")):
            ratio = bootstrap_ratio([np.array([t[over] / t["int8"]]) for t in turns])
            row[name] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        result["backends"][backend] = row
        hand, eager = row["over_by_hand"], row["over_eager"]
        print(
            f"{backend} int8: {eager['ratio']:.2f}x eager FP32 ({eager['low']:.2f} to {eager['high']:.2f}), goal {GOALS[backend]}x"
        )
        print(f"{backend} int8: {hand['ratio']:.2f}x by hand ({hand['low']:.2f} to {hand['high']:.2f}), goal {OF_BY_HAND}x")
    del result["eager"]
    return result


@dataclass(frozen=True)
class Judged:
    """Which samples an engine gets right, the class it gives each, and what its session says of itself."""

    right: NDArray[np.bool_]
    top1: NDArray[np.int64]
    precision: str
    notes: tuple[str, ...]


def judged(backend: str, engine: Artifact, precision: str, samples: Samples, batch: int = 8) -> Judged:
    """An engine on every sample, at a batch that `BuildRequest` makes engines for by default."""
    wanted = samples.label_array()
    assert wanted is not None, "the data has no labels"
    found: list[NDArray[np.int64]] = []
    with Child(backend, threads=1) as child:  # one thread: two wait for each other on a busy machine
        opened = child.call(hosted.open_engine, backend, engine.path, OpenRequest(precision, batch, 1))
        for feeds, count in samples.batches(batch, pad=True):
            found.append(child.call(hosted.infer, feeds)["logits"].argmax(1)[:count])
    top1 = np.concatenate(found)
    return Judged(top1 == wanted, top1, opened.precision, opened.notes)


def accuracy(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Top-1 and its drop of every INT8 row of every backend on Fashion-MNIST."""
    weights = options.weights or Path(f"build/fashion-mnist/{options.model}.safetensors")
    given = source(folder, options.model, 32, 10, str(weights))
    everything = data.open(options.data, given.signature, preprocess=NONE)
    calibrate, judge = data.split(everything, calib_n=512)
    if options.limit:
        judge = judge.take(range(min(options.limit, len(judge))), judge.role)
    reference = judged("torch", built("torch", "fp32", given, calibrate, folder), "fp32", judge)
    result: dict[str, Any] = {
        "model": options.model,
        "data": judge.describe(),
        "top1_fp32": float(reference.right.mean()),
        "backends": {},
    }
    for backend in options.backend.split(","):
        rows = {}
        for precision in (p for p in backends.get(backend).precisions() if p.startswith("int8")):
            engine = built(backend, precision, given, calibration_share(calibrate, 512), folder)
            found = judged(backend, engine, precision, judge)
            pairs = Paired.of(reference.right, found.right)
            low, high = pairs.interval_pp()
            rows[precision] = {
                "top1": pairs.candidate_share,
                "drop_pp": pairs.drop_pp,
                "low": low,
                "high": high,
                "agreement": float((found.top1 == reference.top1).mean()),
                "precision": found.precision,
                "notes": list(found.notes),
                "facts": dict(engine.facts),
            }
            print(
                f"{backend} {precision}, {options.model}, {pairs.n} images: top-1 {pairs.candidate_share:.4f}, FP32 "
                f"{pairs.reference_share:.4f}, drop {pairs.drop_pp:.2f} pp ({low:.2f} to {high:.2f}), goal at most {DROP_PP} pp",
                flush=True,
            )
        result["backends"][backend] = {"rows": rows, "versions": backends.get(backend).versions()}
    return result


def main() -> None:
    """Runs one of the two, and keeps its figures."""
    ready = [name for name in GOALS if name in backends.names() and backends.get(name).missing() is None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "accuracy"])
    parser.add_argument("--backend", default=",".join(ready))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", type=Path, help="default: build/fashion-mnist/MODEL.safetensors")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--limit", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = (speed if options.what == "speed" else accuracy)(options, Path(name))
    features = sorted(f for f in machine.features() if f.startswith(("amx", "avx512_vnni", "avx512_bf16")))
    doc = {
        "what": options.what,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "features": features,
    }
    RESULTS.mkdir(exist_ok=True)
    suffix = f"_{options.model}" if options.what == "accuracy" else ""
    for backend, row in result.pop("backends").items():  # a file each: the two are run apart, too
        path = RESULTS / f"edge_{options.what}{suffix}_{backend}.json"
        path.write_text(json.dumps({**doc, **result, "backend": backend, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
