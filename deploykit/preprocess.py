"""Preprocess: how an image becomes a model's input; part of every manifest and of the calibration's fingerprint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deploykit.errors import InputError


@dataclass(frozen=True)
class Preprocess:
    """resize: the shorter side in pixels (None: straight to the input's size); crop: centre crop, pixels;
    mean, std: per channel, of values scaled to 0..1; layout: nchw or nhwc; interpolation: bilinear or bicubic;
    scale: 1/255 by default (uint8 pixels to 0..1), 1.0 keeps 0..255.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "nchw"
    interpolation: str = "bilinear"
    scale: float = 1.0 / 255.0

    def __post_init__(self) -> None:
        if self.layout not in ("nchw", "nhwc"):
            raise InputError(f"preprocessing layout '{self.layout}' is not known", "use layout=nchw or layout=nhwc")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise InputError(f"interpolation '{self.interpolation}' is not known", "use bilinear or bicubic")
        if any(not value > 0 for value in self.std):
            raise InputError(f"preprocessing std must be positive, not {self.std}")
        if len(self.mean) != len(self.std):
            raise InputError(f"mean has {len(self.mean)} values and std {len(self.std)}", "give one of each a channel")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise InputError(f"crop={self.crop} is larger than resize={self.resize}")

    def to_json(self) -> dict[str, Any]:
        """A JSON document that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Preprocess:
        """The preprocessing that `to_json` wrote."""
        return cls(**{**doc, "mean": tuple(doc["mean"]), "std": tuple(doc["std"])})


NONE = Preprocess()
IMAGENET = Preprocess(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def chosen(text: str | None, kept: dict[str, Any] | None) -> Preprocess | None:
    """What --preprocess asks for, over what a manifest keeps (`to_json`'s document); None where neither says anything.

    'timm' asks for the manifest's own. Raises InputError where it has none, and what `parse` raises.
    """
    if text not in (None, "timm"):
        return parse(text)
    if kept:
        return Preprocess.from_json(kept)
    if text == "timm":
        raise InputError(
            "--preprocess timm: the model's manifest names no preprocessing of its own", "give resize=..,crop=..,mean=..,std=.."
        )
    return None


def parse(text: str) -> Preprocess:
    """Preprocessing from `resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,layout=nhwc`
    (the numbers of a list may be separated by commas too).

    `none` only scales to 0..1 and resizes to the input's size; `imagenet` is torchvision's classification preset;
    `timm` is resolved by the source, which alone knows it. A single mean or std serves every channel.
    Raises InputError naming the bad item.
    """
    if text == "none":
        return NONE
    if text == "imagenet":
        return IMAGENET
    doc: dict[str, Any] = {}
    for item in _items(text):
        name, _, value = item.partition("=")
        try:
            if name in ("resize", "crop"):
                doc[name] = int(value)
                if doc[name] <= 0:
                    raise ValueError
            elif name in ("mean", "std"):
                doc[name] = tuple(float(v) for v in value.split("/"))
            elif name == "scale":
                doc[name] = float(value)
            elif name in ("layout", "interpolation"):
                doc[name] = value
            else:
                raise InputError(
                    f"--preprocess does not know '{item}'",
                    "example: --preprocess resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225",
                )
        except ValueError as exc:
            raise InputError(f"--preprocess: '{value}' is not a value for {name}") from exc
    doc.setdefault("mean", (0.0,) * len(doc.get("std", (0.0,))))
    doc.setdefault("std", (1.0,) * len(doc["mean"]))
    return Preprocess(**doc)


def _items(text: str) -> list[str]:
    items: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        if "=" not in piece and items and items[-1].split("=")[0] in ("mean", "std"):
            items[-1] += f"/{piece}"
        else:
            items.append(piece)
    return items
