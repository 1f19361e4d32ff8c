"""OpenVINO's own profile of a model, in KernelProfile's words."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from deploykit import graph
from deploykit.artifact import Artifact
from deploykit.backends import opened, openvino_cpu
from deploykit.errors import BackendFailed
from deploykit.kernel_profile import Kernel, KernelProfile, per_run
from deploykit.session import OpenRequest
from deploykit.signature import Feeds

WARMUP_RUNS = 3
LEAST_RUNS, MOST_RUNS, LONG_ENOUGH_S = 10, 200, 3.0
_INTEGER_TYPES = {"u8", "i8"}
_QUANTIZE = {"FakeQuantize", "QuantizeLinear", "DequantizeLinear"}
_REFORMAT = {"Reorder", "Convert", "Transpose"}


def profile(engine: Artifact, request: OpenRequest, pool: Sequence[Feeds]) -> KernelProfile:
    """The kernels of an .onnx file or IR at one batch: times from `PERF_COUNT`, precisions from the runtime model.

    Raises ModelError, BackendFailed and InputError as the backend's `open` does.
    """
    import openvino as ov

    opened.require_batch(engine.signature, request)
    asked = {op.get_friendly_name(): op.get_type_name() for op in openvino_cpu.read(engine.path).get_ops()}
    if engine.path.suffix == ".onnx":
        asked.update({node.name: node.op_type for node in graph.load(engine.path).graph.node})
    compiled = openvino_cpu.compile_model(engine.path, engine.signature, request, {"PERF_COUNT": True})
    infer = compiled.create_infer_request()
    ports = [openvino_cpu.port(compiled.inputs, spec.name, "input") for spec in engine.signature.inputs]
    walls: list[float] = []
    times: dict[str, list[float]] = defaultdict(list)
    start = time.perf_counter()
    for number in range(WARMUP_RUNS + MOST_RUNS):
        arrays = opened.ready(engine.signature, request, pool[number % len(pool)], static=True)
        for index, array in zip(ports, arrays.values(), strict=True):
            infer.set_input_tensor(index, ov.Tensor(array))
        before = time.perf_counter()
        try:
            infer.infer()
        except RuntimeError as exc:
            raise BackendFailed(f"OpenVINO failed while running: {opened.first_line(exc)}", "check the inputs") from exc
        walls.append(time.perf_counter() - before)
        if number >= WARMUP_RUNS:
            for info in infer.profiling_info:
                if info.status == ov.ProfilingInfo.Status.EXECUTED:
                    times[info.node_name].append(info.real_time.total_seconds())
        if number + 1 >= WARMUP_RUNS + LEAST_RUNS and time.perf_counter() - start > LONG_ENOUGH_S:
            break
    runs = len(walls) - WARMUP_RUNS
    kernels = tuple(
        _kernel(op, per_run(times[op.get_friendly_name()], runs), asked)
        for op in compiled.get_runtime_model().get_ordered_ops()
        if op.get_friendly_name() in times
    )
    return KernelProfile("openvino", kernels, statistics.median(walls[WARMUP_RUNS:]), runs, request.batch, request.threads)


def _kernel(op: Any, seconds: float, asked: dict[str, str]) -> Kernel:
    info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
    layer, precision, name = info.get("layerType", ""), info.get("runtimePrecision", ""), str(op.get_friendly_name())
    sources = tuple(dict.fromkeys(n for n in info.get("originalLayersNames", "").split(",") if n))
    kind = _kind(layer, precision, info.get("outputPrecisions", ""), [asked.get(n, "") for n in sources])
    return Kernel(name, layer, kind, precision, seconds, info.get("primitiveType", ""), sources)


def _kind(layer: str, precision: str, results: str, sources: list[str]) -> str:
    narrow = precision in _INTEGER_TYPES
    if layer in openvino_cpu.MATRIX_LAYERS:
        return "integer" if narrow else "float"
    known = [source for source in sources if source]
    if layer == "FakeQuantize" or (known and all(source in _QUANTIZE for source in known)):
        return "quantize"
    if layer in _REFORMAT and (layer != "Transpose" or not known):
        return "reformat"
    return "other-integer" if narrow and results.split(",")[0] in _INTEGER_TYPES else "other-float"
