"""Images decoded and preprocessed as torchvision does it, whatever their mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit.data import pixels
from deploykit.data.image_input import ImageInput
from deploykit.errors import DataError
from deploykit.preprocess import NONE, Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(large + rng.integers(-20, 20, large.shape), 0, 255).astype(np.uint8)


def target(size: int | None, channels: int = 3, layout: str = "nchw", dtype: str = "float32") -> ImageInput:
    return ImageInput("x", dtype, layout, channels, size, size)


def made_ready(path: Path, to: ImageInput, preprocess: Preprocess) -> np.ndarray:
    return to.pack(pixels.decode(path, to, preprocess)[None], preprocess)


@pytest.mark.parametrize("size", [(640, 480), (333, 517), (50, 41), (300, 300), (257, 1025)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_crop_normalize_match_torchvision(tmp_path: Path, size: tuple[int, int], interpolation: str) -> None:
    from torchvision import transforms

    path = tmp_path / "a.png"
    Image.fromarray(photo(*size)).save(path)
    preprocess = Preprocess(resize=72, crop=64, mean=MEAN, std=STD, interpolation=interpolation)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose(
        [transforms.Resize(72, mode), transforms.CenterCrop(64), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    expected = theirs(Image.open(path).convert("RGB")).numpy()
    got = made_ready(path, target(64), preprocess)[0]
    assert np.abs(got - expected).max() <= 1 / 255 / min(STD)
    assert np.abs(got - expected).mean() < 1e-4


@pytest.mark.parametrize(("size", "crop"), [((30, 30), 41), ((100, 37), 64), ((65, 66), 32)])
def test_centre_crop_alone_pads_as_torchvision(tmp_path: Path, size: tuple[int, int], crop: int) -> None:
    from torchvision import transforms

    path = tmp_path / "a.png"
    Image.fromarray(photo(*size)).save(path)
    expected = transforms.Compose([transforms.CenterCrop(crop), transforms.ToTensor()])(Image.open(path)).numpy()
    assert np.abs(made_ready(path, target(crop), Preprocess(crop=crop))[0] - expected).max() < 1e-6


def test_without_resize_and_crop_the_image_is_stretched(tmp_path: Path) -> None:
    from torchvision import transforms

    path = tmp_path / "a.png"
    Image.fromarray(photo(80, 50)).save(path)
    expected = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])(Image.open(path)).numpy()
    assert np.abs(made_ready(path, target(32), NONE)[0] - expected).max() <= 1 / 255 + 1e-6


def test_nhwc_and_uint8_hold_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photo(32, 32)).save(path)
    planar = made_ready(path, target(32), NONE)
    packed = made_ready(path, target(32, layout="nhwc"), NONE)
    raw = made_ready(path, target(32, layout="nhwc", dtype="uint8"), NONE)
    assert packed.shape == (1, 32, 32, 3)
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(planar.transpose(0, 2, 3, 1), packed)
    np.testing.assert_array_equal(raw[0], np.asarray(Image.open(path)))


def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        got = made_ready(tmp_path / name, target(64), NONE)[0]
        assert got.shape == (3, 64, 64)
        assert np.abs(got - ramp / 65535).max() < 1e-5


def test_sixteen_bit_greys_stay_within_black_and_white_when_resized(tmp_path: Path) -> None:
    steps = np.zeros((40, 40), dtype=np.uint16)
    steps[:, 20:] = 65535
    Image.fromarray(steps).save(tmp_path / "a.png")
    got = made_ready(tmp_path / "a.png", target(16), Preprocess(resize=16, interpolation="bicubic"))
    assert (got.min(), got.max()) == (0.0, 1.0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "PA", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_colours_pillow_says_it_has(tmp_path: Path, mode: str, channels: int) -> None:
    suffix = {"CMYK": "tif", "YCbCr": "tif", "PA": "tif"}.get(mode, "png")
    path = tmp_path / f"a.{suffix}"
    base = Image.fromarray(photo(40, 40))
    image = base.convert("LA").convert("PA") if mode == "PA" else base.convert(mode)
    try:
        image.save(path)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {mode} as {suffix}")
    got = made_ready(path, target(40, channels), NONE)[0]
    expected = np.asarray(Image.open(path).convert("RGB" if channels == 3 else "L"), dtype=np.float32) / 255
    expected = expected.transpose(2, 0, 1) if channels == 3 else expected[None]
    assert np.abs(got - expected).max() <= 1 / 255 + 1e-6


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(photo(16, 16)).quantize(16)
    image.save(tmp_path / "a.png", transparency=0)
    got = made_ready(tmp_path / "a.png", target(16), NONE)[0]
    assert np.abs(got * 255 - np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)).max() < 1e-3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(48, 24)).save(path, exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)), dtype=np.float32)
    got = pixels.decode(path, target(None), Preprocess(resize=min(upright.shape[:2])))
    np.testing.assert_array_equal(got, upright)


def test_damaged_exif_data_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(photo(24, 24)).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert pixels.check(path) == ""
    assert pixels.decode(path, target(24), NONE).shape == (24, 24, 3)


def test_floating_point_and_32_bit_images_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.ones((8, 8), dtype=np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(DataError, match=name):
            pixels.decode(tmp_path / name, target(8), NONE)
        assert pixels.check(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_truncated_and_garbage_files_are_one_error_naming_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photo(90, 70)).save(path)
    assert pixels.check(path) == ""
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x89PNG\r\n\x1a\n" + bytes(40), b"text\n" * 50):
        path.write_bytes(damaged)
        assert pixels.check(path)
        with pytest.raises(DataError, match=f"a.{suffix}"):
            pixels.decode(path, target(8), NONE)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photo(64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="more pixels than is safe"):
        pixels.decode(path, target(8), NONE)
    assert "decompression bomb" in pixels.check(path)


def test_an_image_that_misses_the_input_size_says_to_crop(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photo(64, 32)).save(path)
    with pytest.raises(DataError, match="16x32 after the preprocessing") as error:
        pixels.decode(path, target(16), Preprocess(resize=16))
    assert "crop" in str(error.value)
