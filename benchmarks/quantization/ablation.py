"""What each of INT8's switches brings, alone and together, each named by the command line's own option.

    python benchmarks/quantization/photographs.py --folder build/photographs
    deploykit export benchmarks/quantization/efficientnet_lite0.py:model --input x:float32:batchx3x224x224 -o lite0.onnx
    python benchmarks/quantization/ablation.py lite0.onnx --calib-data build/photographs/calibrate --data build/photographs/judge \\
        --preprocess crop=224,resize=224,mean=0.5,std=0.5 --name efficientnet_lite0

The same ranges serve all rows: `deploykit calibrate` makes them once (--method best, unless told otherwise), so a row differs
from the first in its switches alone; of an equalized model they are made anew, since its ranges are others. Each row is made by
`deploykit quantize` with the options in its name, and judged in OpenVINO at batch 1 on the same samples: agreement with the float
model's top-1, SQNR of the output, with labels the drop in top-1; speeds in turns, as a ratio to the first row's.
Writes results/ablation_NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compare

RESULTS = compare.RESULTS
PLAIN = "--no-bias-correct"
ROWS = (  # the first is INT8 with nothing else
    PLAIN,
    f"{PLAIN} --equalize",
    f"{PLAIN} --weight-scales mse",
    "--bias-correct --no-scale-correct",
    "--bias-correct",
    "--bias-correct --equalize",
    "--bias-correct --weight-scales mse",
    "--bias-correct --rounding gptq --no-scale-correct",
    "--bias-correct --rounding gptq",
    "--bias-correct --rounding gptq --weight-scales mse",
    "--bias-correct --rounding gptq --weight-scales mse --equalize",
)


def deploykit(*words: str) -> None:
    """Runs a command; what it says is shown where it fails."""
    done = subprocess.run([sys.executable, "-m", "deploykit", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr + done.stdout)


def quantized(asked: argparse.Namespace, switches: str, table: Path, out: Path) -> dict[str, Any]:
    """The seconds that a row took, and which calibration method its ranges are by; its graph lies at `out`, made now unless it is
    there."""
    side = Path(f"{out}.manifest.json")
    if side.is_file():
        return {"quantize_s": None, "method": json.loads(side.read_text())["options"]["method"]}
    words = ["--data", asked.calib_data, "-n", str(asked.n), *(["--preprocess", asked.preprocess] if asked.preprocess else [])]
    ranges = ["--method", asked.method] if "--equalize" in switches else ["--calib", str(table)]
    start = time.perf_counter()
    deploykit("quantize", str(asked.model), "-o", str(out), *words, *ranges, *switches.split())
    seconds = time.perf_counter() - start
    return {"quantize_s": seconds, "method": json.loads(side.read_text())["options"]["method"]}


def main() -> None:
    """Prints a row a set of switches, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="what judges")
    parser.add_argument("--calib-data", required=True, help="what calibrates and what is learnt on")
    parser.add_argument("--preprocess")
    parser.add_argument("--trained-on", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-n", type=int, default=256, help="calibration samples, at most")
    parser.add_argument("--most", type=int, help="judge on at most so many samples")
    parser.add_argument("--method", default="best")
    parser.add_argument("--folder", type=Path, help="keep the graphs here, and take those that are there already")
    parser.add_argument("--only", default="", help="numbers of the rows to take, separated by commas; default: all")
    parser.add_argument("--name", required=True)
    parser.add_argument("--note", default="")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    _, judged = compare.shares(asked)
    judge, labels, name = compare.array_of(judged), judged.label_array(), judged.signature.inputs[0].name
    exact, _ = compare.in_openvino(asked.model, name, judge)
    requests: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    chosen = [ROWS[int(i)] for i in asked.only.split(",")] if asked.only else ROWS
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / "calib.json"
        words = ["--preprocess", asked.preprocess] if asked.preprocess else []
        deploykit(
            "calibrate", str(asked.model), "-o", str(table), "--data", asked.calib_data, "-n", str(asked.n),
            "--method", asked.method, *words,
        )  # fmt: skip
        for switches in chosen:
            out = folder / f"{ROWS.index(switches)}.onnx"
            row = {"name": switches, **quantized(asked, switches, table, out)}
            found, requests[switches] = compare.in_openvino(out, name, judge)
            rows.append({**row, **compare.against(exact, found, labels)})
            print(_line(rows[-1]), flush=True)
        for label, ratio in compare.speeds(requests, base=chosen[0]).items():
            next(row for row in rows if row["name"] == label)["times_plain_speed"] = ratio
    document = {"model": asked.model.name, "judging_samples": judged.describe(), "note": asked.note, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"ablation_{asked.name}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    head = ["switches", "ranges", "agreement", "SQNR dB", "top-1 drop pp", "times the first row's speed", "s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(_cells(row)) + " |" for row in rows)]
    text = f"{asked.model.name}, judged on {len(judged)} samples in OpenVINO at batch 1. {asked.note}\n\n"
    file.with_suffix(".md").write_text(text + "\n".join(lines) + "\n")
    print("\n".join(lines))


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    return [
        f"`{row['name']}`",
        row["method"],
        cell("agreement", ".1%"),
        cell("sqnr_db", ".1f"),
        cell("top1_drop_pp", ".2f"),
        cell("times_plain_speed", ".2f"),
        cell("quantize_s", ".0f"),
    ]


def _line(row: dict[str, Any]) -> str:
    return "  ".join(cell for cell in _cells(row) if cell)


if __name__ == "__main__":
    main()
