"""The most likely classes of each image:  python run.py IMAGE... [--top 5]  (preprocessing as in model/preprocess.json)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = Path(__file__).parent / "model"


def model_facts() -> dict[str, Any]:
    """What model/model.json says: file, inputs, outputs, batch."""
    facts: dict[str, Any] = json.loads((MODEL / "model.json").read_text())
    return facts


def preprocessed(path: Path, how: dict[str, Any]) -> NDArray[Any]:
    """One image as the model's input, without the batch axis: resized, cropped, (pixel * scale - mean) / std."""
    from PIL import Image, ImageOps

    image: Any = ImageOps.exif_transpose(Image.open(path)).convert("L" if how["channels"] == 1 else "RGB")
    filter_ = Image.Resampling.BICUBIC if how["interpolation"] == "bicubic" else Image.Resampling.BILINEAR
    if how["resize"] is not None:
        width, height = image.size
        short = how["resize"]
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize(size, filter_)
    if how["crop"] is not None:
        crop = how["crop"]
        across, down = max(crop - image.width, 0), max(crop - image.height, 0)
        image = ImageOps.expand(image, (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2), fill=0)
        left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    if how["resize"] is None and how["crop"] is None:
        image = image.resize((how["width"], how["height"]), filter_)
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, how["channels"])
    if how["dtype"] == "uint8":
        values: NDArray[Any] = pixels.round().astype(np.uint8)
    else:
        mean, std = np.float32(how["mean"]), np.float32(how["std"])
        values = ((pixels * np.float32(how["scale"]) - mean) / std).astype(how["dtype"])
    return values.transpose(2, 0, 1) if how["layout"] == "nchw" else values


def main() -> int:
    """Prints the classes; 2 where the package says nothing about images, or gives no class scores."""
    from engine import Engine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()
    if not (MODEL / "preprocess.json").is_file():
        sys.stderr.write("this package holds no preprocess.json: feed arrays to engine.Engine instead\n")
        return 2
    how = json.loads((MODEL / "preprocess.json").read_text())
    names = (MODEL / "classes.txt").read_text().splitlines() if (MODEL / "classes.txt").is_file() else []
    facts = model_facts()
    given = facts["outputs"][0]
    if len(given["shape"]) != 2:
        sys.stderr.write(f"output {given['name']} has shape {given['shape']}: no class scores; use engine.Engine instead\n")
        return 2
    engine = Engine(MODEL, facts)
    for path in options.images:
        one = preprocessed(path, how)
        batch = np.stack([one] * facts["batch"])  # the engine was packaged for this batch
        scores = engine.infer({how["input"]: batch})[given["name"]][0].astype(np.float64)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        sys.stdout.write(f"{path}\n")
        for index in np.argsort(-shares)[: options.top]:
            sys.stdout.write(f"  {index:5d}  {shares[index]:.4f}  {names[index] if index < len(names) else ''}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
