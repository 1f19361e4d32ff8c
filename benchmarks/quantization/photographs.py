"""Photographs to calibrate, tune and judge on, where no ImageNet is: those in Debian packages and in one wheel, as crops.

    python benchmarks/quantization/photographs.py --folder build/photographs

Downloads the packages below with `apt-get download` and the wheel with `pip download` (nothing is installed), takes the
photographs out, and writes 224x224 PNG crops into FOLDER/calibrate, FOLDER/tune and FOLDER/judge, several of each photograph.
The split is by photograph: those that look alike (the same monument taken twice, or one photograph in two sizes) count as one, so
no share holds a crop of what another one holds. Which share a photograph falls into depends on its content alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 224
_OPENCV = """aero1 aloeL apple baboon board building butterfly fruits ela_original home leuvenA licenseplate_motion messi5
    orange squirrel_cls"""
DEBIAN = {  # package -> patterns of what in it is a photograph
    "gcompris-qt-data": ("*.rcc",),
    "mate-backgrounds": ("*/nature/*.jpg",),
    "kphotoalbum": ("*/demo/*.jpg",),
    "opencv-doc": tuple(f"*/examples/data/{name}.jpg" for name in _OPENCV.split()),
}
# Activities of GCompris whose pictures are photographs (the others hold drawings and paintings).
ACTIVITIES = (
    "categorization",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
WHEEL, WHEEL_PATTERN = "foolbox", "foolbox/data/imagenet_*.jpg"
SHARES = {"calibrate": (0.0, 0.25), "tune": (0.25, 0.5), "judge": (0.5, 1.0)}
CROPS = {"calibrate": 3, "tune": 3, "judge": 3}
ALIKE = 0.93  # correlation of two 16x16 greys above which two pictures count as one photograph
LEAST_SIDE = 200


@dataclass(frozen=True)
class Photograph:
    """One picture, and where it came from."""

    origin: str
    image: Image.Image
    digest: str


def downloaded(folder: Path) -> Path:
    """The folder with the packages unpacked, one sub-folder each; what is there already is not fetched again."""
    files = folder / "packages"
    files.mkdir(parents=True, exist_ok=True)
    for package in DEBIAN:
        if not (files / package).is_dir():
            archives = folder / "archives"
            archives.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "-q", package], cwd=archives, check=True)
            (archive,) = archives.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, files / package], check=True)
    if not (files / WHEEL).is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder / "archives", WHEEL]
        subprocess.run(command, check=True)
        (archive,) = (folder / "archives").glob(f"{WHEEL}-*.whl")
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(files / WHEEL)
    return files


def photographs(files: Path) -> Iterator[Photograph]:
    """Every photograph once (by its bytes), in an order fixed by its content."""
    found: dict[str, Photograph] = {}
    for origin, data in _pictures(files):
        digest = hashlib.sha256(data).hexdigest()
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, ValueError):
            continue
        if min(image.size) >= LEAST_SIDE and not _transparent(image):
            found[digest] = Photograph(origin, image.convert("RGB"), digest)
    yield from (found[digest] for digest in sorted(found))


def _pictures(files: Path) -> Iterator[tuple[str, bytes]]:
    for package, patterns in {**DEBIAN, WHEEL: (WHEEL_PATTERN,)}.items():
        for pattern in patterns:
            for path in sorted((files / package).rglob(pattern)):
                if path.suffix != ".rcc":
                    yield f"{package} {path.name}", path.read_bytes()
                elif path.stem in ACTIVITIES:
                    yield from ((f"{package} {path.stem}", data) for data in _in_rcc(path.read_bytes()))


def _in_rcc(blob: bytes) -> Iterator[bytes]:
    """The JPEG and WebP files in a Qt resource file: each lies uncompressed, after its size in 4 bytes (big endian)."""
    starts = [i for mark in (b"\xff\xd8\xff", b"RIFF") for i in _all(blob, mark)]
    end = 0
    for start in sorted(starts):
        size = int.from_bytes(blob[max(start - 4, 0) : start], "big")
        if start >= end and 1024 < size <= len(blob) - start:
            end = start + size
            yield blob[start:end]


def _all(blob: bytes, mark: bytes) -> Iterator[int]:
    place = blob.find(mark)
    while place >= 0:
        yield place
        place = blob.find(mark, place + 1)


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] < 255  # type: ignore[operator]


def groups(found: list[Photograph]) -> list[int]:
    """For each photograph the number of the first one that looks like it (or like one that does)."""
    greys = np.stack([_grey(p.image) for p in found])
    alike = greys @ greys.T / greys.shape[1] > ALIKE
    group = list(range(len(found)))
    for i in range(len(found)):
        for j in np.flatnonzero(alike[i, :i]):
            old, new = max(group[i], group[j]), min(group[i], group[j])
            group = [new if g == old else g for g in group]
    return group


def _grey(image: Image.Image) -> NDArray[np.float64]:
    small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), np.float64).reshape(-1)
    return np.asarray((small - small.mean()) / max(small.std(), 1e-9))


def share_of(digest: str) -> str:
    """The share that a photograph's group falls into, by the sha256 of its first one."""
    place = int(digest[:8], 16) / 2**32
    return next(name for name, (low, high) in SHARES.items() if low <= place < high)


def crops(photograph: Photograph, count: int) -> Iterator[Image.Image]:
    """`count` square crops of 224 pixels: the middle one of 0.875 of the shorter side (the usual evaluation), then random ones
    of 0.45 to 1 of it, half of them mirrored."""
    rng = np.random.default_rng(int(photograph.digest[:16], 16))
    width, height = photograph.image.size
    for number in range(count):
        side = int(min(width, height) * (0.875 if number == 0 else rng.uniform(0.45, 1.0)))
        left, top = (width - side) // 2, (height - side) // 2
        if number:
            left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
        crop = photograph.image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number and rng.random() < 0.5 else crop


def main() -> None:
    """Writes the crops, and what they were made from as FOLDER/photographs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/photographs"))
    folder = parser.parse_args().folder
    found = list(photographs(downloaded(folder)))
    group = groups(found)
    doc: dict[str, Any] = {"photographs": len(found), "apart": len(set(group)), "shares": {}}
    counts = {share: [0, 0, 0] for share in SHARES}
    for number, photograph in enumerate(found):
        share = share_of(found[group[number]].digest)
        target = folder / share
        target.mkdir(parents=True, exist_ok=True)
        counts[share][0] += 1
        counts[share][1] += group[number] == number
        for i, crop in enumerate(crops(photograph, CROPS[share])):
            crop.save(target / f"{photograph.digest[:12]}-{i}.png")
            counts[share][2] += 1
    for share, (photos, apart, pieces) in counts.items():
        doc["shares"][share] = {"photographs": photos, "apart": apart, "crops": pieces}
        print(f"{share}: {photos} photographs ({apart} that look unlike), {pieces} crops")
    doc["origins"] = {p.digest[:12]: p.origin for p in found}
    (folder / "photographs.json").write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()
