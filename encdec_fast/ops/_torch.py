"""The `torch` backend: torch's own kernel, for the calls that the fast backends refuse.

In eager mode a refused call runs torch's kernel for the whole network, under torch's own autograd
(`network`), and so costs what torch costs. Inside a compiled graph it runs layer by layer, and
backward computes the layer once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from encdec_fast.backends import Backend
from encdec_fast.ops._call import LayerResult, RecurrentCall, State
from encdec_fast.ops._derivatives import recompute_layer

_KERNELS: dict[str, Any] = {
    "lstm": _VF.lstm,
    "gru": _VF.gru,
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
}


def why_not(call: RecurrentCall) -> list[str]:
    reasons = []
    if call.cell_states:
        reasons.append("torch's kernel does not return the cell states")
    if call.ragged == "resets":
        reasons.append("torch's kernel has no resets")
    if call.context == "transform":
        reasons.append("torch's kernel has no rules for vmap or forward-mode gradients")
    return reasons


def round_weights(weights: list[Tensor], weight_dtype: str) -> list[Tensor]:
    """The weights with the values that they have in `weight_dtype`, in their own dtype.

    bfloat16: each matrix is rounded to it. int8: each row w of a matrix becomes s · round(w / s)
    with s = max|w| / 127. Biases stay as they are.
    """
    if not weight_dtype:
        return weights
    return [w if w.dim() == 1 else _round(w, weight_dtype) for w in weights]


def _round(weight: Tensor, weight_dtype: str) -> Tensor:
    if weight_dtype == "bfloat16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(weight / scale) * scale, weight)


def network(
    kind: str,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    *,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: State,
    batch_sizes: State,
) -> tuple[Tensor, Tensor, State]:
    """All layers in torch's kernel. Returns output, h_n and, for the LSTM, c_n.

    input: as for `encdec_fast.ops`, 3-D or packed; lengths: checked. `train`: dropout is on.
    """
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // (num_layers * directions)
    bias = per_direction >= 4
    steps = input.shape[1 if batch_first else 0]
    order = None
    if lengths is not None and lengths.numel():
        padded = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
        input, batch_sizes, order, back = padded
        if order is not None:
            h0 = None if h0 is None else h0.index_select(1, order)
            c0 = None if c0 is None else c0.index_select(1, order)
    if h0 is None:
        batch = input.shape[0 if batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        size = weights[1].shape[1]
        h0 = input.new_zeros(num_layers * directions, batch, size)
        if kind == "lstm":
            size = weights[1].shape[0] // 4
            c0 = input.new_zeros(num_layers * directions, batch, size)
    states: Any = (h0, c0) if kind == "lstm" else h0
    common = (weights, bias, num_layers, dropout, train, bidirectional)
    if batch_sizes is None:
        result = _KERNELS[kind](input, states, *common, batch_first)
    else:
        result = _KERNELS[kind](input, batch_sizes, states, *common)
    output, h_n = result[0], result[1]
    c_n = result[2] if kind == "lstm" else None
    if order is not None:
        sequence = PackedSequence(output, batch_sizes, order, back)
        output, _ = pad_packed_sequence(sequence, batch_first, total_length=steps)
        h_n = h_n.index_select(1, back)
        c_n = None if c_n is None else c_n.index_select(1, back)
    return output, h_n, c_n


def _layer(
    call: RecurrentCall,
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
) -> tuple[Tensor, Tensor, State]:
    return network(
        call.kind,
        input,
        h0,
        c0,
        round_weights(weights, call.weight_dtype),
        num_layers=1,
        dropout=0.0,
        train=call.training,  # cuDNN asks for it where there will be a backward
        bidirectional=call.bidirectional,
        batch_first=call.batch_first,
        lengths=lengths,
        batch_sizes=batch_sizes,
    )


def _own(result: State) -> Any:
    """A result that an op may return: contiguous, and memory of its own."""
    return None if result is None else result.clone(memory_format=torch.contiguous_format)


def run(call: RecurrentCall, *layer: Any) -> LayerResult:
    output, h_n, c_n = _layer(call, *layer)
    return _own(output), _own(h_n), _own(c_n), None


def train(call: RecurrentCall, *layer: Any) -> tuple[Tensor, Tensor, State, State, State]:
    return *run(call, *layer), None


def backward(
    call: RecurrentCall,
    grads: tuple[State, State, State, State],
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
    *_saved: Any,
) -> Any:
    def layer(input: Tensor, weights: list[Tensor], h0: State, c0: State) -> Any:
        return *_layer(call, input, weights, h0, c0, lengths, batch_sizes), None

    return recompute_layer(layer, grads, input, weights, h0, c0)


INFERENCE = Backend("torch", run, why_not)
TRAINING = Backend("torch", train, why_not, backward=backward)
