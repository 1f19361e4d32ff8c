"""CalibrationTable: the range of each tensor, and exactly what it was found on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit.artifact import Json, write_atomically
from deploykit.errors import InputError, StaleCalibration, UnknownName
from deploykit.preprocess import Preprocess

SCHEMA_VERSION = 1
METHODS = ("minmax", "entropy", "percentile", "mse")
BEST = "best"  # no method of its own: whichever of CANDIDATES gives the INT8 graph that stays closest to the float model
CANDIDATES = ("minmax", "percentile", "mse")
DEFAULT_METHOD = BEST
IMPORTED = "imported"  # the method of a table that was read from another tool's cache
_REMEDY = "make one for this model and data: deploykit calibrate MODEL --data DATA -o FILE --recalibrate"


@dataclass(frozen=True)
class Range:
    """The values a tensor takes, or is to be quantized over: low <= high, both finite."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise InputError(f"a calibration range must be finite with low <= high, not [{self.low}, {self.high}]")

    @property
    def amax(self) -> float:
        """The largest magnitude, max(|low|, |high|)."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class CalibrationTable:
    """Ranges per tensor name (inputs of the model among them), chosen by one method on one set of samples.

    ranges: what an asymmetric quantizer maps onto its levels, once widened to hold zero; observed: exact extremes over all
    the samples; symmetric: the amax a symmetric quantizer should use where the method chose one of its own (the best
    clipping of |x| is not always the larger end of the best [low, high]). model_sha256: `graph.digest` of the float model;
    samples_digest: `Samples.digest`; preprocess: its JSON; n: samples seen; options: the method's settings, and 'random':
    True where the samples were random:N.
    """

    ranges: Mapping[str, Range]
    observed: Mapping[str, Range]
    method: str
    model_sha256: str
    samples_digest: str
    preprocess: Mapping[str, Json] | None
    n: int
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    symmetric: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, IMPORTED):
            raise UnknownName("calibration method", self.method, METHODS)
        strays = (set(self.ranges) ^ set(self.observed)) | (set(self.symmetric) - set(self.ranges))
        if strays:
            raise InputError(f"a calibration table holds only one of range and extremes of {sorted(strays)[:5]}")

    def range(self, name: str) -> Range:
        """The chosen range of a tensor. Raises UnknownName when it was not observed."""
        if name not in self.ranges:
            raise UnknownName("calibrated tensor", name, self.ranges)
        return self.ranges[name]

    def amax(self, name: str) -> float:
        """The magnitude at which a symmetric quantizer clips: scale = amax / 127. Zero for a tensor that is always zero.

        Raises UnknownName when the tensor was not observed.
        """
        found = self.range(name)
        return self.symmetric.get(name, found.amax)

    @property
    def fingerprint(self) -> str:
        """sha256 over everything in the table."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, allow_nan=False).encode()).hexdigest()

    def require_match(
        self,
        *,
        model_sha256: str | None = None,
        samples_digest: str | None = None,
        preprocess: Preprocess | Mapping[str, Json] | None = None,
        method: str | None = None,
    ) -> None:
        """Raises StaleCalibration unless the table was made for what is given; None is not compared."""
        expected: Json = preprocess.to_json() if isinstance(preprocess, Preprocess) else preprocess
        pairs: tuple[tuple[str, Json, Json], ...] = (
            ("model", self.model_sha256, model_sha256),
            ("samples", self.samples_digest, samples_digest),
            ("preprocessing", _plain(self.preprocess), _plain(expected)),
            ("method", self.method, method),
        )
        for what, found, wanted in pairs:
            if wanted is not None and found != wanted:
                raise StaleCalibration(f"calibration table was made for {what} {_short(found)}, not {_short(wanted)}", _REMEDY)

    def to_json(self) -> dict[str, Json]:
        """The document that `save` writes and `from_json` reads back; tensors in name order."""
        tensors = {
            name: {
                "low": chosen.low,
                "high": chosen.high,
                "min": self.observed[name].low,
                "max": self.observed[name].high,
                "amax": self.amax(name),
            }
            for name, chosen in sorted(self.ranges.items())
        }
        return {
            "calibration_version": SCHEMA_VERSION,
            "method": self.method,
            "model_sha256": self.model_sha256,
            "samples_digest": self.samples_digest,
            "preprocess": _plain(self.preprocess),
            "n": self.n,
            "options": _plain(dict(self.options)),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "tensors": tensors,
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> CalibrationTable:
        """The table that `to_json` wrote. Raises KeyError, TypeError, ValueError or InputError for anything else."""
        tensors = {str(name): {k: _number(v) for k, v in row.items()} for name, row in doc["tensors"].items()}
        ranges = {name: Range(row["low"], row["high"]) for name, row in tensors.items()}
        return cls(
            ranges=ranges,
            observed={name: Range(row["min"], row["max"]) for name, row in tensors.items()},
            method=doc["method"],
            model_sha256=str(doc["model_sha256"]),
            samples_digest=str(doc["samples_digest"]),
            preprocess=None if doc["preprocess"] is None else dict(doc["preprocess"]),
            n=int(doc["n"]),
            versions={str(k): str(v) for k, v in doc["versions"].items()},
            notes=tuple(str(note) for note in doc["notes"]),
            symmetric={name: row["amax"] for name, row in tensors.items() if row["amax"] != ranges[name].amax},
            options=dict(doc["options"]),
        )

    def save(self, path: Path) -> None:
        """Writes the table as JSON, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())


def load(path: Path) -> CalibrationTable:
    """The table in a JSON file that `save` wrote.

    Raises InputError for a file that is missing, truncated, of another schema version, or no calibration table.
    """
    try:
        doc = json.loads(path.read_bytes())
        version = doc["calibration_version"]
        if version != SCHEMA_VERSION:
            raise InputError(f"it has calibration version {version}, expected {SCHEMA_VERSION}")
        return CalibrationTable.from_json(doc)
    except FileNotFoundError as exc:
        raise InputError(f"there is no calibration table {path}", "make one with `deploykit calibrate`") from exc
    except IsADirectoryError as exc:
        raise InputError(f"{path} is a folder, not a calibration table", "give the .json file") from exc
    except InputError as exc:
        raise InputError(f"{path}: {exc.message}", _REMEDY) from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(
            f"{path} is not a calibration table of deploykit ({type(exc).__name__}: {exc})",
            "make it again with `deploykit calibrate`",
        ) from exc


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _plain(doc: Json) -> Json:
    """JSON's own view of a value, so that a tuple equals the list it is read back as."""
    return json.loads(json.dumps(doc))


def _short(value: Json) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}..."
    return "'none'" if value is None else str(value)
