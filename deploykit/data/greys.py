"""Greys: small grey pictures (digits, IDX) made ready for a model: resized, and repeated to its channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deploykit.data.image_input import ImageInput
from deploykit.preprocess import NONE, Preprocess
from deploykit.signature import Outputs


def sized(target: ImageInput, native: tuple[int, int]) -> ImageInput:
    """`target` with a free height or width set to the pictures' own."""
    return replace(target, height=target.height or native[0], width=target.width or native[1])


def feeds(greys: NDArray[np.float32], target: ImageInput, preprocess: Preprocess | None) -> Outputs:
    """The input for grey pictures [n, h, w] of values 0..255, stretched to the input's height and width.

    Resize and crop of the preprocessing do not apply (the pictures are small already); scale, mean and std do.
    """
    assert target.height is not None
    assert target.width is not None
    pixels = resize(greys, target.height, target.width)
    return {target.name: target.pack(pixels[..., None], preprocess or NONE)}


def resize(greys: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """[n, height, width]: bilinear with half-pixel centres and antialiasing, as Pillow and torchvision do it."""
    return _along(_along(greys, 2, width), 1, height)


def _along(greys: NDArray[np.float32], axis: int, to: int) -> NDArray[np.float32]:
    """One axis stretched, tap by tap: a matrix product is shorter, but its BLAS threads spin, and on a busy machine of
    2 cores 32 pictures of 28x28 to 224x224 took 60 to 180 ms of processor time so, and 8 ms this way."""
    size = greys.shape[axis]
    if size == to:
        return greys
    weights = _bilinear(size, to)
    first = (weights > 0).argmax(axis=1)
    taps = int((weights > 0).sum(axis=1).max())
    total: NDArray[np.float32] | None = None
    for tap in range(taps):
        at = np.minimum(first + tap, size - 1)
        weight = np.where(first + tap < size, weights[np.arange(to), at], np.float32(0))
        part = np.take(greys, at, axis=axis)
        part *= weight[None, :, None] if axis == 1 else weight[None, None, :]
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def _bilinear(size: int, to: int) -> NDArray[np.float32]:
    """[to, size] weights: a triangle of support max(1, size/to) around (i + 0.5) * size/to, each row summing to 1
    (Pillow, libImaging/Resample.c, precompute_coeffs)."""
    step = size / to
    support = max(step, 1.0)
    centres = (np.arange(to) + 0.5) * step
    pixels = np.arange(size) + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(pixels[None, :] - centres[:, None]) / support)
    normed: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normed


def note(what: str, native: tuple[int, int], target: ImageInput) -> tuple[str, ...]:
    """What was done to the pictures, in words; nothing when they are fed as they are."""
    done = []
    if (target.height, target.width) != native:
        done.append(f"stretched from {native[0]}x{native[1]} to {target.height}x{target.width}")
    if target.channels > 1:
        done.append(f"the grey repeated to {target.channels} channels")
    return (f"{what}: {', '.join(done)}",) if done else ()
