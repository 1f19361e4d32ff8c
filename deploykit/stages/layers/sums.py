"""One pass of the samples through both graphs: every sum that the rows are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.activations import Activations, open_model
from deploykit.children import report_progress
from deploykit.errors import InputError
from deploykit.histogram import sampled_row
from deploykit.quantized_layers import View
from deploykit.samples import Samples
from deploykit.signature import Feeds
from deploykit.stages.layers.match import Match
from deploykit.stages.layers.statistics import Error, Rounding, Spread

if TYPE_CHECKING:
    import onnx

LITERAL = {"session.disable_quant_qdq": "1"}  # Q/DQ pairs as written: what the graph says, not what fused kernels make of it
_MOST_PER_SAMPLE = 1 << 15  # values of a tensor sampled for its histogram and its rounding


class Sums:
    """What is known of each match after `run`: by its index the error of its result, by tensor its spread, by both the
    rounding of the reference's own values; `unlike`: matches whose results cannot be compared."""

    def __init__(self, mine: View, its: View, found: Sequence[Match]) -> None:
        self._found, self._mine, self._its = found, mine, its
        self.notes: list[str] = []
        self.errors = {i: Error() for i in range(len(found))}
        self.spreads: dict[str, Spread] = {}
        self.roundings: dict[tuple[int, str], Rounding] = {}
        self.unlike: set[int] = set()
        self._endless: set[str] = set()
        for i, match in enumerate(found):
            axis = -1 if match.layer.op in ("Gemm", "MatMul") else 1
            for tensor in (match.layer.data, match.layer.bare.read, match.reference_tensor):
                self.spreads.setdefault(tensor, Spread(axis))
            if match.other is None:
                continue
            if match.other.data_pair is not None and match.other.data_pair.per_tensor:
                self.roundings[i, match.layer.data] = Rounding(match.other.data_pair)
            pair = next((p.pair for p in match.other.points if p.read == match.candidate_tensor), None)
            if pair is not None and pair.per_tensor:
                self.roundings[i, match.reference_tensor] = Rounding(pair)
        self._by_tensor: dict[str, list[Rounding]] = {}
        for (_, tensor), rounding in self.roundings.items():
            self._by_tensor.setdefault(tensor, []).append(rounding)

    def run(self, reference: Path, candidate: Path, samples: Samples, batch: int, threads: int) -> None:
        """Fills in all sums. Raises InputError, ModelError, MissingBackend and BackendFailed as `open_model` does."""
        names = sorted(self.spreads, key=lambda name: self._mine.producer.get(name, -1))
        base = opened(self._mine.model, reference.name, names, samples, batch, threads)
        theirs = list(dict.fromkeys(match.candidate_tensor for match in self._found))
        other = opened(self._its.model, candidate.name, theirs, samples, batch, threads)
        self.notes += [f"{path.name}: {note}" for path, found in ((reference, base), (candidate, other)) for note in found.notes]
        done = 0
        for feeds, count in batches(samples, base, other):
            left, right = base.run(feeds), other.run(feeds)
            for name, tensor in left.items():
                self._see(name, base.rows(name, tensor, feeds, count), tensor, done)
            for i, match in enumerate(self._found):
                a, b = left.get(match.reference_tensor), right.get(match.candidate_tensor)
                if a is None or b is None or a.shape != b.shape:
                    self.unlike.add(i)
                    continue
                rows = base.rows(match.reference_tensor, a, feeds, count)
                self.errors[i].see(rows, other.rows(match.candidate_tensor, b, feeds, count))
            done += count
            report_progress("layers", done / len(samples))

    def _see(self, name: str, rows: NDArray[Any], tensor: NDArray[Any], done: int) -> None:
        low, high = float(rows.min()), float(rows.max())
        if name not in self._endless and not (np.isfinite(low) and np.isfinite(high)):
            self._endless.add(name)
            self.notes.append(f"tensor '{name}' of the reference holds NaN or infinite values: its spread is not judged")
        if name in self._endless:
            return
        sampled = np.concatenate([sampled_row(row, done + k, _MOST_PER_SAMPLE) for k, row in enumerate(rows)])
        self.spreads[name].see(tensor, sampled)
        for rounding in self._by_tensor.get(name, ()):
            rounding.see(sampled)


def opened(model: onnx.ModelProto, name: str, tensors: Sequence[str], samples: Samples, batch: int, threads: int) -> Activations:
    """A copy of the model open with those tensors as outputs, Q/DQ taken literally."""
    copy = type(model)()
    copy.CopyFrom(model)
    return open_model(copy, name, tensors, samples, batch=batch, threads=threads, entries=LITERAL)


def batches(samples: Samples, base: Activations, *others: Activations) -> Iterator[tuple[Feeds, int]]:
    """The samples' batches in a size that all open models take. Raises InputError where they take none in common."""
    opened = (base, *others)
    fixed = {found.batch for found in opened if found.fixed}
    if len(fixed) > 1:
        raise InputError(f"the graphs have the batches {sorted(fixed)} baked in", "compare graphs of one batch")
    size = fixed.pop() if fixed else min(found.batch for found in opened)
    for feeds, count in samples.batches(size, pad=any(found.fixed for found in opened)):
        for found in opened:
            found.signature.check(feeds)
        yield feeds, count
