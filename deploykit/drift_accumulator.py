"""DriftAccumulator: a Drift taken batch by batch, in float64, holding per-sample figures and no outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.drift import Drift, OutputError
from deploykit.errors import BackendFailed, DataError, ModelError
from deploykit.paired import Paired
from deploykit.signature import Signature

Arrays = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]
_TOP_K = 5
_SUMS_TO_ONE = 1e-3


class DriftAccumulator:
    """Adds up batches of reference and candidate outputs; `drift` when all n samples are in.

    labels: int64 [n], or None; numbers: what messages call each sample (its number in the data), by default its position.
    The judged output is the first floating-point one of shape [batch, classes >= 2].
    """

    def __init__(
        self,
        signature: Signature,
        n: int,
        labels: NDArray[np.int64] | None = None,
        *,
        samples: str = "",
        own: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> None:
        if n < 1:
            raise DataError("there are no samples to compare outputs on", "give --data with at least one sample")
        if labels is not None and labels.shape != (n,):
            raise DataError(f"{labels.shape} labels for {n} samples")
        self.classes: int | None = None
        self._signature, self._n, self._labels, self._digest, self._own = signature, n, labels, samples, own
        self._numbers = range(n) if numbers is None else numbers
        self._at = 0
        self._sums: dict[str, _Sums] = {}
        self._apart: dict[str, str] = {}  # outputs that cannot be compared, and why
        self._judged: _Judged | None = None

    def add(self, reference: Arrays, candidate: Arrays, count: int, fed: int | None = None) -> None:
        """Takes the next `count` samples; the outputs may be of `fed` samples, of which the first `count` are real.

        An output whose size depends on the values is left out, with a remark, once the two differ in it.
        Raises BackendFailed when the candidate's outputs have other names or shapes, ModelError for NaN in the
        reference's, DataError for a label that the judged output has no class for.
        """
        fed = count if fed is None else fed
        if self._at + count > self._n:
            raise DataError(f"{self._at + count} outputs for {self._n} samples")
        names = [spec.name for spec in self._signature.outputs if spec.name in reference]
        names += [name for name in reference if name not in names]
        missing = [name for name in names if name not in candidate]
        if missing:
            raise BackendFailed(
                f"outputs {missing} are missing; it gave {list(candidate)}", "compare models with the same outputs"
            )
        if self._at == 0:
            self._choose(reference, names, fed)
        place = slice(self._at, self._at + count)
        for name in names:
            self._add_output(name, np.asarray(reference[name]), np.asarray(candidate[name]), place, fed)
        if self._judged is not None:
            labels = None if self._labels is None else self._labels[place]
            name = self._judged.name
            self._judged.add(
                _rows(np.asarray(reference[name]), 0, count), _rows(np.asarray(candidate[name]), 0, count), labels, place
            )
        self._at += count

    def _choose(self, reference: Arrays, names: Sequence[str], fed: int) -> None:
        for name in names:
            array = np.asarray(reference[name])
            if array.ndim == 2 and array.shape[0] == fed and array.shape[1] >= 2 and _is_float(array):
                self.classes = int(array.shape[1])
                self._check_labels(name, self.classes)
                self._judged = _Judged(name, self._n, self.classes, labelled=self._labels is not None)
                return

    def _check_labels(self, name: str, classes: int) -> None:
        if self._labels is None:
            return
        bad = np.flatnonzero((self._labels < 0) | (self._labels >= classes))
        if len(bad):
            raise DataError(
                f"label {int(self._labels[bad[0]])} of sample {self._numbers[int(bad[0])]} is outside the model's {classes} classes "
                f"(output '{name}'); {len(bad)} such label(s)",
                f"labels go from 0 to {classes - 1}; name the classes in the model's order with --classes",
            )

    def _add_output(self, name: str, r: NDArray[Any], c: NDArray[Any], place: slice, fed: int) -> None:
        if name in self._apart:
            return
        if r.shape != c.shape and r.ndim == c.ndim and self._varies(name):
            self._apart[name] = f"output '{name}' was not compared: its size depends on the values ({c.shape} for {r.shape})"
            self._sums.pop(name, None)
            return
        if r.shape != c.shape:
            raise BackendFailed(f"output '{name}' has shape {c.shape}, the reference's {r.shape}")
        if r.dtype.kind in "OSUM" or c.dtype.kind in "OSUM":
            return  # text and dates have no error to sum
        axis = self._batch_axis(name, r, fed)
        count = place.stop - place.start
        if axis is None:  # one value for the whole batch: counted with its first sample
            place = slice(place.start, place.start + 1)
        sums = self._sums.setdefault(name, _Sums(self._n, self._numbers))
        sums.exact = r.dtype.kind in "iub"
        sums.add(name, _rows(r, axis, count), _rows(c, axis, count), place)

    def _varies(self, name: str) -> bool:
        """Whether the graph leaves the size of that output open (NonMaxSuppression, NonZero), and no classes are in it."""
        specs = {spec.name: spec for spec in self._signature.outputs}
        judged = self._judged is not None and self._judged.name == name
        return name in specs and bool(self._signature.free_axes(specs[name])) and not judged

    def _batch_axis(self, name: str, array: NDArray[Any], fed: int) -> int | None:
        for spec in self._signature.outputs:
            if spec.name == name and len(spec.shape) == array.ndim:
                axis = self._signature.batch_axis(spec)
                if axis is not None and array.shape[axis] == fed:
                    return axis
        return 0 if array.ndim and array.shape[0] == fed else None

    def drift(self, remarks: Sequence[str] = ()) -> Drift:
        """The drift over all n samples. Raises DataError when some have not been added."""
        if self._at != self._n:
            raise DataError(f"only {self._at} of {self._n} samples were compared")
        bad = np.zeros(self._n, dtype=np.bool_)
        for sums in self._sums.values():
            bad |= sums.bad
        outputs = tuple(sums.error(name) for name, sums in self._sums.items())
        remarks = [*remarks, *self._apart.values()]
        judged = self._judged
        if judged is None and self._labels is not None:
            remarks.append("labels were not used: no output has the shape [batch, classes]")
        whole = Drift(
            self._n,
            outputs,
            samples=self._digest,
            own=self._own,
            nonfinite=int(bad.sum()),
            remarks=tuple(remarks),
            nonfinite_samples=bad,
        )
        return whole if judged is None else judged.complete(whole)


class _Sums:
    """Error sums of one output, a figure a sample."""

    def __init__(self, n: int, numbers: Sequence[int]) -> None:
        self.elements = 0
        self.numbers = numbers
        self.signal, self.noise, self.dot, self.energy, self.max_abs = (np.zeros(n) for _ in range(5))
        self.bad = np.zeros(n, dtype=np.bool_)
        self.exact = False

    def add(self, name: str, r: Floats, c: Floats, place: slice) -> None:
        if np.isnan(r).any():
            sample = self.numbers[place.start + int(np.flatnonzero(np.isnan(r).any(axis=1))[0])]
            raise ModelError(
                f"the reference itself gives NaN in output '{name}', first for sample {sample}",
                "look at the model and at that sample; nothing can be held against NaN",
            )
        # Where both have the same infinity (masked logits), nothing differs.
        same = r == c
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.where(same, 0.0, r - c)
        bad = np.logical_not(np.isfinite(error).all(axis=1))
        finite = np.isfinite(r) & np.isfinite(c) & ~bad[:, None]
        r, c, error = (np.where(finite, x, 0.0) for x in (r, c, error))
        self.elements += r.size
        self.signal[place], self.energy[place] = (r * r).sum(axis=1), (c * c).sum(axis=1)
        self.noise[place], self.dot[place] = (error * error).sum(axis=1), (r * c).sum(axis=1)
        self.max_abs[place] = np.abs(error).max(axis=1, initial=0.0)
        self.bad[place] = bad

    def error(self, name: str) -> OutputError:
        lengths = np.sqrt(self.signal) * np.sqrt(self.energy)
        some = lengths > 0
        cosine = float(np.mean(np.minimum(1.0, self.dot[some] / lengths[some]))) if some.any() else None
        worst = int(np.argmax(self.bad)) if self.bad.any() else int(np.argmax(self.noise))
        return OutputError(
            name,
            self.elements,
            float(self.signal.sum()),
            float(self.noise.sum()),
            cosine,
            float(self.max_abs.max()),
            worst,
            int(self.bad.sum()),
            self.exact,
        )


class _Judged:
    """Per-sample outcomes of the output that holds the classes."""

    def __init__(self, name: str, n: int, classes: int, *, labelled: bool) -> None:
        def empty() -> NDArray[np.bool_]:
            return np.zeros(n, dtype=np.bool_)

        self.name = name
        self.agree = empty()
        self.right = (empty(), empty()) if labelled else None
        self.right5 = (empty(), empty()) if labelled and classes > _TOP_K else None
        self._kl = np.full(n, np.nan)
        self._probabilities: bool | None = None

    def add(self, r: Floats, c: Floats, labels: NDArray[np.int64] | None, place: slice) -> None:
        usable = np.logical_not((np.isnan(c) | (np.isinf(c) & (r != c))).any(axis=1))
        best = np.where(usable[:, None], c, 0.0).argmax(axis=1)  # the first of equal scores, as argmax has it everywhere
        self.agree[place] = usable & (best == r.argmax(axis=1))
        if self._probabilities is None:
            self._probabilities = bool((r >= 0).all() and np.allclose(r.sum(axis=1), 1.0, atol=_SUMS_TO_ONE))
        kl = np.full(len(r), np.nan)
        kl[usable] = kl_divergence(r[usable], c[usable], probabilities=self._probabilities)
        self._kl[place] = kl
        if labels is not None and self.right is not None:
            self.right[0][place] = r.argmax(axis=1) == labels
            self.right[1][place] = usable & (best == labels)
            if self.right5 is not None:
                self.right5[0][place] = in_top(r, labels, _TOP_K)
                self.right5[1][place] = usable & in_top(np.where(usable[:, None], c, 0.0), labels, _TOP_K)

    def complete(self, drift: Drift) -> Drift:
        """`drift` with what is known of the classes."""
        with_classes = replace(drift, judged=self.name, agreed=int(self.agree.sum()), agree=self.agree, kl=self.mean_kl())
        if self.right is None:
            return with_classes
        reference, candidate = self.right
        with_labels = replace(
            with_classes, top1_table=Paired.of(reference, candidate), reference_correct=reference, candidate_correct=candidate
        )
        if self.right5 is None:
            return with_labels
        reference, candidate = self.right5
        return replace(
            with_labels, top5_table=Paired.of(reference, candidate), reference_top5=reference, candidate_top5=candidate
        )

    def mean_kl(self) -> float | None:
        known = self._kl[np.isfinite(self._kl)]
        return float(known.mean()) if len(known) else None


def kl_divergence(reference: Floats, candidate: Floats, *, probabilities: bool = False) -> Floats:
    """[n] KL(p || q) = sum p ln(p / q) in nats, p and q the softmax of the rows (or, with `probabilities`, the rows)."""
    if probabilities:
        smallest = np.finfo(np.float64).tiny
        log_p, log_q = (np.log(np.maximum(x, smallest)) for x in (reference, candidate))
        p = reference
    else:
        log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
        p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    total: Floats = np.maximum(terms.sum(axis=1), 0.0)
    return total


def in_top(scores: Floats, labels: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """[n] whether the label is among the k highest scores; of equal scores the lower index is the higher, as in argmax."""
    own = scores[np.arange(len(scores)), labels][:, None]
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    found: NDArray[np.bool_] = before.sum(axis=1) < k
    return found


def _log_softmax(rows: Floats) -> Floats:
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _rows(array: NDArray[Any], axis: int | None, count: int) -> Floats:
    """[count, elements] in float64, samples first; [1, elements] without a batch axis."""
    if axis is None:
        return array.astype(np.float64).reshape(1, -1)
    moved = np.moveaxis(array, axis, 0)[:count]
    return moved.astype(np.float64).reshape(count, -1)


def _is_float(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
