"""The calibration table that was asked for by a method's name, `best` among them: run in a child process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from deploykit.calibration_table import BEST, CANDIDATES, METHODS, CalibrationTable
from deploykit.errors import InputError, ModelError, UnknownName
from deploykit.samples import Samples


def require_known(method: str) -> None:
    """Raises UnknownName for what is no calibration method."""
    if method not in (BEST, *METHODS):
        raise UnknownName("calibration method", method, (BEST, *METHODS))


def collect(path: Path, samples: Samples, method: str, resume: Path | None = None) -> CalibrationTable:
    """The table of a model over these samples. `resume`: where a pass that was killed has left its progress.

    BEST: one pass makes the tables of CANDIDATES, and the one whose INT8 graph (layout 'cpu', biases corrected on a few samples) has
    the least noise in its outputs comes back, under its own method's name; a note says what the others had. Raises what
    `calibration.collect` raises.
    """
    from deploykit.stages import calibration

    require_known(method)
    if method != BEST:
        return calibration.collect(path, samples, methods=(method,), resume=resume)[method]
    return best(path, samples, calibration.collect(path, samples, methods=CANDIDATES, resume=resume))


def best(path: Path, samples: Samples, tables: dict[str, CalibrationTable]) -> CalibrationTable:
    """The best of these tables; the first one, with the reason in its notes, where no INT8 graph can be made to tell."""
    from deploykit.stages import precision

    asked = {"asked": BEST}
    try:
        noise = precision.method_noise(path, tables, "cpu", samples)
    except (InputError, ModelError) as exc:
        first = next(iter(tables.values()))
        note = f"the calibration methods could not be compared, and {first.method} was taken: {exc.message}"
        return replace(first, options={**first.options, **asked}, notes=(*first.notes, note))
    chosen = tables[min(noise, key=lambda name: noise[name] if math.isfinite(noise[name]) else math.inf)]
    told = ", ".join(f"{name} {_decibels(value)}" for name, value in noise.items())
    note = f"{chosen.method} was chosen: output SQNR of its INT8 graph: {told}"
    return replace(chosen, options={**chosen.options, **asked}, notes=(*chosen.notes, note))


def made_by(table: CalibrationTable, method: str) -> bool:
    """Whether a table is what `method` stands for."""
    return bool(table.options.get("asked", table.method) == method)


def _decibels(noise: float) -> str:
    return f"{-10 * math.log10(noise):.1f} dB" if noise > 0 else "no noise"
