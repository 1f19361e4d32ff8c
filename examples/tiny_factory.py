"""A model of one's own, as `deploykit export examples/tiny_factory.py:make --num-classes 4 -o tiny.onnx` takes it.

What deploykit reads beside the factory is optional: INPUTS (texts as of --input), PREPROCESS (text as of --preprocess),
CLASSES, OUTPUTS (names), example_inputs (a dict of tensors; also as an attribute of the module).
"""

import torch
from torch import nn

INPUTS = ("x:float32:batchx3x32x32",)
PREPROCESS = "resize=32,crop=32,mean=0.5/0.5/0.5,std=0.25/0.25/0.25"


class Tiny(nn.Module):
    """Two convolutions and a classifier for 3x32x32 pictures."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, num_classes] of pictures [batch, 3, 32, 32]."""
        return self.head(self.body(x).flatten(1))


def make(num_classes: int = 10) -> nn.Module:
    """The network, untrained: give its weights with --weights PATH."""
    return Tiny(num_classes)
