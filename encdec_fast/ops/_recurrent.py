"""What lstm, gru and rnn share: layers, directions, lengths, the way from a call to a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import Backend, select
from encdec_fast.ops import _autocast, _checks, _eager, _recurrent_cuda, _torch
from encdec_fast.ops._call import (
    GRAPHS,
    LayerResult,
    RecurrentCall,
    State,
    autocasting,
    context_of,
    device_type,
    needs_grad,
    ragged_by,
    recurrence_of,
)
from encdec_fast.ops._layer import LayerOp


class Network(NamedTuple):
    """What does not change from call to call of a network of recurrent layers."""

    op: LayerOp
    kind: str
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    projected: bool = False
    weight_dtype: str = ""

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


class Arguments(NamedTuple):
    """What `run` takes."""

    net: Network
    input: Tensor
    h0: State
    c0: State
    weights: list[Tensor]
    dropout: float = 0.0
    lengths: State = None
    batch_sizes: State = None
    cell_states: bool = False

    def fit(self) -> bool:
        """Whether sizes, dtypes and devices are what the weights ask for."""
        return _checks.fits(*self._shapes())

    def complain(self) -> None:
        """Raise what torch raises for arguments that do not fit."""
        _checks.complain(self.net.op.name, *self._shapes())

    def _shapes(self) -> tuple[Any, ...]:
        net = self.net
        rows = net.num_layers * net.directions
        return (
            self.input,
            self.h0,
            self.c0,
            self.weights,
            rows,
            net.batch_first,
            self.batch_sizes,
            net.projected,
        )


def describe(
    net: Network,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    lengths: State,
    batch_sizes: State,
    cell_states: bool,
) -> tuple[tuple[Backend, ...], RecurrentCall]:
    """The backends that may run this call, and what they judge."""
    op, kind, num_layers, bidirectional, batch_first, _, weight_dtype = net
    training = needs_grad(input, h0, c0, weights)
    if training and weight_dtype:
        raise RuntimeError(
            f"weight_dtype={weight_dtype!r} is for inference, and a gradient is needed here: "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    context = "compile" if torch.compiler.is_compiling() else context_of(input, weights)
    symbolic = context in GRAPHS
    call = RecurrentCall(
        kind,
        input.dtype,
        device_type(input),
        training,
        len(weights) // (2 * num_layers if bidirectional else num_layers),
        bidirectional,
        batch_first,
        cell_states,
        weight_dtype,
        ragged_by(lengths, batch_sizes),
        context,
        not symbolic and input.numel() == 0,
        None if symbolic else recurrence_of(kind, input, weights, batch_sizes, batch_first),
    )
    # Under a transform autograd is not the one who asks: plain PyTorch serves any number of them.
    if training and context not in ("grad", "transform", "subclass"):
        return op.train_backends, call
    return op.backends, call


def run(
    net: Network,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    dropout: float = 0.0,
    lengths: State = None,
    batch_sizes: State = None,
    cell_states: bool = False,
) -> LayerResult | None:
    """The network's (output, h_n, c_n, cells of the last layer), or None if arguments do not fit.

    input: 3-D, or 2-D with batch_sizes. h0, c0: (layers · D, B, size). dropout: probability of
    zeroing an element between layers, 0 outside of training. lengths: from `as_lengths`,
    or from `as_resets`.
    """
    if autocasting(device_type(input)):
        fixed = (dropout, lengths, batch_sizes, cell_states)
        return _autocast.run(run, Arguments(net, input, h0, c0, weights, *fixed))
    op, _, num_layers, bidirectional, batch_first, projected, _ = net
    rows = 2 * num_layers if bidirectional else num_layers
    if not _checks.fits(input, h0, c0, weights, rows, batch_first, batch_sizes, projected):
        return None
    backends, call = describe(net, input, h0, c0, weights, lengths, batch_sizes, cell_states)
    emit: Callable[..., LayerResult] = op.emit
    context = call.context
    if context != "compile":
        if lengths is not None and call.ragged == "lengths":
            _checks.check_length_values(lengths, input.shape[1 if batch_first else 0])
        if context != "dispatch":
            backend = select(backends, call)
            if (
                backend.name == "cuda"
                and not dropout
                and _recurrent_cuda.share_a_launch(call, num_layers)
            ):
                own = len(weights) // num_layers
                layers = [weights[at : at + own] for at in range(0, len(weights), own)]
                for i, layer in enumerate(layers):
                    _check_columns(net, i, layer, layers[0][1].shape[1] if i else input.shape[-1])
                given = (layers[0], h0, c0, lengths, batch_sizes, layers[1:])
                return _recurrent_cuda.run(call, input, *given)
            if backend.name == "torch":
                rest = (weights, dropout, lengths, batch_sizes)
                return *torch_network(net, input, h0, c0, *rest), None
            # Nothing watches: spare the way through the dispatcher.
            training = backends is op.train_backends
            emit = partial(_eager.train, op, backend) if training else backend.run
        if call.training:
            _checks.check_devices(op.name, input, weights)
    if num_layers == 1:
        return emit(call, input, weights, h0, c0, lengths, batch_sizes)
    return _layers(net, emit, call, input, h0, c0, weights, dropout, lengths, batch_sizes)


def torch_network(
    net: Network,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    dropout: float,
    lengths: State,
    batch_sizes: State,
) -> tuple[Tensor, Tensor, State]:
    """The whole network in torch's own kernel."""
    return _torch.network(
        net.kind,
        input,
        h0,
        c0,
        _torch.round_weights(weights, net.weight_dtype),
        num_layers=net.num_layers,
        dropout=dropout,
        train=dropout > 0 or torch.is_grad_enabled(),  # cuDNN asks for it where backward follows
        bidirectional=net.bidirectional,
        batch_first=net.batch_first,
        lengths=lengths,
        batch_sizes=batch_sizes,
    )


def _layers(
    net: Network,
    emit: Callable[..., LayerResult],
    call: RecurrentCall,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    dropout: float,
    lengths: State,
    batch_sizes: State,
) -> LayerResult:
    """One layer after the other, with dropout between them."""
    per_layer = len(weights) // net.num_layers
    d = net.directions
    last_states: list[Tensor] = []
    last_cells: list[Tensor] = []
    cells: State = None
    inner = call._replace(cell_states=False)
    for layer in range(net.num_layers):
        if layer:
            if dropout:
                input = F.dropout(input, dropout, True)
            inner = inner if layer < net.num_layers - 1 else call
        own = weights[layer * per_layer : (layer + 1) * per_layer]
        _check_columns(net, layer, own, input.shape[-1])
        h = None if h0 is None else h0[layer * d : (layer + 1) * d]
        c = None if c0 is None else c0[layer * d : (layer + 1) * d]
        input, h_n, c_n, cells = emit(inner, input, own, h, c, lengths, batch_sizes)
        last_states.append(h_n)
        if c_n is not None:
            last_cells.append(c_n)
    h_all = torch.cat(last_states)
    return input, h_all, torch.cat(last_cells) if last_cells else None, cells


def _check_columns(net: Network, layer: int, own: list[Tensor], features: int) -> None:
    if own[0].shape[1] != features:
        raise RuntimeError(
            f"{net.op.name}: w_ih of layer {layer} must have {features} columns, "
            f"but it has {own[0].shape[1]}"
        )


def unbatched(result: LayerResult, batch_first: bool) -> LayerResult:
    """The results of a batch of one, without the batch dimension."""
    output, h_n, c_n, cells = result
    batch = 0 if batch_first else 1
    return (
        output.squeeze(batch),
        h_n.squeeze(1),
        None if c_n is None else c_n.squeeze(1),
        None if cells is None else cells.squeeze(batch),
    )
