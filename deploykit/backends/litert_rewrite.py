"""Rewrites of a .tflite's graph: max-pools that can be quantized, a batch that can be resized, float inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deploykit.backends import litert_flatbuffer
from deploykit.backends.litert_flatbuffer import operator_name


def pad_with_zeros(model: Any) -> int:
    """Rewrites PADV2 with -inf behind a Relu as PAD (zeros); how many there were.

    A max-pool's padding is -inf: quantized, it makes the scale of the tensors around it infinite (ai-edge-quantizer 0.10,
    and XNNPACK then refuses the file), and XNNPACK has no PADV2, which splits the graph. Behind a Relu no value is under 0,
    so zeros give the same maximum.
    """
    from ai_edge_litert import schema_py_generated as schema

    done = 0
    for graph in model.subgraphs:
        for operator in graph.operators:
            if operator_name(model, operator) != "PADV2" or not _pads_low(model, graph, operator):
                continue
            source, padded = operator.inputs[0], operator.outputs[0]
            made = next((op for op in graph.operators if source in list(op.outputs)), None)
            users = [op for op in graph.operators if padded in list(op.inputs)]
            if made is None or not _not_negative(model, made) or {operator_name(model, op) for op in users} != {"MAX_POOL_2D"}:
                continue
            operator.opcodeIndex = _opcode(model, schema.BuiltinOperator.PAD)
            operator.inputs = list(operator.inputs)[:2]
            operator.builtinOptionsType = schema.BuiltinOptions.PadOptions
            operator.builtinOptions = schema.PadOptionsT()
            done += 1
    return done


def same_scale_sources(model: Any) -> Mapping[str, str]:
    """Output tensor -> input tensor of each PADV2 that pads with -inf: its values other than the padding are its input's."""
    result: dict[str, str] = {}
    for graph, name, operator in litert_flatbuffer.operators(model):
        if name == "PADV2" and _pads_low(model, graph, operator):
            result[graph.tensors[operator.outputs[0]].name.decode()] = graph.tensors[operator.inputs[0]].name.decode()
    return result


def _pads_low(model: Any, graph: Any, operator: Any) -> bool:
    data = model.buffers[graph.tensors[operator.inputs[2]].buffer].data
    return data is not None and len(data) == 4 and bool(np.frombuffer(bytes(data), np.float32)[0] == -np.inf)


def _not_negative(model: Any, operator: Any) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    kinds = schema.ActivationFunctionType
    fused = getattr(operator.builtinOptions, "fusedActivationFunction", kinds.NONE)
    return operator_name(model, operator) in ("RELU", "RELU6") or fused in (kinds.RELU, kinds.RELU6)


def _opcode(model: Any, code: int, version: int = 1) -> int:
    """The index of a builtin operator's code in the model, added where it has none."""
    from ai_edge_litert import schema_py_generated as schema

    for index, known in enumerate(model.operatorCodes):
        if known.builtinCode == code and known.version >= version:
            return index
    added = schema.OperatorCodeT()
    added.builtinCode = added.deprecatedBuiltinCode = code
    added.version = version
    model.operatorCodes.append(added)
    return len(model.operatorCodes) - 1


def free_batch(at_one: Any, at_two: Any) -> bool:
    """Makes the RESHAPEs of a model traced at batch 1 take any batch; whether nothing else holds the batch.

    The converter writes a reshape's whole target shape into the file. What differs between the same model traced at
    batch 1 and at batch 2 is the batch: that size becomes -1. What it changed may be no more than the caller can prove.
    """
    if len(at_one.subgraphs) != 1 or len(at_two.subgraphs) != 1:
        return False
    one, two = at_one.subgraphs[0], at_two.subgraphs[0]
    names = [[operator_name(model, op) for op in model.subgraphs[0].operators] for model in (at_one, at_two)]
    if names[0] != names[1]:
        return False
    for name, left, right in zip(names[0], one.operators, two.operators, strict=True):
        for position, (i, j) in enumerate(zip(left.inputs, right.inputs, strict=True)):
            here, there = _whole_numbers(at_one, one, i), _whole_numbers(at_two, two, j)
            if here is None or there is None or here == there:
                continue
            apart = [axis for axis, (a, b) in enumerate(zip(here, there, strict=False)) if a != b]
            if name != "RESHAPE" or position != 1 or len(here) != len(there) or len(apart) != 1:
                return False
            here[apart[0]] = -1
            _set_shape(at_one, one, left, here)
    return True


def _whole_numbers(model: Any, graph: Any, index: int) -> list[int] | None:
    """The values of a constant INT32 tensor; None for one that is computed, or of another type."""
    from ai_edge_litert import schema_py_generated as schema

    if index < 0 or graph.tensors[index].type != schema.TensorType.INT32:
        return None
    data = model.buffers[graph.tensors[index].buffer].data
    return None if data is None or not len(data) else [int(v) for v in np.frombuffer(bytes(data), np.int32)]


def _set_shape(model: Any, graph: Any, reshape: Any, shape: list[int]) -> None:
    from ai_edge_litert import schema_py_generated as schema

    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.asarray(shape, np.int32).tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor = schema.TensorT()
    tensor.name = b"reshape_to_any_batch"
    tensor.type = schema.TensorType.INT32
    tensor.shape = [len(shape)]
    tensor.buffer = len(model.buffers) - 1
    graph.tensors.append(tensor)
    reshape.inputs = [reshape.inputs[0], len(graph.tensors) - 1]
    if reshape.builtinOptions is not None:
        reshape.builtinOptions.newShape = shape


def float_ports(model: Any) -> None:
    """Gives a model with INT8 inputs and outputs float ones: a QUANTIZE behind each input, a DEQUANTIZE before each output.

    ai-edge-quantizer 0.10 can leave them float itself, but hands the float values of an output to the operators that use it
    too: where a graph's output feeds a SUM, that gave numbers that had nothing to do with the right ones.
    """
    from ai_edge_litert import schema_py_generated as schema

    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    integer = schema.TensorType.INT8
    for position, index in enumerate(graph.inputs):
        if graph.tensors[index].type == integer:
            outside = _float_twin(graph, index, b"_float")
            graph.operators.insert(0, _operator(model, schema.BuiltinOperator.QUANTIZE, 1, outside, index))
            graph.inputs[position] = outside
            _point(signature.inputs, index, outside)
    for position, index in enumerate(graph.outputs):
        if graph.tensors[index].type == integer:
            outside = _float_twin(graph, index, b"_float")
            graph.operators.append(_operator(model, schema.BuiltinOperator.DEQUANTIZE, 2, index, outside))
            graph.outputs[position] = outside
            _point(signature.outputs, index, outside)


def _float_twin(graph: Any, index: int, suffix: bytes) -> int:
    from ai_edge_litert import schema_py_generated as schema

    known = graph.tensors[index]
    twin = schema.TensorT()
    twin.name = known.name + suffix
    twin.type = schema.TensorType.FLOAT32
    twin.shape, twin.shapeSignature, twin.hasRank = known.shape, known.shapeSignature, known.hasRank
    graph.tensors.append(twin)
    return len(graph.tensors) - 1


def _operator(model: Any, code: int, version: int, source: int, target: int) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    made = schema.OperatorT()
    made.opcodeIndex = _opcode(model, code, version)
    made.inputs, made.outputs = [source], [target]
    return made


def _point(entries: Any, before: int, after: int) -> None:
    for entry in entries:
        if entry.tensorIndex == before:
            entry.tensorIndex = after
