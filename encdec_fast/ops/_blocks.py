"""The blocks of a Transformer layer in inference, each in one call where nothing is to be asked.

A block is `linear`, `attention` and `linear`, or two of `linear`: csrc/transformer. Each function
returns None wherever there is anything to ask or to complain of: a gradient, a transform, a tracer,
another backend, weights that are not packed, sizes that do not fit. The caller then calls the ops
one by one, which know.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from encdec_fast.ops._call import State
from encdec_fast.ops.linear import ACTIVATIONS, packed_again


@functools.cache
def _calls() -> tuple[Any, Any]:
    ops = torch.ops.encdec_fast_cpu
    return ops.self_attention_block.default, ops.feed_forward_block.default


def _in_four(scores: State) -> State:
    """What goes with the scores, with a dimension for each of theirs."""
    if scores is None or scores.dim() == 4:
        return scores
    return scores[(None,) * (4 - scores.dim())]


def self_attention(
    input: Tensor,
    residual: Tensor,
    projections: tuple[Tensor, State, Tensor, State],
    norm: tuple[State, State, float] | None,
    heads: int,
    where: tuple[State, State, State, bool],
    weight_dtype: str,
) -> Tensor | None:
    """norm(residual + attention(input)) on (B, T, E), or on (N, E) with offsets.

    projections: weight (3 E, E) and bias of queries, keys and values, weight (E, E) and bias of
    the output. norm: weight, bias and eps of a LayerNorm. where: offsets, mask, bias, causal, as
    `varlen_attention` and `attention` take them.
    """
    in_weight, in_bias, out_weight, out_bias = projections
    scale, shift, eps = (None, None, 0.0) if norm is None else norm
    others = (residual, in_bias, out_bias, scale, shift, *where[:3])
    blocks = packed_again(input, (in_weight, out_weight), others, weight_dtype)
    if blocks is None:
        return None
    offsets, mask, bias, causal = where
    result = _calls()[0](
        input,
        residual,
        in_weight,
        in_bias,
        blocks[0],
        out_weight,
        out_bias,
        blocks[1],
        scale,
        shift,
        eps,
        norm is not None,
        heads,
        offsets,
        _in_four(mask),
        _in_four(bias),
        causal,
    )
    return result[0] if result else None


def feed_forward(
    input: Tensor,
    residual: Tensor,
    products: tuple[Tensor, State, Tensor, State],
    activation: str,
    norm: tuple[State, State, float] | None,
    weight_dtype: str,
) -> Tensor | None:
    """norm(residual + linear2(activation(linear1(input)))) on (..., E).

    products: weight and bias of linear1 and of linear2. norm: as of `self_attention`.
    """
    weight1, bias1, weight2, bias2 = products
    scale, shift, eps = (None, None, 0.0) if norm is None else norm
    others = (residual, bias1, bias2, scale, shift)
    blocks = packed_again(input, (weight1, weight2), others, weight_dtype)
    if blocks is None:
        return None
    result = _calls()[1](
        input,
        residual,
        weight1,
        bias1,
        blocks[0],
        weight2,
        bias2,
        blocks[1],
        ACTIVATIONS.index(activation),
        scale,
        shift,
        eps,
        norm is not None,
    )
    return result[0] if result else None
