"""Random inputs, for those who asked for them: `random:N`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError
from deploykit.samples import Samples
from deploykit.signature import Outputs, ShapeRange, Signature, TensorSpec

_SEED = 20_240_601
_MAX_N = 10_000_000


@dataclass(frozen=True)
class RandomReader:
    """Sample i is always the same: floats of N(0, 1), integers of {0, 1} (inside any table), uint8 pictures of 0..255."""

    signature: Signature
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)

    def read(self, indices: Sequence[int]) -> Outputs:
        """Inputs by name; a constant input is the same with every sample."""
        one = self.signature.fixed_batch or 1
        sizes = self.signature.shapes(one, self.shapes)
        feeds: Outputs = {}
        for position, spec in enumerate(self.signature.inputs):
            axis = self.signature.batch_axis(spec)
            shape = sizes[spec.name]
            if axis is None:
                feeds[spec.name] = _draw(spec, shape, (_SEED, position))
            else:
                single = (*shape[:axis], *shape[axis + 1 :])
                rows = [_draw(spec, single, (_SEED, position, 1 + index)) for index in indices]
                feeds[spec.name] = np.stack(rows, axis=axis)
        return feeds


def open_random(count: str, signature: Signature, shapes: Mapping[str, ShapeRange] | None) -> Samples:
    """N seeded random samples. Raises DataError for an N that is no positive number, InputError for a free axis."""
    if not count.isdecimal() or not 0 < int(count) <= _MAX_N:
        raise DataError(f"'random:{count}' does not say how many samples", "example: --data random:64")
    reader = RandomReader(signature, dict(shapes or {}))
    reader.read([0])  # a type or a free axis that cannot be drawn is said now
    return Samples(
        spec=f"random:{int(count)}",
        content=hashlib.sha256(f"random {_SEED} {sorted((shapes or {}).items())!r}".encode()).hexdigest(),
        reader=reader,
        signature=signature,
        preprocess=None,
        indices=tuple(range(int(count))),
        random=True,
        notes=("random inputs: figures of accuracy and ranges say nothing about real data",),
    )


def _draw(spec: TensorSpec, shape: tuple[int, ...], seed: tuple[int, ...]) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as exc:
        raise DataError(f"input {spec} has a type that random values cannot be drawn for", "give an .npz") from exc
    if dtype.kind == "f":
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        picture = spec.dtype == "uint8" and len(shape) >= 3
        return rng.integers(0, 256 if picture else 2, shape).astype(dtype)
    raise DataError(f"input {spec} has a type that random values cannot be drawn for", "give an .npz")
