"""Multiplicative (Luong) attention over a memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.nn._parts import Reads, attend_by_score, describe_called, why_called
from encdec_fast.nn.additive_attention import Lengths
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.additive_attention import describe as describe_additive
from encdec_fast.ops.attention import attention
from encdec_fast.ops.multiplicative_attention import (
    check_score,
    describe,
    multiplicative_attention,
)


class LuongAttention(nn.Module):
    """Global attention of Luong et al.: weights by a score of query and memory, and the context.

    query_size, memory_size: features of a query and of a memory position.
    score: "dot" q.m, "general" q' W m or "concat" v' tanh(W [q; m]).
    attention_size: rows of W for "concat"; None: query_size.
    output_size: return the attentional output tanh(W_c [context; query]), of this size, in place of
        the context; None: the context.

    Submodules, all Linear without bias: for "general" memory_proj (memory_size to query_size: W);
    for "concat" query_proj and memory_proj (to attention_size: W side by side) and score_proj (to
    1: v); with output_size output_proj. The same network in plain torch:

        scores = query @ memory.transpose(1, 2)                                  # dot
        scores = query @ memory_proj(memory).transpose(1, 2)                     # general
        hidden = query_proj(query).unsqueeze(2) + memory_proj(memory).unsqueeze(1)
        scores = score_proj(torch.tanh(hidden)).squeeze(-1)                      # concat
        context = torch.softmax(scores, dim=-1) @ memory
        output = torch.tanh(output_proj(torch.cat([context, query], -1)))

    Where the submodule whose weight the scores are made of (memory_proj for "general", score_proj)
    has a hook, was replaced or is parametrized, it is called.

    Luong, Pham and Manning, 2015 (arXiv:1508.04025).
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        score: str = "general",
        attention_size: int | None = None,
        *,
        output_size: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_score("LuongAttention", score)
        if score == "dot" and query_size != memory_size:
            raise ValueError(
                "LuongAttention: score='dot' needs query_size and memory_size to be equal, "
                f"but they are {query_size} and {memory_size}"
            )
        if attention_size is not None and score != "concat":
            raise ValueError(
                f"LuongAttention: attention_size is for score='concat', but score is {score!r}"
            )
        self.query_size, self.memory_size, self.score = query_size, memory_size, score
        self.output_size = output_size
        where: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        if score == "general":
            self.memory_proj = nn.Linear(memory_size, query_size, **where)
        elif score == "concat":
            size = query_size if attention_size is None else attention_size
            self.query_proj = nn.Linear(query_size, size, **where)
            self.memory_proj = nn.Linear(memory_size, size, **where)
            self.score_proj = nn.Linear(size, 1, **where)
        if output_size is not None:
            self.output_proj = nn.Linear(memory_size + query_size, output_size, **where)

    def extra_repr(self) -> str:
        text = f"{self.query_size}, {self.memory_size}, score={self.score!r}"
        return text + (f", output_size={self.output_size}" if self.output_size else "")

    @property
    def _reads(self) -> Reads:
        if self.score == "dot":
            return {}
        return {"memory_proj" if self.score == "general" else "score_proj": False}

    def project_memory(self, memory: Tensor) -> Tensor:
        """The keys of a memory: once per sentence, for all decode steps; for "dot" the memory."""
        if self.score == "dot":
            return memory
        keys: Tensor = self.memory_proj(memory)
        return keys

    def _arguments(
        self, query: Tensor, memory: Tensor, memory_lengths: Lengths, keys: Tensor | None
    ) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
        """The op, its `describe` and its arguments; without keys, "general" projects the query."""
        lengths = {"memory_lengths": memory_lengths}
        if self.score == "concat":
            keys = self.project_memory(memory) if keys is None else keys
            queries, v = self.query_proj(query), self.score_proj.weight[0]
            return additive_attention, describe_additive, (queries, keys, memory, v), lengths
        weight = None if self.score == "dot" else self.memory_proj.weight
        options = {"score": self.score, "memory_lengths": memory_lengths, "keys": keys}
        return multiplicative_attention, describe, (query, memory, weight), options

    def _called(
        self, query: Tensor, memory: Tensor, lengths: Lengths, shown: bool, keys: Tensor | None
    ) -> Any:
        """Context and weights with calls of all submodules."""
        keys = self.project_memory(memory) if keys is None else keys
        if self.score == "concat":
            queries = self.query_proj(query)
            return attend_by_score(self.score_proj, queries, keys, memory, lengths, shown)
        heads = (tensor.unsqueeze(1) for tensor in (query, keys, memory))
        options: dict[str, Any] = {"memory_lengths": lengths, "need_weights": shown}
        found: Any = attention(*heads, **options, scale=1.0)
        return tuple(t.squeeze(1) for t in found) if shown else found.squeeze(1)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
        *,
        keys: Tensor | None = None,
    ) -> Any:
        """The context (B, Tq, memory_size), or with output_size the output (B, Tq, output_size).

        With need_weights the weights (B, Tq, S) too. query: (B, Tq, query_size). memory: (B, S,
        memory_size). memory_lengths: int64 (B) on the CPU, or a list, each from 0 to S; weights
        past the end are zero, and all are, and the context too, where the length is zero. keys:
        what `project_memory` returned for this memory. RuntimeError for sizes that do not fit.
        """
        if why_called(self, self._reads):
            found = self._called(query, memory, memory_lengths, need_weights, keys)
        else:
            op, _, arguments, options = self._arguments(query, memory, memory_lengths, keys)
            found = op(*arguments, need_weights=need_weights, **options)
        if self.output_size is None:
            return found
        context, *weights = found if need_weights else (found,)
        output = torch.tanh(self.output_proj(torch.cat([context, query], -1)))
        return (output, *weights) if need_weights else output

    def _encdec_fast_describe(
        self,
        query: Tensor,
        memory: Tensor,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
        *,
        keys: Tensor | None = None,
    ) -> Description:
        """What `explain` asks of a module."""
        reason = why_called(self, self._reads)
        if reason:
            return describe_called("luong_attention", query, reason)
        _, of_op, arguments, options = self._arguments(query, memory, memory_lengths, keys)
        found: Description = of_op(*arguments, need_weights=need_weights, **options)
        return found
