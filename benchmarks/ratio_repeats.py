"""Do ratios repeat? The same rows measured several times by `deploykit bench`, each time from new processes.

    python benchmarks/ratio_repeats.py [--times 10] [--duration standard]

ResNet-18 at 224x224, batch 1: PyTorch eager FP32 (the reference), OpenVINO FP32 and INT8. Goal: each speed-up
within 2 % of the median of all of them. The reference's own throughput stands beside, to show what the machine did meanwhile:
the ratios are worth having where they repeat better than it does. The report's own 95 % interval should hold the median of
the repeats about as often as it says.
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


def once(store: Path, report: Path, duration: str) -> dict[str, Any]:
    """One report's rows by backend and precision."""
    command = [sys.executable, "-m", "deploykit", "bench", "resnet18", "--weights", "none", "--data", "random:64", "--batch", "1"]
    command += ["--backend", "torch,openvino", "--precision", "fp32,int8"]
    command += ["--duration", duration, "--store", str(store), "--json", str(report)]
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
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "ratio_repeats.json")
    options = parser.parse_args()
    taken: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(options.times):
            rows = once(Path(name) / "store", Path(name) / "report.json", options.duration)
            found: dict[str, Any] = {
                row: {key: rows[row][key] for key in ("speedup", "speedup_low", "speedup_high")}
                for row in (f"{backend} {precision}" for backend, precision in ROWS)
            }
            taken.append({"rows": found, "reference": rows["torch fp32"]["images_per_s"], "load": os.getloadavg()[0]})
            print({row: round(ratio["speedup"], 3) for row, ratio in found.items()}, file=sys.stderr, flush=True)
    doc: dict[str, Any] = {
        "benchmark": "ratio_repeats",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "duration": options.duration,
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
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(doc, indent=1) + "\n")
    return 0 if all(row["spread"] <= GOAL for row in doc["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
