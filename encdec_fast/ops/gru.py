"""GRU: gated recurrent unit, over whole sequences and one step at a time.

For every step t, with σ the logistic function and ⊙ the product of elements:

    r = σ(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)            reset gate
    z = σ(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)            update gate
    n = tanh(W_in x_t + b_in + r ⊙ (W_hn h_{t-1} + b_hn))   new state
    h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

The reset gate multiplies after the matrix product, as in torch and cuDNN; in the paper it does so
before.

Shapes of a layer with D directions, T steps, B sequences, I inputs and H hidden units:

    input        (T, B, I); (B, T, I) with batch_first; (N, I) packed, N the sum of batch_sizes
    weights      for each direction w_ih (3H, I), w_hh (3H, H), b_ih (3H), b_hh (3H); the biases may
                 be absent; gates in the order r z n
    h0           (D, B, H); absent: zeros
    lengths      int64 (B) on the CPU, each from 1 to T, in any order
    batch_sizes  int64 (T) on the CPU, as in PackedSequence
    resets       bool, input's shape without its features: true where the state before a step (in
                 the reverse direction the state that comes from the step after it) is zero, so that
                 another episode begins; with neither lengths nor batch_sizes
    output       input's layout with D·H features; zero past a sequence's end
    h_n          like h0: the state after each sequence's last step (its first, in reverse)

All tensors have one floating dtype and device. Bad sizes raise what torch.nn.GRU raises.

Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
Translation, 2014 (arXiv:1406.1078).
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
    "gru(Tensor input, Tensor[] weights, Tensor? h0, Tensor? lengths, Tensor? batch_sizes,"
    " bool bidirectional, bool batch_first, str weight_dtype) -> (Tensor output, Tensor h_n)"
)
_library.define(
    "gru_train(Tensor input, Tensor[] weights, Tensor? h0, Tensor? lengths, Tensor? batch_sizes,"
    " bool bidirectional, bool batch_first)"
    " -> (Tensor output, Tensor h_n, Tensor gates, Tensor saved_by)"
)
_library.define(
    "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor[] weights,"
    " Tensor? h0, Tensor? lengths, Tensor? batch_sizes, bool bidirectional, bool batch_first,"
    " Tensor output, Tensor gates, Tensor saved_by)"
    " -> (Tensor grad_input, Tensor[] grad_weights, Tensor grad_h0)"
)


def step(x: Tensor, h: Tensor, _: State, own: list[Tensor]) -> tuple[Tensor, State]:
    """One step: (x, h, nothing, weights) -> (h, nothing)."""
    from_x, from_h = x @ own[0].t(), h @ own[1].t()
    if len(own) == 4:
        from_x, from_h = from_x + own[2], from_h + own[3]
    x_r, x_z, x_n = from_x.chunk(3, dim=-1)
    h_r, h_z, h_n = from_h.chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h, None


def reference(
    input: Tensor,
    weights: list[Tensor],
    h0: State = None,
    lengths: State = None,
    batch_sizes: State = None,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer in plain PyTorch: (output, h_n). The truth that backends are held to.

    Any dtype and device; differentiable any number of times; not fast.
    """

    ragged = (lengths, batch_sizes, bidirectional, batch_first)
    output, final, _, _ = unroll(step, input, weights, h0, None, *ragged, None)
    return output, final


def _reference(
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    _: State,
    lengths: State,
    batch_sizes: State,
    call: RecurrentCall,
) -> LayerResult:
    ragged = (lengths, batch_sizes, call.bidirectional, call.batch_first)
    return *reference(input, weights, h0, *ragged), None, None


def _call(layer: Sequence[Any], flags: Sequence[Any], training: bool) -> RecurrentCall:
    bidirectional, batch_first, *rest = flags
    weight_dtype = "" if training else rest[0]
    return make_call("gru", layer, bidirectional, batch_first, False, weight_dtype, training)


OP = LayerOp("gru", False, _call, lambda call: (), _reference)
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
    return _public.describe(OP, "gru", gru, *args, **options)


@explained_by(_describe)
def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    weight_dtype: torch.dtype | str | None = None,
) -> tuple[Tensor, Tensor]:
    """A network of GRU layers; shapes, dtypes and errors are in this file's docstring.

    input may also be (T, I), one sequence. hx holds the states of the layers one behind the other,
    (layers · D, B, H), zeros if None. weights are those of all layers in torch.nn.GRU's order.
    dropout: the probability of zeroing an element between two layers, while `training`.
    weight_dtype: torch.bfloat16 or "int8" runs inference with the weights rounded to it and packed
    once.

    Returns (output, h_n).
    """
    output, h_n, _, _ = _public.run(
        OP,
        "gru",
        input,
        hx,
        weights,
        num_layers=num_layers,
        bias=bias,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        batch_first=batch_first,
        lengths=lengths,
        batch_sizes=batch_sizes,
        resets=resets,
        weight_dtype=weight_dtype,
    )
    return output, h_n


def _describe_cell(*args: Any, **options: Any) -> Description:
    return _cells.describe(OP, "gru", *args, **options)


@explained_by(_describe_cell)
def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    weight_dtype: torch.dtype | str | None = None,
) -> Tensor:
    """One step of a GRU: h' (B, H) from input (B, I) and hx = h (B, H), zeros if None.

    input may also be (I), one sequence, with h of (H). Where a gradient is needed torch's own cell
    runs. Errors are those of torch.nn.GRUCell; weight_dtype is that of `gru`.
    """
    result = _cells.run(OP, "gru", input, hx, w_ih, w_hh, b_ih, b_hh, weight_dtype=weight_dtype)
    h: Tensor = result[0]
    return h
