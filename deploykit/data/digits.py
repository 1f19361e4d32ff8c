"""Digits: scikit-learn's bundled 1,797 handwritten digits of 8x8 greys."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploykit.data import greys
from deploykit.data.image_input import ImageInput, image_input
from deploykit.errors import DataError, MissingBackend
from deploykit.preprocess import Preprocess
from deploykit.samples import Samples
from deploykit.signature import Outputs, ShapeRange, Signature

_SIZE = (8, 8)
_WHITE = 16.0  # the set's greys go from 0 to 16


@dataclass(frozen=True)
class DigitsReader:
    """Reads the bundled digits; index i is row i of the file."""

    target: ImageInput
    preprocess: Preprocess | None

    def read(self, indices: Sequence[int]) -> Outputs:
        """The model's input for those digits."""
        pictures = load()[0][list(indices)].astype(np.float32) * np.float32(255.0 / _WHITE)
        return greys.feeds(pictures, self.target, self.preprocess)


def open_digits(signature: Signature, preprocess: Preprocess | None, shapes: Mapping[str, ShapeRange] | None) -> Samples:
    """All digits with their labels. Raises MissingBackend without scikit-learn, DataError for a model they don't fit."""
    target = greys.sized(image_input(signature, preprocess, shapes, flat=_SIZE), _SIZE)
    pictures, labels = load()
    content = hashlib.sha256(b"digits" + pictures.tobytes() + labels.tobytes()).hexdigest()
    return Samples(
        spec="digits",
        content=content,
        reader=DigitsReader(target, preprocess),
        signature=signature,
        preprocess=preprocess,
        indices=tuple(range(len(labels))),
        labels=tuple(labels.tolist()),
        classes=tuple("0123456789"),
        notes=greys.note("digits", _SIZE, target),
    )


@functools.cache
def load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [1797, 8, 8] of 0..16 and labels [1797], read from scikit-learn's folder without importing it (2 s)."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingBackend("the data set 'digits' is scikit-learn's, which is not installed", "pip install 'deploykit[digits]'")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        text = gzip.decompress(path.read_bytes())
        table = np.array(text.replace(b"\n", b",").strip(b",").split(b",")).astype(np.float64).astype(np.uint8)
        table = table.reshape(-1, _SIZE[0] * _SIZE[1] + 1)
    except (OSError, EOFError, ValueError) as exc:
        raise DataError(f"scikit-learn's {path.name} cannot be read: {exc}", "reinstall scikit-learn") from exc
    return table[:, :-1].reshape(-1, *_SIZE), table[:, -1].astype(np.int64)
