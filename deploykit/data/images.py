"""Images: a folder with one sub-folder a class, or a flat folder of images."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from deploykit import children
from deploykit.data import content, pixels
from deploykit.data.image_input import ImageInput, image_input
from deploykit.errors import DataError
from deploykit.preprocess import Preprocess
from deploykit.samples import Samples
from deploykit.signature import Outputs, ShapeRange, Signature

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".avif", ".jp2", ".tga", ".ico"}
)
_SHARES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev"})
_DECODERS = 2
_SHOWN = 5


@dataclass(frozen=True)
class ImageReader:
    """Reads images by their place in `files` (relative to `root`); digests: the sha256 of each file's bytes."""

    root: str
    files: tuple[str, ...]
    digests: tuple[str, ...]
    target: ImageInput
    preprocess: Preprocess

    def read(self, indices: Sequence[int]) -> Outputs:
        """The model's input for those images. Raises DataError naming the file that cannot be decoded."""
        distinct = list(dict.fromkeys(indices))
        paths = [Path(self.root) / self.files[i] for i in distinct]
        decode = partial(pixels.decode, target=self.target, preprocess=self.preprocess)
        with pixels.quiet(), ThreadPoolExecutor(_DECODERS) as pool:
            pictures = dict(zip(distinct, pool.map(decode, paths), strict=True))
        sizes = {picture.shape for picture in pictures.values()}
        if len(sizes) > 1:
            shown = ", ".join(f"{h}x{w}" for h, w, _ in sorted(sizes))
            raise DataError(f"the images of one batch have different sizes after the preprocessing: {shown}", "add a crop to it")
        return {self.target.name: self.target.pack(np.stack([pictures[i] for i in indices]), self.preprocess)}


@dataclass(frozen=True)
class Listing:
    """Image files relative to `root`, in order; their class folders (None: a flat folder); what was left aside."""

    root: Path
    files: tuple[str, ...]
    folders: tuple[str, ...] | None
    notes: tuple[str, ...]


def open_images(
    spec: str,
    listing: Listing,
    signature: Signature,
    preprocess: Preprocess | None,
    shapes: Mapping[str, ShapeRange] | None,
    classes: tuple[str, ...] | None,
    *,
    skip_unreadable: bool = False,
) -> Samples:
    """The images of `listing`, each decoded once to know that it can be (remembered by size and time).

    Raises DataError: no preprocessing, a sub-folder that is none of `classes`, an image that cannot be decoded (or, with
    `skip_unreadable`, only when none can).
    """
    if preprocess is None:
        raise DataError(
            f"{spec} holds images, and nothing says how they become the model's input",
            "add --preprocess, for example resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225, or imagenet, or none",
        )
    target = image_input(signature, preprocess, shapes)
    _check_sizes(target, preprocess)
    root = listing.root
    order, notes = _class_order(spec, listing, classes)
    facts = _facts(root, listing.files)
    keep = [i for i, fact in enumerate(facts) if fact.decodes]
    notes = listing.notes + notes + _about_unreadable(root, listing.files, facts, skip=skip_unreadable)
    labels = None
    if listing.folders is not None and order is not None:
        index = {name: i for i, name in enumerate(order)}
        labels = tuple(index[listing.folders[i]] for i in keep)
    files, digests = tuple(listing.files[i] for i in keep), tuple(facts[i].sha256 for i in keep)
    return Samples(
        spec=spec,
        content=content.combine(dict(zip(files, digests, strict=True))),
        reader=ImageReader(str(root.resolve()), files, digests, target, preprocess),
        signature=signature,
        preprocess=preprocess,
        indices=tuple(range(len(keep))),
        labels=labels,
        classes=order,
        notes=notes,
    )


def _class_order(spec: str, listing: Listing, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """(class names in label order, what to note about it)."""
    if listing.folders is None:
        return classes, ()
    names = sorted(set(listing.folders))
    if not classes:
        return tuple(names), _about_order(names)
    for name in names:
        if name not in classes:
            close = difflib.get_close_matches(name, classes, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise DataError(
                f"sub-folder '{name}' of {spec} is none of the model's {len(classes)} classes ({_shown(classes)})",
                f"{hint}name the sub-folders after the classes, or give the class names in the model's order with --classes FILE",
            )
    return classes, ()


def one_image(path: Path) -> Listing:
    """A single image as a listing."""
    return Listing(path.parent, (path.name,), None, ())


def list_images(root: Path) -> Listing:
    """The images of a folder, in sorted order. Raises DataError when there are none."""
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as exc:
        raise DataError(f"{root} cannot be listed: {exc.strerror}", "check the folder's permissions") from exc
    folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if entry.is_file() or (entry.is_symlink() and not entry.exists())]
    below = {folder.name: _walk(folder) for folder in folders}
    notes: list[str] = []
    if any(images for images, _ in below.values()):
        filled = {name for name, (images, _) in below.items() if images}
        if filled <= _SHARES:
            raise DataError(
                f"the sub-folders of {root} are the shares of a data set ({', '.join(sorted(filled))}), not classes",
                f"name one of them: --data {root / sorted(filled)[-1]} (--calib-data takes another)",
            )
        files = [(name, image) for name in sorted(filled) for image in below[name][0]]
        other = [path for _, rest in below.values() for path in rest] + loose
        empty = sorted(set(below) - filled)
        if empty:
            notes.append(f"class folders without images: {_shown(empty)}")
        listing = tuple(str(image.relative_to(root)) for _, image in files)
        labels: tuple[str, ...] | None = tuple(name for name, _ in files)
    else:
        listing = tuple(entry.name for entry in loose if entry.suffix.lower() in EXTENSIONS)
        other = [entry for entry in loose if entry.suffix.lower() not in EXTENSIONS]
        labels = None
    if not listing:
        raise DataError(
            f"{root} holds no images" + (f" (only: {_shown([p.name for p in other])})" if other else ""),
            "expected one sub-folder a class, image files, or IDX files (train-images-idx3-ubyte)",
        )
    if other:
        notes.append(f"{len(other)} file(s) left aside: {_shown([str(p.relative_to(root)) for p in other])}")
    return Listing(root, listing, labels, tuple(notes))


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """(images, other files) below a folder, sorted; links are followed, each folder once."""
    images: list[Path] = []
    other: list[Path] = []
    seen: set[str] = set()
    for where, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                (images if Path(name).suffix.lower() in EXTENSIONS else other).append(Path(where) / name)
    return sorted(images), sorted(other)


def _check_sizes(target: ImageInput, preprocess: Preprocess) -> None:
    wanted = (target.height, target.width)
    side = preprocess.crop
    if side is not None and any(size not in (None, side) for size in wanted):
        raise DataError(
            f"the preprocessing crops to {side}x{side}, input '{target.name}' takes {wanted[0]}x{wanted[1]}",
            f"use crop={wanted[0]}"
            if wanted[0] == wanted[1]
            else "leave resize and crop out, which stretches to the input's size",
        )
    if side is None and preprocess.resize is None and None in wanted:
        raise DataError(
            f"input '{target.name}' has a free height or width, and nothing says which size the images are to have",
            f"add crop=224 to --preprocess, or --shapes {target.name}=...",
        )


def _facts(root: Path, files: Sequence[str]) -> list[content.FileFacts]:
    """sha256 and decodability of each file, from the cache where it has not changed."""
    cache = content.ContentCache(root)
    known = {relative: fact for relative in files if (fact := cache.get(relative)) is not None and fact.decodes is not None}
    unknown = [relative for relative in files if relative not in known]
    if not unknown:
        return [known[relative] for relative in files]  # Pillow stays unimported
    with pixels.quiet(), ThreadPoolExecutor(_DECODERS) as pool:
        for done, (relative, fact) in enumerate(zip(unknown, pool.map(partial(_examine, root), unknown), strict=True), 1):
            known[relative] = fact
            cache.put(relative, fact)
            children.report_progress("reading images", done / len(unknown))
    cache.save()
    return [known[relative] for relative in files]


def _examine(root: Path, relative: str) -> content.FileFacts:
    reason = pixels.check(root / relative)
    try:
        return content.FileFacts(content.file_sha256(root / relative), not reason, reason)
    except DataError as exc:  # a broken link, no permission: unreadable like a damaged one
        return content.FileFacts("", False, reason or exc.message)


def _about_unreadable(root: Path, files: Sequence[str], facts: Sequence[content.FileFacts], *, skip: bool) -> tuple[str, ...]:
    bad = [(files[i], fact.reason) for i, fact in enumerate(facts) if not fact.decodes]
    if not bad:
        return ()
    name, reason = bad[0]
    if not skip or len(bad) == len(files):
        more = f" ({len(bad)} of {len(files)} images cannot be decoded)" if len(bad) > 1 else ""
        raise DataError(
            f"{root / name} cannot be decoded: {reason}{more}",
            "replace or remove it",
        )
    return (f"{len(bad)} image(s) that cannot be decoded were left out: {_shown([n for n, _ in bad])}",)


def _about_order(names: Sequence[str]) -> tuple[str, ...]:
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != names:
        return ("class folders are numbers sorted as text (1, 10, 2), as torchvision does; give --classes for another order",)
    return ()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
