"""Dynamic INT8: weights quantized beforehand, activations while the model runs (ONNX Runtime's quantizer)."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np

from deploykit import graph as graphs
from deploykit.artifact import Artifact, Json
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.graph import attribute
from deploykit.stages.precision import normal_form
from deploykit.stages.precision.int8 import write
from deploykit.stages.precision.view import FloatGraph, tensor

_WHY_NOT_CONV = (
    "convolutions are left in float: ONNX Runtime's ConvInteger made ResNet-18 slower than FP32 (15.4 against 10.4 ms on 2 cores)"
)


def to_int8_dynamic(path: Path, out: Path) -> Artifact:
    """The model with its matrix products by constant weights in dynamic INT8 (int8 weights per column), unsaved.

    Raises InputError for a graph without such a product: dynamic quantization would change nothing. ModelError for a
    quantized model, MissingBackend without ONNX Runtime.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as exc:
        raise MissingBackend(
            "dynamic quantization needs ONNX Runtime, which is not installed", "pip install 'deploykit[cpu]'"
        ) from exc
    graph, _ = normal_form.load(path)
    chosen = [node.name for i, node in enumerate(graph.nodes) if _profits(graph, i)]
    convolutions = sum(node.op_type in ("Conv", "ConvTranspose") for node in graph.nodes)
    if not chosen:
        what = f"{convolutions} convolutions" if convolutions else "no layer with weights"
        raise InputError(
            f"dynamic quantization would change nothing in {path.name}: it has {what} and no matrix product by constant "
            f"weights; {_WHY_NOT_CONV}",
            "use static INT8 (--mode static), which needs calibration data",
        )
    facts = _facts(graph, chosen, convolutions)
    _own_weights(graph, chosen)
    graph.write_back(graph.nodes)
    before = logging.root.level
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "dynamic.onnx"
        try:
            logging.root.setLevel(logging.ERROR)  # it advises a pre-processing step that the normal form has done
            quantize_dynamic(
                graph.model,
                str(made),
                op_types_to_quantize=["MatMul"],  # a plain Gemm is rewritten as one beforehand
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        except Exception as exc:
            raise BackendFailed(f"ONNX Runtime could not quantize {path.name} dynamically: {exc}", "use static INT8") from exc
        finally:
            logging.root.setLevel(before)
        model = graphs.load(made)
    graphs.strip_metadata(model)
    found = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    if found == 0:
        raise BackendFailed(f"ONNX Runtime's dynamic quantization left all of {path.name} in float", "use static INT8")
    facts["quantized_layers"] = found
    packages = ("onnx", _runtime_package())
    return write(model, out, precision="int8-dynamic", parent=path, options={}, facts=facts, packages=packages)


def _own_weights(graph: FloatGraph, chosen: list[str]) -> None:
    """Gives each chosen node a copy of a weight that others read too: ONNX Runtime's quantizer (1.31) transposes a shared one
    in place for the first Gemm, and the others then multiply by the wrong matrix."""
    for node in graph.nodes:
        name = node.input[1] if len(node.input) > 1 else ""
        if node.name in chosen and len(graph.consumers[name]) > 1:
            own = graph.fresh(f"{name}_of_{node.name}")
            graph.constants[own] = tensor(own, graph.array(name))
            node.input[1] = own


def _profits(graph: FloatGraph, i: int) -> bool:
    """Whether a node is a matrix product by a constant float matrix that ONNX Runtime's quantizer takes."""
    node = graph.nodes[i]
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.input[0] in graph.constants:
        return False
    if node.input[1] not in graph.constants or not graph.is_float(node.input[1]):
        return False
    if node.op_type == "MatMul":
        return len(graph.constants[node.input[1]].dims) == 2
    plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    return plain and not attribute(node, "transA", 0)


def _facts(graph: FloatGraph, chosen: list[str], convolutions: int) -> dict[str, Json]:
    weights = {node.name: node.input[1] for node in graph.nodes if len(node.input) > 1 and node.input[1] in graph.constants}
    sizes = {name: int(np.prod(graph.constants[weight].dims)) for name, weight in weights.items()}
    total = sum(sizes.values())
    share = sum(sizes.get(name, 0) for name in chosen) / total if total else 0.0
    notes = []
    if convolutions:
        notes.append(_WHY_NOT_CONV)
        notes.append(
            f"only {len(chosen)} matrix products, {share:.0%} of the weights, are quantized; in a network of convolutions "
            "this rarely pays: static INT8 does"
        )
    return {
        "quantized_layers": len(chosen),
        "quantized_share_of_weights": share,
        "convolutions_left_in_float": convolutions,
        "left_in_float": [
            {"node": node.name, "operator": node.op_type, "reason": "not a matrix product by a constant matrix"}
            for node in graph.nodes
            if node.op_type in ("MatMul", "Gemm") and node.name not in chosen
        ],
        "notes": notes,
    }


def _runtime_package() -> str:
    import importlib.metadata

    installed = {"onnxruntime", "onnxruntime-gpu"} & set(importlib.metadata.packages_distributions().get("onnxruntime", ()))
    return min(installed, default="onnxruntime")
