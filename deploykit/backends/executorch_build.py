"""A PyTorch module to an ExecuTorch program: traced with its dynamic batch, quantized where asked, lowered to XNNPACK, counted."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import trace_error
from deploykit.artifact import Artifact, Json
from deploykit.backends import executorch_count, opened, torch_source
from deploykit.children import report_progress
from deploykit.errors import BackendFailed, DeploykitError, ModelError, NotForThisGraph
from deploykit.samples import Samples
from deploykit.session import BuildRequest
from deploykit.signature import Outputs, Signature
from deploykit.traced import batch_limits

if TYPE_CHECKING:
    import torch

_CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class Program:
    """The bytes of a .pte, what was counted in it, and the smallest and largest batch it takes."""

    data: bytes
    facts: Mapping[str, Json]
    batches: tuple[int, int]
    signature: Signature
    shapes: Mapping[str, tuple[int, ...]]
    example: Mapping[str, torch.Tensor]

    def feeds(self, batch: int) -> Outputs:
        """Inputs at `batch`, made of the source's example."""
        return {name: t.numpy() for name, t in _feeds(self.example, self.signature, self.shapes, batch).items()}


def program(artifact: Artifact, request: BuildRequest) -> Program:
    """The .pte of the source that `artifact` describes. Raises what ExecuTorch.build says."""
    signature = artifact.signature
    source = torch_source.load(artifact)
    traced = getattr(source, "program", None)
    batches = _batches(signature, request, traced)
    shapes = signature.shapes(signature.fixed_batch or batches[1], request.shapes)
    example = _feeds(source.example, signature, shapes, batches[1])
    dynamic = _dynamic_shapes(signature, request, batches)
    module = torch_source.positional(source, signature)
    with _quiet():
        report_progress("loading ExecuTorch's compiler", 0.0)
        _require_compiler()
        report_progress("tracing", 0.1)
        if request.precision == "fp32":
            exported = _export(module, tuple(example.values()), (dynamic,))  # of the one parameter *tensors
        else:
            more = (_CALIBRATION_BATCH,) if request.precision == "int8" else ()
            wide = _batches(signature, replace(request, batches=(*request.batches, *more)), traced)  # what calibrating takes
            first = _feeds(source.example, signature, shapes, wide[1])
            exported = _export(module, tuple(first.values()), (_dynamic_shapes(signature, request, wide),))
            quantized = _quantized(exported.module(), request, signature, first, wide)
            exported = _export(quantized, tuple(example.values()), dynamic)
        report_progress("lowering to XNNPACK", 0.7)
        edge = _lowered(exported)
        facts = executorch_count.counts(edge.exported_program()) | {"batches": list(batches)}
        if request.precision != "fp32" and facts["quantizers"] == 0:
            raise NotForThisGraph(
                f"ExecuTorch's XNNPACK quantizer found nothing to put into {request.precision} in this model",
                "use fp32, or another backend",
            )
        report_progress("writing the .pte", 0.9)
        data = _serialized(edge)
    return Program(data, facts, batches, signature, shapes, source.example)


def _batches(signature: Signature, request: BuildRequest, traced: Any) -> tuple[int, int]:
    """The smallest and the largest batch: 1 to the largest asked for, within what a .pt2 was traced for."""
    if signature.fixed_batch is not None:
        return signature.fixed_batch, signature.fixed_batch
    most = max(request.batches)
    low, high = (1, most) if traced is None else batch_limits(traced, signature, most)
    return low, max(low, high)


def _dynamic_shapes(signature: Signature, request: BuildRequest, batches: tuple[int, int]) -> tuple[Any, ...]:
    """torch.export's ranges for the inputs in order: the memory of a .pte is planned for the upper end of each."""
    import torch

    dims: dict[str, Any] = {}
    if signature.batch_symbol is not None and batches[0] < batches[1]:
        dims[signature.batch_symbol] = torch.export.Dim("batch", min=batches[0], max=batches[1])
    result = []
    for spec in signature.inputs:
        axes: dict[int, Any] = {}
        for axis, dim in enumerate(spec.shape):
            if dim in dims:
                axes[axis] = dims[dim]
            elif isinstance(dim, str) and dim != signature.batch_symbol:
                known = request.shapes[spec.name]
                if known.min[axis] < known.max[axis]:
                    name = re.sub(r"\W", "_", dim)
                    axes[axis] = dims[dim] = torch.export.Dim(f"axis_{name}", min=known.min[axis], max=known.max[axis])
        result.append(axes or None)
    return tuple(result)


def _feeds(
    example: Mapping[str, torch.Tensor], signature: Signature, shapes: Mapping[str, tuple[int, ...]], batch: int
) -> dict[str, torch.Tensor]:
    """`example` at `batch`, its other axes of the sizes in `shapes`."""
    sizes = {
        spec.name: tuple(
            batch if dim == signature.batch_symbol else size for dim, size in zip(spec.shape, shapes[spec.name], strict=True)
        )
        for spec in signature.inputs
    }
    return torch_source.at_shapes(example, sizes)


def _require_compiler() -> None:
    try:
        import executorch.exir  # noqa: F401
    except ImportError as exc:
        raise BackendFailed(
            f"ExecuTorch's compiler cannot be loaded: {opened.first_line(exc)}",
            "its release must fit torch's: pip install 'deploykit[executorch]'",
        ) from exc


def _export(module: Any, example: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Any:
    """The ExportedProgram. Raises ModelError for data-dependent control flow and what else torch.export cannot trace."""
    import torch

    try:
        with torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=dynamic)
    except DeploykitError:
        raise
    except Exception as exc:  # torch.export raises a dozen kinds
        place = trace_error.place(exc)
        if trace_error.asks_for_values(exc):
            raise ModelError(
                f"the model branches on the values of a tensor{place}, which an ExecuTorch program cannot hold",
                "use torch.where or torch.cond instead of if, or leave that part out of the model",
            ) from exc
        raise ModelError(
            f"torch.export cannot trace the model{place}: {type(exc).__name__}: {opened.first_line(exc)}",
            "rewrite that part of the model, or leave ExecuTorch out",
        ) from exc


def _quantized(
    graph: Any, request: BuildRequest, signature: Signature, example: Mapping[str, torch.Tensor], batches: tuple[int, int]
) -> Any:
    """The traced module with quantize and dequantize operators: int8 activations for each tensor (asymmetric), int8
    weights for each channel (symmetric), by XNNPACKQuantizer; static ranges by its HistogramObserver on the samples."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = request.precision == "int8-dynamic"

    class Quantizer(XNNPACKQuantizer):  # type: ignore[misc] # the package has no types
        def annotate(self, model: Any) -> Any:
            return _behind_clamps(super().annotate(model))

    quantizer = Quantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic))
    if dynamic:
        quantizer.set_filter_function(lambda node: not _reads_padding(node))
    try:
        prepared = prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            if dynamic:
                prepared(*example.values())
            else:
                _calibrate(prepared, request.calibration, signature, batches)
        return convert_pt2e(prepared)
    except DeploykitError:
        raise
    except Exception as exc:
        raise BackendFailed(
            f"PT2E cannot quantize the model for XNNPACK: {type(exc).__name__}: {opened.first_line(exc)}",
            "use fp32, or static int8 on another backend",
        ) from exc


def _behind_clamps(model: Any) -> Any:
    """The annotated graph, each convolution that only a ReLU6 (or another clamp) reads quantized behind that.

    XNNPACKQuantizer knows ReLU as a convolution's own activation, and gives a ReLU6 the scale of what comes before it: [0, 6] in
    the steps of a range that may be ten times as wide (EfficientNet-Lite0: 6.5 dB).
    """
    for node in model.graph.nodes:
        source: Any = node.args[0] if node.args else None
        annotation = getattr(source, "meta", {}).get("quantization_annotation")
        if (
            str(node.target).startswith(("aten.hardtanh", "aten.relu6", "aten.clamp"))
            and str(source.target).startswith("aten.conv")
            and annotation is not None
            and annotation.output_qspec is not None
            and len(source.users) == 1
        ):
            kind = type(annotation)
            node.meta["quantization_annotation"] = kind(output_qspec=annotation.output_qspec, _annotated=True)
            annotation.output_qspec = None
    return model


def _reads_padding(node: Any) -> bool:
    """Whether a node is a convolution of what a pad gives. Quantized dynamically, XNNPACK refuses its shapes when it runs
    (ExecuTorch 1.5.1: 'Propagating input shapes failed'), so it stays in float."""
    source = node.args[0] if node.args else None
    return str(node.target).startswith("aten.conv") and str(getattr(source, "target", "")).startswith(
        ("aten.pad", "aten.constant_pad")
    )


def _calibrate(prepared: Any, samples: Samples | None, signature: Signature, batches: tuple[int, int]) -> None:
    """The samples through the graph, which takes between so many at a time; where it cannot take a rest, its last one again."""
    import torch

    if samples is None or len(samples) == 0:
        raise BackendFailed("static INT8 was asked for without calibration samples", "add --data DATA")
    size = max(batches[0], min(batches[1], _CALIBRATION_BATCH))
    done = 0
    for feeds, count in samples.batches(size, pad=batches[0] > 1):
        prepared(*(torch.from_numpy(np.array(feeds[s.name], order="C")) for s in signature.inputs))
        done += count
        report_progress(f"calibrating: {done} of {len(samples)} samples", 0.2 + 0.5 * done / len(samples))


def _lowered(exported: Any) -> Any:
    """The edge program with what XNNPACK takes in its delegates. Raises BackendFailed naming the operator that stops it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    try:
        return to_edge_transform_and_lower(
            exported, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=True)
        )
    except Exception as exc:
        raise _unsupported(exc) from exc


def _serialized(edge: Any) -> bytes:
    try:
        return bytes(edge.to_executorch().buffer)
    except Exception as exc:
        raise _unsupported(exc) from exc


def _unsupported(exc: Exception) -> BackendFailed:
    """The compiler's exception, with the operator that it names first."""
    text = " ".join(str(exc).split())
    missing = re.search(r"Missing out variants: \{([^}]*)\}", text)
    operator = re.search(
        r"(?:torch\.ops\.|_ops\.|operator[s]? )['\"]?((?:aten|torchvision|quantized_decomposed|\w+)[.:]{1,2}[\w.]+)", text
    )
    named = missing[1].replace("'", "") if missing else operator[1] if operator else ""
    what = f"ExecuTorch has no operator {named}" if missing else "ExecuTorch cannot lower the model"
    detail = "" if missing else f"{f' (operator {named})' if named else ''}: {type(exc).__name__}: {opened.first_line(exc)}"
    return BackendFailed(what + detail, "write that part with other operators, or leave ExecuTorch out for this model")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out the compiler's warnings and its log; its errors still come, and native output goes to the child's log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
