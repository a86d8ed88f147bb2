"""A drop-in torch.nn.CrossEntropyLoss."""

from __future__ import annotations

import torch
from torch import Tensor

from encdec_fast.backends import Backend, Description
from encdec_fast.nn._transformer import not_here
from encdec_fast.ops.cross_entropy import cross_entropy, describe

_WHY = "it takes rows of logits and a class for each, without weights of the classes"
_BACKENDS = (
    Backend("triton", not_here, lambda call: [_WHY]),
    Backend("torch", not_here, lambda call: []),
)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, on a kernel that keeps two numbers per row for backward.

    Arguments, inputs, results and errors are those of torch.nn.CrossEntropyLoss. The kernel takes
    logits (N, C) or (C) with classes as targets; weights of the classes, probabilities as targets
    and further dimensions run torch's own. On a GPU a target that is no class counts as the nearest
    unless ENCDEC_FAST_CHECK=1 is set: see `encdec_fast.ops.cross_entropy`.
    """

    def _fits(self, input: Tensor, target: Tensor) -> bool:
        return (
            self.weight is None
            and input.dim() in (1, 2)
            and input.is_floating_point()
            and input.shape[-1] > 0
            and target.dtype == torch.int64
            and target.shape == input.shape[:-1]
            and target.device == input.device
            and 0.0 <= self.label_smoothing <= 1.0
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not self._fits(input, target):
            return super().forward(input, target)
        options = (self.ignore_index, self.reduction, self.label_smoothing)
        loss: Tensor = cross_entropy(input, target, *options)
        return loss

    def _encdec_fast_describe(self, input: Tensor, target: Tensor) -> Description:
        """What `explain` asks of a module."""
        if self._fits(input, target):
            return describe(input, target, self.ignore_index, self.reduction, self.label_smoothing)
        sizes = f"{tuple(input.shape)} {input.dtype} {input.device.type}"
        return Description("cross_entropy", _BACKENDS, input.dtype, sizes, lambda backend: "")
