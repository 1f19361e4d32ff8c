"""Pixels: an image file decoded, turned upright, and resized and cropped as torchvision does it."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deploykit.data.image_input import ImageInput
from deploykit.errors import DataError
from deploykit.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

_WIDE_GREYS = ("I;16", "I;16L", "I;16B", "I;16N")
_WHITE_16 = 65535.0
_WHITE_8 = 255.0
_REMEDY = "replace or remove the file"
_VERIFY_SIZE = (64, 64)


def check(path: Path) -> str:
    """Why an image file cannot be decoded to its last byte; empty when it can.

    JPEGs are decoded at a reduced scale (draft mode): every coded bit is still read, so truncation shows, at a third of
    the time.
    """
    from PIL import Image

    try:
        with _naming(path), Image.open(path) as image:
            image.draft("RGB", _VERIFY_SIZE)
            image.load()
            if image.mode == "F" or (image.mode == "I" and _white_of_int(image) is None):
                return f"its {image.mode} values have no known white"
    except DataError as exc:
        return str(exc.__cause__) or type(exc.__cause__).__name__
    return ""


def decode(path: Path, target: ImageInput, preprocess: Preprocess) -> NDArray[np.float32]:
    """[height, width, 3] of 0..255, or [height, width, 1] of a grey input or a 16-bit image, resized and cropped.

    EXIF orientation is applied; palette, CMYK, YCbCr and bilevel images become RGB or grey; alpha is dropped, as
    torchvision's loader does; 16-bit greys are scaled, keeping their depth, never clipped. Raises DataError naming the file.
    """
    from PIL import Image

    with _naming(path), Image.open(path) as opened:
        opened.load()
        image = _to_channels(path, _upright(opened), target.channels)
    image = _geometry(path, image, target, preprocess)
    pixels = np.clip(np.asarray(image, dtype=np.float32), 0.0, np.float32(_WHITE_8))  # bicubic overshoots in 16-bit greys
    return pixels[..., None] if pixels.ndim == 2 else pixels


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings about large images inside; the refusal of ones twice as large (decompression bombs) stays.

    For the thread that starts decoders, not for each of them: warning filters belong to the whole process.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what Pillow raises on a damaged file into a DataError that names it."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as exc:
        raise DataError(f"{path} has more pixels than is safe to decode: {exc}", _REMEDY) from exc
    except _DECODE_ERRORS as exc:
        raise DataError(f"{path} cannot be decoded: {str(exc) or type(exc).__name__}", _REMEDY) from exc


# What Pillow's decoders raise on damaged files (OSError holds UnidentifiedImageError and truncation).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data says; as it is where that data is damaged, since the pixels are not."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image


def _to_channels(path: Path, image: Image.Image, channels: int) -> Image.Image:
    """L or RGB; F with values 0..255 for 16-bit greys."""
    if image.mode in _WIDE_GREYS or image.mode == "I":
        white = _WHITE_16 if image.mode in _WIDE_GREYS else _white_of_int(image)
        if white is None:
            raise DataError(f"{path} holds 32-bit integers, and nothing says which value is white", "save it as 8 or 16 bits")
        from PIL import Image as Images

        greys = np.asarray(image).astype(np.float32) * np.float32(_WHITE_8 / white)
        return Images.fromarray(greys)
    if image.mode == "F":
        raise DataError(f"{path} holds floating-point values, and nothing says which value is white", "save it as 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns, and the colours behind it are the same
    return image.convert("L" if channels == 1 else "RGB")


def _white_of_int(image: Image.Image) -> float | None:
    """65535 for a 16-bit PNG or PGM, which older Pillow opens as 32-bit integers; None where white is not known."""
    return _WHITE_16 if image.format in ("PNG", "PPM") else None


def _geometry(path: Path, image: Image.Image, target: ImageInput, preprocess: Preprocess) -> Image.Image:
    """torchvision.transforms: Resize (shorter side, antialiased), then CenterCrop; with neither, stretched to the input."""
    from PIL import Image

    filter_ = Image.Resampling.BICUBIC if preprocess.interpolation == "bicubic" else Image.Resampling.BILINEAR
    if preprocess.resize is not None:
        width, height = _shorter_side(image.size, preprocess.resize)
        if (width, height) != image.size:
            image = image.resize((width, height), filter_)
    if preprocess.crop is not None:
        image = _centre_crop(image, preprocess.crop)
    if preprocess.resize is None and preprocess.crop is None:
        if target.height is None or target.width is None:
            raise DataError(f"nothing says which size {path} is to have", "add crop=224 to --preprocess, or give --shapes")
        return image.resize((target.width, target.height), filter_)
    got = (image.height, image.width)
    if (target.height or got[0], target.width or got[1]) != got:
        raise DataError(
            f"{path} is {got[0]}x{got[1]} after the preprocessing, the model takes {target.height}x{target.width}",
            "add a crop to --preprocess, such as resize=256,crop=224",
        )
    return image


def _shorter_side(size: tuple[int, int], to: int) -> tuple[int, int]:
    """torchvision.transforms.functional, _compute_resized_output_size: the longer side is rounded down."""
    width, height = size
    if width <= height:
        return to, int(to * height / width)
    return int(to * width / height), to


def _centre_crop(image: Image.Image, to: int) -> Image.Image:
    """torchvision.transforms.functional, center_crop: a smaller image is padded with black, offsets rounded half to even."""
    from PIL import ImageOps

    if image.width < to or image.height < to:
        across, down = max(to - image.width, 0), max(to - image.height, 0)
        image = ImageOps.expand(image, (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2), fill=0)
    top = round((image.height - to) / 2.0)
    left = round((image.width - to) / 2.0)
    return image.crop((left, top, left + to, top + to))
