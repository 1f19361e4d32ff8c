"""What a layer costs in float: its time in OpenVINO's own profile, float against INT8; multiply-accumulates where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deploykit import children
from deploykit.signature import Feeds

RUNS = 40  # its least time is asked of each layer: on a machine with other work a dozen runs left some layers ten times too slow
CONVERSION = 0.25  # of a layer's median time in INT8: what a layer in float costs at least, by the conversions on its two sides
Costs = tuple[dict[str, float], str]  # per layer, and the unit in words


def costs(float_path: Path, int8_path: Path, layers: Sequence[str], outputs: Mapping[str, str], feeds: Feeds) -> Costs:
    """For each layer (a node's name) what it takes longer in float than in INT8, and in which unit; runs in a child process.

    outputs: each layer's first output, in the float graph. A layer that is no slower in float costs its conversions: with those for
    nothing, 14 depthwise layers of EfficientNet-Lite0 that brought 5 % of the noise were kept first, and took up to twice their INT8
    time in the mixed graph (286 and 146 us), where float values come in and integers go out. Both graphs run one batch in turns,
    several times; a layer's time is its least one.
    """
    if children.has_module("openvino"):
        found = _seconds(float_path, int8_path, layers, outputs, feeds)
        if found:
            return found, "seconds in OpenVINO's profile"
    return macs(float_path, layers), "multiply-accumulates (no runtime here has a profile of these layers)"


def _seconds(
    float_path: Path, int8_path: Path, layers: Sequence[str], outputs: Mapping[str, str], feeds: Feeds
) -> dict[str, float]:
    """Seconds by layer; empty where the profile names fewer than half of them."""
    import openvino as ov

    core = ov.Core()
    requests = []
    for path in (float_path, int8_path):
        model = core.read_model(str(path))
        model.reshape({name: list(array.shape) for name, array in feeds.items()})
        config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
        requests.append(core.compile_model(model, "CPU", config).create_infer_request())
    times: list[dict[str, float]] = [{}, {}]
    for run in range(RUNS):
        children.report_progress("time of each layer", run / RUNS)
        for request, seen in zip(requests, times, strict=True):
            request.infer(dict(feeds))
            for info in request.profiling_info:
                spent = info.real_time.total_seconds()
                seen[info.node_name] = min(seen.get(info.node_name, spent), spent)
    pairs: dict[str, tuple[float, float]] = {}
    for name in layers:
        pair = [_of(seen, name, outputs.get(name, name)) for seen in times]
        if pair[0] is not None and pair[1] is not None:
            pairs[name] = (pair[0], pair[1])
    if len(pairs) < max(len(layers) / 2, 1):
        return {}
    least = CONVERSION * sorted(integer for _, integer in pairs.values())[len(pairs) // 2]
    found = {name: max(wide - integer, least) for name, (wide, integer) in pairs.items()}
    middle = sorted(found.values())[len(found) // 2]
    return {name: found.get(name, middle) for name in layers}


def _of(seen: Mapping[str, float], name: str, output: str) -> float | None:
    """A layer's time under the names OpenVINO may give it: the node's, its output's, either with what was fused in."""
    for key in (name, output, f"{name}/WithoutBiases", f"{output}/WithoutBiases"):
        if key in seen:
            return seen[key]
    return None


def macs(path: Path, layers: Sequence[str]) -> dict[str, float]:
    """Multiply-accumulates of one sample by layer: elements of the weight times places of the output; 1 where unknown."""
    import onnx

    model = onnx.load(str(path))
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*inferred.graph.value_info, *inferred.graph.output]
    }
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.name not in layers or len(node.input) < 2:
            continue
        size = 1.0
        for d in weights.get(node.input[1], [1]):
            size *= d
        for d in shapes.get(node.output[0], [])[2:]:
            size *= max(d, 1)
        found[node.name] = size
    return {name: found.get(name, 1.0) for name in layers}
