"""Additive attention: which parts of a memory a query looks at, scored by a small network.

For query t and key s of a sentence, both projected to the attention size A beforehand:

    e_ts = v' tanh(q_t + k_s)            score; with coverage: v' tanh(q_t + k_s + c_s u)
    w_ts = softmax over s of e_ts        over the sentence's own keys
    context_t = sum over s of w_ts value_s

    query            (B, Tq, A)
    keys             (B, S, A)
    values           (B, S, D)
    score_weight     (A)                 v
    memory_lengths   int64 (B), each from 0 to S, on the CPU or the memory's device; absent: S
    coverage         (B, S)              c: how much attention each key has had so far
    coverage_weight  (A)                 u
    context          (B, Tq, D)
    weights          (B, Tq, S)          zero past a sentence's end

A sentence of length zero has zeros for weights and context. NaN in a query or in a score stays in
its row. All floating tensors have one dtype and device. Nothing of size (B, Tq, S, A) is stored,
forward or backward; training stores the weights, in float32. At a decode step the beams of a
sentence are its queries: keys and values are there once.

Bahdanau, Cho and Bengio, Neural Machine Translation by Jointly Learning to Align and Translate,
2015 (arXiv:1409.0473); coverage: Tu et al., 2016 (arXiv:1601.04811), See et al., 2017
(arXiv:1704.04368).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.backends import Backend, Description, explained_by
from encdec_fast.ops import _attention_checks as checks
from encdec_fast.ops import _triton
from encdec_fast.ops._call import (
    GRAPHS,
    State,
    autocasting,
    context_of,
    device_type,
    needs_gradient,
)
from encdec_fast.ops._cpu import unfit
from encdec_fast.ops._packing import with_rows
from encdec_fast.ops._tensor_op import TensorOp, reference_backend

_library = torch.library.Library("encdec_fast", "FRAGMENT")


class AdditiveCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    need_weights: bool
    context: str  # as in ops/_call.py


def _call(tensors: Sequence[Any], flags: Sequence[Any], training: bool) -> AdditiveCall:
    query = tensors[0]
    return AdditiveCall(query.dtype, device_type(query), training, flags[0], "")


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_weight: Tensor,
    memory_lengths: State = None,
    coverage: State = None,
    coverage_weight: State = None,
) -> tuple[Tensor, Tensor]:
    """(context, weights) in plain PyTorch. The truth that backends are held to.

    Any dtype and device; differentiable any number of times; not fast, and of (B, Tq, S, A) memory.
    """
    if coverage is not None and coverage_weight is not None:
        keys = keys + coverage.unsqueeze(-1) * coverage_weight
    real: State = None
    if memory_lengths is not None:
        positions = torch.arange(keys.shape[1], device=keys.device)
        real = positions < memory_lengths.to(keys.device).unsqueeze(1)  # [B, S]
        # Whatever stands in the padding, NaN too, must not reach a result or a gradient.
        keys = keys.masked_fill(~real.unsqueeze(2), 0)
        values = values.masked_fill(~real.unsqueeze(2), 0)
    scores = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) @ score_weight
    if real is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # The least number in place of -inf: a sentence without keys would have NaN gradients.
        scores = scores.masked_fill(~real.unsqueeze(1), torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(~real.unsqueeze(1), 0)
    return weights @ values, weights


def _reference(call: AdditiveCall, *tensors: Any) -> tuple[Tensor, ...]:
    query, keys, values, score_weight, coverage, coverage_weight, memory_lengths = tensors
    context, weights = reference(
        query, keys, values, score_weight, memory_lengths, coverage, coverage_weight
    )
    shown = weights if call.need_weights else query.new_empty(0)
    if not call.training:
        return context, shown
    return context, shown, weights.to(torch.float32, copy=True)


def _fake(call: AdditiveCall, *tensors: Any) -> tuple[Tensor, ...]:
    query, keys, values = tensors[:3]
    shape = (*query.shape[:2], keys.shape[1])
    context = query.new_empty((*shape[:2], values.shape[2]))
    shown = query.new_empty(shape if call.need_weights else (0,))
    if not call.training:
        return context, shown
    return context, shown, query.new_empty(shape, dtype=torch.float32)


OP = TensorOp(
    "additive_attention",
    tensors="Tensor query, Tensor keys, Tensor values, Tensor score_weight, Tensor? coverage, "
    "Tensor? coverage_weight, Tensor? memory_lengths",
    differentiable=6,
    flags="bool need_weights",
    results="Tensor context, Tensor weights",
    saved="Tensor probabilities",
    make_call=_call,
    reference=_reference,
    fake=_fake,
)
OP.register(_library)


def _rows(tensors: Sequence[State]) -> list[State]:
    """Tensors as the kernels read them: vectors contiguous, matrices with contiguous rows."""
    return [None if t is None else t.contiguous() if t.dim() < 3 else with_rows(t) for t in tensors]


def _cpu(call: AdditiveCall, *tensors: Any) -> tuple[Tensor, ...]:
    wanted = call.need_weights or call.training
    context, *weights = torch.ops.encdec_fast_cpu.additive_forward(*_rows(tensors), wanted)
    if not wanted:
        return context, context.new_empty(0)
    shown = weights[0].to(call.dtype, copy=call.training)
    if not call.training:
        return context, shown
    return context, shown if call.need_weights else context.new_empty(0), weights[0]


def _cpu_backward(
    call: AdditiveCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    grad_context, grad_weights = grads
    if grad_weights is not None:
        grad_weights = grad_weights.float().contiguous() if call.need_weights else None
    found = torch.ops.encdec_fast_cpu.additive_backward(
        *_rows(tensors), kept[2], *_rows([grad_context]), grad_weights
    )
    return _with_coverage(call, found, tensors)


def _with_coverage(
    call: AdditiveCall, found: Sequence[Tensor], tensors: Sequence[Any]
) -> list[State]:
    """The gradients of query, keys, values and score_weight, and those of the coverage."""
    grad_query, grad_keys, grad_values, grad_v = found
    coverage, coverage_weight = tensors[4:6]
    of_coverage: tuple[State, State] = (None, None)
    if coverage is not None:  # it reaches the scores as a part of the keys
        of_coverage = (
            grad_keys @ coverage_weight,
            coverage.reshape(-1) @ grad_keys.reshape(-1, grad_keys.shape[-1]),
        )
    return [grad_query, grad_keys, grad_values, grad_v.to(call.dtype), *of_coverage]


def _triton_run(call: AdditiveCall, *tensors: Any) -> tuple[Tensor, ...]:
    query = tensors[0]
    with torch.cuda.device_of(query):
        context, weights = _triton.kernels("additive_attention").forward(
            *_triton.contiguous(tensors, query.device), call.need_weights or call.training
        )
    shown = context.new_empty(0)
    if call.need_weights:
        shown = weights.to(call.dtype, copy=call.training)
    return (context, shown, weights) if call.training else (context, shown)


def _triton_backward(
    call: AdditiveCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    query = tensors[0]
    grad_context, grad_weights = _triton.contiguous(grads, query.device)
    if grad_weights is not None:
        grad_weights = grad_weights.float() if call.need_weights else None
    with torch.cuda.device_of(query):
        found = _triton.kernels("additive_attention").backward(
            grad_context, grad_weights, *_triton.contiguous(tensors, query.device), kept[2]
        )
    return _with_coverage(call, found, tensors)


BACKENDS = (
    Backend("triton", _triton_run, _triton.unfit, backward=_triton_backward),
    Backend("cpu", _cpu, unfit, backward=_cpu_backward),
    reference_backend(OP),
)
OP.backends = BACKENDS


def _prepare(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_weight: Tensor,
    memory_lengths: Tensor | Sequence[int] | None = None,
    need_weights: bool = False,
    *,
    coverage: State = None,
    coverage_weight: State = None,
) -> tuple[AdditiveCall, list[State]]:
    """The metadata and the tensors of a call of the public function."""
    own: list[State] = [query, keys, values, score_weight, coverage, coverage_weight]
    given = [tensor for tensor in own if tensor is not None]
    if autocasting(device_type(query)) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type(query))
        own = [None if t is None else t.to(dtype) for t in own]
        given = [tensor for tensor in own if tensor is not None]
    checks.additive(*own)
    lengths = checks.as_memory_lengths(memory_lengths, keys)
    context = "compile" if torch.compiler.is_compiling() else context_of(given[0], given[1:])
    if context not in GRAPHS:
        checks.length_values(lengths, keys.shape[1])
    call = AdditiveCall(
        given[0].dtype, device_type(query), needs_gradient(given), need_weights, context
    )
    return call, [*own, lengths]


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, tensors = _prepare(*args, **options)
    query, keys, values = (tensor for tensor in tensors[:3] if tensor is not None)
    sizes = f"B={query.shape[0]} Tq={query.shape[1]} S={keys.shape[1]} A={query.shape[2]}"
    sizes += f" D={values.shape[2]} {call.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    return Description("additive_attention", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_weight: Tensor,
    memory_lengths: Tensor | Sequence[int] | None = None,
    need_weights: bool = False,
    *,
    coverage: Tensor | None = None,
    coverage_weight: Tensor | None = None,
) -> Any:
    """Additive attention on projected queries and keys; shapes are in this file's docstring.

    Returns the context (B, Tq, D), and with need_weights (context, weights). RuntimeError for
    tensors whose sizes, dtypes or devices do not fit, and for lengths below 0 or above S.
    """
    call, tensors = _prepare(
        query,
        keys,
        values,
        score_weight,
        memory_lengths,
        need_weights,
        coverage=coverage,
        coverage_weight=coverage_weight,
    )
    context, weights = OP.emit(call, tensors, (need_weights,))
    return (context, weights) if need_weights else context
