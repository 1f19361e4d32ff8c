"""IDX: a folder of MNIST's file format (train-images-idx3-ubyte, t10k-..., plain or .gz)."""

from __future__ import annotations

import functools
import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploykit.data import content, greys
from deploykit.data.image_input import ImageInput, image_input
from deploykit.errors import DataError
from deploykit.preprocess import Preprocess
from deploykit.samples import Samples
from deploykit.signature import Outputs, ShapeRange, Signature

_UBYTE = 0x08
_PARTS = ("train", "t10k")


@dataclass(frozen=True)
class IdxReader:
    """Reads IDX pictures. One index space: the training file's pictures come first (0 .. train_n - 1), then t10k's."""

    root: str
    images: tuple[str, ...]
    counts: tuple[int, ...]
    train_n: int
    target: ImageInput
    preprocess: Preprocess | None

    def read(self, indices: Sequence[int]) -> Outputs:
        """The model's input for those pictures. Raises DataError naming a damaged file."""
        chosen = np.asarray(indices, dtype=np.int64)
        pictures: NDArray[np.float32] | None = None
        start = 0
        for name, count in zip(self.images, self.counts, strict=True):
            here = (chosen >= start) & (chosen < start + count)
            if here.any():
                part = load(str(Path(self.root) / name))
                if pictures is None:
                    pictures = np.zeros((len(chosen), *part.shape[1:]), dtype=np.float32)
                pictures[here] = part[chosen[here] - start]
            start += count
        if pictures is None:
            raise DataError(f"no samples were asked of {self.root}")
        return greys.feeds(pictures, self.target, self.preprocess)


def is_idx_folder(root: Path) -> bool:
    """Whether a folder holds IDX pictures."""
    return any(_find(root, part, "images", 3) for part in _PARTS)


def open_idx(root: Path, signature: Signature, preprocess: Preprocess | None, shapes: Mapping[str, ShapeRange] | None) -> Samples:
    """The pictures of train-* and t10k-*, whichever are there, with labels when each has them. Raises DataError."""
    images, labels, counts, files = [], [], [], []
    train_n = 0
    size: tuple[int, int] | None = None
    for part in _PARTS:
        path = _find(root, part, "images", 3)
        if path is None:
            continue
        count, height, width = header(path, 3)
        if size not in (None, (height, width)):
            raise DataError(f"{path} holds {height}x{width} pictures, the other file {size}")
        size = (height, width)
        images.append(path.name)
        counts.append(count)
        train_n += count if part == "train" else 0
        files.append(path)
        label_path = _find(root, part, "labels", 1)
        if label_path is not None:
            values = load(str(label_path))
            if len(values) != count:
                raise DataError(f"{label_path} holds {len(values)} labels for the {count} pictures of {path.name}")
            labels.append(values)
            files.append(label_path)
    if size is None or not sum(counts):
        raise DataError(f"{root} holds no IDX pictures", "expected train-images-idx3-ubyte or t10k-images-idx3-ubyte, or .gz")
    target = greys.sized(image_input(signature, preprocess, shapes, flat=size), size)
    notes = greys.note("IDX pictures", size, target)
    if labels and len(labels) < len(images):
        notes += ("labels are missing for one of the files: samples are used without labels",)
    known = len(labels) == len(images)
    return Samples(
        spec=str(root),
        content=content.of_files(root, sorted(p.name for p in files)),
        reader=IdxReader(str(root.resolve()), tuple(images), tuple(counts), train_n, target, preprocess),
        signature=signature,
        preprocess=preprocess,
        indices=tuple(range(sum(counts))),
        labels=tuple(np.concatenate(labels).astype(np.int64).tolist()) if known else None,
        notes=notes,
    )


def header(path: Path, rank: int) -> tuple[int, ...]:
    """The sizes an IDX file of unsigned bytes announces, checked against its length. Raises DataError."""
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
            head = stream.read(4 + 4 * rank)
        with path.open("rb") as stream:
            length = stream.seek(0, 2)
            if zipped:  # the last four bytes of a gzip file: its length unpacked (RFC 1952)
                stream.seek(max(0, length - 4))
                length = int.from_bytes(stream.read(4), "little")
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{path} cannot be read: {exc}", "fetch the file again") from exc
    if len(head) < 4 + 4 * rank or head[:4] != bytes((0, 0, _UBYTE, rank)):
        raise DataError(f"{path} is no IDX file of rank {rank} and unsigned bytes", "fetch the file again")
    sizes = struct.unpack(f">{rank}I", head[4:])
    expected = 4 + 4 * rank + int(np.prod([int(s) for s in sizes]))
    if length != expected % 2**32 and length != expected:
        raise DataError(f"{path} is damaged: {length} bytes long, its header asks for {expected}", "fetch the file again")
    return sizes


def load(path: str) -> NDArray[np.uint8]:
    """The array of an IDX file: [n, h, w] pictures or [n] labels. Raises DataError for a damaged one."""
    try:
        return _load(path, Path(path).stat().st_mtime_ns)
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}", "fetch the file again") from exc


@functools.lru_cache(maxsize=8)
def _load(path: str, _mtime_ns: int) -> NDArray[np.uint8]:
    file = Path(path)
    rank = 3 if "idx3" in file.name else 1
    sizes = header(file, rank)
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            data = stream.read()
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{path} is damaged: {exc}", "fetch the file again") from exc
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(sizes)):
        raise DataError(
            f"{path} is damaged: {values.size} values, its header asks for {int(np.prod(sizes))}", "fetch the file again"
        )
    return values.reshape(sizes)


def _find(root: Path, part: str, what: str, rank: int) -> Path | None:
    for dash in ("-", "."):  # some mirrors write train-images.idx3-ubyte
        for end in ("", ".gz"):
            path = root / f"{part}-{what}{dash}idx{rank}-ubyte{end}"
            if path.is_file():
                return path
    return None
