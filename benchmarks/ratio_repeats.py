"""Do ratios repeat? The same rows measured several times by `deploykit bench`, each time from new processes.

    python benchmarks/ratio_repeats.py [--times 10] [--duration standard] [--threads 2] [--reference torch]

ResNet-18 at 224x224, batch 1: OpenVINO FP32 and INT8 over PyTorch eager FP32, or (`--reference onnxruntime`) over ONNX Runtime FP32
from the exported .onnx. Goal: each speed-up within 2 % of the median of all of them. The reference's own throughput stands beside,
to show what the machine did meanwhile: the ratios are worth having where they repeat better than it does. The report's own 95 %
interval should hold the median of the repeats about as often as it says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploykit import machine

GOAL = 0.02
ROWS = (("openvino", "fp32"), ("openvino", "int8"))


def source(reference: str, folder: Path) -> list[str]:
    """What is measured: the PyTorch model, or the same as an .onnx, which has no PyTorch row."""
    model = ["resnet18", "--weights", "none"]
    if reference == "torch":
        return model
    path = folder / "resnet18.onnx"
    subprocess.run([sys.executable, "-m", "deploykit", "export", *model, "-o", str(path)], check=True, capture_output=True)
    return [str(path)]


def once(model: list[str], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One report's rows by backend and precision."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "deploykit", "bench", *model, "--data", "random:64", "--batch", "1"]
    command += ["--backend", f"{options.reference},openvino", "--precision", "fp32,int8", "--threads", str(options.threads)]
    command += ["--duration", options.duration, "--store", str(folder / "store"), "--json", str(report)]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(report.read_text())["rows"]
    return {f"{r['backend']} {r['precision']}": r for r in rows if r["status"] == "ok"}


def spread(values: list[float]) -> float:
    """The largest distance from the median, as a share of it."""
    middle = statistics.median(values)
    return max(abs(v / middle - 1) for v in values)


def main() -> int:
    """0 when every row's ratios repeat within the goal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--duration", default="standard")
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--reference", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mode = "" if options.reference == "torch" else f"_{options.reference}_{options.threads}_threads"
    kept = options.json or Path(__file__).parent / "results" / f"ratio_repeats{mode}.json"
    taken: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = source(options.reference, folder)
        for _ in range(options.times):
            rows = once(model, folder, options)
            found: dict[str, Any] = {
                row: {key: rows[row][key] for key in ("speedup", "speedup_low", "speedup_high")}
                for row in (f"{backend} {precision}" for backend, precision in ROWS)
            }
            taken.append(
                {"rows": found, "reference": rows[f"{options.reference} fp32"]["images_per_s"], "load": os.getloadavg()[0]}
            )
            print({row: round(ratio["speedup"], 3) for row, ratio in found.items()}, file=sys.stderr, flush=True)
    doc: dict[str, Any] = {
        "benchmark": "ratio_repeats",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "duration": options.duration,
        "reference": f"{options.reference} fp32",
        "threads": options.threads,
        "goal": GOAL,
        "reference_spread": spread([t["reference"] for t in taken]),
        "rows": {},
        "repeats": taken,
    }
    for row in taken[0]["rows"]:
        ratios = [t["rows"][row] for t in taken]
        middle = statistics.median(r["speedup"] for r in ratios)
        held = sum(r["speedup_low"] <= middle <= r["speedup_high"] for r in ratios)
        doc["rows"][row] = {"median": middle, "spread": spread([r["speedup"] for r in ratios]), "intervals_that_hold_it": held}
        print(
            f"{row}: {middle:.3f}x, repeats within {doc['rows'][row]['spread']:.1%} (goal {GOAL:.0%}); "
            f"{held} of {len(ratios)} intervals hold the median"
        )
    print(f"the reference's own throughput: within {doc['reference_spread']:.1%}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(doc, indent=1) + "\n")
    return 0 if all(row["spread"] <= GOAL for row in doc["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
