"""Our INT8 scales for TensorRT beside NVIDIA ModelOpt's: ResNet-18 at 224x224, the same samples, the max method.

    python benchmarks/modelopt_scales.py [--venv DIR] [--json benchmarks/results/modelopt_scales.json]

ModelOpt pins older packages, so it gets an environment of its own: `--venv` names one to make or to use again (default: one
for this run). It sees this environment's packages and adds ModelOpt and what it imports, without dependencies.

Checked, and the exit code is 1 where one fails:
1. each activation and weight scale of ModelOpt's Q/DQ graph (calibration_method="max") against ours: 1e-4 relative at most;
2. ModelOpt's reader of calibration caches takes our TensorRT text: the scales in the graph it makes from it are the cache's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deploykit import graph, trt_cache
from deploykit.calibration_table import load as load_table

HERE = Path(__file__).parent
PACKAGES = (
    *("nvidia-modelopt", "nvidia-ml-py", "pulp<4", "omegaconf", "antlr4-python3-runtime==4.9.3", "regex"),
    *("cppimport", "mako", "pybind11", "lief", "onnx-graphsurgeon", "onnxslim"),
)
SAMPLES, LIMIT = 64, 1e-4

# Runs in ModelOpt's environment: model, samples, cache or '-', out.
QUANTIZE = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
model, samples, cache, out = sys.argv[1:]
quantize(model, quantize_mode="int8", calibration_data={"x": np.load(samples)["x"]}, calibration_method="max",
         calibration_cache_path=None if cache == "-" else cache, calibration_eps=["cpu"], high_precision_dtype="fp32",
         output_path=out, log_level="WARNING")
import importlib.metadata
print(importlib.metadata.version("nvidia-modelopt"))
"""


def environment(folder: Path) -> Path:
    """The Python of an environment with ModelOpt beside this one's packages."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        site = next((folder / "lib").glob("python3*")) / "site-packages"
        (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
    return python


def scales(model: onnx.ModelProto) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Of a Q/DQ graph: the scale of each quantized activation by the tensor's name, and the scales of each convolution's or
    matrix product's weights by the node's name."""
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            stored[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    maker = {o: n for n in model.graph.node for o in n.output}
    activations = {
        n.input[0]: float(stored[n.input[1]].reshape(-1)[0])
        for n in model.graph.node
        if n.op_type == "QuantizeLinear" and n.input[0] not in stored
    }
    weights = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.input) > 1:
            source = maker.get(node.input[1])
            while source is not None and source.op_type in ("Transpose", "Cast"):
                source = maker.get(source.input[0])
            if source is not None and source.op_type == "DequantizeLinear":
                weights[node.name] = stored[source.input[1]].reshape(-1).astype(np.float64)
    return activations, weights


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, str]:
    """The largest relative difference over the names in both, and where it is."""
    shared = sorted(found.keys() & wanted.keys())
    worst_at = [(float(np.max(np.abs(np.asarray(found[n]) / np.asarray(wanted[n]) - 1.0))), n) for n in shared]
    return max(worst_at, default=(float("nan"), "nothing in common"))


def deploykit(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "deploykit", *words], check=True)


def make_samples(path: Path) -> None:
    """Images of smooth structure with some noise, as a trained network's inputs have them: normalised, not uniform."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(SAMPLES, 3, 14, 14)).astype(np.float32)
    smooth = coarse.repeat(16, axis=2).repeat(16, axis=3)
    np.savez(path, x=smooth + 0.1 * rng.normal(size=smooth.shape).astype(np.float32))


def compare(folder: Path, python: Path) -> dict[str, Any]:
    """The record of one comparison."""
    model, samples = folder / "resnet18.onnx", folder / "samples.npz"
    make_samples(samples)
    deploykit("export", "resnet18", "--weights", "none", "--input", "x:float32:batchx3x224x224", "-o", str(model))
    table, cache, ours_at = folder / "calib.json", folder / "calib.cache", folder / "ours.onnx"
    deploykit("calibrate", str(model), "--data", str(samples), "-n", str(SAMPLES), "-o", str(table), "--trt-cache", str(cache))
    deploykit("quantize", str(model), "--mode", "static", "--layout", "tensorrt", "--calib", str(table), "-o", str(ours_at))
    kept = load_table(table)
    if kept.n != SAMPLES:  # our own split may leave samples for judging: give ModelOpt exactly what calibrated
        np.savez(samples, x=np.load(samples)["x"][: kept.n])
    version = ""
    theirs_at = {"calibrated": folder / "theirs.onnx", "from our cache": folder / "theirs-cache.onnx"}
    for (_, out), given in zip(theirs_at.items(), ("-", str(cache)), strict=True):
        words = [str(python), "-c", QUANTIZE, str(model), str(samples), given, str(out)]
        version = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
    ours, our_weights = scales(graph.load(ours_at))
    theirs, their_weights = scales(graph.load(theirs_at["calibrated"]))
    read, _ = scales(graph.load(theirs_at["from our cache"]))
    from_table = {name: kept.amax(name) / 127.0 for name in kept.ranges}
    _, in_cache = trt_cache.read(cache)
    checks = {
        "activations, our graph": worst(ours, theirs),
        "activations, our table": worst(from_table, theirs),
        "weights": worst(our_weights, their_weights),
        "activations, ModelOpt from our cache": worst(read, in_cache),
    }
    counts = {
        "activations, our graph": len(ours.keys() & theirs.keys()),
        "activations, our table": len(from_table.keys() & theirs.keys()),
        "weights": len(our_weights.keys() & their_weights.keys()),
        "activations, ModelOpt from our cache": len(read.keys() & in_cache.keys()),
    }
    return {
        "versions": {"nvidia-modelopt": version, **{n: metadata.version(n) for n in ("onnx", "onnxruntime", "numpy")}},
        "samples": kept.n,
        "quantized_activations": {"ours": len(ours), "modelopt": len(theirs)},
        "checks": {
            name: {"compared": counts[name], "largest_relative_difference": value, "at": at}
            for name, (value, at) in checks.items()
        },
        "passed": all(counts[name] and value <= LIMIT for name, (value, _) in checks.items()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="environment with ModelOpt; made where it is not there")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "modelopt_scales.json")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        python = environment(chosen.venv or Path(scratch) / "modelopt")
        record = {"taken_at": datetime.now(UTC).isoformat(timespec="seconds"), "limit": LIMIT, **compare(Path(scratch), python)}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in record["checks"].items():
        print(f"{name}: {row['compared']} compared, largest difference {row['largest_relative_difference']:.2g} at {row['at']}")
    print("passed" if record["passed"] else f"FAILED: more than {LIMIT}")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
