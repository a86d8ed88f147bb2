"""Location attention over a memory of at most so many positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.nn.additive_attention import Lengths
from encdec_fast.ops.location_attention import describe, location_attention


class LocationAttention(nn.Module):
    """Weights that the decoder's word and state give to positions, and the context they make.

    embedding_size, hidden_size: features of the embedded word and of the decoder's state.
    max_length: positions that there are weights for; a memory has at most as many.

    Submodule: attn, Linear from both to max_length. The same network in plain torch, as in the
    tutorial (whose `attn_combine` is the next layer of the decoder, not of the attention):

        weights = torch.softmax(attn(torch.cat([embedded, hidden], -1)), dim=-1)
        context = weights[..., : memory.shape[1]] @ memory

    With memory_lengths the softmax goes over each sentence's own positions in place of all
    max_length; see `encdec_fast.ops.location_attention`.
    """

    def __init__(
        self,
        embedding_size: int,
        hidden_size: int,
        max_length: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embedding_size, self.hidden_size = embedding_size, hidden_size
        self.max_length = max_length
        features = embedding_size + hidden_size
        self.attn = nn.Linear(features, max_length, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.embedding_size}, {self.hidden_size}, max_length={self.max_length}"

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        memory: Tensor,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
    ) -> Any:
        """The context (B, Tq, M), and with need_weights the weights (B, Tq, S) too.

        embedded: (B, Tq, embedding_size). hidden: (B, Tq, hidden_size). memory: (B, S, M), S at
        most max_length. memory_lengths: int64 (B) on the CPU, or a list, each from 0 to S.
        RuntimeError for sizes that do not fit.
        """
        tensors = (embedded, hidden, memory, self.attn.weight, self.attn.bias)
        return location_attention(*tensors, memory_lengths, need_weights)

    def _encdec_fast_describe(
        self,
        embedded: Tensor,
        hidden: Tensor,
        memory: Tensor,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        tensors = (embedded, hidden, memory, self.attn.weight, self.attn.bias)
        return describe(*tensors, memory_lengths, need_weights)
