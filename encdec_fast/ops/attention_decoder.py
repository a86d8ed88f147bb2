"""A recurrent decoder with attention and input feeding, all steps of a known target at once.

From the state (h, c) and the context f of the step before, for each step t:

    h_t, c_t = cell([x_t; f_{t-1}], (h_{t-1}, c_{t-1}))        an LSTM's or a GRU's
    q_t = W_q h_t                                              or h_t itself
    e_ts = v' tanh(q_t + key_s)                                additive (Bahdanau; Luong's concat)
    e_ts = scale * (q_t . key_s)                               without v (Luong's dot and general)
    w_ts = softmax over s of e_ts                              over the sentence's own keys
    f_t = sum over s of w_ts value_s

    input           (B, T, I)         x: the embedded target, teacher-forced
    h0, c0          (B, H)            c0 for an LSTM only
    context0        (B, M)            f before the first step
    keys            (B, S, A)         the memory, projected once
    values          (B, S, M)
    weight_ih       (G H, I + M)      G: 4 for an LSTM (i f g o), 3 for a GRU (r z n)
    weight_hh       (G H, H)
    bias_ih, bias_hh  (G H)           both or none
    query_weight    (A, H)            W_q; absent: A = H
    score_weight    (A)               v
    memory_lengths  int64 (B), each from 0 to S, on the CPU or the memory's device; absent: S
    output          (B, T, H + M)     h_t and f_t side by side, as the next projection reads them
    c_n             (B, H)            of the last step; (B, 0) for a GRU
    weights         (B, T, S)         zero past a sentence's end

A sentence of length zero has zeros for weights and contexts. All floating tensors have one dtype
and device. Nothing of size (B, T, S, A) is stored.

Luong, Pham and Manning, Effective Approaches to Attention-based Neural Machine Translation, 2015
(arXiv:1508.04025), section 3.3, with the context itself fed; Bahdanau et al., 2015
(arXiv:1409.0473).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import (
    Backend,
    Description,
    explained_by,
    requested_backend,
    use_backend,
)
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
from encdec_fast.ops._derivatives import recompute
from encdec_fast.ops._packing import with_rows
from encdec_fast.ops._tensor_op import TensorOp, reference_backend
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.additive_attention import reference as additive_reference
from encdec_fast.ops.attention import attention
from encdec_fast.ops.attention import reference as dot_reference
from encdec_fast.ops.gru import gru_cell
from encdec_fast.ops.gru import step as gru_step
from encdec_fast.ops.lstm import lstm_cell
from encdec_fast.ops.lstm import step as lstm_step

_library = torch.library.Library("encdec_fast", "FRAGMENT")
GATES = {"lstm": 4, "gru": 3}


class DecoderCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    cell: str
    scale: float
    need_weights: bool
    empty: bool  # no step or no sentence
    context: str  # as in ops/_call.py


def _call(tensors: Sequence[Any], flags: Sequence[Any], training: bool) -> DecoderCall:
    input = tensors[0]
    cell, scale, need_weights = flags
    empty = input.shape[0] * input.shape[1] == 0
    where = (input.dtype, device_type(input), training)
    return DecoderCall(*where, cell, scale, need_weights, empty, "")


def reference(
    input: Tensor,
    h0: Tensor,
    c0: State,
    context0: Tensor,
    keys: Tensor,
    values: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: State = None,
    bias_hh: State = None,
    query_weight: State = None,
    score_weight: State = None,
    memory_lengths: State = None,
    *,
    cell: str = "lstm",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, c_n, weights) in plain PyTorch, a step at a time. What backends are held to."""
    h, c, fed = h0, c0, context0
    step = lstm_step if cell == "lstm" else gru_step
    own = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    outputs, weights = [], []
    for t in range(input.shape[1]):
        x = torch.cat([input[:, t], fed], dim=1)
        h, c = step(x, h, c, own)
        query = (h if query_weight is None else h @ query_weight.t()).unsqueeze(1)
        if score_weight is None:
            q, k, v = (tensor.unsqueeze(1) for tensor in (query, keys, values))
            found, weight = dot_reference(q, k, v, memory_lengths, scale=scale)
            found, weight = found[:, 0], weight[:, 0]
        else:
            found, weight = additive_reference(query, keys, values, score_weight, memory_lengths)
        fed = found[:, 0]
        outputs.append(torch.cat([h, fed], dim=1))
        weights.append(weight[:, 0])
    c_n = h.new_empty(h.shape[0], 0) if c is None else c
    if not outputs:
        shape = input.shape[0], 0
        width = h0.shape[1] + context0.shape[1]
        return input.new_empty(*shape, width), c_n, input.new_empty(*shape, keys.shape[1])
    return torch.stack(outputs, dim=1), c_n, torch.stack(weights, dim=1)


def _reference(call: DecoderCall, *tensors: Any) -> tuple[Tensor, ...]:
    output, c_n, weights = reference(*tensors, cell=call.cell, scale=call.scale)
    shown = weights if call.need_weights else output.new_empty(0)
    if not call.training:
        return output, c_n, shown
    return output, c_n, shown, *_fake(call, *tensors)[3:]


def _fake(call: DecoderCall, *tensors: Any) -> tuple[Tensor, ...]:
    input, h0, _, context0, keys = tensors[:5]
    (B, T), (H, M) = input.shape[:2], (h0.shape[1], context0.shape[1])
    S, A = keys.shape[1:]
    lstm = H if call.cell == "lstm" else 0
    results = (
        input.new_empty((B, T, H + M)),
        input.new_empty((B, lstm)),
        input.new_empty((B, T, S) if call.need_weights else (0,)),
    )
    if not call.training:
        return results
    saved = (
        input.new_empty((B, T, S), dtype=torch.float32),
        input.new_empty((B, T, lstm)),
        input.new_empty((T, B, 4 * H)),
        input.new_empty((B, T, A)),
    )
    return *results, *saved


OP = TensorOp(
    "attention_decoder",
    tensors="Tensor input, Tensor h0, Tensor? c0, Tensor context0, Tensor keys, Tensor values, "
    "Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? query_weight, "
    "Tensor? score_weight, Tensor? memory_lengths",
    differentiable=12,
    flags="str cell, float scale, bool need_weights",
    results="Tensor output, Tensor c_n, Tensor weights",
    saved="Tensor probabilities, Tensor cells, Tensor gates, Tensor queries",
    make_call=_call,
    reference=_reference,
    fake=_fake,
)
OP.register(_library)


def _kernel_inputs(call: DecoderCall, tensors: Sequence[Any]) -> list[Any]:
    """A call as the kernels take it: vectors and states contiguous, matrices with whole rows."""
    steps = {0, 4, 5, 6, 7, 10}  # input, keys, values, weights
    laid_out = [
        t if t is None else with_rows(t) if index in steps else t.contiguous()
        for index, t in enumerate(tensors)
    ]
    return [list(GATES).index(call.cell), *laid_out, call.scale]


def _cpu(call: DecoderCall, *tensors: Any) -> tuple[Tensor, ...]:
    run = torch.ops.encdec_fast_cpu.attention_decoder_forward.default
    output, _, c_n, weights, *saved = run(*_kernel_inputs(call, tensors), call.training)
    shown = output.new_empty(0)
    if call.need_weights:
        shown = weights.to(call.dtype, copy=call.training)
    if not call.training:
        return output, c_n, shown
    return output, c_n, shown, weights, *saved


def _cpu_backward(
    call: DecoderCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    grad_output, grad_c_n, grad_weights = grads
    output, probabilities, cells, gates, queries = kept[0], *kept[3:7]
    if grad_weights is not None:
        grad_weights = grad_weights.float().contiguous() if call.need_weights else None
    given = _kernel_inputs(call, tensors)
    outer: list[State] = [
        None if grad_output is None else with_rows(grad_output),
        None if grad_c_n is None or call.cell != "lstm" else grad_c_n.contiguous(),
        grad_weights,
    ]
    run = torch.ops.encdec_fast_cpu.attention_decoder_backward.default
    found = run(*outer, *given, output, probabilities, cells, gates, queries)
    *of_input, of_x, of_context, of_state_weight, of_b_ih, of_b_hh, of_query, grad_context = found
    keys, values, score_weight, lengths = given[5], given[6], given[12], given[13]
    grad_v: State = None
    if score_weight is not None:
        _, grad_keys, grad_values, grad_v = torch.ops.encdec_fast_cpu.additive_backward(
            *(queries, keys, values, score_weight, None, None, lengths),
            *(probabilities, grad_context, grad_weights),
        )
        grad_v = grad_v.to(call.dtype)
    else:
        heads = [t.unsqueeze(1) for t in (queries, keys, values)]
        of_head = [None if t is None else t.unsqueeze(1) for t in (grad_context, grad_weights)]
        _, grad_keys, grad_values = torch.ops.encdec_fast_cpu.attention_backward(
            *of_head, *heads, None, lengths, None, None, False, call.scale, 0.0, False, False
        )
        grad_keys, grad_values = grad_keys[:, 0], grad_values[:, 0]
    of_weights = [torch.cat([of_x, of_context], dim=1), of_state_weight, of_b_ih, of_b_hh]
    return [*of_input, grad_keys, grad_values, *of_weights, of_query, grad_v]


def _why_not(call: DecoderCall) -> list[str]:
    reasons = unfit(call)
    if call.training and call.dtype == torch.float16:
        reasons.append("there is no backward in float16")
    if call.empty:
        reasons.append("there is no step or no sentence")
    return reasons


def _steps(call: DecoderCall, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, of the ops of a step: each on whatever runs it."""
    input, h, c, fed, keys, values, w_ih, w_hh, b_ih, b_hh, query_weight, score, lengths = tensors
    lengths = None if lengths is None else lengths.to(input.device)
    biases = () if b_ih is None else (b_ih, b_hh)
    outputs, weights, need = [], [], call.need_weights
    for t in range(input.shape[1]):
        x = torch.cat([input[:, t], fed], dim=1)
        if call.cell == "lstm":
            h, c = lstm_cell(x, (h, c), w_ih, w_hh, *biases)
        else:
            h = gru_cell(x, h, w_ih, w_hh, *biases)
        query = (h if query_weight is None else F.linear(h, query_weight)).unsqueeze(1)
        if score is None:
            heads = [tensor.unsqueeze(1) for tensor in (query, keys, values)]
            options: dict[str, Any] = {
                "memory_lengths": lengths,
                "scale": call.scale,
                "need_weights": need,
            }
            found = attention(*heads, **options)
            parts = [part[:, 0] for part in found] if need else [found[:, 0]]
        else:
            found = additive_attention(query, keys, values, score, lengths, need)
            parts = list(found) if need else [found]
        fed = parts[0][:, 0]
        outputs.append(torch.cat([h, fed], dim=1))
        if need:
            weights.append(parts[1][:, 0].to(h.dtype))
    c_n = h.new_empty(h.shape[0], 0) if c is None else c
    shown = torch.stack(weights, dim=1) if need else h.new_empty(0)
    return torch.stack(outputs, dim=1), c_n, shown


@cache
def _replays() -> Any:
    """The graphs of whole calls."""
    return _triton.kernels("_replay").Replays()


def _captures(call: DecoderCall, tensor: Tensor) -> bool:
    """Whether a call may become a graph: not inside of somebody else's."""
    return not call.training and tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def _triton_run(call: DecoderCall, *tensors: Any) -> tuple[Tensor, ...]:
    first = tensors[0]
    results = _fake(call, *tensors)
    if not _captures(call, first):
        return *_steps(call, *tensors), *results[3:]
    given = [None if t is None else t.to(first.device) for t in tensors]

    def launch(own: Sequence[Any]) -> None:
        for to, found in zip(own[len(given) :], _steps(call, *own[: len(given)]), strict=True):
            to.copy_(found)

    places = range(len(given) + len(results))
    kind = (call, requested_backend())
    read, written = places[: len(given)], places[len(given) :]
    with torch.cuda.device_of(first):
        _replays().run(kind, [*given, *results], read, written, launch)
    return results


def _triton_backward(
    call: DecoderCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    """By autograd, through the steps once more: nothing of theirs was kept."""
    lengths = tensors[12]

    def results(*own: Any) -> tuple[Tensor, ...]:
        return _steps(call, *own, lengths)

    with use_backend(None):  # a cell that trains is torch's, whatever is asked for
        return recompute(results, grads, tensors[:12])


def _unfit_for_triton(call: DecoderCall) -> list[str]:
    reasons = _triton.unfit(call)
    if call.empty:
        reasons.append("there is no step or no sentence")
    return reasons


BACKENDS = (
    Backend("triton", _triton_run, _unfit_for_triton, backward=_triton_backward),
    Backend("cpu", _cpu, _why_not, backward=_cpu_backward),
    reference_backend(OP),
)
OP.backends = BACKENDS


def _prepare(
    input: Tensor,
    h0: Tensor,
    c0: State,
    context0: Tensor,
    keys: Tensor,
    values: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: State = None,
    bias_hh: State = None,
    query_weight: State = None,
    score_weight: State = None,
    memory_lengths: Tensor | Sequence[int] | None = None,
    *,
    cell: str = "lstm",
    scale: float = 1.0,
    need_weights: bool = False,
) -> tuple[DecoderCall, list[State]]:
    """The metadata and the tensors of a call of the public function."""
    if cell not in GATES:
        raise ValueError(f"attention_decoder: cell must be 'lstm' or 'gru', but it is {cell!r}")
    own: list[State] = [input, h0, c0, context0, keys, values, weight_ih, weight_hh]
    own += [bias_ih, bias_hh, query_weight, score_weight]
    if autocasting(device_type(input)) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type(input))
        own = [None if t is None else t.to(dtype) for t in own]
    given = [tensor for tensor in own if tensor is not None]
    checks.decoder(own, GATES[cell])
    lengths = checks.as_memory_lengths(memory_lengths, keys)
    context = "compile" if torch.compiler.is_compiling() else context_of(given[0], given[1:])
    if context not in GRAPHS:
        checks.length_values(lengths, keys.shape[1])
    tensors = [*own, lengths]
    call = _call(tensors, (cell, float(scale), need_weights), needs_gradient(given))
    return call._replace(context=context), tensors


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, tensors = _prepare(*args, **options)
    input, h0, keys, values = (t for t in (*tensors[:2], *tensors[4:6]) if t is not None)
    sizes = f"{call.cell} B={input.shape[0]} T={input.shape[1]} I={input.shape[2]}"
    sizes += f" H={h0.shape[1]} S={keys.shape[1]} A={keys.shape[2]} M={values.shape[2]}"
    sizes += f" {call.dtype} {call.device}" + (" training" if call.training else " inference")
    return Description("attention_decoder", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def attention_decoder(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    context0: Tensor,
    keys: Tensor,
    values: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    query_weight: Tensor | None = None,
    score_weight: Tensor | None = None,
    memory_lengths: Tensor | Sequence[int] | None = None,
    *,
    cell: str = "lstm",
    scale: float = 1.0,
    need_weights: bool = False,
) -> Any:
    """A decoder's steps over a known target; shapes are in this file's docstring.

    score_weight: with it scores are additive, without it dot products times `scale`.
    Returns (output, c_n), and with need_weights (output, c_n, weights). RuntimeError for tensors
    whose sizes, dtypes or devices do not fit, and for lengths below 0 or above S; ValueError for an
    unknown cell.
    """
    call, tensors = _prepare(
        input,
        h0,
        c0,
        context0,
        keys,
        values,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        query_weight,
        score_weight,
        memory_lengths,
        cell=cell,
        scale=scale,
        need_weights=need_weights,
    )
    output, c_n, weights = OP.emit(call, tensors, (cell, call.scale, need_weights))
    return (output, c_n, weights) if need_weights else (output, c_n)
