"""Additive (Bahdanau) attention over a memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.nn._parts import Reads, attend_by_score, describe_called, why_called
from encdec_fast.ops.additive_attention import additive_attention, describe

Lengths = Tensor | Sequence[int] | None


class AdditiveAttention(nn.Module):
    """Weights v' tanh(W_q query + W_k memory) over a memory, and the context that they make of it.

    query_size, memory_size, attention_size: features of a query, of a memory position, and of the
        projections that the score is computed from.
    coverage: let queries know what the ones before them looked at: u times the sum of their
        weights is added to each key (Tu et al., 2016; See et al., 2017).

    Submodules, all Linear without bias: query_proj, memory_proj, score (to 1) and, with coverage,
    coverage_proj (from 1). The same network in plain torch:

        hidden = torch.tanh(query_proj(query).unsqueeze(2) + memory_proj(memory).unsqueeze(1))
        weights = torch.softmax(score(hidden).squeeze(-1), dim=-1)
        context = weights @ memory

    Where score or coverage_proj has a hook, was replaced or is parametrized, they are called.

    Bahdanau, Cho and Bengio, 2015 (arXiv:1409.0473).
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        coverage: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_size, self.memory_size = query_size, memory_size
        self.attention_size, self.coverage = attention_size, coverage
        where: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.query_proj = nn.Linear(query_size, attention_size, **where)
        self.memory_proj = nn.Linear(memory_size, attention_size, **where)
        self.score = nn.Linear(attention_size, 1, **where)
        if coverage:
            self.coverage_proj = nn.Linear(1, attention_size, **where)

    def extra_repr(self) -> str:
        sizes = f"{self.query_size}, {self.memory_size}, {self.attention_size}"
        return sizes + (", coverage=True" if self.coverage else "")

    @property
    def _reads(self) -> Reads:
        return {"score": False, **({"coverage_proj": False} if self.coverage else {})}

    def project_memory(self, memory: Tensor) -> Tensor:
        """The keys (B, S, attention_size) of a memory: once per sentence, for all decode steps."""
        keys: Tensor = self.memory_proj(memory)
        return keys

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
        *,
        keys: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> Any:
        """The context (B, Tq, memory_size), and with need_weights the weights (B, Tq, S) too.

        query: (B, Tq, query_size). memory: (B, S, memory_size). memory_lengths: int64 (B) on the
        CPU, or a list, each from 0 to S; weights past the end are zero, and all are, and the
        context too, where the length is zero. keys: what `project_memory` returned for this memory.
        coverage: (B, S), the sum of the weights of earlier calls; zero if None. With coverage the
        queries of a call are taken one after the other. RuntimeError for sizes that do not fit.
        """
        if keys is None:
            keys = self.project_memory(memory)
        queries = self.query_proj(query)
        called = bool(why_called(self, self._reads))
        if not self.coverage:
            if coverage is not None:
                raise RuntimeError("AdditiveAttention: coverage was given to a module without it")
            given = (queries, keys, memory, memory_lengths, need_weights)
            return self._attend(*given, None, called)
        if coverage is None:
            coverage = memory.new_zeros(memory.shape[:2])
        contexts, weights = [], []
        for t in range(queries.shape[1]):
            now = queries[:, t : t + 1]
            context, weight = self._attend(
                now, keys, memory, memory_lengths, True, coverage, called
            )
            coverage = coverage + weight[:, 0]
            contexts.append(context)
            weights.append(weight)
        if contexts:
            result, shown = torch.cat(contexts, dim=1), torch.cat(weights, dim=1)
        else:  # no queries
            result = queries.new_zeros(memory.shape[0], 0, memory.shape[2])
            shown = queries.new_zeros(memory.shape[0], 0, memory.shape[1])
        return (result, shown) if need_weights else result

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        memory: Tensor,
        lengths: Lengths,
        need_weights: bool,
        coverage: Tensor | None,
        called: bool,
    ) -> Any:
        """The op, or with `called` calls of score and coverage_proj."""
        if called:
            covered = None if coverage is None else self.coverage_proj(coverage.unsqueeze(-1))
            tensors = (queries, keys, memory)
            return attend_by_score(self.score, *tensors, lengths, need_weights, covered)
        options: dict[str, Any] = {}
        if coverage is not None:
            options = {"coverage": coverage, "coverage_weight": self.coverage_proj.weight[:, 0]}
        v = self.score.weight[0]
        return additive_attention(queries, keys, memory, v, lengths, need_weights, **options)

    def _encdec_fast_describe(
        self,
        query: Tensor,
        memory: Tensor,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
        **options: Any,
    ) -> Description:
        """What `explain` asks of a module."""
        reason = why_called(self, self._reads)
        if reason:
            return describe_called("additive_attention", query, reason)
        keys = self.project_memory(memory)
        arguments = (self.query_proj(query), keys, memory, self.score.weight[0], memory_lengths)
        return describe(*arguments, need_weights=need_weights)
