"""What a .tflite file holds: its layers and the type each runs in, its inputs' and outputs' quantization, its names."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deploykit.artifact import Json
from deploykit.backends import opened
from deploykit.errors import ModelError

# Operators with weights, or with two tensors multiplied: where a model's time goes.
MATRIX_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL")


def read(path: Path) -> Any:
    """The file as ai_edge_litert's ModelT. Raises ModelError for bytes that are no .tflite."""
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ModelError(f"{path.name} cannot be read: {exc.strerror}", "build it again") from exc
    return parse(data, path.name)


def parse(data: bytes, name: str) -> Any:
    """The ModelT in `data`; `name` is the file's, for the message. Raises ModelError for bytes that are no .tflite."""
    from ai_edge_litert.tools import flatbuffer_utils

    if data[4:8] != b"TFL3":
        raise ModelError(f"{name} is no .tflite file: it does not carry the mark TFL3", "build it again")
    try:
        model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
        size = sum(1 for _ in operators(model))
    except (struct.error, IndexError, TypeError, ValueError, OverflowError, MemoryError) as exc:  # where a wrong offset leads
        raise ModelError(f"{name} is truncated or damaged ({opened.first_line(exc)})", "build it again") from exc
    if not size:
        raise ModelError(f"{name} holds no operator", "build it again")
    return model


def to_bytes(model: Any) -> bytes:
    """The .tflite of a ModelT."""
    from ai_edge_litert.tools import flatbuffer_utils

    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def layers(model: Any) -> dict[str, int]:
    """How many convolutions and matrix products take which types: 'int8' (activations and weights), 'int8-dynamic' (INT8
    weights, activations quantized as they come), 'fp16' (weights stored so, computed in FP32), 'fp32', 'int16'."""
    counts: Counter[str] = Counter()
    for graph, name, operator in operators(model):
        if name in MATRIX_OPERATORS:
            counts[_kind(model, graph, operator)] += 1
    return dict(counts)


def _kind(model: Any, graph: Any, operator: Any) -> str:
    inputs = list(operator.inputs)
    # TRANSPOSE_CONV takes (output shape, weights, activations), the others (activations, weights, bias)
    data, weights = (inputs[2], inputs[1]) if operator_name(model, operator) == "TRANSPOSE_CONV" else (inputs[0], inputs[1])
    kinds = (_dtype(graph.tensors[data]), _dtype(graph.tensors[weights]))
    if kinds == ("float32", "float32"):
        made = next((op for op in graph.operators if weights in list(op.outputs)), None)
        halved = made is not None and _dtype(graph.tensors[made.inputs[0]]) == "float16"
        return "fp16" if halved else "fp32"
    if kinds[0] == "float32":
        return "int8-dynamic"
    return kinds[0]


def ports(model: Any) -> dict[str, Json]:
    """Inputs and outputs of the main graph for a manifest: name, dtype, shape, and the scale and zero point of an integer
    one: real value = (integer - zero_point) * scale."""
    graph = model.subgraphs[0]
    signature = model.signatureDefs[0] if model.signatureDefs else None

    def rows(kind: str) -> list[Json]:
        named = {m.tensorIndex: m.name.decode() for m in (getattr(signature, kind) or ())} if signature is not None else {}
        return [_port(graph.tensors[i], named.get(i)) for i in getattr(graph, kind)]

    return {"inputs": rows("inputs"), "outputs": rows("outputs")}


def _port(tensor: Any, name: str | None) -> Json:
    row: dict[str, Json] = {
        "name": name or tensor.name.decode(),
        "dtype": _dtype(tensor),
        "shape": [int(size) for size in tensor.shape],
    }
    quantization = tensor.quantization
    if quantization is not None and quantization.scale is not None and len(quantization.scale):
        row["scale"] = float(quantization.scale[0])
        row["zero_point"] = int(quantization.zeroPoint[0])
    return row


def rename(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives the one signature's inputs and outputs the model's own names; litert-torch calls them args_0, output_0 and so on.

    Raises ModelError when their numbers differ: the converter has dropped an input that changes nothing.
    """
    signature = model.signatureDefs[0]
    for kind, names, prefix in (("inputs", inputs, "args_"), ("outputs", outputs, "output_")):
        found = {entry.name.decode(): entry for entry in getattr(signature, kind)}
        wanted = {f"{prefix}{position}": name for position, name in enumerate(names)}
        if set(found) != set(wanted):
            raise ModelError(
                f"the .tflite has the {kind} {sorted(found)} for the model's {list(names)}",
                "an input that no output depends on is dropped by the converter: take it out of the model",
            )
        for position, name in wanted.items():
            found[position].name = name.encode()


def operators(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """(graph, operator's name, operator) of each operator, in order."""
    for graph in model.subgraphs:
        for operator in graph.operators:
            yield graph, operator_name(model, operator), operator


def operator_name(model: Any, operator: Any) -> str:
    from ai_edge_litert.tools import flatbuffer_utils

    return str(flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex))


def _dtype(tensor: Any) -> str:
    from ai_edge_litert.tools import flatbuffer_utils

    return str(flatbuffer_utils.type_to_name(tensor.type)).lower()
