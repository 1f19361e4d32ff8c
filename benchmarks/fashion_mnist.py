"""INT8 against FP32 on a ResNet-18 trained on Fashion-MNIST: the top-1 drop on the 10,000 test images.

    apt-get install dataset-fashion-mnist
    .venv/bin/python benchmarks/fashion_mnist.py [--model resnet18] [--epochs 3]

Goal (of issue 2): at most 0.1 pp for the OpenVINO and the ONNX Runtime row. The weights are kept in --folder and reused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Trains once, runs the line, prints the drops and keeps them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--size", default="32")
    parser.add_argument("--method", default="best")
    parser.add_argument("--folder", type=Path, default=Path("build/fashion-mnist"))
    options = parser.parse_args()
    weights = options.folder / f"{options.model}.safetensors"
    source = [options.model, "--num-classes", "10", "--input", f"x:float32:batchx3x{options.size}x{options.size}"]
    deploykit = [sys.executable, "-m", "deploykit"]
    if not weights.is_file():
        train = ["finetune", *source, "--weights", "none", "--data", options.data, "--epochs", options.epochs, "-o", str(weights)]
        subprocess.run([*deploykit, *train], check=True)
    out = options.folder / f"report-{options.model}"
    run = ["run", *source, "--weights", str(weights), "--data", options.data, "--method", options.method]
    run += ["--backend", "onnxruntime,openvino", "--precision", "fp32,int8", "--batch", "8", "-o", str(out)]
    subprocess.run([*deploykit, *run, "--store", str(options.folder / "engines")], check=True)
    doc = json.loads((out / "report.json").read_text())
    keep = ("backend", "precision", "top1", "top1_drop_pp", "top1_drop_low", "top1_drop_high", "agreement", "sqnr_db", "speedup")
    rows = [{k: r[k] for k in keep} for r in doc["rows"] if r["status"] == "ok"]
    for row in rows:
        if row["precision"] == "int8":
            print(
                f"{row['backend']} int8: top-1 {100 * row['top1']:.2f} %, drop {row['top1_drop_pp']:.2f} pp, goal at most 0.1 pp"
            )
    RESULTS.mkdir(exist_ok=True)
    kept = {
        "model": options.model,
        "method": options.method,
        "samples": doc["samples"],
        "rows": rows,
        "measured_at": doc["measured_at"],
    }
    (RESULTS / f"fashion_mnist_{options.model}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
