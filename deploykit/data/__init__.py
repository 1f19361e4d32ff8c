"""DATA made into Samples: `open` reads what the user named, `split` says which samples calibrate and which judge.

One module a reader: images (folders), npz, digits, idx, random_inputs. Readers are picklable and open files lazily.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deploykit.data.digits import open_digits
from deploykit.data.idx import is_idx_folder, open_idx
from deploykit.data.images import EXTENSIONS, list_images, one_image, open_images
from deploykit.data.npz import open_npz
from deploykit.data.random_inputs import open_random
from deploykit.data.split import calibration_share, held_out, limited, split, train_share
from deploykit.errors import DataError
from deploykit.preprocess import Preprocess
from deploykit.samples import Samples
from deploykit.signature import ShapeRange, Signature

__all__ = ["calibration_share", "held_out", "open", "split", "train_share"]

KINDS = (
    "a folder with one sub-folder a class, a folder of images or one image, an .npz, a folder of IDX files, "
    "'digits' (scikit-learn's), or random:N"
)


def open(
    spec: str,
    signature: Signature,
    *,
    preprocess: Preprocess | None = None,
    classes: tuple[str, ...] | None = None,
    limit: int | None = None,
    shapes: Mapping[str, ShapeRange] | None = None,
    skip_unreadable: bool = False,
) -> Samples:
    """All samples of DATA, made ready for a model of that signature; `limit` keeps so many, stratified.

    preprocess: how images become inputs (asked for with image folders; digits and IDX pictures are stretched to the
    input and take its scale, mean and std); classes: the model's class names in order, which sub-folder names must be among;
    shapes: sizes for free axes; skip_unreadable: leaves images out that cannot be decoded, with a note.
    Raises DataError or MissingBackend (digits without scikit-learn).
    """
    samples = _open(spec, signature, preprocess, classes, shapes, skip_unreadable)
    return samples if limit is None else limited(samples, limit)


def _open(
    spec: str,
    signature: Signature,
    preprocess: Preprocess | None,
    classes: tuple[str, ...] | None,
    shapes: Mapping[str, ShapeRange] | None,
    skip_unreadable: bool,
) -> Samples:
    if spec == "digits":
        return open_digits(signature, preprocess, shapes)
    if spec.startswith("random:") or spec == "random":
        return open_random(spec.partition(":")[2], signature, shapes)
    path = Path(spec).expanduser()
    try:
        folder, file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as exc:
        raise DataError(f"DATA '{spec}' cannot be read: {exc}", f"expected {KINDS}") from exc
    if folder and is_idx_folder(path):
        return open_idx(path, signature, preprocess, shapes)
    if folder or (file and path.suffix.lower() in EXTENSIONS):
        listing = list_images(path) if folder else one_image(path)
        return open_images(spec, listing, signature, preprocess, shapes, classes, skip_unreadable=skip_unreadable)
    if file and path.suffix.lower() == ".npz":
        return open_npz(path, signature)
    what = "is a file of another kind" if file else "does not exist"
    raise DataError(f"DATA '{spec}' {what}", f"expected {KINDS}")
