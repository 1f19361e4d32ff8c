"""Ranges of a float model's tensors over real samples: one pass, all methods, memory that does not grow with the samples.

The graph runs in ONNX Runtime with the tensors of `observation.plan` as its outputs. Of each, every value counts for
the extremes, and a share chosen by the sample's position alone for the histogram: the batch size changes neither, up to
the float rounding of the runtime's own kernels.

Reductions stay outside the graph: on ResNet-18, numpy's minimum and maximum cost 0.9 ms an image beside 16 ms for the
forward pass, ReduceMin and ReduceMax nodes in the graph as much; and numpy's see a NaN, which ONNX Runtime's may not.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import checkpoint, graph, observation
from deploykit.calibration_table import METHODS, CalibrationTable, Range
from deploykit.children import available_threads, has_module, report_progress
from deploykit.clipping import PERCENTILE, choose
from deploykit.errors import BackendFailed, DataError, InputError, MissingBackend, ModelError, UnknownName
from deploykit.histogram import Observation, sampled_row
from deploykit.observation import Plan
from deploykit.samples import Samples
from deploykit.signature import Feeds, Outputs, Signature

VALUES_PER_TENSOR = 1 << 21  # sampled for the histogram, over all samples ...
LEAST_PER_SAMPLE = 4096  # ... but so many of each sample at least
MOST_ACTIVATION_BYTES = 256 << 20  # fetched at once; a larger batch is run in smaller ones
CHECKPOINT_EVERY = 16  # batches
FEW = 100
MASK = 1e30  # larger magnitudes are attention masks (float32's lowest value, say), which no 8-bit range can hold


@dataclass(frozen=True)
class _Layout:
    """Where a tensor holds its samples: along `axis`, in blocks; None: it does not grow with the batch."""

    axis: int | None
    size: int


@dataclass
class _Open:
    """A session that returns `names`, and what is known of the graph."""

    session: Any
    signature: Signature
    plan: Plan
    batch: int
    layouts: dict[str, _Layout]
    notes: list[str]

    def run(self, feeds: Feeds) -> Outputs:
        """The observed tensors, inputs among them, by name, in graph order."""
        inner = [name for name in self.layouts if name not in feeds]
        outputs = dict(zip(inner, _run(self.session, inner, feeds), strict=True)) if inner else {}
        return {name: np.asarray(feeds[name]) if name in feeds else outputs[name] for name in self.layouts}


@dataclass
class _Progress:
    """What has been seen so far, of how many samples."""

    done: int = 0
    seen: dict[str, Observation] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)
    first: int | None = None  # checksum of the first sample
    vary: bool = False


def collect(
    path: Path,
    samples: Samples,
    *,
    methods: Sequence[str] = ("minmax",),
    batch: int = 8,
    threads: int | None = None,
    tensors: Sequence[str] | None = None,
    resume: Path | None = None,
    percentile: float = PERCENTILE,
) -> dict[str, CalibrationTable]:
    """A table per method, of every tensor that quantization needs (or of `tensors`), model inputs included.

    One pass over the samples serves all methods. With `resume`, progress is kept in that file, and a pass that was
    killed goes on from there; the file is removed at the end. `percentile` (in %) is that method's share of values kept.
    Raises ModelError for a model that is quantized already or cannot run, DataError for no samples and for NaN or infinite
    activations (naming the tensor and the sample), UnknownName for a method or a tensor, MissingBackend without
    ONNX Runtime.
    """
    _check_arguments(samples, methods, batch, percentile)
    model = graph.load(path)
    observation.require_float(model, path)
    digest = graph.digest(model)
    opened = _open(model, path, samples, batch, threads or available_threads(), tensors)
    del model
    most = max(LEAST_PER_SAMPLE, VALUES_PER_TENSOR // len(samples))
    mark = hashlib.sha256(repr((digest, samples.digest, tuple(opened.layouts), most)).encode()).hexdigest()
    state = _Progress() if resume is None else _restore(resume, mark, opened.notes)
    batches = 0
    for feeds, count in _ahead(samples.take(range(state.done, len(samples)), samples.role), opened):
        _see(state, opened, feeds, count, most)
        state.done += count
        batches += 1
        report_progress("calibrating", state.done / len(samples))
        if resume is not None and batches % CHECKPOINT_EVERY == 0 and state.done < len(samples):
            _keep(resume, mark, state)
    tables = _tables(state, opened, samples, digest, methods, percentile, most)
    if resume is not None:
        resume.unlink(missing_ok=True)
    return tables


def _check_arguments(samples: Samples, methods: Sequence[str], batch: int, percentile: float) -> None:
    for method in methods:
        if method not in METHODS:
            raise UnknownName("calibration method", method, METHODS)
    if not methods:
        raise InputError("no calibration method was named", f"choose from: {', '.join(METHODS)}")
    if batch < 1:
        raise InputError(f"the calibration batch must be at least 1, not {batch}")
    if not 50.0 < percentile <= 100.0:
        raise InputError(f"percentile {percentile} is not above 50 and at most 100", f"the default is {PERCENTILE}")
    if not len(samples):
        raise DataError(f"there are no samples to calibrate on in {samples.spec}", "give data with at least one sample")


def _open(model: Any, path: Path, samples: Samples, batch: int, threads: int, tensors: Sequence[str] | None) -> _Open:
    signature = graph.signature(model)
    ours, theirs = [s.name for s in signature.inputs], [s.name for s in samples.signature.inputs]
    if sorted(ours) != sorted(theirs):
        raise DataError(f"the samples hold the inputs {theirs}, but {path.name} takes {ours}", "open the data for this model")
    plan = observation.plan(model, tensors)
    inner = [name for name in plan.roots if name not in ours]
    if inner:
        del model.graph.output[:]
        model.graph.output.extend(_output(name) for name in inner)
    session = _session(model, path, threads)
    opened = _Open(session, signature, plan, batch, {name: _Layout(None, 0) for name in plan.roots}, [])
    _probe(opened, samples)
    return opened


def _output(name: str) -> Any:
    import onnx

    return onnx.ValueInfoProto(name=name)


def _session(model: Any, path: Path, threads: int) -> Any:
    if not has_module("onnxruntime"):
        raise MissingBackend("calibration runs the model in ONNX Runtime, which is not installed", "pip install 'deploykit[cpu]'")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="deploykit-calibration-") as folder:
        file = Path(folder) / "observed.onnx"
        graph.save(model, file)
        try:
            return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime raises a class of its own per status code
            raise ModelError(f"ONNX Runtime cannot open {path.name}: {_first_line(exc)}", "see `deploykit check`") from exc


def _run(session: Any, names: list[str], feeds: Feeds) -> list[Any]:
    try:
        return list(session.run(names, dict(feeds)))
    except Exception as exc:
        shapes = ", ".join(f"{name} {np.shape(array)}" for name, array in feeds.items())
        raise BackendFailed(f"the model failed on inputs {shapes}: {_first_line(exc)}", "see `deploykit check`") from exc


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def _probe(opened: _Open, samples: Samples) -> None:
    """Finds where each tensor holds its samples by running the first one alone and twice over; no name is trusted.

    Leaves out tensors that turn out not to be floats, and lowers the batch to what memory allows.
    """
    fixed = opened.signature.fixed_batch
    first = samples.indices[0]
    sizes = (fixed, fixed) if fixed is not None else (1, 2)
    one = samples.reader.read([first] * sizes[0])
    opened.signature.check(one)
    shapes = {name: array.shape for name, array in opened.run(one).items() if _is_float(array)}
    opened.layouts = {name: _Layout(None, int(np.prod(shape))) for name, shape in shapes.items()}
    twice = shapes
    if fixed is None:
        try:
            twice = {name: array.shape for name, array in opened.run(samples.reader.read([first] * 2)).items()}
        except BackendFailed as exc:
            opened.batch = 1
            opened.notes.append(f"run at batch 1: batch 2 failed ({exc.message})")
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        if fixed is not None:
            axis = next((a for a, dim in enumerate(shape) if dim and dim % fixed == 0), None) if fixed > 1 else 0
        elif twice is shapes:
            axis = 0 if shape else None
        else:
            grown = [a for a, (x, y) in enumerate(zip(shape, twice[name], strict=False)) if x != y]
            axis = grown[0] if len(grown) == 1 and twice[name][grown[0]] == 2 * shape[grown[0]] else None
        opened.layouts[name] = _Layout(axis, size)
    if fixed is not None:
        opened.batch = fixed
    else:
        bytes_each = 4 * sum(layout.size for layout in opened.layouts.values())
        opened.batch = max(1, min(opened.batch, MOST_ACTIVATION_BYTES // max(bytes_each, 1)))


def _is_float(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size > 0


def _ahead(samples: Samples, opened: _Open) -> Iterator[tuple[Feeds, int]]:
    """The samples' batches, the next one read while the model runs on the last."""
    batches = samples.batches(opened.batch, pad=opened.signature.fixed_batch is not None)
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, batches, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield item


def _see(state: _Progress, opened: _Open, feeds: Feeds, count: int, most: int) -> None:
    """Takes in the tensors of one batch, of which `count` samples are real."""
    opened.signature.check(feeds)
    _compare_inputs(state, opened.signature, feeds, count)
    size = _batch_of(opened.signature, feeds, count)
    for name, tensor in opened.run(feeds).items():
        if name in state.masks or tensor.size == 0:
            continue
        rows = _rows(tensor, opened.layouts[name], size, count)
        low, high = float(rows.min()), float(rows.max())
        if not (low > -MASK and high < MASK):  # false for NaN too
            if np.isnan(low) or np.isnan(high) or (np.isinf([low, high]).any() and not opened.plan.masked):
                raise _not_finite(name, rows, state.done, name in feeds)
            state.masks.add(name)
            state.seen.pop(name, None)
            continue
        sampled = [sampled_row(row, state.done + i, most) for i, row in enumerate(rows)]
        values = rows if sampled[0].size == rows[0].size else np.stack(sampled)
        state.seen.setdefault(name, Observation()).see(low, high, values)


def _batch_of(signature: Signature, feeds: Feeds, count: int) -> int:
    for spec in signature.inputs:
        axis = signature.batch_axis(spec)
        if axis is not None:
            return int(feeds[spec.name].shape[axis])
    return count


def _rows(tensor: NDArray[Any], layout: _Layout, size: int, count: int) -> NDArray[Any]:
    """The values of each real sample, [count, values]; one row where the tensor doesn't grow with the batch."""
    if tensor.dtype == np.float16:
        tensor = tensor.astype(np.float32)
    if layout.axis is None or tensor.shape[layout.axis] % size:
        return tensor.reshape(1, -1)
    return np.moveaxis(tensor, layout.axis, 0).reshape(size, -1)[:count]


def _not_finite(name: str, rows: NDArray[Any], done: int, is_input: bool) -> DataError:
    bad = next(i for i, row in enumerate(rows) if not np.isfinite(row).all())
    kind = "NaN" if np.isnan(rows[bad]).any() else "Inf"
    where = f"sample {done + bad} of the calibration set (counted from 0)"
    if is_input:
        return DataError(f"input '{name}' holds {kind} in {where}", "repair or remove that sample")
    return DataError(
        f"tensor '{name}' holds {kind} on {where}",
        "the float model itself overflows or divides by zero there: look at its weights with `deploykit check`, and at that sample",
    )


def _compare_inputs(state: _Progress, signature: Signature, feeds: Feeds, count: int) -> None:
    if state.vary:
        return
    for i in range(count):
        checksum = 0
        for spec in signature.inputs:
            axis = signature.batch_axis(spec)
            if axis is not None:
                checksum = zlib.crc32(np.ascontiguousarray(np.take(feeds[spec.name], i, axis=axis)).tobytes(), checksum)
        if state.first is None:
            state.first = checksum
        state.vary |= checksum != state.first


def _restore(resume: Path, mark: str, notes: list[str]) -> _Progress:
    kept = checkpoint.load(resume, mark)
    if kept is None:
        if resume.exists():
            notes.append(f"{resume.name} was kept by another run: started from the first sample")
        return _Progress()
    facts, seen = kept
    return _Progress(int(facts["done"]), seen, set(facts["masks"]), facts["first"], bool(facts["vary"]))


def _keep(resume: Path, mark: str, state: _Progress) -> None:
    facts = {"done": state.done, "masks": sorted(state.masks), "first": state.first, "vary": state.vary}
    checkpoint.save(resume, mark, facts, state.seen)


def _tables(
    state: _Progress, opened: _Open, samples: Samples, digest: str, methods: Sequence[str], percentile: float, most: int
) -> dict[str, CalibrationTable]:
    seen: dict[str, Observation] = {}
    for name, source in opened.plan.wanted.items():
        root = state.seen.get(source.root)
        if root is not None:
            seen[name] = root if source == type(source)(source.root) else root.clipped(source.low, source.high)
    if not seen:
        raise ModelError("no float tensor of the model could be observed", "there is nothing in it that int8 could speed up")
    notes = (*opened.notes, *_notes(state, seen, samples))
    observed = {name: Range(found.low, found.high) for name, found in seen.items()}
    tables = {}
    for method in methods:
        chosen = {name: choose(found, method, percentile=percentile) for name, found in seen.items()}
        options: dict[str, Any] = {"values_per_sample": most, "random": samples.random}
        if method == "percentile":
            options["percentile"] = percentile
        tables[method] = CalibrationTable(
            ranges={name: pair[0] for name, pair in chosen.items()},
            observed=observed,
            method=method,
            model_sha256=digest,
            samples_digest=samples.digest,
            preprocess=None if samples.preprocess is None else samples.preprocess.to_json(),
            n=len(samples),
            versions=_versions(),
            notes=notes,
            symmetric={name: amax for name, (found, amax) in chosen.items() if amax != found.amax},
            options=options,
        )
    return tables


def _notes(state: _Progress, seen: Mapping[str, Observation], samples: Samples) -> list[str]:
    n, notes = len(samples), []
    if samples.random:
        notes.append("calibrated on random numbers: the ranges say nothing about real data")
    if n < FEW:
        notes.append(
            f"{n} sample{'s are' if n > 1 else ' is'} few: one unseen sample in {n + 1} can be expected to go beyond the extremes "
            f"of any one tensor (1 / (n + 1)); with {FEW} or more it is 1 %, and NVIDIA calibrates ImageNet networks on about 500"
        )
    if n > 1 and not state.vary:
        notes.append(f"all {n} samples are alike: the ranges are those of one input")
    still = sorted(name for name, found in seen.items() if found.low == found.high)
    if still:
        notes.append(f"never varies: {_listed(still)}")
    if state.masks:
        notes.append(f"left out, since they hold a mask's infinite or huge values: {_listed(sorted(state.masks))}")
    return notes


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__, "numpy": np.__version__}
