"""Mixed precision on a budget beside BF16 and plain INT8, by the product's own command, on photographs.

    python benchmarks/quantization/photographs.py --folder build/photographs
    deploykit export benchmarks/quantization/efficientnet_lite0.py:model --input x:float32:batchx3x224x224 -o lite0.onnx
    python benchmarks/quantization/mixed.py lite0.onnx --min-sqnr 26.3 --duration standard --preprocess crop=224,resize=224,mean=0.5,std=0.5

One `deploykit run` makes OpenVINO's rows FP32, BF16, INT8 and mixed, judges them on the same crops and times them in turns at
batch 1. Crops of `photographs.py`'s shares calibrate and tune make and tune the graphs (the command takes the last third of what
it calibrates on for tuning); those of its share judge come from other photographs. The budget is what the tuning samples are held
to; what is compared with BF16 is measured on the judging ones.

Goal (of issue 4): mixed closer to the float model than BF16 (93.5 %, 25.1 dB as stated there), at 85 % of plain INT8's speed or more;
held against the stated figures and against BF16's of the same run. Writes results/mixed_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.measurement import Measurement, speedup

RESULTS = Path(__file__).parent.parent / "results"
PRECISIONS = ("fp32", "bf16", "int8", "mixed")
LEAST_SHARE = 0.85
STATED = {"agreement": 0.935, "sqnr_db": 25.1}  # BF16's fidelity as the goal gives it


def together(photographs: Path) -> Path:
    """One flat folder with the crops that calibrate and those that tune, as links."""
    folder = photographs / "calibrate-and-tune"
    folder.mkdir(exist_ok=True)
    for share in ("calibrate", "tune"):
        for crop in (photographs / share).glob("*.png"):
            link = folder / f"{share}-{crop.name}"
            if not link.exists():
                os.link(crop, link)
    return folder


def search_of(store: Path) -> dict[str, Any]:
    """What the newest search in a store has tried."""
    files = sorted(store.glob(".search-*.json"), key=lambda p: p.stat().st_mtime)
    trials = json.loads(files[-1].read_text())["trials"] if files else {}
    return {
        "trials": [{"in_float": len(kept.split()), **score} for kept, score in trials.items()],
        "evaluations": len(trials),
    }


def kept_by(store: Path) -> dict[str, Any]:
    """The newest mixed graph's own account: which layers stay in float, what was judged, its cost."""
    manifests = (json.loads(p.read_text()) for p in sorted(store.rglob("*.manifest.json"), key=lambda p: p.stat().st_mtime))
    found = [doc["facts"]["mixed"] for doc in manifests if "mixed" in doc.get("facts", {})]
    return {k: v for k, v in found[-1].items() if k != "layers"} if found else {}


def rows_of(report: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows by precision, each with its speed as a share of plain INT8's (launches paired, 95 % interval), and the samples."""
    doc = json.loads((report / "report.json").read_text())
    raw = json.loads((report / "measurements.json").read_text())["measurements"]
    times = {parts[2]: Measurement.from_json(m) for name, m in raw.items() if (parts := name.split("|"))[1] == "openvino"}
    keep = ("precision", "status", "reason", "agreement", "sqnr_db", "images_per_s", "p50_s", "size_bytes", "notes")
    rows = []
    for row in (r for r in doc["rows"] if r["backend"] == "openvino"):
        kept = {k: row[k] for k in keep}
        if {row["precision"], "int8"} <= times.keys():
            ratio = speedup(times[row["precision"]], times["int8"])
            kept |= {"share_of_int8": ratio.value, "share_of_int8_low": ratio.low, "share_of_int8_high": ratio.high}
        rows.append(kept)
    return rows, doc["samples"]


def verdict(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mixed against BF16's fidelity, as stated and in this run, and INT8's speed."""
    mixed, bf16 = rows["mixed"], rows["bf16"]

    def met(fidelity: Mapping[str, Any]) -> bool:
        closer = mixed["agreement"] >= fidelity["agreement"] and mixed["sqnr_db"] > fidelity["sqnr_db"]
        return bool(closer and mixed["share_of_int8"] >= LEAST_SHARE)

    return {
        "agreement_over_bf16_pp": 100 * (mixed["agreement"] - bf16["agreement"]),
        "sqnr_over_bf16_db": mixed["sqnr_db"] - bf16["sqnr_db"],
        "share_of_int8": mixed["share_of_int8"],
        "met_as_stated": met(STATED),
        "met_against_this_run": met(bf16),
    }


def main() -> None:
    """Runs the line once, prints what came out and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photographs", type=Path, default=Path("build/photographs"))
    parser.add_argument("--preprocess", required=True)
    parser.add_argument("--min-sqnr", required=True, help="the budget, dB on the tuning samples")
    parser.add_argument("--folder", type=Path, default=Path("build/mixed"))
    parser.add_argument("--duration", default="quick")
    parser.add_argument("--name", default="efficientnet_lite0")
    parser.add_argument("--note", default="", help="kept with the result, e.g. that the machine was shared")
    parser.add_argument("more", nargs="*", help="further options of `deploykit run`, after --")
    asked = parser.parse_args()
    store = asked.folder / "engines"
    command = ["run", str(asked.model), "--calib-data", str(together(asked.photographs)), "--data"]
    command += [str(asked.photographs / "judge"), "--preprocess", asked.preprocess, "--backend", "openvino"]
    command += ["--precision", ",".join(PRECISIONS), "--batch", "1", "--min-sqnr", asked.min_sqnr]
    command += ["--duration", asked.duration, "--store", str(store), "-o", str(asked.folder / "report"), *asked.more]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "deploykit", *command], check=True)
    seconds = time.perf_counter() - start
    rows, samples = rows_of(asked.folder / "report")
    found = verdict({row["precision"]: row for row in rows})
    document = {
        "model": asked.model.name,
        "command": ["deploykit", *command],
        "samples": samples,
        "rows": rows,
        "verdict": found,
        "mixed": kept_by(store),
        "search": search_of(store),
        "seconds": seconds,
        "note": asked.note,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"mixed_{asked.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        share = f"{100 * row['share_of_int8']:.0f} % of INT8's speed" if "share_of_int8" in row else row["reason"]
        print(f"{row['precision']}: agreement {100 * row['agreement']:.1f} %, SQNR {row['sqnr_db'] or 0:.1f} dB, {share}")
    print(f"goal {'met' if found['met_as_stated'] else 'NOT met'} as stated: {found}")


if __name__ == "__main__":
    main()
