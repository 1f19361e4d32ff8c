"""Drift: what a candidate's outputs differ by from the reference's, per sample, with the statistics derived."""

from __future__ import annotations

import io
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError
from deploykit.paired import Paired, wilson

_ARRAYS = ("reference_correct", "candidate_correct", "reference_top5", "candidate_top5", "agree", "nonfinite_samples")
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class OutputError:
    """One output's error sums over all samples whose outputs are finite, in float64.

    signal = sum r^2, noise = sum (r - c)^2, for reference r and candidate c; cosine: mean over samples of
    r.c / (|r| |c|), None where one of them is zero throughout; worst_sample: position of the largest error; exact: integers or
    booleans, classes and indices mostly, of which an error in dB says little.
    """

    name: str
    elements: int
    signal: float
    noise: float
    cosine: float | None
    max_abs: float
    worst_sample: int
    nonfinite: int
    exact: bool = False

    @property
    def identical(self) -> bool:
        """Whether every value equals the reference's."""
        return self.noise == 0 and self.max_abs == 0 and not self.nonfinite

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise), the signal-to-quantization-noise ratio in dB.

        None where it is no number: identical outputs (no noise), a reference of zeros, NaN or Inf in the candidate.
        """
        if self.nonfinite or self.noise <= 0 or self.signal <= 0:
            return None
        return 10.0 * math.log10(self.signal / self.noise)


@dataclass(frozen=True)
class Drift:
    """A candidate's drift from the reference over n samples.

    samples: digest of the samples that judged; own: the reference held against itself; judged: the output whose classes
    count, None without one of shape [batch, classes]; top1_table, top5_table: with labels; agreed: samples with the same
    top-1; kl: mean KL divergence of the softmax, in nats, over the samples that are finite; nonfinite: samples
    with NaN or Inf where the reference has none: they count as wrong and as disagreeing. The arrays are bool [n], kept
    apart from the JSON.
    """

    n: int
    outputs: tuple[OutputError, ...]
    judged: str | None = None
    samples: str = ""
    own: bool = False
    top1_table: Paired | None = None
    top5_table: Paired | None = None
    agreed: int | None = None
    kl: float | None = None
    nonfinite: int = 0
    remarks: tuple[str, ...] = ()
    reference_correct: Bools | None = field(default=None, compare=False, repr=False)
    candidate_correct: Bools | None = field(default=None, compare=False, repr=False)
    reference_top5: Bools | None = field(default=None, compare=False, repr=False)
    candidate_top5: Bools | None = field(default=None, compare=False, repr=False)
    agree: Bools | None = field(default=None, compare=False, repr=False)
    nonfinite_samples: Bools | None = field(default=None, compare=False, repr=False)

    @property
    def correct(self) -> Bools | None:
        """Whether the candidate was right, bool [n]; None without labels (what a gate pairs with another run)."""
        return self.candidate_correct

    @property
    def main(self) -> OutputError | None:
        """The output the figures are of: the judged one, else the one with the lowest SQNR, floats before integers."""
        for output in self.outputs:
            if output.name == self.judged:
                return output
        return min(self.outputs, key=lambda output: (output.exact, _badness(output)), default=None)

    @property
    def top1(self) -> float | None:
        """The candidate's top-1 accuracy, a fraction."""
        return None if self.top1_table is None else self.top1_table.candidate_share

    @property
    def top5(self) -> float | None:
        """The candidate's top-5 accuracy, a fraction; None with five classes or fewer."""
        return None if self.top5_table is None else self.top5_table.candidate_share

    @property
    def top1_drop_pp(self) -> float | None:
        """Percentage points of top-1 lost, positive = worse."""
        return None if self.top1_table is None else self.top1_table.drop_pp

    @property
    def top1_drop_interval_pp(self) -> tuple[float, float] | None:
        """The drop's 95 % interval (Paired.interval_pp); None for the reference itself, which has nothing to lose."""
        return None if self.top1_table is None or self.own else self.top1_table.interval_pp()

    @property
    def mcnemar_p(self) -> float | None:
        """Exact two-sided McNemar p-value of the change in top-1."""
        return None if self.top1_table is None else self.top1_table.mcnemar_p

    @property
    def smallest_visible_drop_pp(self) -> float | None:
        """The smallest top-1 drop these samples could have shown (Paired.smallest_visible_pp)."""
        return None if self.top1_table is None else self.top1_table.smallest_visible_pp

    @property
    def agreement(self) -> float | None:
        """The share of samples with the reference's top-1 class."""
        return None if self.agreed is None else self.agreed / self.n

    @property
    def agreement_interval(self) -> tuple[float, float] | None:
        """The agreement's 95 % interval (Wilson)."""
        return None if self.agreed is None else wilson(self.agreed, self.n)

    @property
    def sqnr_db(self) -> float | None:
        """SQNR of the main output in dB; None where it is no number (OutputError.sqnr_db)."""
        return None if self.main is None else self.main.sqnr_db

    @property
    def cosine(self) -> float | None:
        """Mean cosine similarity of the main output."""
        return None if self.main is None else self.main.cosine

    @property
    def max_abs(self) -> float | None:
        """Largest absolute error of the main output, in its own unit."""
        return None if self.main is None else self.main.max_abs

    @property
    def identical(self) -> bool:
        """Whether every output equals the reference's, bit for bit but for the sign of zero."""
        return all(output.identical for output in self.outputs)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know."""
        found = list(self.remarks)
        if self.nonfinite:
            found.append(f"NaN or Inf in the outputs of {self.nonfinite} of {self.n} samples")
        if self.top1_table is not None and not self.own:
            least = self.smallest_visible_drop_pp
            shown = "no drop at all" if least is None else f"no drop below {least:.2g} pp"
            found.append(f"{self.n} samples can show {shown}")
        return tuple(found)

    def row_figures(self) -> dict[str, float | None]:
        """The Row's accuracy columns by name; None where there is nothing to say."""
        low, high = self.top1_drop_interval_pp or (None, None)
        return {
            "top1": self.top1,
            "top5": self.top5,
            "top1_drop_pp": None if self.own else self.top1_drop_pp,
            "top1_drop_low": low,
            "top1_drop_high": high,
            "agreement": self.agreement,
            "sqnr_db": self.sqnr_db,
        }

    def in_words(self) -> str:
        """The main figures in one line."""
        said = []
        if self.top1_table is not None:
            said.append(f"top-1 {100 * self.top1_table.candidate_share:.2f} %")
            if self.top1_drop_interval_pp is not None:
                low, high = self.top1_drop_interval_pp
                said.append(f"drop {self.top1_table.drop_pp:.2f} pp (95 %: {low:.2f} to {high:.2f})")
        if self.agreement is not None:
            said.append(f"top-1 agreement {100 * self.agreement:.2f} %")
        if self.identical:
            said.append("identical outputs")
        elif self.sqnr_db is not None:
            said.append(f"SQNR {self.sqnr_db:.1f} dB")
        if self.nonfinite:
            said.append(f"NaN or Inf in {self.nonfinite} of {self.n} samples")
        return ", ".join(said) or "nothing comparable"

    def lines(self) -> list[str]:
        """All figures, a line each."""
        found = [self.in_words()]
        if self.top1_table is not None and not self.own:
            table = self.top1_table
            found.append(f"top-1: {table.lost} lost, {table.gained} gained, exact McNemar p = {table.mcnemar_p:.3g}")
        if self.kl is not None:
            found.append(f"KL of the softmax of '{self.judged}': {self.kl:.3g} nats")
        for output in self.outputs:
            ratio = "identical" if output.identical else "no SQNR" if output.sqnr_db is None else f"SQNR {output.sqnr_db:.1f} dB"
            cosine = "" if output.cosine is None else f", cosine {output.cosine:.6f}"
            bad = f", NaN or Inf in {output.nonfinite} samples" if output.nonfinite else ""
            found.append(
                f"output '{output.name}': {ratio}{cosine}, max abs {output.max_abs:.3g} (sample {output.worst_sample}){bad}"
            )
        return found + list(self.notes)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back, without the per-sample arrays; derived figures beside them."""
        doc: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ARRAYS}
        doc["outputs"] = [{**asdict(o), "sqnr_db": o.sqnr_db} for o in self.outputs]
        doc["remarks"] = list(self.remarks)
        for name in ("top1_table", "top5_table"):
            doc[name] = None if doc[name] is None else doc[name].to_json()
        derived = ("agreement_interval", "top1_drop_interval_pp", "mcnemar_p", "smallest_visible_drop_pp", "cosine", "max_abs")
        for name in derived:
            value = getattr(self, name)
            doc[name] = list(value) if isinstance(value, tuple) else value
        return {**doc, **self.row_figures()}

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Drift:
        """The drift that `to_json` wrote, without per-sample arrays. Raises DataError for another document."""
        try:
            outputs = tuple(
                OutputError(**{f.name: o[f.name] for f in fields(OutputError) if f.name in o}) for o in doc["outputs"]
            )
            top1, top5 = (None if doc[name] is None else Paired.from_json(doc[name]) for name in ("top1_table", "top5_table"))
            return cls(
                int(doc["n"]),
                outputs,
                doc["judged"],
                str(doc["samples"]),
                bool(doc["own"]),
                top1,
                top5,
                doc["agreed"],
                doc["kl"],
                int(doc["nonfinite"]),
                tuple(doc["remarks"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise DataError(f"this is no drift document: {type(exc).__name__}: {exc}", "measure again with --remeasure") from exc

    def save_outcomes(self, path: Path) -> None:
        """Writes the per-sample arrays as .npz (temporary file, then rename)."""
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, n=np.int64(self.n), samples=np.str_(self.samples), **arrays)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(buffer.getvalue())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def with_outcomes(self, path: Path) -> Drift:
        """This drift with the per-sample arrays that `save_outcomes` wrote. Raises DataError when they are not its own."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                n, samples = int(archive["n"]), str(archive["samples"])
                arrays = {name: archive[name] for name in _ARRAYS if name in archive.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as exc:
            raise DataError(f"per-sample outcomes {path} cannot be read: {exc}", "measure again with --remeasure") from exc
        wrong = [name for name, array in arrays.items() if array.shape != (self.n,) or array.dtype != np.bool_]
        correct = arrays.get("candidate_correct")
        table = self.top1_table
        if correct is not None and (table is None or int(correct.sum()) != table.both + table.gained):
            wrong.append("candidate_correct")
        if (n, samples) != (self.n, self.samples) or wrong:
            raise DataError(f"per-sample outcomes {path} belong to another measurement", "measure again with --remeasure")
        return replace(self, **arrays)


def _badness(output: OutputError) -> float:
    """Lower is worse."""
    if output.nonfinite:
        return -math.inf
    return math.inf if output.sqnr_db is None else output.sqnr_db
