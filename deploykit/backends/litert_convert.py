"""A PyTorch module as a float .tflite, proven against the module's own outputs at several batches."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import trace_error
from deploykit.backends import litert_flatbuffer, litert_rewrite, opened, torch_source
from deploykit.backends.torch_source import LoadedSource
from deploykit.children import report_progress
from deploykit.errors import BackendFailed, DeploykitError, ModelError
from deploykit.session import BuildRequest
from deploykit.signature import Outputs, Signature

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
PROOF_BATCHES = (2, 7)
TOLERANCE = 1e-3  # of the largest output: FP32 sums in another order give 1e-6, a batch baked in gives 1 or more
ANY_BATCH = 0


def convert(source: LoadedSource, signature: Signature, request: BuildRequest) -> dict[int, bytes]:
    """The float .tflite files by batch: one under ANY_BATCH where the interpreter can resize it to each batch of
    PROOF_BATCHES and gives the module's outputs there, its reshapes freed of the batch where that is what it takes; else one
    for each batch of `request`. A fixed batch has just its own.

    Raises BackendFailed naming the operator that the converter lacks, or how far the outputs are from the module's;
    ModelError for a model whose graph depends on values.
    """
    if signature.fixed_batch is not None:
        return {signature.fixed_batch: _at(source, signature, request, signature.fixed_batch)}
    data = _at(source, signature, request, 1)
    if _resizes(data, source, signature, request):
        return {ANY_BATCH: data}
    by_batch = {1: data, 2: _at(source, signature, request, 2)}
    models = [litert_flatbuffer.parse(by_batch[batch], "the converted model") for batch in (1, 2)]
    if litert_rewrite.free_batch(*models):
        freed = litert_flatbuffer.to_bytes(models[0])
        if _resizes(freed, source, signature, request):
            return {ANY_BATCH: freed}
    return {batch: by_batch.get(batch) or _at(source, signature, request, batch) for batch in sorted(set(request.batches))}


def _resizes(data: bytes, source: LoadedSource, signature: Signature, request: BuildRequest) -> bool:
    """Whether the .tflite gives the module's outputs at the other batches too."""
    try:
        for batch in PROOF_BATCHES:
            _prove(data, source, signature, request, batch)
    except BackendFailed:  # a shape that the batch of 1 went into
        return False
    return True


def _at(source: LoadedSource, signature: Signature, request: BuildRequest, batch: int) -> bytes:
    """The .tflite traced at `batch`, with the model's own names, its max-pools made quantizable, proven at that batch."""
    feeds = feeds_at(source.example, signature.shapes(batch, request.shapes))
    raw = _converted(torch_source.positional(source, signature), tuple(feeds[s.name] for s in signature.inputs), batch)
    model = litert_flatbuffer.parse(raw, "the converted model")
    litert_flatbuffer.rename(model, [s.name for s in signature.inputs], [s.name for s in signature.outputs])
    litert_rewrite.pad_with_zeros(model)
    data = litert_flatbuffer.to_bytes(model)
    _prove(data, source, signature, request, batch)
    return data


def feeds_at(example: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """`example` brought to those shapes; floats varied, so that samples differ."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = torch_source.at_shapes(example, shapes)
    return {
        name: t * (1 + 0.25 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t
        for name, t in found.items()
    }


def _converted(module: torch.nn.Module, tensors: tuple[torch.Tensor, ...], batch: int) -> bytes:
    import tempfile
    from pathlib import Path

    report_progress("loading the LiteRT converter", 0.0)
    import litert_torch

    report_progress(f"converting to .tflite at batch {batch}", 0.2)
    try:
        edge = litert_torch.convert(module, tensors)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.tflite"
            edge.export(str(path))
            return path.read_bytes()
    except DeploykitError:
        raise
    except Exception as exc:  # torch.export's errors, RuntimeError, ValueError, jax's and MLIR's own
        raise explained(exc) from exc


def explained(exc: BaseException) -> DeploykitError:
    """The converter's exception as one error: which operator it lacks, or which line of the model cannot be traced."""
    text = " ".join(str(exc).split())
    lacking = re.search(r"Lowering not found: ([\w.:]+)", text)
    if lacking:
        return BackendFailed(
            f"litert-torch has no conversion for the operator {lacking[1]}",
            "write that part with other operators, or leave LiteRT out for this model",
        )
    named = re.search(r"'?(tfl\.[\w.]+|stablehlo\.[\w.]+|mhlo\.[\w.]+|chlo\.[\w.]+)'? op", text)
    if named:
        return BackendFailed(
            f"LiteRT's converter cannot lower {named[1]}: {opened.first_line(exc)}",
            "write that part with other operators, or leave LiteRT out for this model",
        )
    if trace_error.asks_for_values(exc):
        return ModelError(
            f"the model branches on the values of a tensor, which a .tflite cannot hold{trace_error.place(exc)}",
            "use torch.where instead of if, or leave that part out of the model",
        )
    return BackendFailed(
        f"litert-torch cannot convert the model: {type(exc).__name__}: {opened.first_line(exc)}{trace_error.place(exc)}",
        "leave LiteRT out for this model, or rewrite that part",
    )


def _prove(data: bytes, source: LoadedSource, signature: Signature, request: BuildRequest, batch: int) -> None:
    """Raises BackendFailed unless the .tflite gives the module's outputs at `batch`."""
    report_progress(f"proving the .tflite at batch {batch}", 0.8)
    feeds = feeds_at(source.example, signature.shapes(batch, request.shapes))
    wanted = source.run(feeds)
    found = once(data, {name: tensor.numpy() for name, tensor in feeds.items()})
    for spec in signature.outputs:
        right = wanted[spec.name].numpy()
        left = found[spec.name]
        if left.shape != right.shape:
            raise BackendFailed(f"the .tflite gives {spec.name} as {left.shape} at batch {batch}, the model as {right.shape}")
        largest = float(np.abs(right.astype(np.float64)).max(initial=0.0))
        apart = float(np.abs(left.astype(np.float64) - right).max(initial=0.0))
        if not apart <= TOLERANCE * max(largest, 1e-6):  # a NaN fails
            raise BackendFailed(
                f"the .tflite's {spec.name} is {apart:.2g} from the PyTorch model's at batch {batch} (largest value {largest:.2g})",
                "LiteRT's converter gets an operator of this model wrong; leave LiteRT out for it",
            )


def once(data: bytes, feeds: Outputs) -> Outputs:
    """The outputs of a .tflite for one feed, by name; raises BackendFailed where the interpreter cannot take its shapes."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_content=data)
        runner = interpreter.get_signature_runner()
        types = {name: details["dtype"] for name, details in runner.get_input_details().items()}
        return dict(runner(**{name: feeds[name].astype(dtype) for name, dtype in types.items()}))
    except (ValueError, RuntimeError) as exc:
        raise BackendFailed(f"LiteRT cannot run the converted model: {opened.first_line(exc)}") from exc


@contextlib.contextmanager
def quiet() -> Any:
    """Keeps Python's warnings of the converter and the quantizer away; what their native code prints goes to the child's log."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("absl").setLevel(logging.ERROR)
        yield
