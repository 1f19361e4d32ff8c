"""Samples: re-iterable batches of a model's inputs, with labels when there are any, and a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.preprocess import Preprocess
from deploykit.signature import Feeds, Outputs, Signature


class Reader(Protocol):
    """Where samples come from: a folder of images, an .npz, ... Picklable: it opens its files lazily, in any process."""

    def read(self, indices: Sequence[int]) -> Outputs:
        """Inputs by name for those samples, stacked along each input's batch axis; constant inputs as they are.

        Raises DataError naming the file for a sample that cannot be read or holds a NaN.
        """
        ...


@dataclass(frozen=True)
class Samples:
    """A share of a data set, made ready for one model.

    spec: what the user wrote; content: sha256 of the data set's content (all of it); indices: which samples are in this
    share; labels: int64 class index for each of `indices` (aligned with it), or None; role: 'calibrate' | 'judge' | 'all'.
    """

    spec: str
    content: str
    reader: Reader
    signature: Signature
    preprocess: Preprocess | None
    indices: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    role: str = "all"
    random: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def digest(self) -> str:
        """sha256 over content, preprocessing and the choice of samples: the fingerprint of a calibration."""
        doc = repr((self.content, self.preprocess, self.indices))
        return hashlib.sha256(doc.encode()).hexdigest()

    def take(self, positions: Sequence[int], role: str) -> Samples:
        """The samples at those positions of this share, as a share of its own."""
        labels = None if self.labels is None else tuple(self.labels[p] for p in positions)
        return replace(self, indices=tuple(self.indices[p] for p in positions), labels=labels, role=role)

    def batches(self, size: int, *, pad: bool = False) -> Iterator[tuple[Feeds, int]]:
        """(feeds, count) for `size` samples at a time, in order.

        The last batch is short, or with `pad` filled up to `size` by repeating its last sample; count is the number of
        real samples in it.
        """
        for start in range(0, len(self.indices), size):
            chosen = list(self.indices[start : start + size])
            count = len(chosen)
            if pad and count < size:
                chosen += [chosen[-1]] * (size - count)
            yield self.reader.read(chosen), count

    def label_array(self) -> NDArray[np.int64] | None:
        """The labels as an int64 array [len(self)], or None."""
        return None if self.labels is None else np.asarray(self.labels, dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        """What a report says of this share (JSON values)."""
        return {
            "data": self.spec,
            "role": self.role,
            "n": len(self),
            "random": self.random,
            "labelled": self.labels is not None,
            "content": self.content,
            "digest": self.digest,
            "preprocess": None if self.preprocess is None else self.preprocess.to_json(),
            "notes": list(self.notes),
        }
