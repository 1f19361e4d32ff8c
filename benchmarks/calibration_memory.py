"""What calibrating ResNet-18 at 224x224 costs: deploykit, all methods in one pass, beside a bare forward pass and ONNX
Runtime's own calibrators.

    python benchmarks/calibration_memory.py [--rounds 3] [--skip-peers] [--json benchmarks/results/calibration_memory.json]

Every run is a process of its own, so that its peak memory (VmHWM) is its own; all read the same images from a file,
eight at a time, on all cores. Seconds are those of opening the model, reading, running and computing the ranges, imports
left out. Bare passes and deploykit's runs take turns, and the ratio is the median of the rounds' ratios. CPU seconds
(user + system) stand beside the wall clock, since they suffer less from a machine that others use too.

Goals: at most twice the bare forward pass at 256 images, under 1 GB, and no more memory at 2,000 images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
DISTINCT = 256  # images in the file; a longer run goes round
SHAPE = (3, 224, 224)
METHODS = ("minmax", "entropy", "percentile", "mse")
PEERS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # ONNX Runtime's names


class ImageFile:
    """A deploykit Reader of images in one raw file, read (not mapped: mapped pages would count as memory)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        size = int(np.prod(SHAPE))
        batch = np.empty((len(indices), *SHAPE), np.float32)
        with self.path.open("rb") as stream:
            for row, index in enumerate(indices):
                stream.seek(index % DISTINCT * size * 4)
                batch[row] = np.fromfile(stream, np.float32, size).reshape(SHAPE)
        return {"x": batch}

    def batches(self, n: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, n, BATCH):
            yield self.read(range(start, min(start + BATCH, n)))


def make_inputs(folder: Path) -> None:
    """resnet18.onnx with random weights, and normalised images: smooth structure, an exposure of their own, some noise."""
    import torch
    import torchvision

    torch.manual_seed(0)
    torch.onnx.export(
        torchvision.models.resnet18(weights=None).eval(),
        (torch.zeros(2, *SHAPE),),
        str(folder / "resnet18.onnx"),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["x"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    rng = np.random.default_rng(0)
    with (folder / "images.f32").open("wb") as stream:
        for _ in range(DISTINCT):
            coarse = rng.normal(0, 1, (3, 14, 14)).astype(np.float32)
            image = np.kron(coarse, np.ones((1, 16, 16), np.float32)) * rng.uniform(0.4, 1.2)
            image += rng.normal(0, 0.1, SHAPE).astype(np.float32)
            np.clip(image, -2.1, 2.6).astype(np.float32).tofile(stream)


def bare(model: Path, images: ImageFile, n: int) -> None:
    """The forward pass alone."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    for feeds in images.batches(n):
        session.run(None, feeds)


def deploykit_run(model: Path, images: ImageFile, n: int, methods: Sequence[str]) -> None:
    """deploykit's collect."""
    from deploykit import graph
    from deploykit.samples import Samples
    from deploykit.stages import calibration

    signature = graph.signature(graph.load(model))
    samples = Samples("benchmark", "images", images, signature, None, tuple(range(n)))
    tables = calibration.collect(model, samples, methods=methods, batch=BATCH)
    assert set(tables) == set(methods)


def onnxruntime_run(model: Path, images: ImageFile, n: int, method: str) -> None:
    """ONNX Runtime's calibrator of that method, with its defaults."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = images.batches(n)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            str(model),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod[PEERS[method]],
        )
        calibrator.set_execution_providers(["CPUExecutionProvider"])
        calibrator.collect_data(Reader())
        calibrator.compute_data()


def one(kind: str, n: int, folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of one run in this process."""
    import onnx  # noqa: F401 - imports are not what is timed
    import onnxruntime
    import onnxruntime.quantization  # noqa: F401

    model, images = folder / "resnet18.onnx", ImageFile(folder / "images.f32")
    before, start = os.times(), time.perf_counter()
    if kind == "bare":
        bare(model, images, n)
    elif kind == "deploykit-all":
        deploykit_run(model, images, n, METHODS)
    elif kind == "deploykit-minmax":
        deploykit_run(model, images, n, ("minmax",))
    else:
        onnxruntime_run(model, images, n, kind.removeprefix("onnxruntime-"))
    seconds, after = time.perf_counter() - start, os.times()
    return {
        "seconds": seconds,
        "cpu_seconds": after.user + after.system - before.user - before.system,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> float:
    """This program's peak memory: VmHWM. (ru_maxrss would start at the parent's, from which the process was forked.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024.0


def launch(kind: str, n: int, folder: Path) -> dict[str, Any]:
    """`one` in a child process; a failure is a row that says so."""
    command = [sys.executable, __file__, "--one", kind, str(n), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(rounds: int, peers: bool, folder: Path) -> list[dict[str, Any]]:
    """Every run's raw figures."""
    turns = [("bare", 64), ("deploykit-all", 64), ("bare", 256), ("deploykit-minmax", 256), ("deploykit-all", 256)]
    plan = [(turn, number) for number in range(rounds) for turn in turns]
    plan.append((("deploykit-all", 2000), 0))
    if peers:
        plan += [((f"onnxruntime-{m}", n), 0) for n in (64, 256) for m in PEERS]
    rows = []
    for (kind, n), number in plan:
        row = {"kind": kind, "n": n, "round": number, **launch(kind, n, folder)}
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians per kind and n; ratios to the bare pass of the same round (of all rounds, for kinds run once)."""
    bares = {(r["n"], r["round"]): r for r in rows if r["kind"] == "bare" and "error" not in r}
    table = []
    for kind, n in dict.fromkeys((r["kind"], r["n"]) for r in rows):
        runs = [r for r in rows if (r["kind"], r["n"]) == (kind, n) and "error" not in r]
        if not runs:
            table.append({"kind": kind, "n": n, "error": next(r["error"] for r in rows if r["kind"] == kind and r["n"] == n)})
            continue
        entry = {"kind": kind, "n": n, "runs": len(runs)}
        for key in ("seconds", "cpu_seconds"):
            entry[key] = statistics.median(r[key] for r in runs)
            ratios = [r[key] / bares[n, r["round"]][key] for r in runs if (n, r["round"]) in bares]
            if ratios:
                entry[f"{key}_over_bare"] = statistics.median(ratios)
        entry["peak_rss_bytes"] = max(r["peak_rss_bytes"] for r in runs)
        table.append(entry)
    return table


def show(table: list[dict[str, Any]]) -> None:
    """The table as Markdown."""
    print("| run | images | seconds | over bare | CPU seconds | over bare | peak memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for row in table:
        if "error" in row:
            print(f"| {row['kind']} | {row['n']} | failed: {row['error']} | | | | |")
            continue
        wall, cpu = (f"{row[k]:.2f}" if k in row else "" for k in ("seconds_over_bare", "cpu_seconds_over_bare"))
        megabytes = row["peak_rss_bytes"] / 1e6
        print(
            f"| {row['kind']} | {row['n']} | {row['seconds']:.1f} | {wall} | {row['cpu_seconds']:.1f} | {cpu} | {megabytes:.0f} |"
        )


def environment() -> dict[str, Any]:
    """What the figures were taken on."""
    import onnxruntime

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()),
        "threads": len(os.sched_getaffinity(0)),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "batch": BATCH,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_at_start": os.getloadavg()[0],
    }


def main() -> None:
    """Runs all, prints the table, keeps the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-peers", action="store_true", help="leave out ONNX Runtime's calibrators (8 GB of memory)")
    parser.add_argument("--note", default="", help="kept with the result, e.g. 'other jobs ran on the machine'")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "calibration_memory.json")
    options = parser.parse_args()
    if options.one:
        kind, n, folder = options.one
        print(json.dumps(one(kind, int(n), Path(folder))))
        return
    start = environment()
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        rows = measure(options.rounds, not options.skip_peers, Path(name))
    table = summary(rows)
    show(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"environment": start, "note": options.note, "table": table, "runs": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
