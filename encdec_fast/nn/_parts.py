"""Linear modules whose weights another module's op reads, and what runs where it may not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from encdec_fast.backends import Description
from encdec_fast.nn._transformer import BACKENDS, ModuleCall
from encdec_fast.nn.linear import Linear
from encdec_fast.ops.attention import attention

LISTENERS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# By the name of a submodule: whether the op takes its bias too.
Reads = dict[str, bool]


def _why_called(part: nn.Module | None, bias: bool) -> str:
    if type(part) not in (nn.Linear, Linear):
        return "was replaced or is parametrized"
    own: Any = part
    if "weight" not in own._parameters:
        return "has a weight that is computed anew in every call"
    if not bias and own.bias is not None:
        return "has a bias"
    if getattr(own, "weight_dtype", None) is not None:
        return "has a weight_dtype of its own"
    if "forward" in own.__dict__ or any(getattr(own, name) for name in LISTENERS):
        return "has a hook or a forward of its own"
    return ""


def why_called(module: nn.Module, reads: Reads) -> str:
    """Why a module calls these of its parts, in place of an op that reads their weights.

    "" where the op may: each is a Linear as it was made, and nobody listens to it.
    """
    for name, bias in reads.items():
        reason = _why_called(module._modules.get(name), bias)
        if reason:
            return f"{name} {reason}"
    return "a hook listens to all modules" if torch_module._has_any_global_hook() else ""


def attend_by_scores(
    scores: Tensor, memory: Tensor, memory_lengths: Any = None, need_weights: bool = False
) -> Any:
    """Attention over a memory (B, S, M) whose scores (B, Tq, S) are already there."""
    nothing = (scores.new_zeros(*scores.shape[:2], 1), scores.new_zeros(*memory.shape[:2], 1))
    if memory.dtype != scores.dtype:  # under autocast
        memory = memory.to(scores.dtype)
    heads = [tensor.unsqueeze(1) for tensor in (*nothing, memory)]
    options = {"memory_lengths": memory_lengths, "need_weights": need_weights}
    found: Any = attention(*heads, bias=scores.unsqueeze(1), **options)
    return tuple(t.squeeze(1) for t in found) if need_weights else found.squeeze(1)


def attend_by_score(
    score: nn.Module,
    queries: Tensor,
    keys: Tensor,
    memory: Tensor,
    memory_lengths: Any = None,
    need_weights: bool = False,
    of_coverage: Tensor | None = None,
) -> Any:
    """Additive attention that calls `score`. of_coverage: (B, S, A), added to the keys."""
    keys = keys if of_coverage is None else keys + of_coverage
    scores = score(torch.tanh(queries.unsqueeze(2) + keys.unsqueeze(1))).squeeze(-1)
    return attend_by_scores(scores, memory, memory_lengths, need_weights)


def describe_called(op: str, input: Tensor, reason: str) -> Description:
    """What `explain` says of a module that calls its parts."""
    sizes = f"{tuple(input.shape)} {input.dtype} {input.device.type}"
    plan = "the submodules are called one after the other"
    return Description(op, BACKENDS, ModuleCall((reason,), ()), sizes, lambda backend: plan)
