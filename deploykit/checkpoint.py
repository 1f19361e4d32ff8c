"""Progress of a calibration in a file, so that a pass that was killed goes on where it was."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import write_atomically
from deploykit.histogram import BINS, Histogram, Observation


def save(path: Path, mark: str, facts: Mapping[str, Any], seen: Mapping[str, Observation]) -> None:
    """Writes the observations, whole or not at all. `mark` says what they are of; `facts` are JSON values."""
    names = list(seen)
    doc = {
        "mark": mark,
        "facts": dict(facts),
        "names": names,
        "exponents": [seen[name].histogram.exponent for name in names],
    }
    stream = io.BytesIO()
    np.savez(
        stream,
        doc=np.array(json.dumps(doc)),
        extremes=np.array([[seen[name].low, seen[name].high] for name in names], dtype=np.float64).reshape(-1, 2),
        counts=np.array([seen[name].histogram.counts for name in names], dtype=np.int64).reshape(-1, 2 * BINS),
    )
    write_atomically(path, stream.getvalue())


def load(path: Path, mark: str) -> tuple[dict[str, Any], dict[str, Observation]] | None:
    """The facts and observations that `save` wrote; None when there is no such file, or it is of something else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            doc = json.loads(str(arrays["doc"]))
            if doc["mark"] != mark:
                return None
            extremes, counts = arrays["extremes"], arrays["counts"]
        seen = {
            name: Observation(float(low), float(high), Histogram(exponent, row.copy()))
            for name, exponent, (low, high), row in zip(doc["names"], doc["exponents"], extremes, counts, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return doc["facts"], seen
