"""A float .tflite in fewer bits: FP16 weights, dynamic INT8, static INT8 calibrated on samples (ai-edge-quantizer)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from deploykit.backends import litert_flatbuffer, litert_rewrite, opened
from deploykit.children import report_progress
from deploykit.errors import BackendFailed, NotForThisGraph
from deploykit.samples import Samples
from deploykit.signature import Outputs

CHUNK = 16  # samples handed over at a time: ai-edge-quantizer makes a list of them
IO = ("float", "int8")


def to_fp16(data: bytes) -> bytes:
    """The model with its weights stored in FP16 and made FP32 when it is opened."""
    from ai_edge_quantizer import qtyping

    half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    config = qtyping.OpQuantizationConfig(weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT)
    rules = _rules()
    rules.add_quantization_config(".*", qtyping.TFLOperationName.ALL_SUPPORTED, config, "float_casting")
    return _quantized(data, rules, None, "fp16")


def to_dynamic(data: bytes) -> bytes:
    """The model with INT8 weights, a scale for each output channel; activations are quantized when the model runs."""
    from ai_edge_quantizer import recipe

    rules = _rules()
    rules.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    return _quantized(data, rules, None, "int8-dynamic")


def to_static(data: bytes, samples: Samples, batch: int, io: str) -> bytes:
    """The model in INT8: weights per output channel, activations from their smallest and largest value over all `samples`.

    batch: the one `data` was made at. io: 'float' leaves the inputs and outputs as they are, 'int8' quantizes them too.
    ai-edge-quantizer's own default takes a moving average of each sample's range (factor 0.95), which forgets the first
    samples and depends on their order.
    Raises NotForThisGraph where nothing can be quantized, BackendFailed.
    """
    from ai_edge_quantizer import recipe

    rules = _rules()
    rules.load_quantization_recipe(recipe.static_wi8_ai8())
    made = _quantized(data, rules, _ranges(data, rules, samples, batch), "int8")
    if io == "int8":
        return made
    model = litert_flatbuffer.parse(made, "the int8 model")
    litert_rewrite.float_ports(model)
    return litert_flatbuffer.to_bytes(model)


def _rules() -> Any:
    from ai_edge_quantizer import recipe_manager

    return recipe_manager.RecipeManager()


def _ranges(data: bytes, rules: Any, samples: Samples, batch: int) -> dict[str, Any]:
    """Smallest and largest value of each tensor over the samples, as ai-edge-quantizer takes them.

    Its calibrator in C++ is used: the one in Python keeps every tensor of a run.
    """
    from ai_edge_quantizer import calibrator
    from ai_edge_quantizer.utils import qsv_utils

    model = litert_flatbuffer.parse(data, "the float model")
    key = model.signatureDefs[0].signatureKey.decode()
    types = {port["name"]: port["dtype"] for port in litert_flatbuffer.ports(model)["inputs"]}
    try:
        collecting = calibrator.Calibrator(
            data,
            num_threads=_threads(),
            mode=calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED,
            qsv_update_func=qsv_utils.min_max_update,
        )
        done = 0
        for chunk in _chunks(samples, batch, types):
            report_progress("calibrating for LiteRT", done / len(samples))
            collecting.calibrate({key: chunk}, rules)
            done += len(chunk) * batch
    except (ValueError, RuntimeError, KeyError) as exc:
        raise BackendFailed(f"LiteRT's calibration failed: {opened.first_line(exc)}") from exc
    found: dict[str, Any] = collecting.get_model_qsvs()
    for padded, source in litert_rewrite.same_scale_sources(model).items():
        if padded in found and source in found:
            found[padded] = dict(found[source])  # its padding, -inf, is no value to be represented
    for name, values in found.items():
        if not all(np.isfinite(values[end]).all() for end in ("min", "max") if end in values):
            raise BackendFailed(
                f"the tensor {name} is infinite or NaN on the calibration samples, and has no INT8 scale",
                "look at the model's outputs on these samples in FP32 first",
            )
    return found


def _chunks(samples: Samples, batch: int, types: dict[str, str]) -> Iterator[list[Outputs]]:
    chunk: list[Outputs] = []
    for feeds, _ in samples.batches(batch, pad=True):
        chunk.append({name: np.asarray(feeds[name]).astype(types[name]) for name in types})
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _threads() -> int:
    from deploykit.children import available_threads

    return available_threads()


def _quantized(data: bytes, rules: Any, ranges: dict[str, Any] | None, what: str) -> bytes:
    from ai_edge_quantizer import quantizer

    report_progress(f"writing {what}", 0.9)
    try:
        made = quantizer.Quantizer(data, rules.get_quantization_recipe())
        result = made.quantize(ranges, enable_progress_report=False).quantized_model
    except Exception as exc:  # ValueError, RuntimeError, KeyError, AssertionError: by operator
        raise BackendFailed(f"ai-edge-quantizer cannot make {what} of the model: {opened.first_line(exc)}") from exc
    if result is None:
        raise BackendFailed(f"ai-edge-quantizer gave no {what} model")
    converted = bytes(result)
    counts = litert_flatbuffer.layers(litert_flatbuffer.parse(converted, f"the {what} model"))
    if not counts.get(what):
        raise NotForThisGraph(
            f"no layer of the model can be had in {what} from LiteRT: its convolutions and matrix products are {counts or 'none'}",
            "use fp32",
        )
    return converted
