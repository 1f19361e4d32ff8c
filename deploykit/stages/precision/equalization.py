"""Channels brought to one range, in the float model, before it is quantized: what it computes stays the same.

Cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1):
a factor for each channel goes into the weights of the layer that makes it and out of the weights of the layers that read it. The
paper evens out weight ranges, since its weights have one scale a tensor. Here weights have one a channel, so it is the channels of
an activation that gain: they share one scale, and those of a small range lose most of its levels. What a reading layer pays is
noise in its own weights, which grows with the channels that were enlarged; the factors are (range of the largest channel / own
range) ** alpha, alpha being the one of `ALPHAS` with the least noise in the readers' outputs. A depthwise layer pays nothing.

Through Clip(0, h), as Relu6 is, a channel can only be enlarged until its largest value meets h: beyond, it would be clipped. Other
samples reach further than those that were seen, hence `ROOM`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Artifact, Json
from deploykit.children import report_progress
from deploykit.errors import InputError
from deploykit.graph import attribute
from deploykit.samples import Samples
from deploykit.stages.precision import channel_groups, normal_form
from deploykit.stages.precision.channel_groups import Group
from deploykit.stages.precision.int8 import write
from deploykit.stages.precision.plan import fused_tail
from deploykit.stages.precision.view import FloatGraph, tensor
from deploykit.stages.precision.walk import open_session

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROOM = 4.0  # an enlarged channel stays that far below a Clip's bound: EfficientNet-Lite0 with its Relu6 kept 38 dB of its float
# outputs on photographs it had not seen; with 2.5 it kept 31, with 1.5 27, and with 1 (and fewer samples) 18
MOST = 64.0  # the largest factor: a channel that is nearly dead is left so
_BATCH = 4
Floats = NDArray[np.float64]


@dataclass
class Seen:
    """Of one tensor's channels [C]: largest magnitude, largest value, mean square; levels: 1 where no value is negative, 2 else."""

    amax: Floats
    high: Floats
    square: Floats
    low: Floats


def equalize(path: Path, samples: Samples, out: Path) -> Artifact:
    """The float model with its channels equalized, unsaved; facts: 'equalized_groups', and 'largest_factor'.

    samples: calibration samples, which say how far each channel reaches. The outputs stay what they were, up to
    float rounding, on inputs that keep within those ranges. Raises InputError without samples or where no channel can be
    scaled, ModelError for a model that is quantized already, MissingBackend without ONNX Runtime.
    """
    if not len(samples):
        raise InputError("equalization needs calibration samples, and there are none", "give data with --data")
    graph, _ = normal_form.load(path)
    found = [group for group in channel_groups.find(graph) if group.channels > 1]
    if not found:
        raise InputError(
            f"{path.name} has no two layers between which channels could be equalized",
            "leave --equalize out: it serves convolutions that follow one another through Relu, Relu6, pooling or additions",
        )
    seen = _observed(graph, sorted({name for group in found for name in group.tensors}), samples)
    largest, changed = 1.0, 0
    for group in found:
        factors = _factors(graph, group, seen)
        if not np.allclose(factors, 1.0):
            changed += 1
            largest = max(largest, float(factors.max()))
            _scale(graph, group, factors)
    graph.index()
    graph.write_back(graph.nodes)
    facts: dict[str, Json] = {"equalized_groups": changed, "largest_factor": largest}
    return write(graph.model, out, precision="fp32", parent=path, options={"equalized_on": samples.digest}, facts=facts)


def _observed(graph: FloatGraph, names: list[str], samples: Samples) -> dict[str, Seen]:
    """What the channels of those tensors hold over the samples."""
    import onnx

    model = onnx.ModelProto()
    graph.write_back(graph.nodes)
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = open_session(model, None)
    fixed = samples.signature.fixed_batch
    seen: dict[str, Seen] = {}
    done = 0
    for feeds, count in samples.batches(fixed or _BATCH, pad=fixed is not None):
        for name, value in zip(names, session.run(names, dict(feeds)), strict=True):
            rows = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)
            high, low = rows.max(axis=1).astype(np.float64), rows.min(axis=1).astype(np.float64)
            square = np.einsum("cn,cn->c", rows, rows, dtype=np.float64) / rows.shape[1]
            amax = np.maximum(np.abs(high), np.abs(low))
            old = seen.get(name)
            if old is not None:
                high, low, amax = np.maximum(old.high, high), np.minimum(old.low, low), np.maximum(old.amax, amax)
                square = old.square + (square - old.square) * count / (done + count)
            seen[name] = Seen(amax, high, square, low)
        done += count
        report_progress("equalization", done / len(samples))
    return seen


def _factors(graph: FloatGraph, group: Group, seen: dict[str, Seen]) -> Floats:
    """By how much each channel of the group is enlarged, [C], at least 1."""
    inner = [name for name in group.tensors if fused_tail(graph, name) == name]  # what is quantized: before a Relu nothing is
    reach = np.max([seen[name].amax for name in inner], axis=0)
    room = np.full(group.channels, MOST)
    for name, bound in group.clips.items():
        high = seen[name].high
        room = np.minimum(room, np.where(high > bound, 1.0, bound / np.maximum(ROOM * high, 1e-12)))
    wanted = np.minimum(reach.max() / np.maximum(reach, 1e-12), np.maximum(room, 1.0))
    wanted[reach <= 0.0] = 1.0
    losses = [_noise(graph, group, seen, wanted**alpha) for alpha in ALPHAS]
    return np.asarray(wanted ** ALPHAS[int(np.argmin(losses))])


def _noise(graph: FloatGraph, group: Group, seen: dict[str, Seen], factors: Floats) -> float:
    """Noise power in the outputs of the group's readers, relative to their signal: from quantizing what they read (step of a
    tensor's 255 levels) and their weights (127 levels a channel), each uniform: step ** 2 / 12."""
    total = 0.0
    for i in group.readers:
        observed = seen[graph.nodes[i].input[0]]
        span = float((np.maximum(observed.high, 0.0) * factors).max() - (np.minimum(observed.low, 0.0) * factors).min())
        weight = _by_input(graph, i, group.channels)
        power = np.square(weight).sum(axis=(0, 2))
        signal = max(float(power @ observed.square), 1e-30)
        data = float((power / np.square(factors)).sum()) * (span / 255.0) ** 2 / 12.0
        stored = 0.0  # of a depthwise layer, whose scales follow the factors, it is the same for all of them
        if not _is_depthwise(graph, i):
            steps = (np.abs(weight).max(axis=2) / factors).max(axis=1) / 127.0
            taps = weight.shape[2] * observed.square * np.square(factors)
            stored = float(np.square(steps).sum() / 12.0 * taps.sum())
        total += (data + stored) / signal
    return total


def _is_depthwise(graph: FloatGraph, i: int) -> bool:
    return graph.nodes[i].op_type == "Conv" and attribute(graph.nodes[i], "group", 1) != 1


def _by_input(graph: FloatGraph, i: int, channels: int) -> Floats:
    """The weight of a reader as [outputs, channels, places]; of a depthwise one [1, channels, outputs of each * places]."""
    node = graph.nodes[i]
    weight = graph.array(node.input[1]).astype(np.float64)
    if node.op_type == "Gemm":
        return np.asarray((weight if attribute(node, "transB", 0) else weight.T)[:, :, None])
    if _is_depthwise(graph, i):
        return weight.reshape(1, channels, -1)
    return weight.reshape(weight.shape[0], channels, -1)


def _scale(graph: FloatGraph, group: Group, factors: Floats) -> None:
    """Writes the factors into the weights of the makers and the readers, each in a constant of its own."""
    for i in group.makers:
        node = graph.nodes[i]
        weight = graph.array(node.input[1]).astype(np.float64)
        _replace(graph, i, 1, weight * factors.reshape(-1, *[1] * (weight.ndim - 1)))
        if len(node.input) > 2 and node.input[2]:
            _replace(graph, i, 2, graph.array(node.input[2]).astype(np.float64) * factors)
    for i in group.readers:
        node = graph.nodes[i]
        weight = graph.array(node.input[1]).astype(np.float64)
        if node.op_type == "Gemm":
            shape: tuple[int, ...] = (1, -1) if attribute(node, "transB", 0) else (-1, 1)
            _replace(graph, i, 1, weight / factors.reshape(shape))
        elif not _is_depthwise(graph, i):
            _replace(graph, i, 1, weight / factors.reshape(1, -1, *[1] * (weight.ndim - 2)))
        else:
            own = np.repeat(factors, weight.shape[0] // group.channels)
            _replace(graph, i, 1, weight / own.reshape(-1, *[1] * (weight.ndim - 1)))


def _replace(graph: FloatGraph, i: int, k: int, value: NDArray[Any]) -> None:
    name = graph.fresh(f"{graph.nodes[i].name}_equalized_{'weight' if k == 1 else 'bias'}")
    graph.constants[name] = tensor(name, value.astype(np.float32))
    graph.elem_types[name], graph.shapes[name] = 1, value.shape
    graph.nodes[i].input[k] = name
