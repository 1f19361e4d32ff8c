"""ResNet-18 at 224x224 on this CPU: how much faster than PyTorch eager the best row is, and INT8 against FP32.

    .venv/bin/python benchmarks/resnet18.py [--duration standard]

Goals (of issue 2): the best row at batch 1 at least 13x PyTorch eager FP32 on 2 cores with AMX; ONNX Runtime's INT8 at
least 2.5x its own FP32. All rows are measured in turns, in one run, by `deploykit bench`. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measures, prints the goals beside the figures, and keeps the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", default="standard")
    parser.add_argument("--batch", default="1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "deploykit", "bench", "resnet18", "--weights", "none", "--data", "random:64"]
        command += [
            "--backend",
            "torch,torch-compile,onnxruntime,openvino",
            "--batch",
            options.batch,
            "--duration",
            options.duration,
        ]
        subprocess.run([*command, "--store", f"{scratch}/engines", "--json", str(report)], check=True)
        doc = json.loads(report.read_text())
    rows = {(r["backend"], r["precision"], r["batch"]): r for r in doc["rows"] if r["status"] == "ok"}
    batch = int(options.batch.split(",")[0])
    best = max((r for r in rows.values() if r["batch"] == batch), key=lambda r: r["speedup"] or 0)
    features = doc["environment"]["features"]
    amx = "with AMX" if "amx_int8" in features else "WITHOUT AMX (the goal is for a CPU with it)"
    print(f"best row: {best['backend']} {best['precision']}: {best['speedup']:.2f}x eager FP32, goal 13x; this CPU is {amx}")
    fp32, int8 = rows[("onnxruntime", "fp32", batch)], rows[("onnxruntime", "int8", batch)]
    ratio = int8["images_per_s"] / fp32["images_per_s"]
    print(f"onnxruntime int8 over its fp32: {ratio:.2f}x, goal 2.5x")
    RESULTS.mkdir(exist_ok=True)
    kept = {k: doc[k] for k in ("reference", "rows", "environment", "versions", "measured_at", "command")}
    (RESULTS / "resnet18.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
