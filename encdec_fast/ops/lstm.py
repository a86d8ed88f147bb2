"""LSTM: long short-term memory, over whole sequences and one step at a time.

For every step t, with σ the logistic function and ⊙ the product of elements:

    i = σ(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)        input gate
    f = σ(W_if x_t + b_if + W_hf h_{t-1} + b_hf)        forget gate
    g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)     what may be written
    o = σ(W_io x_t + b_io + W_ho h_{t-1} + b_ho)        output gate
    c_t = f ⊙ c_{t-1} + i ⊙ g
    h_t = o ⊙ tanh(c_t),    with a projection: h_t = W_hr (o ⊙ tanh(c_t))

Shapes of a layer with D directions, T steps, B sequences, I inputs, H hidden units and P outputs
(P = H without a projection):

    input        (T, B, I); (B, T, I) with batch_first; (N, I) packed, N the sum of batch_sizes
    weights      for each direction w_ih (4H, I), w_hh (4H, P), b_ih (4H), b_hh (4H), w_hr (P, H);
                 the biases and w_hr may be absent; gates in the order i f g o
    h0, c0       (D, B, P), (D, B, H); absent: zeros
    lengths      int64 (B) on the CPU, each from 1 to T, in any order
    batch_sizes  int64 (T) on the CPU, as in PackedSequence
    resets       bool, input's shape without its features: true where the state before a step (in
                 the reverse direction the state that comes from the step after it) is zero, so that
                 another episode begins; with neither lengths nor batch_sizes
    output       input's layout with D·P features; zero past a sequence's end
    h_n, c_n     like h0, c0: the state after each sequence's last step (its first, in reverse)
    cells        every c_t, output's layout with D·H features, zero past a sequence's end

All tensors have one floating dtype and device. Bad sizes raise what torch.nn.LSTM raises.

Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; the forget gate: Gers et al., 2000; the
projection: Sak et al., 2014 (arXiv:1402.1128).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Description, explained_by
from encdec_fast.ops import _cells, _cpu, _public, _recurrent_cuda, _recurrent_triton, _torch
from encdec_fast.ops._call import LayerResult, RecurrentCall, State, make_call
from encdec_fast.ops._layer import LayerOp
from encdec_fast.ops._reference import reference_backend, unroll

_library = torch.library.Library("encdec_fast", "FRAGMENT")
_library.define(
    "lstm(Tensor input, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? lengths,"
    " Tensor? batch_sizes, bool bidirectional, bool batch_first, bool cell_states,"
    " str weight_dtype) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells)"
)
_library.define(
    "lstm_train(Tensor input, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? lengths,"
    " Tensor? batch_sizes, bool bidirectional, bool batch_first, bool cell_states)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates, Tensor saved_by)"
)
_library.define(
    "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells,"
    " Tensor input, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? lengths,"
    " Tensor? batch_sizes, bool bidirectional, bool batch_first, bool cell_states,"
    " Tensor output, Tensor cells, Tensor gates, Tensor saved_by)"
    " -> (Tensor grad_input, Tensor[] grad_weights, Tensor grad_h0, Tensor grad_c0)"
)


def step(x: Tensor, h: Tensor, c: State, own: list[Tensor]) -> tuple[Tensor, State]:
    """One step: (x, h, c, weights) -> (h, c)."""
    assert c is not None
    w_ih, w_hh = own[:2]
    gates = x @ w_ih.t() + h @ w_hh.t()
    if len(own) >= 4:
        gates = gates + own[2] + own[3]
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h @ own[-1].t() if len(own) in (3, 5) else h), c


def reference(
    input: Tensor,
    weights: list[Tensor],
    h0: State = None,
    c0: State = None,
    lengths: State = None,
    batch_sizes: State = None,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> LayerResult:
    """One layer in plain PyTorch: (output, h_n, c_n, cells). The truth that backends are held to.

    Any dtype and device; differentiable any number of times; not fast.
    """

    ragged = (lengths, batch_sizes, bidirectional, batch_first)
    return unroll(step, input, weights, h0, c0, *ragged, weights[0].shape[0] // 4)


def _reference(
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
    call: RecurrentCall,
) -> LayerResult:
    ragged = (lengths, batch_sizes, call.bidirectional, call.batch_first)
    return reference(input, weights, h0, c0, *ragged)


def _call(layer: Sequence[Any], flags: Sequence[Any], training: bool) -> RecurrentCall:
    bidirectional, batch_first, cell_states, *rest = flags
    weight_dtype = "" if training else rest[0]
    return make_call("lstm", layer, bidirectional, batch_first, cell_states, weight_dtype, training)


OP = LayerOp("lstm", True, _call, lambda call: (call.cell_states,), _reference)
OP.register(_library)  # fakes and autograd, which all recurrent ops share: see LayerOp

BACKENDS = (
    _recurrent_cuda.INFERENCE,
    _recurrent_triton.INFERENCE,
    _cpu.INFERENCE,
    _torch.INFERENCE,
    reference_backend(_reference),
)
TRAIN_BACKENDS = (
    _recurrent_cuda.TRAINING,
    _recurrent_triton.TRAINING,
    _cpu.TRAINING,
    _torch.TRAINING,
    reference_backend(_reference, training=True),
)
OP.backends, OP.train_backends = BACKENDS, TRAIN_BACKENDS


def _describe(*args: Any, **options: Any) -> Description:
    return _public.describe(OP, "lstm", lstm, *args, **options)


@explained_by(_describe)
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
    weight_dtype: torch.dtype | str | None = None,
) -> tuple[Any, ...]:
    """A network of LSTM layers; shapes, dtypes and errors are in this file's docstring.

    input may also be (T, I), one sequence. hx is (h0, c0) with the states of the layers one behind
    the other, (layers · D, B, P) and (layers · D, B, H), zeros if None. weights are those of all
    layers in torch.nn.LSTM's order. dropout: the probability of zeroing an element between two
    layers, while `training`. weight_dtype: torch.bfloat16 or "int8" runs inference with the weights
    rounded to it and packed once.

    Returns (output, (h_n, c_n)), and with return_cell_states (output, (h_n, c_n), cells), the cells
    of the last layer.
    """
    output, h_n, c_n, cells = _public.run(
        OP,
        "lstm",
        input,
        hx,
        weights,
        num_layers=num_layers,
        bias=bias,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        proj_size=proj_size,
        lengths=lengths,
        batch_sizes=batch_sizes,
        resets=resets,
        return_cell_states=return_cell_states,
        weight_dtype=weight_dtype,
    )
    return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))


def _describe_cell(*args: Any, **options: Any) -> Description:
    return _cells.describe(OP, "lstm", *args, **options)


@explained_by(_describe_cell)
def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    weight_dtype: torch.dtype | str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: (h', c'), each (B, H), from input (B, I) and hx = (h, c), zeros if None.

    input may also be (I), one sequence, with h and c of (H). Where a gradient is needed torch's own
    cell runs. Errors are those of torch.nn.LSTMCell; weight_dtype is that of `lstm`.
    """
    h, c = _cells.run(OP, "lstm", input, hx, w_ih, w_hh, b_ih, b_hh, weight_dtype=weight_dtype)
    return h, c
