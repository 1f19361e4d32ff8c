"""What a node makes of constants: the values behind a weight that an exporter wrote as several nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.graph import attribute

if TYPE_CHECKING:
    import onnx


def rounded(node: onnx.NodeProto, inputs: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    """QuantizeLinear or DequantizeLinear of a constant, from or to integers; None for blocks and for 8-bit floats."""
    value, scale, *rest = inputs
    if value is None or scale is None or attribute(node, "block_size", 0):
        return None
    zero = rest[0] if rest and rest[0] is not None else np.zeros(scale.shape, np.uint8)
    if scale.size > 1:
        shape = [1] * value.ndim
        shape[int(attribute(node, "axis", 1))] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    else:
        scale, zero = scale.reshape(()), zero.reshape(())
    if node.op_type == "DequantizeLinear":
        if value.dtype.kind not in "iu":
            return None
        return np.asarray((value.astype(np.float64) - (zero.astype(np.float64) if rest else 0.0)) * scale, np.float32)
    if zero.dtype.kind not in "iu":
        return None
    info = np.iinfo(zero.dtype)
    return np.asarray(np.clip(np.rint(value / scale) + zero, info.min, info.max), zero.dtype)


def computed(node: onnx.NodeProto, inputs: dict[str, Any], model: onnx.ModelProto) -> NDArray[Any] | None:
    """What `node` gives for constant inputs, by ONNX's reference evaluator under the model's opsets; None where that does not know it."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    info = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype), None)
        for name, value in inputs.items()
    ]
    out = [onnx.helper.make_empty_tensor_value_info(node.output[0])]
    body = onnx.helper.make_graph([node], "constant", info, out)
    opsets = list(model.opset_import)
    alone = onnx.helper.make_model(body, opset_imports=opsets, ir_version=10)
    try:
        return np.asarray(next(iter(ReferenceEvaluator(alone).run(None, inputs))))
    except Exception:  # the evaluator raises whatever an operator it half knows raises: then the value is not known
        return None
