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
    pixels = np.repeat(pixels[..., None], target.channels, axis=3)
    return {target.name: target.pack(pixels, preprocess or NONE)}


def resize(greys: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """[n, height, width]: bilinear with half-pixel centres and antialiasing, as Pillow and torchvision do it."""
    if greys.shape[1:] == (height, width):
        return greys
    rows = _bilinear(greys.shape[1], height)
    columns = _bilinear(greys.shape[2], width)
    stretched: NDArray[np.float32] = np.matmul(np.matmul(rows, greys), columns.T)
    return stretched


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
