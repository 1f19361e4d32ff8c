"""ImageInput: the one input of a model that pictures go into, and how pixels become it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError
from deploykit.preprocess import NONE, Preprocess
from deploykit.signature import Dim, ShapeRange, Signature, TensorSpec

_DTYPES = ("float32", "float16", "float64", "uint8")
_CHANNELS = (1, 3)
_WHITE = 255.0


@dataclass(frozen=True)
class ImageInput:
    """name, dtype; layout: nchw | nhwc | nhw | flat; channels 1 or 3; height, width in pixels, None where free."""

    name: str
    dtype: str
    layout: str
    channels: int
    height: int | None
    width: int | None

    def pack(self, pixels: NDArray[np.float32], preprocess: Preprocess) -> NDArray[Any]:
        """The input for pictures [n, height, width, channels or 1] of values 0..255, in its dtype: (x * scale - mean) / std.

        The formula is torchvision's ToTensor and Normalize (scale = 1/255), taken as x * (scale / std) - mean / std, which
        needs half the passes over memory. An integer input takes the pixels, rounded. A single grey serves every channel.
        """
        n, height, width, given = pixels.shape
        whole = self.dtype == "uint8"
        shape = (n, self.channels, height, width) if self.layout == "nchw" else (n, height, width, self.channels)
        packed = np.empty(shape, dtype=self.dtype)
        for channel in range(self.channels):
            place = packed[:, channel] if self.layout == "nchw" else packed[..., channel]
            values = pixels[..., min(channel, given - 1)]
            if whole:
                place[...] = np.clip(np.rint(values), 0, _WHITE)
            else:
                mean, std = (t[min(channel, len(t) - 1)] for t in (preprocess.mean, preprocess.std))
                values = values * np.float32(preprocess.scale / std)
                place[...] = np.subtract(values, np.float32(mean / std), out=values) if mean else values
        if self.layout == "nhw":
            return packed[..., 0]
        return packed.reshape(n, -1) if self.layout == "flat" else packed


def image_input(
    signature: Signature,
    preprocess: Preprocess | None,
    shapes: Mapping[str, ShapeRange] | None = None,
    *,
    flat: tuple[int, int] | None = None,
) -> ImageInput:
    """The input that pictures go into; free heights and widths are taken from the `opt` of `shapes`.

    `flat` is the (height, width) a rank-2 input is the pixels of. Raises DataError when the model has several inputs,
    or one that is no picture, or when the preprocessing does not fit it.
    """
    if len(signature.inputs) != 1:
        names = ", ".join(map(str, signature.inputs))
        raise DataError(f"pictures fill one input, but the model takes {names}", "give an .npz with an array for each input")
    spec = signature.inputs[0]
    if signature.batch_axis(spec) != 0:
        raise DataError(f"input {spec} does not count samples along axis 0, so no picture fits it", "give an .npz")
    if spec.dtype not in _DTYPES:
        raise DataError(f"input {spec} is no picture: its type is not one of {', '.join(_DTYPES)}", "give an .npz")
    found = _layout(spec, _sizes(spec, shapes), preprocess, flat)
    _check_preprocess(found, preprocess or NONE, spec)
    return found


def _sizes(spec: TensorSpec, shapes: Mapping[str, ShapeRange] | None) -> tuple[int | None, ...]:
    known = (shapes or {}).get(spec.name)
    if known is None:
        return tuple(d if isinstance(d, int) else None for d in spec.shape)
    if len(known.opt) != len(spec.shape):
        raise DataError(f"--shapes gives input '{spec.name}' rank {len(known.opt)}, but the model has {spec}")
    return tuple(d if isinstance(d, int) else o for d, o in zip(spec.shape, known.opt, strict=True))


def _layout(
    spec: TensorSpec, sizes: tuple[int | None, ...], preprocess: Preprocess | None, flat: tuple[int, int] | None
) -> ImageInput:
    if len(sizes) == 2 and flat is not None:
        if sizes[1] not in (None, flat[0] * flat[1]):
            raise DataError(f"input {spec} takes {sizes[1]} values a sample, the pictures have {flat[0]}x{flat[1]} pixels")
        return ImageInput(spec.name, spec.dtype, "flat", 1, *flat)
    if len(sizes) == 3:
        return ImageInput(spec.name, spec.dtype, "nhw", 1, sizes[1], sizes[2])
    if len(sizes) != 4:
        raise DataError(f"input {spec} is no picture: it has rank {len(sizes)}, a picture 4 (or 3)", "give an .npz")
    first, last = spec.shape[1], spec.shape[3]
    layout = preprocess.layout if preprocess is not None else _layout_of(first, last)
    channels = sizes[1] if layout == "nchw" else sizes[3]
    if channels is None:
        channels = 3 if preprocess is None or len(preprocess.mean) == 1 else len(preprocess.mean)
    if channels not in _CHANNELS:
        other = "nhwc" if layout == "nchw" else "nchw"
        fits = (last if other == "nhwc" else first) in _CHANNELS
        remedy = f"add layout={other} to --preprocess" if fits else "pictures have 1 or 3 channels; give an .npz"
        raise DataError(f"input {spec} has {channels} channels when read as {layout.upper()}", remedy)
    height, width = (sizes[2], sizes[3]) if layout == "nchw" else (sizes[1], sizes[2])
    return ImageInput(spec.name, spec.dtype, layout, channels, height, width)


def _layout_of(first: Dim, last: Dim) -> str:
    return "nhwc" if first not in _CHANNELS and last in _CHANNELS else "nchw"


def _check_preprocess(found: ImageInput, preprocess: Preprocess, spec: TensorSpec) -> None:
    values = len(preprocess.mean)
    if values not in (1, found.channels):
        raise DataError(
            f"the preprocessing has {values} means and stds, input {spec} has {found.channels} channel(s)",
            "give one of each a channel, or a single one for all",
        )
    plain = not any(preprocess.mean) and set(preprocess.std) == {1.0}
    if found.dtype == "uint8" and not plain:
        raise DataError(
            f"input {spec} takes pixels 0..255 as they are, the preprocessing asks for mean {preprocess.mean} "
            f"and std {preprocess.std}",
            "leave mean and std out of --preprocess",
        )
