"""Corrections learnt on samples: what quantizing shifts in a layer's mean output is given back through its bias, and,
where asked for, weights are rounded so that their errors make up for each other (`rounding.py`).

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2 (the empirical
form): delta = E[float output] - E[quantized output] for each output channel, layer after layer, each measured with the
corrections before it in place. It costs nothing at run time.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit import graph as graphs
from deploykit.artifact import Artifact, write_atomically
from deploykit.children import report_progress
from deploykit.errors import InputError, ModelError, StaleCalibration
from deploykit.samples import Samples
from deploykit.stages.precision import normal_form, rounding
from deploykit.stages.precision.fp16 import to_int8_fp16
from deploykit.stages.precision.int8 import quantized, to_int8, write
from deploykit.stages.precision.options import Int8Options
from deploykit.stages.precision.plan import gemm_bias_fits
from deploykit.stages.precision.view import FloatGraph, attribute, set_attribute, tensor
from deploykit.stages.precision.walk import Arrays, advance, affordable, cuts, open_session

if TYPE_CHECKING:
    import onnx

    from deploykit.calibration_table import CalibrationTable

CORRECTED = ("Conv", "ConvTranspose", "Gemm")
DEFAULT_SAMPLES = 64  # activations of that many samples are held in memory, of one cut through the graph at a time
_BATCH = 8
_DEFAULT = Int8Options()
Rounded = tuple[NDArray[np.int8], NDArray[np.float32]]


class NothingToCorrect(ModelError):
    """A model none of whose quantized layers has a bias that could take a correction."""


@dataclass(frozen=True)
class BiasDeltas:
    """What to add to the bias of each node, [channels] by node name, for the model of that digest and one layout.

    integers: weights rounded other than to the nearest, and the scale of each channel that they belong to, by node name.
    """

    model_sha256: str
    layout: str
    deltas: dict[str, NDArray[np.float32]]
    n: int = 0
    integers: dict[str, Rounded] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 over everything here."""
        digest = hashlib.sha256(f"{self.model_sha256} {self.layout}".encode())
        for name, values in sorted(self.deltas.items()):
            digest.update(name.encode() + b"\0" + values.tobytes())
        for name, (integers, scale) in sorted(self.integers.items()):
            digest.update(name.encode() + b"\1" + integers.tobytes() + scale.tobytes())
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
            if node.op_type == "Gemm" and (beta := attribute(node, "beta", 1.0)) != 1.0:
                values = values * np.float32(beta)  # else it would scale the correction too
                set_attribute(node, "beta", 1.0)
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
    path: Path,
    quantized_path: Path,
    samples: Samples,
    *,
    layout: str,
    limit: int = DEFAULT_SAMPLES,
    threads: int | None = None,
    options: Int8Options = _DEFAULT,
) -> BiasDeltas:
    """The corrections that bring each quantized layer's mean output back to the float model's, on at most `limit` samples.

    path: the float model; quantized_path: what `to_int8` made of it with `options`, whose `rounding` says whether weights are
    rounded anew first. The quantized graph is computed literally (no fused kernels). Fewer samples are used where their
    activations would not fit into `walk.HELD_BYTES`. Raises InputError without samples, NothingToCorrect (so too where the two
    graphs do not match), MissingBackend without ONNX Runtime.
    """
    if not len(samples):
        raise InputError("bias correction needs calibration samples, and there are none", "give data with --data")
    graph, digest = normal_form.load(path)
    model = graphs.load(quantized_path)
    wanted = correctable(graph, model)
    if not wanted:
        raise NothingToCorrect(
            f"{path.name} has no quantized Conv, ConvTranspose or Gemm whose bias could be corrected",
            "leave --bias-correct and --rounding gptq out: they have nothing to work on here",
        )
    count = affordable(graph.model, min(limit, len(samples)))
    fixed = samples.signature.fixed_batch  # such a graph takes whole batches: the last sample counts again
    chosen = samples.take(range(count), samples.role).batches(fixed or _BATCH, pad=fixed is not None)
    feeds = [dict(batch) for batch, _ in chosen]
    report_progress("bias correction", 0.0)
    means = _float_means(graph, wanted, feeds, threads)
    roundable = _roundable(graph, wanted) if options.rounding == "gptq" else {}
    found: dict[str, NDArray[np.float32]] = {}
    integers: dict[str, Rounded] = {}
    live: list[Arrays] = feeds
    for step, cut in enumerate(cuts(model, frozenset(wanted))):
        report_progress("bias correction", step / len(wanted))
        if cut.before is not None:
            advance(cut.before, live, cut.needed, threads)
        name = cut.node.name
        if name in roundable:
            stored, _, scale = cut.weights()
            batches = [values[cut.node.input[0]] for values in live]
            learnt = rounding.learnt(cut.node, roundable[name], scale, options.levels, batches)
            cut.replace(stored, learnt)
            integers[name] = (learnt, scale)
        advance(cut.part, live, cut.keep, threads)
        delta = (means[name] - _mean([values[cut.result] for values in live])).astype(np.float32)
        found[name] = delta
        for values in live:
            values[cut.result] = values[cut.result] + _along(delta, values[cut.result].ndim)
    return BiasDeltas(digest, layout, found, count, integers)


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
        model, facts = quantized(path, table, layout, options, half=rest == "fp16")
        write(model, plain, precision="int8", parent=path, options={}, facts=facts)
        found = deltas(path, plain, samples, layout=layout, limit=limit, options=options)
    if rest == "fp16":
        return to_int8_fp16(path, table, out, options, found)
    return to_int8(path, table, layout, out, options, found)


def save(deltas_: BiasDeltas, path: Path) -> None:
    """Writes the corrections as .npz, whole or not at all."""
    import io

    stream = io.BytesIO()
    head = np.array([deltas_.model_sha256, deltas_.layout, str(deltas_.n)])
    named: dict[str, Any] = {f"delta/{name}": values for name, values in deltas_.deltas.items()}
    for name, (integers, scale) in deltas_.integers.items():
        named |= {f"integers/{name}": integers, f"scale/{name}": scale}
    np.savez(stream, head=head, **named)
    write_atomically(path, stream.getvalue())


def load(path: Path) -> BiasDeltas:
    """The corrections in a file that `save` wrote. Raises InputError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as found:
            digest, layout, n = (str(v) for v in found["head"])
            values = {k.removeprefix("delta/"): np.asarray(found[k], np.float32) for k in found.files if k.startswith("delta/")}
            names = [k.removeprefix("integers/") for k in found.files if k.startswith("integers/")]
            integers = {name: (found[f"integers/{name}"], found[f"scale/{name}"]) for name in names}
    except (OSError, ValueError, KeyError) as exc:
        raise InputError(f"{path} holds no bias corrections: {exc}", "make them again") from exc
    return BiasDeltas(digest, layout, values, int(n), integers)


def correctable(graph: FloatGraph, model: onnx.ModelProto) -> dict[str, str]:
    """node name -> its output in the quantized graph, of nodes with quantized weights and a constant bias, one value for each
    channel, or none."""
    dequantized = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    float_nodes = {node.name: i for i, node in enumerate(graph.nodes)}
    result = {}
    for node in model.graph.node:
        i = float_nodes.get(node.name)
        if i is None or graph.nodes[i].op_type != node.op_type or node.op_type not in CORRECTED:
            continue
        known = graph.nodes[i]
        bias = known.input[2] if len(known.input) > 2 else ""
        fits = gemm_bias_fits(graph, i) if node.op_type == "Gemm" else not bias or bias in graph.constants
        if node.input[1] in dequantized and fits:
            result[node.name] = node.output[0]
    return result


def _roundable(graph: FloatGraph, wanted: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """node name -> its float weight, of the nodes whose weights can be rounded on samples: read by that node alone."""
    found = {}
    for node in graph.nodes:
        if node.name not in wanted or not graph.has_one_reader(node.input[1]):
            continue
        weight = graph.array(node.input[1])
        if attribute(node, "alpha", 1.0) == 1.0 and rounding.can_round(node, weight):
            found[node.name] = weight
    return found


def _float_means(graph: FloatGraph, wanted: dict[str, str], feeds: list[Arrays], threads: int | None) -> Arrays:
    """Mean output of each node over samples and space, [channels], in the float model."""
    tensors = {node.name: (node.output[0], rank_of(graph, node)) for node in graph.nodes if node.name in wanted}
    return means(graph, tensors, feeds, threads)


def rank_of(graph: FloatGraph, node: onnx.NodeProto) -> int:
    """How many axes the output of a Conv, ConvTranspose or Gemm has."""
    return 2 if node.op_type == "Gemm" else len(graph.constants[node.input[1]].dims)


def means(graph: FloatGraph, tensors: Mapping[str, tuple[str, int]], feeds: list[Arrays], threads: int | None) -> Arrays:
    """By key, the mean of a tensor (its name and rank) over everything but axis 1, [channels]; reduced inside the graph, which is
    used up."""
    import onnx

    model = graph.model
    graph.write_back(graph.nodes)
    outputs = {}
    for key, (source, rank) in tensors.items():
        name = graph.fresh(f"{source}_mean")
        axes = graph.fresh(f"{name}_axes")
        model.graph.initializer.append(tensor(axes, np.array([a for a in range(rank) if a != 1], np.int64)))
        kind = "ReduceMean"
        if graph.opset < 18:
            made = onnx.helper.make_node(kind, [source], [name], axes=[a for a in range(rank) if a != 1], keepdims=0)
        else:
            made = onnx.helper.make_node(kind, [source, axes], [name], keepdims=0)
        model.graph.node.append(made)
        outputs[name] = key
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    session = open_session(model, threads)
    totals: dict[str, NDArray[Any]] = {}
    for batch in feeds:
        for (_, key), value in zip(outputs.items(), session.run(list(outputs), batch), strict=True):
            totals[key] = totals.get(key, np.zeros(1)) + value.astype(np.float64) * _count(batch)
    n = sum(_count(batch) for batch in feeds)
    return {key: total / n for key, total in totals.items()}


def _mean(arrays: list[NDArray[Any]]) -> NDArray[np.float64]:
    """Mean over everything but axis 1, [channels]."""
    axes = tuple(a for a in range(arrays[0].ndim) if a != 1)
    total = np.sum([array.mean(axis=axes, dtype=np.float64) * array.shape[0] for array in arrays], axis=0)
    return np.asarray(total / sum(array.shape[0] for array in arrays))


def _along(delta: NDArray[Any], rank: int) -> NDArray[Any]:
    return delta.reshape(1, -1, *[1] * (rank - 2))


def _count(batch: Arrays) -> int:
    return max((int(array.shape[0]) for array in batch.values() if array.ndim), default=1)
