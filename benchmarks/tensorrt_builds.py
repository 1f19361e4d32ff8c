"""What TensorRT-RTX makes of well-known networks, on a machine without a GPU: FP16 for sm75, FP16 and INT8 for sm86 and
sm89, each for batch 1 to 32.

    python benchmarks/tensorrt_builds.py [--models resnet18,...] [--json benchmarks/results/tensorrt_builds.json]

Every step is the product's own command (export, calibrate, build-trt) in a process of its own. Weights are seeded and random
(networks.py) and the calibration samples are random numbers (their extremes): this is a record of what is accepted, of which precision each layer gets and of
sizes, not of accuracy or speed. A refusal is recorded in the words that the user reads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = {  # name in networks.py -> image size
    "resnet18": 224,
    "resnet34": 224,
    "resnet50": 224,
    "mobilenet_v2": 224,
    "efficientnet_lite0": 224,
    "lraspp_mobilenet_v3_large": 256,
    "ssdlite320_mobilenet_v3_large": 320,
}
BUILDS = (("fp16", "sm75"), ("fp16", "sm86"), ("int8", "sm86"), ("fp16", "sm89"), ("int8", "sm89"))
BATCHES = "1,8,32"


def deploykit(*words: str) -> tuple[int, float, str]:
    """Exit code, seconds and what was said on standard error, of one command."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "deploykit", *words], capture_output=True, text=True, check=False)
    return done.returncode, time.perf_counter() - start, done.stderr.strip()


def prepared(name: str, folder: Path) -> dict[str, Any]:
    """Exports and calibrates; {} or {'refused': why}."""
    given = ["--input", f"x:float32:batchx3x{MODELS[name]}x{MODELS[name]}"]
    steps = (
        ["export", f"{HERE / 'networks.py'}:{name}", *given, "--batch", BATCHES, "-o", str(folder / "m.onnx")],
        [
            "calibrate",
            str(folder / "m.onnx"),
            "--data",
            "random:16",
            "-n",
            "16",
            "--method",
            "minmax",
            "-o",
            str(folder / "calib.json"),
        ],
    )
    for words in steps:
        code, _, said = deploykit(*words)
        if code:
            return {"refused": said, "step": words[0]}
    return {}


def built(folder: Path, precision: str, target: str) -> dict[str, Any]:
    """One engine's record, from its manifest."""
    out = folder / "engines"
    words = ["build-trt", str(folder / "m.onnx"), f"--{precision}", "--target", target, "--batch", BATCHES, "-o", str(out)]
    code, seconds, said = deploykit(*words, *(["--calib", str(folder / "calib.json")] if precision == "int8" else []))
    manifests = list(out.glob(f"*-{precision}-{target}/*.manifest.json"))
    row: dict[str, Any] = {"precision": precision, "target": target, "exit_code": code, "command_s": round(seconds, 2)}
    if not manifests:
        return {**row, "refused": said}
    made = json.loads(manifests[0].read_text())
    facts = made["facts"]
    convolutions = facts["layers"].get("convolution", {})
    engine = manifests[0].with_name(manifests[0].name.removesuffix(".manifest.json"))
    return {
        **row,
        "size_bytes": engine.stat().st_size,
        "plan_layers": facts["plan_layers"],
        "layers": facts["layers"],
        "requested": facts["requested"],
        "convolutions_int8": convolutions.get("Int8", 0),
        "convolutions": sum(convolutions.values()),
        "fell_back": facts["fell_back"],
        "fallback": facts["fallback"],
        "build_s": round(facts["build_s"], 3),
        "parse_s": round(facts["parse_s"], 3),
        "profiles": facts["profiles"],
        "rebuild": facts["rebuild"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "tensorrt_builds.json")
    chosen = parser.parse_args()
    record: dict[str, Any] = {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU",
        "versions": {n: metadata.version(n) for n in ("tensorrt-rtx", "torch", "torchvision", "timm", "onnx")},
        "weights": "seeded random; calibrated on random:16, minmax",
        "validated_on_gpu": False,
        "models": {},
    }
    if chosen.json.is_file():  # a run for some models keeps what others were made with
        before = json.loads(chosen.json.read_text())
        if before["versions"] == record["versions"]:
            record["models"] = before["models"]
    for name in chosen.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            found = prepared(name, folder)
            found["engines"] = [] if found.get("refused") else [built(folder, *build) for build in BUILDS]
        record["models"][name] = found
        print(name, found.get("refused", ""), flush=True)
        for row in found["engines"]:
            size = f"{row['size_bytes'] / 1e6:.1f} MB" if "size_bytes" in row else row["refused"]
            share = f"{row.get('convolutions_int8')}/{row.get('convolutions')} convolutions Int8"
            print(f"  {row['precision']} {row['target']}: {size}, {share}, exit {row['exit_code']}", flush=True)
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
