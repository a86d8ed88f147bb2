"""A recurrent decoder with attention and input feeding, all steps of a known target at once.

From the state (h, c) and the context f of the step before, for each step t:

    h_t, c_t = cell([x_t; f_{t-1}], (h_{t-1}, c_{t-1}))        an LSTM's or a GRU's
    q_t = W_q h_t                                              or h_t itself
    e_ts = v' tanh(q_t + key_s)                                additive (Bahdanau; Luong's concat)
    e_ts = scale * (q_t . key_s)                               without v (Luong's dot and general)
    w_ts = softmax over s of e_ts                              over the sentence's own keys
    f_t = sum over s of w_ts value_s
    f_t = tanh(W_o [sum over s of w_ts value_s; h_t])          with W_o (Luong's attentional vector)

With coverage, key_s of step t is key_s + c_ts u; c_t is c_0 and the sum of the weights before t.

Location attention comes before the step: with p_t made of x_t by the caller,

    e_t = p_t + W_q h_{t-1}            (L)        w_t: softmax over all L positions, or with
    f_t = sum over s < S of w_ts value_s          memory_lengths over the sentence's own
    h_t, c_t = cell([x_t; f_t], (h_{t-1}, c_{t-1}))

    input           (B, T, I)         x: the embedded target, teacher-forced
    h0, c0          (B, H)            c0 for an LSTM only
    context0        (B, F)            f before the first step; of location not read
    keys            (B, S, A)         the memory, projected once; of location absent
    values          (B, S, M)
    weight_ih       (G H, I + F)      G: 4 for an LSTM (i f g o), 3 for a GRU (r z n)
    weight_hh       (G H, H)
    bias_ih, bias_hh  (G H)           both or none
    query_weight    (A, H)            W_q; absent: A = H; of location (L, H)
    score_weight    (A)               v
    positions       (B, T, L)         p, of location; S is at most L
    output_weight   (F, M + H)        W_o; absent: F = M
    coverage        (B, S)            c_0, with score_weight only
    coverage_weight (A)               u
    memory_lengths  int64 (B), each from 0 to S, on the CPU or the memory's device; absent: S
    output          (B, T, H + F)     h_t and f_t side by side, as the next projection reads them
    c_n             (B, H)            of the last step; (B, 0) for a GRU
    weights         (B, T, S)         zero past a sentence's end

A sentence of length zero has zeros for weights and contexts. All floating tensors have one dtype
and device. Nothing of size (B, T, S, A) is stored.

Luong, Pham and Manning, Effective Approaches to Attention-based Neural Machine Translation, 2015
(arXiv:1508.04025), section 3.3, with the context itself fed; Bahdanau et al., 2015
(arXiv:1409.0473); coverage: Tu et al., 2016 (arXiv:1601.04811).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from encdec_fast.backends import Backend, Description, explained_by
from encdec_fast.ops import _attention_checks as checks
from encdec_fast.ops import _attention_decoder_triton
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
from encdec_fast.ops.additive_attention import reference as additive_reference
from encdec_fast.ops.attention import reference as dot_reference
from encdec_fast.ops.gru import step as gru_step
from encdec_fast.ops.location_attention import by_scores
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
    keys: State,
    values: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: State = None,
    bias_hh: State = None,
    query_weight: State = None,
    score_weight: State = None,
    positions: State = None,
    output_weight: State = None,
    coverage: State = None,
    coverage_weight: State = None,
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
    covered = coverage

    def attend(h: Tensor) -> tuple[Tensor, Tensor]:
        query = (h if query_weight is None else h @ query_weight.t()).unsqueeze(1)
        if positions is not None:
            return by_scores(positions[:, t : t + 1] + query, values, memory_lengths)
        assert keys is not None
        if score_weight is not None:
            more = (memory_lengths, covered, coverage_weight)
            return additive_reference(query, keys, values, score_weight, *more)
        q, k, v = (tensor.unsqueeze(1) for tensor in (query, keys, values))
        found, weight = dot_reference(q, k, v, memory_lengths, scale=scale)
        return found[:, 0], weight[:, 0]

    for t in range(input.shape[1]):
        if keys is None:
            found, weight = attend(h)
            fed = found[:, 0]
        h, c = step(torch.cat([input[:, t], fed], dim=1), h, c, own)
        if keys is not None:
            found, weight = attend(h)
            fed = found[:, 0]
            if output_weight is not None:
                fed = torch.tanh(torch.cat([fed, h], dim=1) @ output_weight.t())
        outputs.append(torch.cat([h, fed], dim=1))
        weights.append(weight[:, 0])
        covered = None if covered is None else covered + weight[:, 0]
    c_n = h.new_empty(h.shape[0], 0) if c is None else c
    if not outputs:
        shape = input.shape[0], 0
        width = h0.shape[1] + context0.shape[1]
        return input.new_empty(*shape, width), c_n, input.new_empty(*shape, values.shape[1])
    return torch.stack(outputs, dim=1), c_n, torch.stack(weights, dim=1)


def _reference(call: DecoderCall, *tensors: Any) -> tuple[Tensor, ...]:
    output, c_n, weights = reference(*tensors, cell=call.cell, scale=call.scale)
    shown = weights if call.need_weights else output.new_empty(0)
    if not call.training:
        return output, c_n, shown
    return output, c_n, shown, *_fake(call, *tensors)[3:]


def _fake(call: DecoderCall, *tensors: Any) -> tuple[Tensor, ...]:
    input, h0, _, context0, keys, values = tensors[:6]
    positions, output_weight, coverage = tensors[12:15]
    (B, T), (H, F) = input.shape[:2], (h0.shape[1], context0.shape[1])
    S, M = values.shape[1:]
    scored = S if positions is None else positions.shape[2]
    lstm = H if call.cell == "lstm" else 0
    results = (
        input.new_empty((B, T, H + F)),
        input.new_empty((B, lstm)),
        input.new_empty((B, T, S) if call.need_weights else (0,)),
    )
    if not call.training:
        return results
    saved = (
        input.new_empty((B, T, scored), dtype=torch.float32),
        input.new_empty((B, T, lstm)),
        input.new_empty((T, B, 4 * H)),
        input.new_empty((B, T, scored if keys is None else keys.shape[2])),
        input.new_empty((B, 0 if output_weight is None else T, M)),
        input.new_empty((B, 0 if coverage is None else T, S), dtype=torch.float32),
    )
    return *results, *saved


OP = TensorOp(
    "attention_decoder",
    tensors="Tensor input, Tensor h0, Tensor? c0, Tensor context0, Tensor? keys, Tensor values, "
    "Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? query_weight, "
    "Tensor? score_weight, Tensor? positions, Tensor? output_weight, Tensor? coverage, "
    "Tensor? coverage_weight, Tensor? memory_lengths",
    differentiable=16,
    flags="str cell, float scale, bool need_weights",
    results="Tensor output, Tensor c_n, Tensor weights",
    saved="Tensor probabilities, Tensor cells, Tensor gates, Tensor queries, Tensor contexts, "
    "Tensor coverages",
    make_call=_call,
    reference=_reference,
    fake=_fake,
)
OP.register(_library)


def _kernel_inputs(call: DecoderCall, tensors: Sequence[Any]) -> list[Any]:
    """A call as the kernels take it: vectors and states contiguous, matrices with whole rows."""
    steps = {0, 4, 5, 6, 7, 10, 12, 13}  # input, keys, values, weights, positions
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
        real = weights[..., : tensors[5].shape[1]]
        shown = real.to(call.dtype, copy=call.training).contiguous()
    if not call.training:
        return output, c_n, shown
    return output, c_n, shown, weights, *saved


def _cpu_backward(
    call: DecoderCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    grad_output, grad_c_n, grad_weights = grads
    output, probabilities, cells, gates, queries, contexts, coverages = kept[0], *kept[3:9]
    given = _kernel_inputs(call, tensors)
    keys, values, score_weight, positions, lengths = *given[5:7], *given[12:14], given[17]
    if grad_weights is not None:
        grad_weights = grad_weights.float().contiguous() if call.need_weights else None
    if grad_weights is not None and positions is not None:
        # Of the positions that no key is at, nobody has seen a weight.
        grad_weights = pad(grad_weights, (0, positions.shape[2] - values.shape[1]))
    outer: list[State] = [
        None if grad_output is None else with_rows(grad_output),
        None if grad_c_n is None or call.cell != "lstm" else grad_c_n.contiguous(),
        grad_weights,
    ]
    run = torch.ops.encdec_fast_cpu.attention_decoder_backward.default
    found = run(*outer, *given, output, probabilities, cells, gates, queries, contexts, coverages)
    *of_input, of_x, of_fed, of_state_weight, of_b_ih, of_b_hh, of_query = found[:10]
    grad_context, of_positions, *of_output = found[10:14]
    grad_keys: State = None
    grad_v: State = None
    of_coverage: list[State] = [None, None]
    if positions is not None or len(found) > 14:
        real = probabilities[..., : values.shape[1]].to(call.dtype)
        grad_values = real.transpose(1, 2) @ grad_context
        if positions is None:
            grad_keys, grad_v, *of_coverage = found[14:]
    elif score_weight is not None:
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
    of_weights = [torch.cat([of_x, of_fed], dim=1), of_state_weight, of_b_ih, of_b_hh]
    of_attention = [of_query, grad_v, of_positions, torch.cat(of_output, dim=1), *of_coverage]
    return [*of_input, grad_keys, grad_values, *of_weights, *of_attention]


def _why_not(call: DecoderCall) -> list[str]:
    reasons = unfit(call)
    if call.training and call.dtype == torch.float16:
        reasons.append("there is no backward in float16")
    if call.empty:
        reasons.append("there is no step or no sentence")
    return reasons


def _triton(call: DecoderCall, *tensors: Any) -> tuple[Tensor, ...]:
    return _attention_decoder_triton.run(call, _fake(call, *tensors), tensors)


BACKENDS = (
    Backend(
        "triton",
        _triton,
        _attention_decoder_triton.unfit,
        backward=_attention_decoder_triton.backward,
    ),
    Backend("cpu", _cpu, _why_not, backward=_cpu_backward),
    reference_backend(OP),
)
OP.backends = BACKENDS


def _prepare(
    input: Tensor,
    h0: Tensor,
    c0: State,
    context0: Tensor,
    keys: State,
    values: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: State = None,
    bias_hh: State = None,
    query_weight: State = None,
    score_weight: State = None,
    memory_lengths: Tensor | Sequence[int] | None = None,
    *,
    positions: State = None,
    output_weight: State = None,
    coverage: State = None,
    coverage_weight: State = None,
    cell: str = "lstm",
    scale: float = 1.0,
    need_weights: bool = False,
) -> tuple[DecoderCall, list[State]]:
    """The metadata and the tensors of a call of the public function."""
    if cell not in GATES:
        raise ValueError(f"attention_decoder: cell must be 'lstm' or 'gru', but it is {cell!r}")
    own: list[State] = [input, h0, c0, context0, keys, values, weight_ih, weight_hh]
    own += [bias_ih, bias_hh, query_weight, score_weight, positions, output_weight]
    own += [coverage, coverage_weight]
    if autocasting(device_type(input)) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type(input))
        own = [None if t is None else t.to(dtype) for t in own]
    given = [tensor for tensor in own if tensor is not None]
    checks.decoder(own, GATES[cell])
    lengths = checks.as_memory_lengths(memory_lengths, values)
    context = "compile" if torch.compiler.is_compiling() else context_of(given[0], given[1:])
    if context not in GRAPHS:
        checks.length_values(lengths, values.shape[1])
    tensors = [*own, lengths]
    call = _call(tensors, (cell, float(scale), need_weights), needs_gradient(given))
    return call._replace(context=context), tensors


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, tensors = _prepare(*args, **options)
    input, h0, values = (t for t in (*tensors[:2], tensors[5]) if t is not None)
    scored = tensors[12] if tensors[4] is None else tensors[4]
    assert scored is not None
    sizes = f"{call.cell} B={input.shape[0]} T={input.shape[1]} I={input.shape[2]}"
    sizes += f" H={h0.shape[1]} S={values.shape[1]} A={scored.shape[2]} M={values.shape[2]}"
    sizes += f" {call.dtype} {call.device}" + (" training" if call.training else " inference")
    return Description("attention_decoder", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def attention_decoder(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    context0: Tensor,
    keys: Tensor | None,
    values: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    query_weight: Tensor | None = None,
    score_weight: Tensor | None = None,
    memory_lengths: Tensor | Sequence[int] | None = None,
    *,
    positions: Tensor | None = None,
    output_weight: Tensor | None = None,
    coverage: Tensor | None = None,
    coverage_weight: Tensor | None = None,
    cell: str = "lstm",
    scale: float = 1.0,
    need_weights: bool = False,
) -> Any:
    """A decoder's steps over a known target; shapes are in this file's docstring.

    score_weight: with it scores are additive, without it dot products times `scale`. positions, in
    place of keys: scores are of location.
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
        positions=positions,
        output_weight=output_weight,
        coverage=coverage,
        coverage_weight=coverage_weight,
        cell=cell,
        scale=scale,
        need_weights=need_weights,
    )
    output, c_n, weights = OP.emit(call, tensors, (cell, call.scale, need_weights))
    return (output, c_n, weights) if need_weights else (output, c_n)
