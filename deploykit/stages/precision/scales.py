"""Scales, zero points and integer weights: the arithmetic of linear quantization, real = scale * (q - zero_point).

The formulas are ONNX's QuantizeLinear (round half to even, saturate) and gemmlowp's choice of an asymmetric zero point
(https://github.com/google/gemmlowp/blob/master/doc/quantization.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.stages.precision.half import HALF_MAX, HALF_NORMAL

# The least scale in float32. The product of two (a bias's scale) is a normal float32 still, and 1 / scale is finite. It leaves
# room for the activations of an untrained MobileNetV2 (4e-9): 1e-7, a common choice, gave it 0 dB.
TINY_SCALE = 2.0**-60
TINY_HALF_SCALE = 2.0**-24  # FP16's smallest subnormal; a smaller weight is zero in FP16 anyway
COARSE_HALF_SCALE = 2.0**-18  # FP16's subnormals are 2**-24 apart: a smaller scale would be rounded up by more than 1/64
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class ActivationScale:
    """scale and zero point of a tensor; dtype: uint8 | int8."""

    scale: float
    zero_point: int
    dtype: str


def asymmetric(low: float, high: float) -> ActivationScale:
    """uint8 over [low, high] widened to hold zero: scale = (high - low) / 255, zero point an integer; 1 where all is zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return ActivationScale(1.0, 0, "uint8")
    scale = float(np.float32(max((high - low) / 255.0, TINY_SCALE)))
    return ActivationScale(scale, int(np.clip(np.rint(-low / scale), 0, 255)), "uint8")


def symmetric(amax: float, *, half: bool = False) -> ActivationScale:
    """int8 over [-amax, amax]: scale = amax / 127 (1 where all is zero), zero point 0. With `half`, a scale that FP16 holds
    exactly."""
    if amax == 0.0:
        return ActivationScale(1.0, 0, "int8")
    return ActivationScale(float(positive(np.array([amax / 127.0]), half=half)[0]), 0, "int8")


def positive(scale: NDArray[Any], *, half: bool = False) -> NDArray[np.float32]:
    """Scales that are above zero, as float32; with `half` rounded up to what FP16 holds, so that nothing saturates."""
    if not half:
        return np.asarray(np.maximum(scale, TINY_SCALE), dtype=np.float32)
    wanted = np.clip(scale, TINY_HALF_SCALE, 65504.0)
    rounded = wanted.astype(np.float16)
    up = np.nextafter(rounded, np.float16(np.inf))
    return np.asarray(np.where(rounded < wanted, up, rounded), dtype=np.float32)


def gained(scale: NDArray[Any], gain: NDArray[Any], *, half: bool = False) -> NDArray[np.float32]:
    """scale * gain, above zero, as float32; with `half` what FP16 holds nearest to it, and the scale itself where FP16 holds numbers of
    that size coarsely (a subnormal)."""
    found = np.maximum(scale * gain, TINY_SCALE)
    if half:
        nearest = np.clip(found, TINY_HALF_SCALE, HALF_MAX).astype(np.float16)
        found = np.where((found < HALF_NORMAL) | (scale < HALF_NORMAL), scale, nearest)
    return np.asarray(found, dtype=np.float32)


def revive(scale: NDArray[Any], dead: NDArray[np.bool_]) -> NDArray[Any]:
    """The scales [C] with those of dead channels replaced by the largest of the others, 1 where all are dead.

    Any positive scale stands for zeros; a tiny one makes products of scales vanish in whoever quantizes biases with them
    (ONNX Runtime's WeightBiasQuantization on an FP16 graph: output all wrong).
    """
    return np.asarray(np.where(dead, scale[~dead].max(initial=0.0) or 1.0, scale))


def spread(values: NDArray[Any], axis: int | None, rank: int) -> NDArray[Any]:
    """Per-channel values [C] in a shape that broadcasts over a weight of that rank; per-tensor ones as they are."""
    if axis is None:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def channel_amax(weight: NDArray[Any], axis: int | None) -> NDArray[np.float64]:
    """max |w| of each channel [C]; of the whole weight [1] where axis is None."""
    magnitude = np.abs(weight.astype(np.float64))
    if axis is None:
        return np.array([magnitude.max(initial=0.0)])
    return np.asarray(magnitude.max(axis=tuple(a for a in range(weight.ndim) if a != axis), initial=0.0))


def quantize(weight: NDArray[Any], scale: NDArray[np.float32], axis: int | None, levels: int) -> NDArray[np.int8]:
    """round(w / scale) within [-levels, levels]."""
    ratio = weight.astype(np.float64) / spread(scale, axis, weight.ndim).astype(np.float64)
    return np.clip(np.rint(ratio), -levels, levels).astype(np.int8)


def mse_scale(weight: NDArray[Any], axis: int | None, levels: int, steps: int = 40) -> NDArray[np.float64]:
    """For each channel the scale, of `steps` clippings between 0.5 and 1.0 of max |w|, with the least squared error."""
    amax = channel_amax(weight, axis)
    others = tuple(a for a in range(weight.ndim) if a != axis) if axis is not None else None
    best, least = amax / levels, np.full(amax.shape, np.inf)
    for share in np.linspace(1.0, 0.5, steps):
        scale = np.maximum(amax * share / levels, TINY_SCALE)
        step = spread(scale, axis, weight.ndim)
        error = weight - step * np.clip(np.rint(weight / step), -levels, levels)
        loss = np.atleast_1d(np.square(error, dtype=np.float64).sum(axis=others))
        best, least = np.where(loss < least, scale, best), np.minimum(loss, least)
    return best


def bias_to_int32(bias: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.int32]:
    """round(b / scale), scale = input scale * weight scale of each channel [C]."""
    return np.clip(np.rint(bias.astype(np.float64) / scale.astype(np.float64)), -INT32_MAX, INT32_MAX).astype(np.int32)
