"""What the tests of the backends share: graphs of a precision, torch sources of the same weights, engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import tiny_models
from onnx.reference import ReferenceEvaluator

from deploykit import graph, source_spec
from deploykit.artifact import Artifact
from deploykit.samples import Samples
from deploykit.session import Backend, BuildRequest
from deploykit.signature import Feeds, Signature

FACTORY = """
from pathlib import Path
import onnx
import torch
from onnx import numpy_helper

W = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy())
     for t in onnx.load(Path(__file__).parent / "MODEL.onnx").graph.initializer}


class ConvNet(torch.nn.Module):
    INPUTS = ["x:float32:batchx3x8x8"]
    OUTPUTS = ["logits"]

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Linear(8, 4)
        for layer, w, b in ((self.conv1, "w1", "b1"), (self.conv2, "w2", "b2"), (self.fc, "w3", "b3")):
            layer.weight, layer.bias = torch.nn.Parameter(W[w]), torch.nn.Parameter(W[b])

    def forward(self, x):
        x = self.conv1(x).relu()
        return self.fc((self.conv2(x) + x).relu().mean((2, 3)))


class TwoInputs(torch.nn.Module):
    INPUTS = ["a:float32:batch,6", "ids:int64:batch,3"]
    OUTPUTS = ["y", "z"]

    def __init__(self):
        super().__init__()
        self.w, self.table = torch.nn.Parameter(W["w"]), torch.nn.Parameter(W["table"])

    def forward(self, a, ids):
        y = a @ self.w + self.table[ids].mean(1)
        return y, y.sum(1)


def make():
    return ConvNet() if "w1" in W else TwoInputs()
"""

# Largest difference allowed, as a share of the largest reference output: FP32 sums in another order; BF16 has 8 bits of
# mantissa and these nets three layers; an INT8 graph is compared with itself run literally, where a value on a rounding
# edge may fall to the other side; dynamic INT8 of PyTorch has no graph and is compared with FP32.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 4e-2, "int8": 0.04, "int8-dynamic": 0.08}
# A backend that quantizes the source by itself has no graph either.
OWN_INT8_TOLERANCE = 0.1
MODELS = ("conv_net", "two_inputs")


def tolerance(backend: Backend, precision: str) -> float:
    """The largest difference allowed of a backend's row; see TOLERANCE."""
    return OWN_INT8_TOLERANCE if backend.graph(precision) == "source-calibrated" else TOLERANCE[precision]


def model(name: str, folder: Path) -> Artifact:
    """The FP32 graph of a tiny model, and its torch factory beside it."""
    path: Path = getattr(tiny_models, name)(folder / f"{name}.onnx")
    (folder / f"{name}_factory.py").write_text(FACTORY.replace("MODEL", name))
    return artifact(path, "fp32")


def artifact(path: Path, precision: str) -> Artifact:
    """An .onnx file as a stage would hand it on."""
    return Artifact(path, "onnx", precision, graph.signature(graph.load(path)), "test").save()


def feeds(signature: Signature, batch: int, seed: int = 0) -> dict[str, Any]:
    """Random inputs: normal floats, indices 0..9."""
    rng = np.random.default_rng(seed)
    shapes = signature.shapes(batch)
    return {
        s.name: rng.normal(size=shapes[s.name]).astype(s.dtype)
        if s.dtype.startswith("float")
        else rng.integers(0, 10, shapes[s.name])
        for s in signature.inputs
    }


def graph_of(kind: str, fp32: Artifact, folder: Path) -> Artifact:
    """The model in the graph kind a backend asks for, quantized by ONNX Runtime's own tool."""
    from onnxruntime import quantization as q

    out = folder / f"{fp32.path.stem}-{kind}.onnx"
    if kind.startswith("source"):
        spec = source_spec.parse(f"{folder / (fp32.path.stem + '_factory.py')}:make")
        path = folder / f"{fp32.path.stem}.json"
        path.write_text(json.dumps(spec.to_json()))
        return Artifact(path, "source", "fp32", fp32.signature, "test").save()
    if kind == "fp32":
        return fp32
    if kind == "fp16":
        from deploykit.stages import precision

        precision.to_fp16(fp32.path, out)
    elif kind == "int8-dynamic":
        q.quantize_dynamic(fp32.path, out, weight_type=q.QuantType.QInt8)
    else:
        tensorrt = kind == "int8-tensorrt"
        q.quantize_static(
            fp32.path,
            out,
            _Reader([feeds(fp32.signature, 4, seed) for seed in range(8)]),
            activation_type=q.QuantType.QInt8 if tensorrt else q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            per_channel=True,
            extra_options={"ActivationSymmetric": tensorrt, "WeightSymmetric": True, "QuantizeBias": not tensorrt},
        )
    return artifact(out, kind.partition("-tensorrt")[0].partition("-cpu")[0])


class _Reader:
    """Calibration batches, as ONNX Runtime's quantizer takes them."""

    def __init__(self, batches: list[Any]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Any:
        return next(self._left, None)


class _SeedReader:
    """Sample i is the feed of seed i: a reader for calibration."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature

    def read(self, indices: Any) -> dict[str, Any]:
        rows = [feeds(self._signature, self._signature.fixed_batch or 1, index) for index in indices]
        axes = {spec.name: self._signature.batch_axis(spec) for spec in self._signature.inputs}
        return {n: rows[0][n] if axis is None else np.concatenate([r[n] for r in rows], axis) for n, axis in axes.items()}


def calibration(signature: Signature, n: int = 32) -> Samples:
    """Samples for a backend that quantizes by itself."""
    return Samples("random", "seeds", _SeedReader(signature), signature, None, tuple(range(n)), role="calibrate")


def engine(
    backend: Backend,
    fp32: Artifact,
    precision: str,
    folder: Path,
    base: Artifact | None = None,
    batches: tuple[int, ...] = (1, 8),
) -> Artifact:
    """The backend's engine with its manifest, in a folder of its own; made of `base` (its FP32 engine) where that is given."""
    out = folder / f"{fp32.path.stem}-{backend.name}-{precision}"
    out.mkdir()
    kind = backend.graph(precision)
    samples = calibration(fp32.signature) if kind == "source-calibrated" else None
    request = BuildRequest(precision, backend.targets()[0], batches, calibration=samples)
    return backend.build(base or graph_of(kind, fp32, folder), request, out).save()


def expected(backend: Backend, precision: str, fp32: Artifact, folder: Path, inputs: Feeds) -> dict[str, Any]:
    """The outputs of the graph the engine was made from, with Q/DQ run literally; for the others those of the FP32 graph
    by ONNX's reference implementation (which lacks Q/DQ at this opset: ONNX Runtime without any optimization stands in)."""
    quantized = folder / f"{fp32.path.stem}-{backend.graph(precision)}.onnx"
    path = quantized if precision.startswith("int8") and quantized.is_file() else fp32.path
    names = [s.name for s in fp32.signature.outputs]
    if path == fp32.path:
        values = ReferenceEvaluator(onnx.load(path)).run(names, dict(inputs))
    else:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        values = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(names, dict(inputs))
    return dict(zip(names, values, strict=True))


def distance(found: Any, reference: Any) -> float:
    """Largest absolute difference over the largest reference value."""
    return float(np.abs(found - reference).max() / np.abs(reference).max())
