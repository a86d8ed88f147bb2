"""The attention decoder by the ops of its steps, as a GPU runs it: Triton has each of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import requested_backend, use_backend
from encdec_fast.ops import _triton
from encdec_fast.ops._call import State
from encdec_fast.ops._derivatives import recompute
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.attention import attention
from encdec_fast.ops.gru import gru_cell
from encdec_fast.ops.location_attention import attend_positions
from encdec_fast.ops.lstm import lstm_cell


def steps(call: Any, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, of the ops of a step: each on whatever runs it."""
    input, h, c, fed, keys, values, w_ih, w_hh, b_ih, b_hh, *rest = tensors
    query_weight, score, positions, output_weight, covered, coverage_weight, lengths = rest
    lengths = None if lengths is None else lengths.to(input.device)
    biases = () if b_ih is None else (b_ih, b_hh)
    outputs, weights, need = [], [], call.need_weights
    shown = need or covered is not None  # by attention

    def attend(h: Tensor) -> list[Tensor]:
        query = (h if query_weight is None else F.linear(h, query_weight)).unsqueeze(1)
        if keys is None:
            scores = positions[:, t : t + 1] + query
            found = attend_positions(scores, values, lengths, shown)
        elif score is not None:
            options: dict[str, Any] = {}
            if covered is not None:
                options = {"coverage": covered, "coverage_weight": coverage_weight}
            found = additive_attention(query, keys, values, score, lengths, shown, **options)
        else:
            heads = [tensor.unsqueeze(1) for tensor in (query, keys, values)]
            options = {"memory_lengths": lengths, "need_weights": shown}
            found = attention(*heads, scale=call.scale, **options)
            found = tuple(part[:, 0] for part in found) if shown else found[:, 0]
        return [part[:, 0] for part in (found if shown else (found,))]

    for t in range(input.shape[1]):
        if keys is None:
            fed, *weight = attend(h)
        x = torch.cat([input[:, t], fed], dim=1)
        if call.cell == "lstm":
            h, c = lstm_cell(x, (h, c), w_ih, w_hh, *biases)
        else:
            h = gru_cell(x, h, w_ih, w_hh, *biases)
        if keys is not None:
            fed, *weight = attend(h)
        if output_weight is not None:
            fed = torch.tanh(F.linear(torch.cat([fed, h], dim=1), output_weight))
        outputs.append(torch.cat([h, fed], dim=1))
        if covered is not None:
            covered = covered + weight[0].to(h.dtype)
        if need:
            weights.append(weight[0].to(h.dtype))
    c_n = h.new_empty(h.shape[0], 0) if c is None else c
    seen = torch.stack(weights, dim=1) if need else h.new_empty(0)
    return torch.stack(outputs, dim=1), c_n, seen


@cache
def _replays() -> Any:
    """The graphs of whole calls."""
    return _triton.kernels("_replay").Replays()


def _captures(call: Any, tensor: Tensor) -> bool:
    """Whether a call may become a graph: not inside of somebody else's."""
    return not call.training and tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def run(call: Any, results: tuple[Tensor, ...], tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """All steps into empty results: on a GPU a graph, from the second call of its sizes on."""
    first = tensors[0]
    if not _captures(call, first):
        return *steps(call, *tensors), *results[3:]
    given = [None if t is None else t.to(first.device) for t in tensors]

    def launch(own: Sequence[Any]) -> None:
        for to, found in zip(own[len(given) :], steps(call, *own[: len(given)]), strict=True):
            to.copy_(found)

    places = range(len(given) + len(results))
    kind = (call, requested_backend())
    read, written = places[: len(given)], places[len(given) :]
    with torch.cuda.device_of(first):
        _replays().run(kind, [*given, *results], read, written, launch)
    return results


def backward(
    call: Any, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    """By autograd, through the steps once more: nothing of theirs was kept."""
    lengths = tensors[16]

    def results(*own: Any) -> tuple[Tensor, ...]:
        return steps(call, *own, lengths)

    with use_backend(None):  # a cell that trains is torch's, whatever is asked for
        return recompute(results, grads, tensors[:16])


def unfit(call: Any) -> list[str]:
    """Why the kernels cannot run a call."""
    reasons = _triton.unfit(call)
    if call.empty:
        reasons.append("there is no step or no sentence")
    return reasons
