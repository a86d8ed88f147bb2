"""A drop-in torch.nn.LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from encdec_fast.backends import Backend, Description
from encdec_fast.nn._transformer import not_here

_WHY = "there is no kernel for it alone: it is the end of the linear that it follows, or torch's"
_BACKENDS = (
    Backend("cpu", not_here, lambda call: [_WHY]),
    Backend("torch", not_here, lambda call: []),
)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm as it is.

    Called alone it runs torch's own kernel. Inside the Transformer modules of this package, without
    gradients, it is computed at the end of the product before it, without a pass of its own.
    """

    def _encdec_fast_describe(self, input: Tensor) -> Description:
        """What `explain` asks of a module."""
        sizes = f"{tuple(input.shape)} {input.dtype} {input.device.type}"
        return Description("layer_norm", _BACKENDS, input.dtype, sizes, lambda backend: "")
