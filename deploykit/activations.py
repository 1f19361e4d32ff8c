"""Activations: a float model opened so that its inner tensors come out, and where each of them holds its samples."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit import graph
from deploykit.children import has_module
from deploykit.errors import BackendFailed, MissingBackend, ModelError
from deploykit.samples import Samples
from deploykit.signature import Feeds, Outputs, Signature

if TYPE_CHECKING:
    import onnx

MOST_BYTES = 256 << 20  # of activations fetched at once; a larger batch is run in smaller ones


@dataclass(frozen=True)
class Layout:
    """Where a tensor holds its samples: along `axis`, in equal blocks; None: it does not grow with the batch.

    size: its values at batch 1 (at the graph's own batch, where that is fixed).
    """

    axis: int | None
    size: int


@dataclass(frozen=True)
class Activations:
    """An open model that returns inner tensors. `layouts` has them by name, in graph order, model inputs among them;
    batch: how many samples to feed at a time; notes: what a reader of the results should know."""

    session: Any
    signature: Signature
    layouts: dict[str, Layout]
    batch: int
    notes: tuple[str, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether the graph takes `batch` samples and no other number."""
        return self.signature.fixed_batch is not None

    def run(self, feeds: Feeds) -> Outputs:
        """The tensors by name, in graph order. Raises BackendFailed where the model fails on these inputs."""
        inner = [name for name in self.layouts if name not in feeds]
        outputs = dict(zip(inner, _run(self.session, inner, feeds), strict=True)) if inner else {}
        return {name: np.asarray(feeds[name]) if name in feeds else outputs[name] for name in self.layouts}

    def rows(self, name: str, tensor: NDArray[Any], feeds: Feeds, count: int) -> NDArray[Any]:
        """The values of each of the first `count` samples, [count, values], in float32 or wider; one row where the tensor
        does not grow with the batch."""
        if tensor.dtype == np.float16:
            tensor = tensor.astype(np.float32)
        axis, size = self.layouts[name].axis, self._fed(feeds, count)
        if axis is None or axis >= tensor.ndim or tensor.shape[axis] % size:
            return tensor.reshape(1, -1)
        return np.moveaxis(tensor, axis, 0).reshape(size, -1)[:count]

    def _fed(self, feeds: Feeds, count: int) -> int:
        for spec in self.signature.inputs:
            axis = self.signature.batch_axis(spec)
            if axis is not None:
                return int(feeds[spec.name].shape[axis])
        return count


def open_model(
    model: onnx.ModelProto,
    name: str,
    tensors: Sequence[str],
    samples: Samples,
    *,
    batch: int,
    threads: int,
    entries: Mapping[str, str] | None = None,
) -> Activations:
    """`model` open in ONNX Runtime with `tensors` as its outputs (changes the model in place). Tensors that turn out not to
    be floats are left out; `batch` is lowered to what MOST_BYTES allows. `name` stands for the model in messages; `entries`
    are ONNX Runtime's session settings.

    Raises MissingBackend without ONNX Runtime, ModelError where it cannot open the model, BackendFailed where the model
    fails on the first sample.
    """
    signature = graph.signature(model)
    inputs = {spec.name for spec in signature.inputs}
    inner = [tensor for tensor in tensors if tensor not in inputs]
    if inner:
        del model.graph.output[:]
        model.graph.output.extend(_output(tensor) for tensor in inner)
    session = _session(model, name, threads, entries or {})
    return _probed(Activations(session, signature, {t: Layout(None, 0) for t in tensors}, batch), samples)


def _output(name: str) -> onnx.ValueInfoProto:
    import onnx

    return onnx.ValueInfoProto(name=name)  # ONNX Runtime finds type and shape itself


def _session(model: onnx.ModelProto, name: str, threads: int, entries: Mapping[str, str]) -> Any:
    if not has_module("onnxruntime"):
        raise MissingBackend(
            "inner tensors are read through ONNX Runtime, which is not installed", "pip install 'deploykit[cpu]'"
        )
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory(prefix="deploykit-activations-") as folder:
        file = Path(folder) / "observed.onnx"
        graph.save(model, file)
        try:
            return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime raises a class of its own per status code
            raise ModelError(f"ONNX Runtime cannot open {name}: {_first_line(exc)}", "see `deploykit check`") from exc


def _run(session: Any, names: list[str], feeds: Feeds) -> list[Any]:
    try:
        return list(session.run(names, dict(feeds)))
    except Exception as exc:
        shapes = ", ".join(f"{name} {np.shape(array)}" for name, array in feeds.items())
        raise BackendFailed(f"the model failed on inputs {shapes}: {_first_line(exc)}", "see `deploykit check`") from exc


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def _probed(opened: Activations, samples: Samples) -> Activations:
    """Runs the first sample alone and twice over, and compares shapes: no name of an axis is trusted."""
    fixed = opened.signature.fixed_batch
    first, notes = samples.indices[0], list(opened.notes)
    feeds = samples.reader.read([first] * (fixed or 1))
    opened.signature.check(feeds)
    once = {name: array.shape for name, array in opened.run(feeds).items() if _is_float(array)}
    sizes = {name: int(np.prod(shape)) for name, shape in once.items()}
    if fixed is not None:
        axes = {name: _divisible(shape, fixed) for name, shape in once.items()}
        return Activations(opened.session, opened.signature, {n: Layout(axes[n], sizes[n]) for n in once}, fixed, opened.notes)
    batch = max(1, min(opened.batch, MOST_BYTES // max(4 * sum(sizes.values()), 1)))
    axes = {name: 0 if shape else None for name, shape in once.items()}
    try:
        twice = opened.run(samples.reader.read([first] * 2))
        axes = {name: _grown(shape, twice[name].shape) for name, shape in once.items()}
    except BackendFailed as exc:
        batch = 1
        notes.append(f"run one sample at a time, since two at a time failed ({exc.message})")
    layouts = {name: Layout(axes[name], sizes[name]) for name in once}
    return Activations(opened.session, opened.signature, layouts, batch, tuple(notes))


def _is_float(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size > 0


def _divisible(shape: tuple[int, ...], batch: int) -> int | None:
    return next((axis for axis, dim in enumerate(shape) if dim % batch == 0), None)


def _grown(once: tuple[int, ...], twice: tuple[int, ...]) -> int | None:
    """The one axis that doubled with the batch."""
    grown = [axis for axis, (x, y) in enumerate(zip(once, twice, strict=False)) if x != y]
    return grown[0] if len(grown) == 1 and twice[grown[0]] == 2 * once[grown[0]] else None
