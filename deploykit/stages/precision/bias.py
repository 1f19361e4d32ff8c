"""Corrections learnt on samples: what quantizing does to the mean and to the spread of a layer's channels is given back through its
biases and the scales of its weights, and, where asked for, weights are rounded so that their errors make up for each other
(`rounding.py`). It costs nothing at run time.

Biases: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2 (the empirical form),
layer after layer, each measured with the corrections before it in place. Scales: the batch-norm tuning of Hubara et al. 2020,
"Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming" (arXiv:2006.10518), for any layer with
a scale for each channel: gain = std(float output) / std(quantized output), delta = mean(float output) - gain * mean(quantized output).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit import graph as graphs
from deploykit.artifact import Artifact
from deploykit.children import report_progress
from deploykit.errors import InputError, ModelError
from deploykit.graph import attribute
from deploykit.samples import Samples
from deploykit.stages.precision import channel_moments, normal_form, rounding, scales
from deploykit.stages.precision.channel_moments import Moments
from deploykit.stages.precision.correction import Corrections, Rounded
from deploykit.stages.precision.fp16 import to_int8_fp16
from deploykit.stages.precision.int8 import quantized, to_int8, write
from deploykit.stages.precision.options import Int8Options
from deploykit.stages.precision.plan import gemm_bias_fits
from deploykit.stages.precision.view import FloatGraph
from deploykit.stages.precision.walk import Arrays, advance, affordable, cuts

if TYPE_CHECKING:
    import onnx

    from deploykit.calibration_table import CalibrationTable

CORRECTED = ("Conv", "ConvTranspose", "Gemm")
DEFAULT_SAMPLES = 96  # activations of that many samples are held in memory, of one cut through the graph at a time
_BATCH = 8
_DEFAULT = Int8Options()


class NothingToCorrect(ModelError):
    """A model none of whose quantized layers has a bias that could take a correction."""


def corrections(
    path: Path,
    quantized_path: Path,
    samples: Samples,
    *,
    layout: str,
    limit: int = DEFAULT_SAMPLES,
    threads: int | None = None,
    options: Int8Options = _DEFAULT,
    half: bool = False,
) -> Corrections:
    """The corrections that bring the mean and the spread of each quantized layer's channels back to the float model's, on at most
    `limit` samples.

    path: the float model; quantized_path: what `to_int8` made of it with `options`: without `scale_correct` means alone are brought
    back; `rounding` says whether weights are rounded anew first. half: FP16 will hold the scales. The quantized graph is computed
    literally (no fused kernels). Fewer samples are used where their activations would not fit into `walk.HELD_BYTES`. Raises
    InputError without samples, NothingToCorrect (so too where the two graphs do not match), MissingBackend without ONNX Runtime.
    """
    if not len(samples):
        raise InputError("bias correction needs calibration samples, and there are none", "give data with --data")
    graph, digest = normal_form.load(path)
    model = graphs.load(quantized_path)
    wanted = correctable(graph, model)
    if not wanted:
        raise NothingToCorrect(
            f"{path.name} has no quantized Conv, ConvTranspose or Gemm whose bias could be corrected",
            "leave --bias-correct, --scale-correct and --rounding gptq out: they have nothing to work on here",
        )
    count = affordable(graph.model, min(limit, len(samples)))
    feeds = _feeds(samples, count)
    report_progress("bias correction", 0.0)
    scaled = scaled_by_channel(model, wanted) if options.scale_correct else frozenset()
    exact = float_moments(graph, wanted, feeds, threads)
    roundable = _roundable(graph, wanted) if options.rounding == "gptq" else {}
    deltas: dict[str, NDArray[np.float32]] = {}
    gains: dict[str, NDArray[np.float32]] = {}
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
        seen = channel_moments.of_arrays(values[cut.result] for values in live)
        half_scale = cut.weights()[2] if half and name in scaled else None
        gain, deltas[name] = towards(exact[name], seen, name in scaled, half_scale=half_scale)
        if name in scaled:
            gains[name] = gain
        for values in live:
            values[cut.result] = channel_moments.moved(values[cut.result], gain, deltas[name])
    return Corrections(digest, layout, deltas, count, integers, gains)


def _feeds(samples: Samples, count: int) -> list[Arrays]:
    """The first `count` samples in batches; a graph with a fixed batch takes whole ones: the last sample counts again."""
    fixed = samples.signature.fixed_batch
    chosen = samples.take(range(count), samples.role).batches(fixed or _BATCH, pad=fixed is not None)
    return [dict(batch) for batch, _ in chosen]


def towards(
    exact: Moments, seen: Moments, scaled: bool, half_scale: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gain and delta of each channel. half_scale: the weights' scales where FP16 will hold them: the gain is then what it leaves."""
    gain = seen.gain_to(exact) if scaled else np.ones(seen.mean.shape, np.float32)
    if half_scale is not None:
        gain = scales.gained(half_scale, gain, half=True) / half_scale
    return gain, (exact.mean - gain * seen.mean).astype(np.float32)


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
    """`to_int8` with its biases, and its weight scales, corrected on `samples`, unsaved: quantized once to measure, then again with
    the corrections.

    rest 'fp16' (TensorRT's layout only): as `to_int8_fp16`. The samples must be calibration samples, never those that judge.
    Raises as `to_int8` and `corrections` do.
    """
    if rest not in ("fp32", "fp16") or (rest == "fp16" and layout != "tensorrt"):
        raise InputError(f"bias correction cannot write layout '{layout}' with the rest in '{rest}'", "fp16 goes with 'tensorrt'")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "int8.onnx"
        model, facts = quantized(path, table, layout, options, half=rest == "fp16")
        write(model, plain, precision="int8", parent=path, options={}, facts=facts)
        found = corrections(path, plain, samples, layout=layout, limit=limit, options=options, half=rest == "fp16")
    if rest == "fp16":
        return to_int8_fp16(path, table, out, options, found)
    return to_int8(path, table, layout, out, options, found)


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


def scaled_by_channel(model: onnx.ModelProto, names: Collection[str]) -> frozenset[str]:
    """Those of the nodes whose weights have a scale for each output channel: they can take a gain."""
    maker = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    dims = {t.name: list(t.dims) for t in model.graph.initializer}
    return frozenset(
        node.name for node in model.graph.node if node.name in names and len(dims.get(maker[node.input[1]].input[1], ())) == 1
    )


def float_moments(graph: FloatGraph, wanted: Collection[str], feeds: list[Arrays], threads: int | None) -> dict[str, Moments]:
    """Mean and spread of each node's output in the float model, which is used up."""
    tensors = {node.name: (node.output[0], rank_of(graph, node)) for node in graph.nodes if node.name in wanted}
    return channel_moments.in_graph(graph, tensors, feeds, threads)


def rank_of(graph: FloatGraph, node: onnx.NodeProto) -> int:
    """How many axes the output of a Conv, ConvTranspose or Gemm has."""
    return 2 if node.op_type == "Gemm" else len(graph.constants[node.input[1]].dims)
