"""Bridges: what a recurrent decoder starts from, and goes on with, of what its encoder found."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.nn._parts import Reads, attend_by_score, describe_called, why_called
from encdec_fast.nn.additive_attention import Lengths
from encdec_fast.nn.linear import Linear
from encdec_fast.ops._call import needs_gradient, weight_dtype_name
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.additive_attention import describe as describe_additive
from encdec_fast.ops.direct_bridge import MERGES, States, check_merge, direct_bridge
from encdec_fast.ops.gated_bridge import describe as describe_gated
from encdec_fast.ops.gated_bridge import gated_bridge


def _check_states(name: str, states: Any) -> None:
    """RuntimeError unless states are a tensor or a pair of tensors."""
    if isinstance(states, Tensor):
        return
    if isinstance(states, tuple) and all(isinstance(state, Tensor) for state in states):
        if len(states) == 2:
            return
        found = f"got {len(states)} of them"
    else:
        found = f"got {type(states).__name__}"
    raise RuntimeError(f"{name}: states must be a tensor or the pair (h, c), a tuple, {found}")


class Bridge(nn.Module):
    """What stands between an encoder and a decoder; a class of its own so that models can take any.

    States have torch's form: (layers, B, H), for an LSTM the pair (h, c) of two such tensors. What
    else a bridge takes and returns is said by each.
    """


class DirectBridge(Bridge):
    """The encoder's final states as the decoder's first ones.

    num_layers: of the decoder; None: as many as the encoder has. last_layers: of an encoder with
        more layers take the last ones, in place of an error.
    bidirectional: the encoder has two directions, which are merged by
    merge: "concat" (2 H features), "sum" (H), or "projection": a Linear from the 2 H features, or
        without bidirectional the H, to output_size.
    hidden_size, output_size: of the encoder and of the decoder; for "projection" only.
    lstm: for "projection" only: the states are pairs, and c has a Linear of its own.
    feed: also return the vector that the decoder is fed at every step, beside the word: its last
        layer's first hidden state.

    Submodules, for "projection" only: hidden_proj and, with lstm, cell_proj, Linear with bias, the
    same for all layers.

    Sutskever, Vinyals and Le, 2014 (arXiv:1409.3215); feed: Cho et al., 2014 (arXiv:1406.1078);
    projection: Britz et al., 2017 (arXiv:1703.03906).
    """

    def __init__(
        self,
        num_layers: int | None = None,
        *,
        bidirectional: bool = False,
        merge: str = "concat",
        hidden_size: int | None = None,
        output_size: int | None = None,
        lstm: bool = False,
        last_layers: bool = False,
        feed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_merge("DirectBridge", merge, (*MERGES, "projection"))
        self.num_layers, self.bidirectional, self.merge = num_layers, bidirectional, merge
        self.last_layers, self.feed, self.lstm = last_layers, feed, lstm
        if merge != "projection":
            if hidden_size is not None or output_size is not None or lstm:
                raise ValueError(
                    "DirectBridge: hidden_size, output_size and lstm are for merge='projection', "
                    f"but merge is {merge!r}"
                )
            return
        if hidden_size is None or output_size is None:
            raise ValueError("DirectBridge: merge='projection' needs hidden_size and output_size")
        features = 2 * hidden_size if bidirectional else hidden_size
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_proj = Linear(features, output_size, **where)
        if lstm:
            self.cell_proj = Linear(features, output_size, **where)

    def extra_repr(self) -> str:
        return (
            f"num_layers={self.num_layers}, bidirectional={self.bidirectional}, "
            f"merge={self.merge!r}, feed={self.feed}"
        )

    def forward(self, states: States) -> Any:
        """The decoder's first states; with feed, the pair of them and the vector (B, ·).

        RuntimeError for states that do not fit the bridge.
        """
        _check_states("DirectBridge", states)
        projected = self.merge == "projection"
        if projected and isinstance(states, tuple) != self.lstm:
            expected = "the pair (h, c)" if self.lstm else "one tensor"
            raise RuntimeError(f"DirectBridge: with lstm={self.lstm} states must be {expected}")
        found: Any = direct_bridge(
            states,
            self.num_layers,
            bidirectional=self.bidirectional,
            merge="concat" if projected else self.merge,
            last_layers=self.last_layers,
        )
        if projected:
            if isinstance(found, tuple):
                found = self.hidden_proj(found[0]), self.cell_proj(found[1])
            else:
                found = self.hidden_proj(found)
        if not self.feed:
            return found
        return found, (found[0] if isinstance(found, tuple) else found)[-1]


class GatedBridge(Bridge):
    """A decoder's state mixed with a context by a gate: g * s + (1 - g) * tanh(W_c c).

    hidden_size, context_size: features of a state and of a context. bias: of the gate.
    weight_dtype: None, torch.bfloat16 or "int8", the dtype in which inference holds the weights; it
        is no part of the state_dict.

    Submodules: gate, Linear from the hidden_size + context_size features of [s; c], and
    context_proj, Linear without bias. The same network in plain torch:

        g = torch.sigmoid(gate(torch.cat([state, context], -1)))
        state = g * state + (1 - g) * torch.tanh(context_proj(context))

    Where a submodule has a hook, was replaced or is parametrized, both are called, with weights
    that are not rounded; `explain` says so.
    """

    weight_dtype: torch.dtype | str | None = None
    _reads: ClassVar[Reads] = {"gate": True, "context_proj": False}

    def __init__(
        self,
        hidden_size: int,
        context_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.context_size = hidden_size, context_size
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = nn.Linear(hidden_size + context_size, hidden_size, bias=bias, **where)
        self.context_proj = nn.Linear(context_size, hidden_size, bias=False, **where)

    def _tensors(self, states: States, context: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state, and the context with its leading sizes."""
        _check_states("GatedBridge", states)
        state: Tensor = states[0] if isinstance(states, tuple) else states
        if context.dim() == 2 and state.dim() == 3:  # one context for all layers
            context = context.expand(state.shape[0], -1, -1)
        return state, context

    def _weights(self) -> tuple[Any, ...]:
        return self.gate.weight, self.context_proj.weight, self.gate.bias

    def _called(self, state: Tensor, context: Tensor) -> Tensor:
        """The new state with calls of the submodules."""
        training = needs_gradient([state, context, *self.parameters()])
        weight_dtype_name(self.weight_dtype, training)  # raises
        gate = torch.sigmoid(self.gate(torch.cat([state, context], -1)))
        return gate * state + (1 - gate) * torch.tanh(self.context_proj(context))

    def forward(self, states: States, context: Tensor) -> States:
        """The state with the context in it, of the same shape.

        states: (B, hidden_size) or (layers, B, hidden_size); of an LSTM's pair (h, c), c stays as
        it is. context: (B, context_size), for all layers, or of the state's leading sizes.
        RuntimeError for sizes that do not fit.
        """
        tensors = self._tensors(states, context)
        if why_called(self, self._reads):
            result = self._called(*tensors)
        else:
            result = gated_bridge(*tensors, *self._weights(), weight_dtype=self.weight_dtype)
        return (result, states[1]) if isinstance(states, tuple) else result

    def _encdec_fast_describe(self, states: States, context: Tensor) -> Description:
        """What `explain` asks of a module."""
        tensors = self._tensors(states, context)
        reason = why_called(self, self._reads)
        if reason:
            return describe_called("gated_bridge", tensors[0], reason)
        options: dict[str, Any] = {"weight_dtype": self.weight_dtype}
        return describe_gated(*tensors, *self._weights(), **options)


class AttentionBridge(Bridge):
    """A summary of fixed size of the encoder's outputs, whatever their number, by learned queries.

    Each of `queries` learned vectors q_i attends to the memory m:

        a_is = softmax over s of v' tanh(q_i + W m_s),    row i of the summary = sum of a_is m_s

    A decoder starts from the mean of the rows, and may attend to them in place of the memory.

    memory_size, attention_size: features of a memory position, and of the queries and the
        projection that the scores are computed from. queries: how many.
    hidden_size: of the decoder; with it the first state is tanh of a Linear, state_proj, of the
        mean, as Bahdanau et al. make theirs; None: the mean itself. num_layers: of the decoder,
        which all get the same.

    Parameters: queries (queries, attention_size); memory_proj and score, Linear without bias. The
    same network in plain torch:

        hidden = torch.tanh(queries.unsqueeze(1) + memory_proj(memory).unsqueeze(1))
        summary = torch.softmax(score(hidden).squeeze(-1), dim=-1) @ memory

    Where score has a hook, was replaced or is parametrized, it is called.

    Lin et al., A Structured Self-attentive Sentence Embedding, 2017 (arXiv:1703.03130), as a bridge
    between encoder and decoder: Vázquez et al., 2019 (arXiv:1811.00498). Theirs gives each row a
    score vector of its own; here it is a query of its own, under one score vector.
    """

    _reads: ClassVar[Reads] = {"score": False}

    def __init__(
        self,
        memory_size: int,
        attention_size: int,
        queries: int = 1,
        hidden_size: int | None = None,
        num_layers: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if queries < 1 or num_layers < 1:
            raise ValueError(
                "AttentionBridge: queries and num_layers must be at least 1, "
                f"but they are {queries} and {num_layers}"
            )
        self.memory_size, self.attention_size, self.num_layers = (
            memory_size,
            attention_size,
            num_layers,
        )
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = nn.Parameter(torch.empty(queries, attention_size, **where))
        self.memory_proj = nn.Linear(memory_size, attention_size, bias=False, **where)
        self.score = nn.Linear(attention_size, 1, bias=False, **where)
        self.state_proj = None
        if hidden_size is not None:
            self.state_proj = nn.Linear(memory_size, hidden_size, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries from the normal distribution, so that they differ; the rest as torch's Linear."""
        nn.init.normal_(self.queries)
        for linear in (self.memory_proj, self.score, self.state_proj):
            if linear is not None:
                linear.reset_parameters()

    def extra_repr(self) -> str:
        sizes = f"{self.memory_size}, {self.attention_size}"
        return f"{sizes}, queries={self.queries.shape[0]}, num_layers={self.num_layers}"

    def _tensors(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and memory."""
        if memory.dim() != 3 or memory.shape[2] != self.memory_size:
            raise RuntimeError(
                f"AttentionBridge: memory must have the shape (B, S, {self.memory_size}), "
                f"but it is {tuple(memory.shape)}"
            )
        queries = self.queries.expand(memory.shape[0], -1, -1)
        return queries, self.memory_proj(memory), memory

    def forward(
        self, memory: Tensor, memory_lengths: Lengths = None, need_weights: bool = False
    ) -> Any:
        """(first state, summary), and with need_weights the weights too.

        memory: (B, S, memory_size). memory_lengths: int64 (B) on the CPU, or a list, each from 0 to
        S. first state: (num_layers, B, hidden_size or memory_size); for an LSTM it is h. summary:
        (B, queries, memory_size). weights: (B, queries, S). RuntimeError for sizes that do not fit.
        """
        tensors = self._tensors(memory)
        if why_called(self, self._reads):
            found = attend_by_score(self.score, *tensors, memory_lengths, need_weights)
        else:
            v = self.score.weight[0]
            found = additive_attention(*tensors, v, memory_lengths, need_weights)
        summary, *weights = found if need_weights else (found,)
        first = summary.mean(dim=1)
        if self.state_proj is not None:
            first = torch.tanh(self.state_proj(first))
        first = first.unsqueeze(0).repeat(self.num_layers, 1, 1)
        return first, summary, *weights

    def _encdec_fast_describe(
        self, memory: Tensor, memory_lengths: Lengths = None, need_weights: bool = False
    ) -> Description:
        """What `explain` asks of a module."""
        reason = why_called(self, self._reads)
        if reason:
            return describe_called("attention_bridge", memory, reason)
        tensors = self._tensors(memory)
        return describe_additive(*tensors, self.score.weight[0], memory_lengths, need_weights)
