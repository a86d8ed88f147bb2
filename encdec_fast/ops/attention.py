"""Scaled dot-product attention over heads, with every kind of mask, and its weights on request.

For query t and key s of a head:

    e_ts = scale * (q_t . k_s) + bias_ts          scale: 1 / sqrt(D) unless given
    w_ts = softmax over s of e_ts                 over the keys that count
    w_ts = w_ts / (1 - p) or, with probability p, 0        with dropout
    output_t = sum over s of w_ts value_s

A key counts where it is within the sentence's memory_lengths, where mask is True, and, with causal,
where s <= t.

    query           (B, H, Tq, D)
    key             (B, G, S, D)      H a multiple of G: H / G query heads share a key head
    value           (B, G, S, V)
    memory_lengths  int64 (B), each from 0 to S, on the CPU or the memory's device; absent: S
    mask            bool, broadcast to (B, H, Tq, S)
    bias            of the query's dtype, broadcast to (B, H, Tq, S): T5's relative bias, ALiBi, or
                    a float mask with -inf in it
    output          (B, H, Tq, V)     in memory (B, Tq, H, V), as the next projection reads it
    weights         (B, H, Tq, S)     zero where a key does not count; or their mean over the
                                      heads, (B, Tq, S)

Dropout is decided by a seed that is drawn from torch's generator, and a place: the same numbers
(Philox4x32-10, `ops/_dropout.py`) on every thread. Only the `torch` backend, outside of a graph,
leaves it to torch, which draws others. At a decode step the beams
of a sentence are its queries: keys and values are there once.

A query without any key that counts has zeros for weights and output, where torch has NaN. Memory
past a sentence's end is not read. All floating tensors have one dtype and device. Backward computes
the weights again: nothing of size (Tq, S) is stored.

Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762); shared key heads: Ainslie et
al., 2023 (arXiv:2305.13245); backward: Dao et al., 2022 (arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.backends import (
    Backend,
    Description,
    explained_by,
    requested_backend,
    select,
)
from encdec_fast.ops import _attention_checks as checks
from encdec_fast.ops import _triton
from encdec_fast.ops._attention_torch import (
    Recorded,
    counts_of,
    laid_out,
    torch_attention,
    torch_why_not,
    without_padding,
)
from encdec_fast.ops._call import (
    GRAPHS,
    State,
    autocasting,
    context_of,
    device_type,
    needs_gradient,
)
from encdec_fast.ops._cpu import unfit
from encdec_fast.ops._derivatives import recompute
from encdec_fast.ops._dropout import drawn_seed, dropout_factors
from encdec_fast.ops._packing import with_rows
from encdec_fast.ops._tensor_op import TensorOp

MOST_NUMBERS = 256  # of a query, key or value, that a Triton program holds

_library = torch.library.Library("encdec_fast", "FRAGMENT")


class AttentionCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    causal: bool
    scale: float
    dropout_p: float
    average_weights: bool
    need_weights: bool
    context: str  # as in ops/_call.py
    wide: bool = False  # more than MOST_NUMBERS in a query or a value
    plain: bool = False  # neither lengths nor mask nor bias


def _wide(query: Tensor, value: Tensor) -> bool:
    sizes = (query.shape[3], value.shape[3])  # a tracer's symbols are no int
    return any(isinstance(size, int) and size > MOST_NUMBERS for size in sizes)


def _call(tensors: Sequence[Any], flags: Sequence[Any], training: bool) -> AttentionCall:
    query = tensors[0]
    causal, scale, dropout_p, average_weights, need_weights = flags
    where = (query.dtype, device_type(query), training)
    options = (causal, scale, dropout_p, average_weights, need_weights)
    plain = all(t is None for t in tensors[3:6])
    return AttentionCall(*where, *options, "", _wide(query, tensors[2]), plain)


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
    dropout_p: float = 0.0,
    seed: State = None,
) -> tuple[Tensor, Tensor]:
    """(output, weights) in plain PyTorch. The truth that backends are held to."""
    scale = max(1, query.shape[-1]) ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    key, value = without_padding(key, value, memory_lengths)
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = scale * (query @ key.transpose(2, 3))
    scores = scores if bias is None else scores + bias
    counts = counts_of(query, key, memory_lengths, mask, causal)
    if counts is not None:
        scores = scores.masked_fill(~counts, -torch.inf)
    none = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(none, 0), dim=-1).masked_fill(none, 0)
    if counts is not None:
        weights = weights.masked_fill(~counts, 0)
    if dropout_p > 0 and seed is not None:
        weights = weights * dropout_factors(seed, weights, dropout_p)
    return weights @ value, weights


def _new_heads(like: Tensor, B: Any, H: Any, rows: Any, size: Any) -> Tensor:
    """A tensor (B, H, rows, size) in that layout, with strides of its own: no view."""
    one = torch.sym_max
    row = one(H, 1) * one(size, 1)
    return like.new_empty_strided((B, H, rows, size), (one(rows, 1) * row, one(size, 1), row, 1))


def _results(
    call: AttentionCall, query: Tensor, output: Tensor, weights: Tensor, log_sums: State = None
) -> tuple[Tensor, ...]:
    """What a backend returns; log_sums: of each row, what only Triton's backward reads."""
    if not call.training:
        return output, weights
    if log_sums is None:
        log_sums = query.new_zeros(query.shape[:3], dtype=torch.float32)
    return output, weights, log_sums


def _reference(call: AttentionCall, *tensors: Any) -> tuple[Tensor, ...]:
    query, key, value, bias, memory_lengths, mask, seed = tensors
    output, weights = reference(
        query,
        key,
        value,
        memory_lengths,
        mask,
        bias,
        causal=call.causal,
        scale=call.scale,
        dropout_p=call.dropout_p,
        seed=seed,
    )
    shown = output.new_empty(0)
    if call.need_weights:
        shown = weights.mean(1) if call.average_weights else weights.contiguous()
    return _results(call, query, laid_out(output), shown)


def _fake(call: AttentionCall, *tensors: Any) -> tuple[Tensor, ...]:
    query, key, value = tensors[:3]
    B, H, Tq, _ = query.shape
    shape: tuple[int, ...] = (0,)
    if call.need_weights:
        S = key.shape[2]
        shape = (B, Tq, S) if call.average_weights else (B, H, Tq, S)
    output = _new_heads(query, B, H, Tq, value.shape[3])
    return _results(call, query, output, query.new_empty(shape))


OP = TensorOp(
    "attention",
    tensors="Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? memory_lengths, "
    "Tensor? mask, Tensor? seed",
    differentiable=4,
    flags="bool causal, float scale, float dropout_p, bool average_weights, bool need_weights",
    results="Tensor output, Tensor weights",
    saved="Tensor log_sums",
    make_call=_call,
    reference=_reference,
    fake=_fake,
    layout=laid_out,
)
OP.register(_library)


def _recompute(call: AttentionCall, grads: Any, tensors: Any, kept: Any) -> list[State]:
    return OP.recompute(call, grads, tensors)


def _torch(call: AttentionCall, *tensors: Any) -> tuple[Tensor, ...]:
    return _results(call, tensors[0], *torch_attention(call, *tensors))


def _torch_backward(call: AttentionCall, grads: Any, tensors: Any, kept: Any) -> list[State]:
    def run(*own: Any) -> tuple[Tensor, ...]:
        return torch_attention(call, *own, *tensors[4:])[:1]

    return recompute(run, grads[:1], tensors[:4])


def _cpu(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: State,
    memory_lengths: State,
    mask: State,
    seed: State,
) -> tuple[Tensor, ...]:
    output, *weights = torch.ops.encdec_fast_cpu.attention_forward.default(
        with_rows(query),
        with_rows(key),
        with_rows(value),
        bias,
        memory_lengths,
        mask,
        seed,
        call.causal,
        call.scale,
        call.dropout_p,
        call.average_weights,
        call.need_weights,
    )
    shown = weights[0].to(call.dtype) if weights else output.new_empty(0)
    return _results(call, query, output, shown)


def _cpu_backward(
    call: AttentionCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    grad_output, grad_weights = grads
    if grad_weights is not None:
        grad_weights = grad_weights.float().contiguous() if call.need_weights else None
    found = torch.ops.encdec_fast_cpu.attention_backward.default(
        None if grad_output is None else with_rows(grad_output),
        grad_weights,
        *map(with_rows, tensors[:3]),
        *tensors[3:],
        call.causal,
        call.scale,
        call.dropout_p,
        call.average_weights,
        tensors[3] is not None,
    )
    return [*found[:3], found[3].to(call.dtype) if len(found) > 3 else None]


def _triton_call(kernels: Any, call: AttentionCall, tensors: Sequence[Any]) -> Any:
    query, key, value, bias, lengths, mask, seed = tensors
    lengths = None if lengths is None else lengths.to(query.device)
    given = (*map(with_rows, (query, key, value)), bias, lengths, mask, seed)
    return kernels.call_of(*given, call.causal, call.scale, call.dropout_p)


def _triton_run(call: AttentionCall, *tensors: Any) -> tuple[Tensor, ...]:
    query, kernels = tensors[0], _triton.kernels("attention")
    with torch.cuda.device_of(query):
        output, weights, log_sums = kernels.forward(
            _triton_call(kernels, call, tensors),
            call.need_weights,
            call.average_weights,
            call.training,
        )
    shown = weights.to(call.dtype) if call.need_weights else output.new_empty(0)
    return _results(call, query, output, shown, log_sums)


def _triton_backward(
    call: AttentionCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    (grad_output, grad_weights), (output, _, log_sums), bias = grads, kept, tensors[3]
    if grad_weights is not None:
        grad_weights = grad_weights.float().contiguous() if call.need_weights else None
    kernels = _triton.kernels("attention")
    with torch.cuda.device_of(output):
        *found, grad_bias = _triton.kernels("attention_backward").backward(
            _triton_call(kernels, call, tensors),
            laid_out(torch.zeros_like(output) if grad_output is None else grad_output),
            grad_weights,
            call.average_weights,
            laid_out(output),
            log_sums,
            None if bias is None else bias.shape,
        )
    return [*found, None if grad_bias is None else grad_bias.to(call.dtype)]


def _unfit_for_triton(call: AttentionCall) -> list[str]:
    reasons = _triton.unfit(call)
    if call.wide:
        reasons.append(f"a program holds {MOST_NUMBERS} numbers of a query, key or value")
    # Nothing has been measured: what vendors wrote for this very call goes first.
    by_torch = call.device == "cuda" and call.plain and not torch_why_not(call)
    if by_torch and requested_backend() != "triton":
        reasons.append("torch's fused kernels take calls without lengths, mask, bias and weights")
    return reasons


BACKENDS = (
    Backend("triton", _triton_run, _unfit_for_triton, backward=_triton_backward),
    Backend("cpu", _cpu, unfit, backward=_cpu_backward),
    Backend("torch", _torch, torch_why_not, backward=_torch_backward),
    Backend("reference", _reference, lambda call: [], backward=_recompute),
)
OP.backends = BACKENDS


def _torch_runs(call: AttentionCall) -> bool:
    return select(BACKENDS, call._replace(training=False)).name == "torch"


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
    dropout_p: float = 0.0,
    need_weights: bool = False,
    average_weights: bool = False,
) -> tuple[AttentionCall, list[Any]]:
    """The metadata and the tensors of a call of the public function."""
    if autocasting(device_type(query)) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type(query))
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    mask, bias = checks.attention(query, key, value, mask, bias)
    lengths = checks.as_memory_lengths(memory_lengths, key)
    given = [t for t in (key, value, mask, bias) if t is not None]
    context = "compile" if torch.compiler.is_compiling() else context_of(query, given)
    if context not in GRAPHS:
        checks.length_values(lengths, key.shape[2])
    scale = float(max(1, query.shape[-1]) ** -0.5 if scale is None else scale)
    seed = drawn_seed(query.device) if checks.probability(dropout_p) > 0 else None
    device, training = device_type(query), needs_gradient([query, *given])
    flags = (causal, scale, float(dropout_p), average_weights and need_weights, need_weights)
    plain = bias is None and lengths is None and mask is None
    call = AttentionCall(query.dtype, device, training, *flags, context, _wide(query, value), plain)
    return call, [query, key, value, bias, lengths, mask, seed]


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, tensors = _prepare(*args, **options)
    query, key, value = (tensor for tensor in tensors[:3] if tensor is not None)
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
    dropout_p: float = 0.0,
    need_weights: bool = False,
    average_weights: bool = False,
) -> Any:
    """Scaled dot-product attention; shapes and masks are in this file's docstring.

    dropout_p: the probability with which a weight is dropped, in training and in inference alike.
    average_weights: the weights are their mean over the heads.
    Returns the output (B, H, Tq, V), and with need_weights (output, weights), the weights after
    dropout. RuntimeError for tensors whose sizes, dtypes or devices do not fit, and for lengths
    below 0 or above S; ValueError for a probability outside of [0, 1].
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
        dropout_p=dropout_p,
        need_weights=need_weights,
        average_weights=average_weights,
    )
    if call.training and not call.context and _torch_runs(call):
        # With dropout torch runs plain operations, which autograd knows by itself.
        if dropout_p > 0:
            return torch_attention(call, *tensors)[0]
        return Recorded.apply(call, _reference, *tensors)
    flags = (causal, call.scale, call.dropout_p, call.average_weights, need_weights)
    output, weights = OP.emit(call, tensors, flags)
    return (output, weights) if need_weights else output
