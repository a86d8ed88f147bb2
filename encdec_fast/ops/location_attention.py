"""Location attention: where to look is said by the decoder alone, not by what is there.

For step t, with the embedded word x and the hidden state h of a decoder, over L = max_length
positions that the weight has scores for, of which the memory m has the first S:

    e_t = W [x_t; h_t] + b               (L)
    w_t = softmax of e_t                 over all L positions, or, with memory_lengths, over the
                                         sentence's own ones
    context_t = sum over s < S of w_ts m_s

    embedded        (B, Tq, E)
    hidden          (B, Tq, H)
    memory          (B, S, M)            S at most L
    weight          (L, E + H)           W
    bias            (L)                  b, may be absent
    memory_lengths  int64 (B) on the CPU, each from 0 to S
    context         (B, Tq, M)
    weights         (B, Tq, S)

In the tutorial the memory is padded with zeros to L positions, and the softmax goes over all of
them: what falls on the padding is lost. Without memory_lengths this is the same: the weights of the
S positions that are there add up to less than 1 where S < L. With memory_lengths a sentence's
weights add up to 1; a sentence of length zero has zeros for weights and context, and memory past a
sentence's end is not read. All floating tensors have one dtype and device.

No kernel of its own: the scores of all L positions are `linear`, on the packed weight where no
gradient is needed; with memory_lengths the rest is `attention` with the scores as its bias, without
them it is torch's softmax and product.

Luong, Pham and Manning, 2015 (arXiv:1508.04025), the location score; with the embedded word: the
attention decoder of the PyTorch tutorial "NLP From Scratch: Translation with a Sequence to Sequence
Network and Attention".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Description, explained_by
from encdec_fast.ops._attention_checks import check_shapes
from encdec_fast.ops._call import State, autocasting, device_type
from encdec_fast.ops.attention import attention
from encdec_fast.ops.linear import describe as describe_linear
from encdec_fast.ops.linear import linear

_NAME = "location_attention"


def reference(
    embedded: Tensor,
    hidden: Tensor,
    memory: Tensor,
    weight: Tensor,
    bias: State = None,
    memory_lengths: State = None,
) -> tuple[Tensor, Tensor]:
    """(context, weights) in plain PyTorch, by the formulas above: what the result is held to."""
    scores = torch.cat([embedded, hidden], -1) @ weight.t()
    scores = scores if bias is None else scores + bias
    return by_scores(scores, memory, memory_lengths)


def by_scores(scores: Tensor, memory: Tensor, memory_lengths: State) -> tuple[Tensor, Tensor]:
    """`reference` from the scores (B, Tq, L) of all positions on."""
    size = memory.shape[1]
    if memory_lengths is None:
        weights = torch.softmax(scores, dim=-1)[..., :size]
    else:
        positions = torch.arange(size, device=memory.device)
        real = positions < memory_lengths.to(memory.device)[:, None, None]
        scores = scores[..., :size].masked_fill(~real, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(~real, 0)
        memory = memory.masked_fill(~real.transpose(1, 2), 0)
    return weights @ memory, weights


def _check(embedded: Tensor, hidden: Tensor, memory: Tensor, weight: Tensor, bias: State) -> None:
    """RuntimeError unless the tensors fit what is embedded."""
    for what, tensor in (("embedded", embedded), ("hidden", hidden), ("memory", memory)):
        if tensor.dim() != 3:
            raise RuntimeError(f"{_NAME}: {what} must have 3 dimensions, got {tensor.dim()}")
    if not embedded.is_floating_point():
        raise RuntimeError(
            f"{_NAME}: expected floating-point tensors, but embedded is {embedded.dtype}"
        )
    batch, queries, size = embedded.shape
    most = weight.shape[0] if weight.dim() else 0
    shapes: dict[str, tuple[State, tuple[int, ...]]] = {
        "hidden": (hidden, (batch, queries, hidden.shape[2])),
        "memory": (memory, (batch, *memory.shape[1:])),
        "weight": (weight, (most, size + hidden.shape[2])),
    }
    if bias is not None:
        shapes["bias"] = (bias, (most,))
    check_shapes(_NAME, "embedded", embedded, shapes)
    if memory.shape[1] > most:
        raise RuntimeError(
            f"{_NAME}: memory must have at most the {most} positions that weight has scores for, "
            f"but it has {memory.shape[1]}"
        )


def _prepare(
    embedded: Tensor, hidden: Tensor, memory: Tensor, weight: Tensor, bias: State = None
) -> list[Any]:
    """The tensors of a call of the public function."""
    own: list[Any] = [embedded, hidden, memory, weight, bias]
    if autocasting(device_type(embedded)):
        dtype = torch.get_autocast_dtype(device_type(embedded))
        own = [None if tensor is None else tensor.to(dtype) for tensor in own]
    _check(*own)
    return own


def _first(scores: Tensor, size: int) -> Tensor:
    """Those of the first `size` positions."""
    if torch.compiler.is_compiling():  # a slice would keep an exported graph from a memory of all L
        return scores.index_select(-1, torch.arange(size, device=scores.device))
    return scores[..., :size]


def describe(
    embedded: Tensor,
    hidden: Tensor,
    memory: Tensor,
    weight: Tensor,
    bias: State = None,
    memory_lengths: Any = None,
    need_weights: bool = False,
) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    embedded, hidden, _, weight, bias = _prepare(embedded, hidden, memory, weight, bias)
    found = describe_linear(torch.cat([embedded, hidden], -1), weight, bias)
    rest = "torch's softmax and product" if memory_lengths is None else "attention"
    plan = f"the scores by linear, the context by {rest}"
    return found._replace(op=f"{_NAME}, its scores", plan=lambda backend: plan)


def attend_positions(
    scores: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | Sequence[int] | None,
    need_weights: bool,
) -> Any:
    """`location_attention` from the scores (B, Tq, L) of all positions on."""
    size = memory.shape[1]
    if memory_lengths is None:
        weights = _first(torch.softmax(scores, dim=-1), size)
        context = weights @ memory
        return (context, weights) if need_weights else context
    query, key = scores.new_zeros(*scores.shape[:2], 1), scores.new_zeros(*memory.shape[:2], 1)
    found = attention(
        query.unsqueeze(1),
        key.unsqueeze(1),
        memory.unsqueeze(1),
        bias=_first(scores, size).unsqueeze(1),
        memory_lengths=memory_lengths,
        need_weights=need_weights,
    )
    return tuple(t.squeeze(1) for t in found) if need_weights else found.squeeze(1)


@explained_by(describe)
def location_attention(
    embedded: Tensor,
    hidden: Tensor,
    memory: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    memory_lengths: Tensor | Sequence[int] | None = None,
    need_weights: bool = False,
) -> Any:
    """Attention by position; shapes, and what the softmax goes over, are in this file's docstring.

    Returns the context (B, Tq, M), and with need_weights (context, weights). RuntimeError for
    tensors whose sizes, dtypes or devices do not fit, for a memory of more than L positions, and
    for lengths below 0 or above S.
    """
    embedded, hidden, memory, weight, bias = _prepare(embedded, hidden, memory, weight, bias)
    scores = linear(torch.cat([embedded, hidden], -1), weight, bias)
    return attend_positions(scores, memory, memory_lengths, need_weights)
