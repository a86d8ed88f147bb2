"""torch's own fused attention as `ops/attention.py` calls it, and what the reference shares with
it: which keys count, and how the op's tensors lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.ops._call import State

# A call and its tensors -> the output, and what else there is.
Reference = Callable[..., tuple[Tensor, ...]]


def counts_of(
    query: Tensor, key: Tensor, memory_lengths: State, mask: State, causal: bool
) -> State:
    """Which keys count, broadcast to (B, H, Tq, S); None where all do."""
    found = mask
    if memory_lengths is not None:
        positions = torch.arange(key.shape[2], device=key.device)
        real = positions < memory_lengths.to(key.device)[:, None, None, None]
        found = real if found is None else found & real
    if causal:
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        found = ones.tril() if found is None else found & ones.tril()
    return found


def without_padding(key: Tensor, value: Tensor, memory_lengths: State) -> tuple[Tensor, Tensor]:
    """Zeros past each sentence's end: whatever stands there, NaN too, must reach nothing."""
    if memory_lengths is None:
        return key, value
    positions = torch.arange(key.shape[2], device=key.device)
    padding = (positions >= memory_lengths.to(key.device).unsqueeze(1))[:, None, :, None]
    return key.masked_fill(padding, 0), value.masked_fill(padding, 0)


def laid_out(output: Tensor) -> Tensor:
    """An output or a gradient in the layout of the op: heads side by side in the features."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def torch_attention(
    call: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: State,
    memory_lengths: State,
    mask: State,
    seed: State,
) -> tuple[Tensor, Tensor]:
    """torch's own fused attention."""
    key, value = without_padding(key, value, memory_lengths)
    # torch's kernel takes causal or a mask, not both.
    masked = memory_lengths is not None or mask is not None or bias is not None
    counts = counts_of(query, key, memory_lengths, mask, call.causal and masked)
    both = counts
    if bias is not None:
        both = bias if counts is None else bias.masked_fill(~counts, -torch.inf)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=both,
        dropout_p=call.dropout_p,
        is_causal=call.causal and not masked,
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if both is not None:  # rows without a key
        some = (both if both.dtype == torch.bool else both != -torch.inf).any(-1, keepdim=True)
        output = torch.where(some, output, 0)
    return laid_out(output), output.new_empty(0)


def torch_why_not(call: Any) -> list[str]:
    reasons = ["torch's kernel does not return the weights"] if call.need_weights else []
    if call.training and call.dropout_p > 0:
        reasons.append("torch's kernel draws its own numbers for dropout, others in backward")
    return reasons


def _leaf_or_view(t: Tensor) -> Tensor:
    """`t` for torch.autograd.grad, which takes no tensor of which no gradient is needed."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


class Recorded(torch.autograd.Function):
    """torch's kernel under autograd, whose own backward cannot be differentiated: where that is
    asked for, the reference is.
    """

    @staticmethod
    def forward(ctx: Any, call: Any, reference: Reference, *tensors: Any) -> Tensor:
        ctx.call, ctx.reference = call, reference
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            ctx.own = [None if t is None else t.detach().requires_grad_() for t in tensors[:4]]
            ctx.output, _ = torch_attention(call, *ctx.own, *tensors[4:])
        output: Tensor = ctx.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors
        own, output = ctx.own, ctx.output
        if torch.is_grad_enabled():
            own = [None if t is None else _leaf_or_view(t) for t in saved[:4]]
            output = ctx.reference(ctx.call, *own, *saved[4:])[0]
        wanted = [t for t in own if t is not None]
        found = torch.autograd.grad(
            output,
            wanted,
            grad,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
            materialize_grads=True,
        )
        grads = iter(found)
        return None, None, *(None if t is None else next(grads) for t in own), None, None, None
