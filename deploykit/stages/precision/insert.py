"""A Plan written into the graph: scales, integer weights, and the QuantizeLinear / DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.graph import attribute
from deploykit.stages.precision import scales
from deploykit.stages.precision.options import Int8Options
from deploykit.stages.precision.plan import Plan
from deploykit.stages.precision.scales import ActivationScale
from deploykit.stages.precision.view import FloatGraph, set_attribute, tensor

if TYPE_CHECKING:
    import onnx

    from deploykit.calibration_table import CalibrationTable


@dataclass
class Inserter:
    """Writes one plan. `integer_bias`: int32 biases, as ONNX Runtime's kernels want them; TensorRT wants them in float.
    `half`: scales that FP16 holds exactly. `rounded`: by node, the integers to take, where the scale is the one they are for.
    `gains`: by node, what its result is to be multiplied by, [channels]: its biases have it already, its weights' scales get it here,
    and the integers stay as they are."""

    graph: FloatGraph
    plan: Plan
    activation: dict[str, ActivationScale]
    options: Int8Options
    integer_bias: bool
    half: bool = False
    rounded: Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]] = field(default_factory=dict)
    gains: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    dead_channels: int = 0
    rounded_layers: int = 0
    scaled_layers: int = 0
    _weights: dict[tuple[str, int | None, bytes, bytes], str] = field(default_factory=dict)

    def write(self) -> None:
        """Rewrites the graph's model in place."""
        before: dict[int, list[onnx.NodeProto]] = {}
        for i in self.plan.weighted:
            before[i] = self._quantize_weights(i)
        pairs = {name: self._pair(name) for name in sorted(self.plan.edges, key=self._position)}
        if self.integer_bias:
            before |= self._shields()
        after: dict[int, list[onnx.NodeProto]] = {}
        for name, pair in pairs.items():
            after.setdefault(self.graph.producer.get(name, -1), []).extend(pair)
        nodes = list(after.get(-1, ()))
        for i, node in enumerate(self.graph.nodes):
            nodes += [*before.get(i, ()), node, *after.get(i, ())]
        self.graph.write_back(nodes)

    def _shields(self) -> dict[int, list[onnx.NodeProto]]:
        """A Clip without bounds, which changes nothing, before each layer that stays in float between Q/DQ pairs.

        ONNX Runtime (1.31, WeightBiasQuantization) quantizes the float weights of a Conv, ConvTranspose or Gemm that it finds
        between a DequantizeLinear and a QuantizeLinear, and so undoes what was kept in float: 47.8 dB away from the graph as
        it is written, in a chain of four convolutions with one kept. It leaves such a Clip where it is; on that chain it cost
        2 % of the time. OpenVINO removes it.
        """
        import onnx

        found = {}
        for i in sorted({edge[0] for edges in self.plan.edges.values() for edge in edges if edge[1] == 0}):
            node = self.graph.nodes[i]
            if i in self.plan.weighted or node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
                continue
            if node.input[1] in self.graph.constants:
                source, node.input[0] = node.input[0], self.graph.fresh(f"{node.name}_float_input")
                label = self.graph.fresh(f"{node.name}_stays_in_float")
                found[i] = [onnx.helper.make_node("Clip", [source], [node.input[0]], name=label)]
        return found

    def _position(self, name: str) -> tuple[int, str]:
        return self.graph.producer.get(name, -1), name

    def _constant(self, name: str, array: NDArray[Any]) -> str:
        fresh = self.graph.fresh(name)
        self.graph.constants[fresh] = tensor(fresh, array)
        return fresh

    def _pair(self, name: str) -> list[onnx.NodeProto]:
        """Q and DQ of an activation. A tensor that the caller or a control-flow body sees keeps its name: where nobody
        reads the float value any more, the name goes to the dequantized one."""
        import onnx

        chosen = self.activation[self.plan.root(name)]
        source, result = name, self.graph.fresh(f"{name}_dequantized")
        made = self.graph.producer.get(name)
        if name in self.plan.through and made is not None and (name in self.graph.outputs or name in self.graph.captured):
            source, result = self.graph.fresh(f"{name}_float"), name
            outputs = self.graph.nodes[made].output
            outputs[list(outputs).index(name)] = source
        scale = self._constant(f"{name}_scale", np.array(chosen.scale, np.float32))
        zero = self._constant(f"{name}_zero_point", np.array(chosen.zero_point, chosen.dtype))
        middle = self.graph.fresh(f"{name}_quantized")
        for i, k in self.plan.edges[name]:
            self.graph.nodes[i].input[k] = result
        make = onnx.helper.make_node
        return [
            make("QuantizeLinear", [source, scale, zero], [middle], name=self.graph.fresh(f"{name}_QuantizeLinear")),
            make("DequantizeLinear", [middle, scale, zero], [result], name=self.graph.fresh(f"{name}_DequantizeLinear")),
        ]

    def _quantize_weights(self, i: int) -> list[onnx.NodeProto]:
        """Integer weights (and bias) of a node, read through DequantizeLinear nodes, which come back."""
        node = self.graph.nodes[i]
        weight = self._plain_gemm(node) if node.op_type == "Gemm" else self.graph.array(node.input[1])
        axis = weight_axis(node, weight.ndim)
        if node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1:
            axis = None  # axis 1 counts the channels of one group only
        levels = self.options.levels
        amax = scales.channel_amax(weight, axis)
        dead = amax <= (scales.TINY_HALF_SCALE if self.half else 0.0)
        self.dead_channels += int(dead.sum())
        wanted = scales.mse_scale(weight, axis, levels) if self.options.weight_scales == "mse" else amax / levels
        scale = scales.positive(scales.revive(wanted, dead), half=self.half)
        gain = self.gains.get(node.name, np.ones(1, np.float32)) if axis is not None else np.ones(1, np.float32)
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in self.graph.constants else None
        result: list[onnx.NodeProto | None] = []
        if bias is not None and node.op_type != "MatMul":
            values = self.graph.array(bias).reshape(-1)
            channels = weight.shape[axis] if axis is not None else weight.shape[0]
            values = np.broadcast_to(values, (channels,)) if values.size == 1 else values
            step = self.activation[self.plan.root(node.input[0])].scale
            # A channel of tiny weights would need a bias beyond int32: its scale grows until the bias fits. So too where the bias
            # stays in float: ONNX Runtime (1.31, WeightBiasQuantization) makes an int32 of it by itself.
            floor = np.abs(values.astype(np.float64) / gain) / (step * (scales.INT32_MAX // 2))
            if axis is None or floor.size != channels:  # a Gemm's third operand may be a matrix
                floor = floor.max(keepdims=True)
            scale = scales.positive(np.maximum(scale, floor), half=self.half)
            if self.integer_bias:
                result.append(self._integer_bias(node, bias, values, (scale * gain * np.float32(step)).astype(np.float32)))
        result.insert(0, self._integer_weight(node, weight, scale, gain, axis, levels))
        return [found for found in result if found is not None]

    def _integer_weight(
        self,
        node: onnx.NodeProto,
        weight: NDArray[Any],
        scale: NDArray[np.float32],
        gain: NDArray[np.float32],
        axis: int | None,
        levels: int,
    ) -> onnx.NodeProto | None:
        import onnx

        name = node.input[1]
        self.scaled_layers += int(node.name in self.gains and axis is not None)
        key = (name, axis, scale.tobytes(), gain.tobytes())
        if key in self._weights:  # shared by several nodes along one axis
            node.input[1] = self._weights[key]
            return None
        given = self.rounded.get(node.name)
        usable = given is not None and np.array_equal(given[1].reshape(-1), scale.reshape(-1))
        integers = given[0] if given is not None and usable else scales.quantize(weight, scale, axis, levels)
        self.rounded_layers += int(usable)
        scale = scales.gained(scale, gain, half=self.half)
        result = self.graph.fresh(f"{name}_dequantized")
        inputs = [
            self._constant(f"{name}_quantized", integers),
            self._constant(f"{name}_scale", scale if axis is not None else scale.reshape(())),
            self._constant(f"{name}_zero_point", np.zeros(scale.shape if axis is not None else (), np.int8)),
        ]
        node.input[1] = self._weights[key] = result
        label = self.graph.fresh(f"{name}_DequantizeLinear")
        made = onnx.helper.make_node("DequantizeLinear", inputs, [result], name=label)
        if axis is not None:
            set_attribute(made, "axis", axis)
        return made

    def _integer_bias(self, node: onnx.NodeProto, name: str, values: NDArray[Any], scale: NDArray[np.float32]) -> onnx.NodeProto:
        import onnx

        result = self.graph.fresh(f"{name}_dequantized")
        inputs = [
            self._constant(f"{name}_quantized", scales.bias_to_int32(values, scale)),
            self._constant(f"{name}_scale", np.broadcast_to(scale, values.shape)),
            self._constant(f"{name}_zero_point", np.zeros(values.shape, np.int32)),
        ]
        node.input[2] = result
        label = self.graph.fresh(f"{name}_DequantizeLinear")
        return onnx.helper.make_node("DequantizeLinear", inputs, [result], name=label, axis=0)

    def _plain_gemm(self, node: onnx.NodeProto) -> NDArray[Any]:
        """The weight of a Gemm with alpha, and beta of a constant third operand, multiplied in."""
        weight = self.graph.array(node.input[1])
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        if alpha != 1.0:
            weight = (weight * np.float32(alpha)).astype(np.float32)
            node.input[1] = self._constant(f"{node.input[1]}_scaled", weight)
            set_attribute(node, "alpha", 1.0)
        if beta != 1.0 and len(node.input) > 2 and node.input[2] in self.graph.constants:
            bias = (self.graph.array(node.input[2]) * np.float32(beta)).astype(np.float32)
            node.input[2] = self._constant(f"{node.input[2]}_scaled", bias)
            set_attribute(node, "beta", 1.0)
        return weight


def weight_axis(node: onnx.NodeProto, rank: int) -> int | None:
    """The axis of a weight that counts output channels; None for a batch of matrices: one scale for all."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if rank == 2 else None


def activation_scales(plan: Plan, table: CalibrationTable, layout: str, *, half: bool) -> dict[str, ActivationScale]:
    """Scale and zero point of every tensor that the plan quantizes."""
    result = {}
    for name in {plan.root(edge) for edge in plan.edges}:
        if layout == "tensorrt":
            result[name] = scales.symmetric(table.amax(name), half=half)
        else:
            chosen = table.range(name)
            result[name] = scales.asymmetric(chosen.low, chosen.high)
    return result
