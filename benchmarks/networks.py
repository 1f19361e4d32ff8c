"""Well-known networks as factories, for `deploykit export benchmarks/networks.py:NAME`.

Their weights are seeded and random, but the statistics of their batch normalisation are measured on random images, so that
activations have the size that they have in a trained network: as initialised, those of MobileNetV2 fade below what FP16
holds, and layers are kept in float for it. The detector ends in raw heads, without the drawing of boxes.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn
from torchvision import models

SIZES = {"lraspp_mobilenet_v3_large": 256, "ssdlite320_mobilenet_v3_large": 320}


class Segmenter(nn.Module):
    """Images -> class logits at every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.whole(x)["out"]
        return found


class Detector(nn.Module):
    """Images -> box offsets [batch, anchors, 4] and class logits [batch, anchors, 91]."""

    def __init__(self) -> None:
        super().__init__()
        whole = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.head(list(self.backbone(x).values()))
        return found["bbox_regression"], found["cls_logits"]


def _measured(name: str, module: nn.Module) -> nn.Module:
    """The module with the statistics of its batch normalisations taken on 16 random images."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    size = SIZES.get(name, 224)
    generator = torch.Generator().manual_seed(0)
    module.train()
    with torch.no_grad():
        for _ in range(4):
            module(torch.randn(4, 3, size, size, generator=generator))
    return module.eval()


def _make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "lraspp_mobilenet_v3_large":
        module: Any = Segmenter()
    elif name == "ssdlite320_mobilenet_v3_large":
        module = Detector()
    elif name == "efficientnet_lite0":
        module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    else:
        module = models.get_model(name, weights=None)
    return _measured(name, module)


def resnet18() -> nn.Module:
    return _make("resnet18")


def resnet34() -> nn.Module:
    return _make("resnet34")


def resnet50() -> nn.Module:
    return _make("resnet50")


def mobilenet_v2() -> nn.Module:
    return _make("mobilenet_v2")


def efficientnet_lite0() -> nn.Module:
    return _make("efficientnet_lite0")


def lraspp_mobilenet_v3_large() -> nn.Module:
    return _make("lraspp_mobilenet_v3_large")


def ssdlite320_mobilenet_v3_large() -> nn.Module:
    return _make("ssdlite320_mobilenet_v3_large")
