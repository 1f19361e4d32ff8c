"""The proof that an exported graph is its source: run at several batches, compared with the source's own outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.children import has_module, report_progress
from deploykit.errors import MissingBackend, ModelError
from deploykit.signature import Signature
from deploykit.stages.export_graph import difference

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

    from deploykit.stages.source import Source

# Two correct FP32 runs differ by the order of their sums: about eps * sqrt(K) = 6e-8 * sqrt(4608) = 4e-6 of the scale per
# layer (K = products in a sum), 2e-7 to 5e-6 in all on the networks in the tests. 1e-4 leaves room for depth and is far
# below what a wrong weight, pad or axis does. The second term serves outputs that are small differences of larger values;
# it shrinks with outputs that are tiny altogether (an untrained MobileNetV2 gives 4e-9), which it would wave through.
RELATIVE = 1e-4
ABSOLUTE = 1e-5
TINY_RELATIVE = 1e-3
# An integer output is an argmax, a count or an index: equal, but for ties that rounding decides.
INTEGER_SHARE = 1e-3
TOLERANCE = f"max |error| <= {RELATIVE:g} * m + min({ABSOLUTE:g}, {TINY_RELATIVE:g} * m), m = max |reference|; integers: at most {INTEGER_SHARE:.1%} differ"


def wanted_batches(batches: Iterable[int]) -> tuple[int, ...]:
    """1, 2, an odd size and the maximum of those asked for, in order."""
    most = max(batches)
    return tuple(sorted({1, 2, 7 if most >= 7 else 3, most}))


def open_session(model: bytes | Path) -> onnxruntime.InferenceSession:
    """The graph in ONNX Runtime on the CPU. Raises MissingBackend without it, ModelError when it refuses the graph."""
    if not has_module("onnxruntime"):
        raise MissingBackend("ONNX Runtime is not installed, and the export is proven with it", "pip install 'deploykit[cpu]'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Idle threads would spin while torch computes the reference: 20 s of CPU time instead of 11 for ResNet-18.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    given = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        # Its exceptions have no public base class.
        raise ModelError(
            f"ONNX Runtime refuses the graph: {_short(exc)}", "try another --opset, or run: deploykit check"
        ) from exc


def prove(session: onnxruntime.InferenceSession, source: Source, batches: tuple[int, ...]) -> dict[str, Any]:
    """The figures of the proof (JSON values), one run a batch; other dynamic axes get one run at other sizes.

    Raises ModelError when the graph fails at a batch, or differs from the source by more than TOLERANCE.
    """
    runs: list[dict[str, Any]] = []
    plan = [(batch, False) for batch in batches]
    if any(source.signature.free_axes(spec) for spec in source.signature.inputs):
        plan.append((batches[min(1, len(batches) - 1)], True))
    for position, (batch, grown) in enumerate(plan):
        report_progress(f"proving batch {batch}", 0.6 + 0.4 * position / len(plan))
        feeds = source.feeds(batch, seed=100 + position, grown=grown)
        reference = {name: tensor.detach().numpy() for name, tensor in source.run(feeds).items()}
        arrays = {name: tensor.detach().numpy() for name, tensor in feeds.items()}
        found = _run(session, arrays, batch)
        runs.append({"batch": batch, "grown": grown, "outputs": _compare(reference, found, batch)})
    return {"against": "the source's own outputs, FP32", "runtime": "onnxruntime", "tolerance": TOLERANCE, "runs": runs}


def _run(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    try:
        return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in taken}), strict=True))
    except Exception as exc:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise ModelError(
            f"the graph does not run at batch {batch} ({shapes}): {_short(exc)}", "its batch is baked in there"
        ) from exc


def _compare(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], batch: int) -> dict[str, Any]:
    import numpy as np

    result: dict[str, Any] = {}
    for name, expected in reference.items():
        got = found[name]
        if got.shape != expected.shape:
            raise ModelError(
                f"at batch {batch} output '{name}' has shape {list(got.shape)}, the source's has {list(expected.shape)}",
                "a size is baked into the graph",
            )
        if expected.dtype.kind in "iub":
            share = float(np.mean(expected != got)) if expected.size else 0.0
            result[name] = {"differing_share": share}
            if share > INTEGER_SHARE:
                raise ModelError(f"at batch {batch} output '{name}' differs from the source's in {share:.2%} of its elements")
            continue
        if not np.isfinite(expected).all():
            raise ModelError(
                f"the source's own output '{name}' has NaN or Inf at batch {batch}",
                "check its weights, or give real example_inputs",
            )
        error, scale = difference(expected, got)
        limit = RELATIVE * scale + min(ABSOLUTE, TINY_RELATIVE * scale)
        result[name] = {"max_abs_error": error, "max_abs_reference": scale, "limit": limit}
        if not error <= limit:
            raise ModelError(
                f"at batch {batch} output '{name}' differs from the source's by {error:.3g} (largest value {scale:.3g}, "
                f"limit {limit:.3g})",
                "is the model random in eval mode, or does it mix samples of a batch? else report this export",
            )
    return result


def prove_runs(session: onnxruntime.InferenceSession, signature: Signature, batches: tuple[int, ...]) -> dict[str, Any]:
    """That a graph without a source runs at those batches with finite outputs (JSON values).
    Inputs are seeded: normal floats, integers of 0 and 1. Raises ModelError when it does not run."""
    import numpy as np

    runs: list[dict[str, Any]] = []
    for batch in batches:
        feeds = _made_up(signature, {signature.batch_symbol: batch})
        found = _run(session, feeds, batch)
        finite = {name: bool(np.isfinite(a).all()) if a.dtype.kind == "f" else True for name, a in found.items()}
        runs.append({"batch": batch, "shapes": {n: list(a.shape) for n, a in found.items()}, "finite": finite})
    return {"against": "nothing: the graph is the source", "runtime": "onnxruntime", "runs": runs}


def tied_axes(session: onnxruntime.InferenceSession, signature: Signature) -> tuple[str, ...]:
    """Symbols on axis 0 of inputs without the batch's, that are the batch all the same: the graph runs where they equal it,
    and does not where one of them is one larger."""
    batch = signature.batch_symbol
    firsts = [spec.shape[0] for spec in signature.inputs if spec.shape and batch not in spec.shape]
    others = list(dict.fromkeys(d for d in firsts if isinstance(d, str)))

    def runs(sizes: Mapping[str | None, int]) -> bool:
        try:
            _run(session, _made_up(signature, sizes), 2)
        except ModelError:
            return False
        return True

    if batch is None or not others or not all(runs(dict.fromkeys([batch, *others], n)) for n in (2, 3)):
        return ()
    return tuple(symbol for symbol in others if not runs({**dict.fromkeys([batch, *others], 2), symbol: 3}))


def _made_up(signature: Signature, sizes: Mapping[str | None, int]) -> dict[str, np.ndarray]:
    """Seeded inputs: normal floats, integers of 0 and 1; axes that `sizes` does not name are 224 in pictures, else 8."""
    import numpy as np

    generator = np.random.default_rng(0)
    images = {dim for spec in signature.inputs if len(spec.shape) >= 4 for dim in signature.free_axes(spec)}
    feeds = {}
    for spec in signature.inputs:
        shape = tuple(d if isinstance(d, int) else sizes.get(d, 224 if d in images else 8) for d in spec.shape)
        dtype = np.dtype(spec.dtype)
        values = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
        feeds[spec.name] = values.astype(dtype)
    return feeds


def _short(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return text if len(text) <= 300 else text[:297] + "..."
