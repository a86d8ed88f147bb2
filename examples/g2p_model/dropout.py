"""Dropout from one random byte for each element.

torch draws the elements of a mask one by one on processors that are not Intel's: a third of the
time of training the small Transformer here. From each number of the same generator this takes the
masks of eight elements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ByteDropout(nn.Dropout):
    """As `torch.nn.Dropout`, with a probability that is a multiple of 1/256: the nearest to p."""

    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * 256)
        if not self.training or dropped == 0:
            return input
        if dropped == 256:
            return input * 0
        numbers = torch.empty((input.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.uint8)[: input.numel()].view(input.shape) >= dropped
        return input * kept.to(input.dtype).mul_(256 / (256 - dropped))


def use_byte_dropout(model: nn.Module) -> None:
    """Put it in the place of every `torch.nn.Dropout` of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, ByteDropout(child.p))
