"""Empirical bias correction: what quantizing shifts in a layer's mean output is given back through its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2 (the empirical
form): delta = E[float output] - E[quantized output] for each output channel, layer after layer, each measured with the
corrections before it in place. It costs nothing at run time.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit import graph as graphs
from deploykit.artifact import Artifact, write_atomically
from deploykit.children import report_progress
from deploykit.errors import InputError, MissingBackend, ModelError, StaleCalibration
from deploykit.samples import Samples
from deploykit.stages.precision import normal_form
from deploykit.stages.precision.fp16 import to_int8_fp16
from deploykit.stages.precision.int8 import to_int8
from deploykit.stages.precision.options import Int8Options
from deploykit.stages.precision.view import FloatGraph, bodies, tensor

if TYPE_CHECKING:
    import onnx

    from deploykit.calibration_table import CalibrationTable

CORRECTED = ("Conv", "ConvTranspose", "Gemm")
DEFAULT_SAMPLES = 64  # activations of that many samples are held in memory, of one cut through the graph at a time
_BATCH = 8
_DEFAULT = Int8Options()
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class BiasDeltas:
    """What to add to the bias of each node, [channels] by node name, for the model of that digest and one layout."""

    model_sha256: str
    layout: str
    deltas: dict[str, NDArray[np.float32]]
    n: int = 0

    @property
    def fingerprint(self) -> str:
        """sha256 over everything here."""
        digest = hashlib.sha256(f"{self.model_sha256} {self.layout}".encode())
        for name, values in sorted(self.deltas.items()):
            digest.update(name.encode() + b"\0" + values.tobytes())
        return digest.hexdigest()

    def apply(self, graph: FloatGraph, chosen: Iterable[int]) -> int:
        """Adds the deltas to the biases of those nodes, in place, where there are any; a node without a bias gets one.
        Returns how many nodes got theirs."""
        count = 0
        for i in chosen:
            node = graph.nodes[i]
            delta = self.deltas.get(node.name)
            if delta is None:
                continue
            count += 1
            old = node.input[2] if len(node.input) > 2 else ""
            values = graph.array(old).reshape(-1) if old else np.zeros(1, np.float32)
            name = graph.fresh(f"{node.name}_corrected_bias")
            graph.constants[name] = tensor(name, (values + delta).astype(np.float32))
            graph.elem_types[name], graph.shapes[name] = 1, (delta.size,)
            del node.input[2:]
            node.input.append(name)
        graph.index()
        return count

    def require_match(self, model_sha256: str, layout: str) -> None:
        """Raises StaleCalibration unless the corrections were made for that model and layout."""
        if (self.model_sha256, self.layout) != (model_sha256, layout):
            raise StaleCalibration(
                f"bias corrections were made for model {self.model_sha256[:12]}... in layout '{self.layout}', "
                f"not {model_sha256[:12]}... in '{layout}'",
                "rerun with --recalibrate",
            )


def deltas(
    path: Path, quantized: Path, samples: Samples, *, layout: str, limit: int = DEFAULT_SAMPLES, threads: int | None = None
) -> BiasDeltas:
    """The corrections that bring each quantized layer's mean output back to the float model's, on at most `limit` samples.

    path: the float model; quantized: what `to_int8` made of it. The quantized graph is computed literally (no fused
    kernels). Raises InputError without samples, ModelError where the two graphs do not match, MissingBackend without ONNX
    Runtime.
    """
    if not len(samples):
        raise InputError("bias correction needs calibration samples, and there are none", "give data with --data")
    graph, digest = normal_form.load(path)
    model = graphs.load(quantized)
    feeds = [dict(batch) for batch, _ in samples.take(range(min(limit, len(samples))), samples.role).batches(_BATCH)]
    wanted = _correctable(graph, model)
    if not wanted:
        raise ModelError(
            f"{quantized.name} holds no layer of {path.name} whose bias could be corrected", "give the model it is of"
        )
    means = _float_means(graph, wanted, feeds, threads)
    found: dict[str, NDArray[np.float32]] = {}
    live: list[Arrays] = feeds
    segments = list(_segments(model, wanted))
    for step, (part, node_name, result, keep) in enumerate(segments):
        report_progress("bias correction", step / len(segments))
        live = _advance(part, live, keep, threads)
        if node_name is None:
            continue
        mean = _mean([values[result] for values in live])
        delta = (means[node_name] - mean).astype(np.float32)
        found[node_name] = delta
        for values in live:
            values[result] = values[result] + _along(delta, values[result].ndim)
    return BiasDeltas(digest, layout, found, sum(_count(f) for f in feeds))


def bias_correct(
    path: Path,
    table: CalibrationTable,
    layout: str,
    samples: Samples,
    out: Path,
    options: Int8Options = _DEFAULT,
    rest: str = "fp32",
    limit: int = DEFAULT_SAMPLES,
) -> Artifact:
    """`to_int8` with its biases corrected on `samples`, unsaved: quantized once to measure, then again with the corrections.

    rest 'fp16' (TensorRT's layout only): as `to_int8_fp16`. The samples must be calibration samples, never those that judge.
    Raises as `to_int8` and `deltas` do.
    """
    if rest not in ("fp32", "fp16") or (rest == "fp16" and layout != "tensorrt"):
        raise InputError(f"bias correction cannot write layout '{layout}' with the rest in '{rest}'", "fp16 goes with 'tensorrt'")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "int8.onnx"
        to_int8(path, table, layout, plain, options)
        found = deltas(path, plain, samples, layout=layout, limit=limit)
    if rest == "fp16":
        return to_int8_fp16(path, table, out, options, found)
    return to_int8(path, table, layout, out, options, found)


def save(deltas_: BiasDeltas, path: Path) -> None:
    """Writes the corrections as .npz, whole or not at all."""
    import io

    stream = io.BytesIO()
    head = np.array([deltas_.model_sha256, deltas_.layout, str(deltas_.n)])
    named: dict[str, Any] = {f"delta/{name}": values for name, values in deltas_.deltas.items()}
    np.savez(stream, head=head, **named)
    write_atomically(path, stream.getvalue())


def load(path: Path) -> BiasDeltas:
    """The corrections in a file that `save` wrote. Raises InputError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as found:
            digest, layout, n = (str(v) for v in found["head"])
            values = {k.removeprefix("delta/"): np.asarray(found[k], np.float32) for k in found.files if k != "head"}
    except (OSError, ValueError, KeyError) as exc:
        raise InputError(f"{path} holds no bias corrections: {exc}", "make them again") from exc
    return BiasDeltas(digest, layout, values, int(n))


def _correctable(graph: FloatGraph, model: onnx.ModelProto) -> dict[str, str]:
    """node name -> its output in the quantized graph, of nodes with quantized weights and a constant bias or none."""
    dequantized = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    float_nodes = {node.name: node for node in graph.nodes}
    result = {}
    for node in model.graph.node:
        known = float_nodes.get(node.name)
        if known is None or known.op_type != node.op_type or node.op_type not in CORRECTED:
            continue
        bias = known.input[2] if len(known.input) > 2 else ""
        if node.input[1] in dequantized and (not bias or bias in graph.constants):
            result[node.name] = node.output[0]
    return result


def _float_means(graph: FloatGraph, wanted: dict[str, str], feeds: list[Arrays], threads: int | None) -> Arrays:
    """Mean output of each node over samples and space, [channels], in the float model; reduced inside the graph."""
    import onnx

    model = graph.model
    graph.write_back(graph.nodes)
    outputs = {}
    for node in graph.nodes:
        if node.name in wanted:
            name, source = graph.fresh(f"{node.name}_mean"), node.output[0]
            rank = len(graph.shapes.get(source, (0, 0)))
            axes = graph.fresh(f"{name}_axes")
            model.graph.initializer.append(tensor(axes, np.array([a for a in range(rank) if a != 1], np.int64)))
            kind = "ReduceMean"
            if graph.opset < 18:
                made = onnx.helper.make_node(kind, [source], [name], axes=[a for a in range(rank) if a != 1], keepdims=0)
            else:
                made = onnx.helper.make_node(kind, [source, axes], [name], keepdims=0)
            model.graph.node.append(made)
            outputs[name] = node.name
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    session = _session(model, threads)
    totals: dict[str, NDArray[Any]] = {}
    for batch in feeds:
        for (_, name), value in zip(outputs.items(), session.run(list(outputs), batch), strict=True):
            totals[name] = totals.get(name, np.zeros(1)) + value.astype(np.float64) * _count(batch)
    n = sum(_count(batch) for batch in feeds)
    return {name: total / n for name, total in totals.items()}


def _segments(
    model: onnx.ModelProto, wanted: dict[str, str]
) -> Iterator[tuple[onnx.ModelProto, str | None, str, frozenset[str]]]:
    """The quantized graph cut after each node to correct: (part, that node, its output, tensors needed from there on)."""
    import onnx

    nodes = list(model.graph.node)
    ends = [i for i, node in enumerate(nodes) if node.name in wanted]
    stored = {t.name: t for t in model.graph.initializer}
    start = 0
    for end in ends:
        inside = nodes[start : end + 1]
        later = {name for node in nodes[end + 1 :] for name in _reads(node)}
        made = {name for node in inside for name in node.output if name}
        read = {name for node in inside for name in _reads(node) if name}
        keep = frozenset(later)
        graph = onnx.helper.make_graph(
            inside,
            "part",
            [onnx.helper.make_empty_tensor_value_info(n) for n in sorted(read - made - set(stored))],
            [onnx.helper.make_empty_tensor_value_info(n) for n in sorted((made & later) | {nodes[end].output[0]})],
            [stored[n] for n in sorted(read & set(stored))],
        )
        part = onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
        yield part, nodes[end].name, nodes[end].output[0], keep | {nodes[end].output[0]}
        start = end + 1


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for body in bodies(node):
        for inner in body.node:
            yield from _reads(inner)


def _advance(part: onnx.ModelProto, live: list[Arrays], keep: frozenset[str], threads: int | None) -> list[Arrays]:
    """The live tensors after a part of the graph ran; those nobody needs any more are dropped."""
    import onnx

    names = {value.name for value in part.graph.input}
    captured = {n for n in names if not live or n not in live[0]}
    kept = [v for v in part.graph.input if v.name not in captured]
    del part.graph.input[:]
    for value in kept:
        array = live[0][value.name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        part.graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind, [None] * array.ndim))
    session = _session(part, threads)
    outputs = [value.name for value in session.get_outputs()]
    inputs = [value.name for value in session.get_inputs()]
    result = []
    for values in live:
        made = dict(zip(outputs, session.run(outputs, {name: values[name] for name in inputs}), strict=True))
        result.append({name: value for name, value in {**values, **made}.items() if name in keep})
    return result


def _session(model: onnx.ModelProto, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingBackend(
            "bias correction needs ONNX Runtime, which is not installed", "pip install 'deploykit[cpu]'"
        ) from exc
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _mean(arrays: list[NDArray[Any]]) -> NDArray[np.float64]:
    """Mean over everything but axis 1, [channels]."""
    axes = tuple(a for a in range(arrays[0].ndim) if a != 1)
    total = np.sum([array.mean(axis=axes, dtype=np.float64) * array.shape[0] for array in arrays], axis=0)
    return np.asarray(total / sum(array.shape[0] for array in arrays))


def _along(delta: NDArray[Any], rank: int) -> NDArray[Any]:
    return delta.reshape(1, -1, *[1] * (rank - 2))


def _count(batch: Arrays) -> int:
    return max((int(array.shape[0]) for array in batch.values() if array.ndim), default=1)
