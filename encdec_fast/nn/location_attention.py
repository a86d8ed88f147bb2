"""Location attention over a memory of at most so many positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.nn._parts import Reads, attend_by_scores, describe_called, why_called
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

    Where attn has a hook, was replaced or is parametrized, it is called.

    With memory_lengths the softmax goes over each sentence's own positions in place of all
    max_length; see `encdec_fast.ops.location_attention`.
    """

    _reads: ClassVar[Reads] = {"attn": True}

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
        if why_called(self, self._reads):
            return self._called(embedded, hidden, memory, memory_lengths, need_weights)
        tensors = (embedded, hidden, memory, self.attn.weight, self.attn.bias)
        return location_attention(*tensors, memory_lengths, need_weights)

    def _called(
        self, embedded: Tensor, hidden: Tensor, memory: Tensor, lengths: Lengths, shown: bool
    ) -> Any:
        """`forward` with a call of attn."""
        size = memory.shape[1]
        if size > self.max_length:
            raise RuntimeError(
                f"LocationAttention: memory must have at most {self.max_length} positions, "
                f"but it has {size}"
            )
        scores = self.attn(torch.cat([embedded, hidden], -1))
        if lengths is not None:
            return attend_by_scores(scores[..., :size], memory, lengths, shown)
        weights = torch.softmax(scores, dim=-1)[..., :size]
        context = weights @ memory
        return (context, weights) if shown else context

    def _encdec_fast_describe(
        self,
        embedded: Tensor,
        hidden: Tensor,
        memory: Tensor,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        reason = why_called(self, self._reads)
        if reason:
            return describe_called("location_attention", embedded, reason)
        tensors = (embedded, hidden, memory, self.attn.weight, self.attn.bias)
        return describe(*tensors, memory_lengths, need_weights)
