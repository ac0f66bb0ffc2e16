"""Chapter 15: small convolutional networks for digits that show what is inside them.

Shapes: N pictures of side × side pixels, 10 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from kd_helpers.methods.digits import CLASSES


class Seen(NamedTuple):
    """What a network makes of N pictures.

    Attributes:
        maps: after each convolution, `[N, channels, height, width]`.
        embedding: in front of the last layer, `[N, E]`.
        logits: `[N, 10]`.
    """

    maps: list[torch.Tensor]
    embedding: torch.Tensor
    logits: torch.Tensor


class DigitCNN(nn.Module):
    """A convolution of 3 × 3 for each number of channels; the first keeps the picture's size, the others halve it."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        before = (1, *channels[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(taken, made, 3, padding=1, stride=1 if layer == 0 else 2)
            for layer, (taken, made) in enumerate(zip(before, channels, strict=True))
        )
        self.head = nn.Linear(channels[-1], CLASSES)

    def forward(self, pictures: torch.Tensor) -> Seen:
        """Pictures `[N, side²]`."""
        side = round(pictures.shape[1] ** 0.5)
        features, maps = pictures.view(-1, 1, side, side), []
        for convolution in self.convolutions:
            features = torch.relu(convolution(features))
            maps.append(features)
        embedding = features.mean(dim=(2, 3))
        return Seen(maps, embedding, self.head(embedding))


def digit_cnn(channels: Sequence[int], *, seed: int) -> DigitCNN:
    """A network whose weights the seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitCNN(channels)
