"""Scaled dot-product attention over heads, with every kind of mask, and its weights on request.

For query t and key s of a head:

    e_ts = scale * (q_t . k_s) + bias_ts          scale: 1 / sqrt(D) unless given
    w_ts = softmax over s of e_ts                 over the keys that count
    output_t = sum over s of w_ts value_s

A key counts where it is within the sentence's memory_lengths, where mask is True, and, with causal,
where s <= t.

    query           (B, H, Tq, D)
    key             (B, G, S, D)      H a multiple of G: H / G query heads share a key head
    value           (B, G, S, V)
    memory_lengths  int64 (B) on the CPU, each from 0 to S; absent: S
    mask            bool, broadcast to (B, H, Tq, S)
    bias            of the query's dtype, broadcast to (B, H, Tq, S): T5's relative bias, ALiBi, or
                    a float mask with -inf in it
    output          (B, H, Tq, V)     in memory (B, Tq, H, V), as the next projection reads it
    weights         (B, H, Tq, S)     zero where a key does not count

A query without any key that counts has zeros for weights and output, where torch has NaN. Memory
past a sentence's end is not read. All floating tensors have one dtype and device.

Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762); shared key heads: Ainslie et
al., 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import Backend, Description, explained_by, select
from encdec_fast.ops import _attention_checks as checks
from encdec_fast.ops._call import GRAPHS, State, autocasting, context_of, needs_gradient
from encdec_fast.ops._cpu import unfit
from encdec_fast.ops._packing import with_rows

_library = torch.library.Library("encdec_fast", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? memory_lengths, Tensor? mask,"
    " Tensor? bias, bool causal, float scale, bool need_weights)"
    " -> (Tensor output, Tensor weights)"
)


class AttentionCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    causal: bool
    scale: float
    need_weights: bool
    context: str  # as in ops/_call.py


def _counts(query: Tensor, key: Tensor, memory_lengths: State, mask: State, causal: bool) -> State:
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


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_lengths: State = None,
    mask: State = None,
    bias: State = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, weights) in plain PyTorch. The truth that backends are held to."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    if memory_lengths is not None:  # whatever stands in the padding, NaN too, must reach nothing
        positions = torch.arange(key.shape[2], device=key.device)
        padding = (positions >= memory_lengths.to(key.device).unsqueeze(1))[:, None, :, None]
        key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = scale * (query @ key.transpose(2, 3))
    scores = scores if bias is None else scores + bias
    counts = _counts(query, key, memory_lengths, mask, causal)
    if counts is not None:
        scores = scores.masked_fill(~counts, -torch.inf)
    none = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(none, 0), dim=-1).masked_fill(none, 0)
    if counts is not None:
        weights = weights.masked_fill(~counts, 0)
    return weights @ value, weights


def _laid_out(output: Tensor) -> Tensor:
    """The output in the layout of the op: heads side by side in the features."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _reference(call: AttentionCall, *tensors: Any) -> tuple[Tensor, Tensor]:
    output, weights = reference(*tensors, causal=call.causal, scale=call.scale)
    return _laid_out(output), weights if call.need_weights else output.new_empty(0)


def _torch(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_lengths: State,
    mask: State,
    bias: State,
) -> tuple[Tensor, Tensor]:
    """torch's own fused attention."""
    # torch's kernel takes causal or a mask, not both.
    masked = memory_lengths is not None or mask is not None or bias is not None
    counts = _counts(query, key, memory_lengths, mask, call.causal and masked)
    both = counts
    if bias is not None:
        both = bias if counts is None else bias.masked_fill(~counts, -torch.inf)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=both,
        is_causal=call.causal and not masked,
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if both is not None:  # rows without a key
        some = (both if bias is None else both != -torch.inf).any(-1, keepdim=True)
        output = torch.where(some, output, 0)
    return _laid_out(output), output.new_empty(0)


def _torch_why_not(call: AttentionCall) -> list[str]:
    return ["torch's kernel does not return the weights"] if call.need_weights else []


def _cpu(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_lengths: State,
    mask: State,
    bias: State,
) -> tuple[Tensor, Tensor]:
    output, *weights = torch.ops.encdec_fast_cpu.attention_forward.default(
        with_rows(query),
        with_rows(key),
        with_rows(value),
        memory_lengths,
        mask,
        bias,
        call.causal,
        call.scale,
        call.need_weights,
    )
    return output, weights[0].to(call.dtype) if weights else output.new_empty(0)


def _why_not(call: AttentionCall) -> list[str]:
    return unfit(call) + (["a gradient is needed: it has none yet"] if call.training else [])


BACKENDS = (
    Backend("cpu", _cpu, _why_not),
    Backend("torch", _torch, _torch_why_not),
    Backend("reference", _reference, lambda call: []),
)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, (causal, scale, need_weights) = args[:6], args[6:]
    query = tensors[0]
    call = AttentionCall(query.dtype, query.device.type, False, causal, scale, need_weights, "")
    result: tuple[Tensor, Tensor] = select(BACKENDS, call).run(call, *tensors)
    return result


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], key.shape[2]) if rest[-1] else (0,)
    B, H, Tq, _ = query.shape
    output = query.new_empty((B, Tq, H, value.shape[3])).transpose(1, 2)
    return output, query.new_empty(shape)


_library.impl("attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("encdec_fast::attention", _fake, lib=_library)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    memory_lengths: Tensor | Sequence[int] | None = None,
    mask: State = None,
    bias: State = None,
    causal: bool = False,
    scale: float | None = None,
    need_weights: bool = False,
) -> tuple[AttentionCall, tuple[Any, ...]]:
    """The metadata and the tensors of a call of the public function."""
    if autocasting(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    mask, bias = checks.attention(query, key, value, mask, bias)
    lengths = checks.as_memory_lengths(memory_lengths, key)
    given = [t for t in (key, value, mask, bias) if t is not None]
    context = "compile" if torch.compiler.is_compiling() else context_of(query, given)
    if context not in GRAPHS:
        checks.length_values(lengths, key.shape[2])
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    device, training = query.device.type, needs_gradient([query, *given])
    call = AttentionCall(query.dtype, device, training, causal, scale, need_weights, context)
    return call, (query, key, value, lengths, mask, bias)


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, (query, key, value, *_) = _prepare(*args, **options)
    B, H, Tq, D = query.shape
    sizes = f"B={B} H={H} G={key.shape[1]} Tq={Tq} S={key.shape[2]} D={D} V={value.shape[3]}"
    sizes += f" {call.dtype} {call.device}" + (" training" if call.training else " inference")
    return Description("attention", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    memory_lengths: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    need_weights: bool = False,
) -> Any:
    """Scaled dot-product attention; shapes and masks are in this file's docstring.

    Returns the output (B, H, Tq, V), and with need_weights (output, weights). RuntimeError for
    tensors whose sizes, dtypes or devices do not fit, and for lengths below 0 or above S. Where a
    gradient is needed it runs on torch's own kernel, or with need_weights in plain PyTorch.
    """
    call, tensors = _prepare(
        query,
        key,
        value,
        memory_lengths=memory_lengths,
        mask=mask,
        bias=bias,
        causal=causal,
        scale=scale,
        need_weights=need_weights,
    )
    if call.context in GRAPHS and not call.training:
        op = torch.ops.encdec_fast.attention
        output, weights = op(*tensors, causal, call.scale, need_weights)
    elif call.context in GRAPHS:
        output, weights = (_reference if need_weights else _torch)(call, *tensors)
    else:
        output, weights = select(BACKENDS, call).run(call, *tensors)
    return (output, weights) if need_weights else output
