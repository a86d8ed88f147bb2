"""What lstm, gru and rnn share: layers, directions, lengths, the way from a call to a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import Backend, BackendRefused, Description, select
from encdec_fast.ops import _autocast, _checks, _cpu, _torch
from encdec_fast.ops._call import (
    GATES,
    GRAPHS,
    WEIGHT_DTYPES,
    LayerResult,
    RecurrentCall,
    State,
    context_of,
    needs_grad,
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
    call = RecurrentCall(
        kind,
        input.dtype,
        input.device.type,
        training,
        len(weights) // (2 * num_layers if bidirectional else num_layers),
        bidirectional,
        batch_first,
        cell_states,
        weight_dtype,
        "lengths" if lengths is not None else "packed" if batch_sizes is not None else "",
        context,
        context not in GRAPHS and input.numel() == 0,
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
    zeroing an element between layers, 0 outside of training. lengths: from `as_lengths`.
    """
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type):
        return _autocast.run(
            run, net, input, h0, c0, weights, dropout, lengths, batch_sizes, cell_states
        )
    op, _, num_layers, bidirectional, batch_first, projected, _ = net
    rows = 2 * num_layers if bidirectional else num_layers
    if not _checks.fits(input, h0, c0, weights, rows, batch_first, batch_sizes, projected):
        return None
    backends, call = describe(net, input, h0, c0, weights, lengths, batch_sizes, cell_states)
    emit: Callable[..., LayerResult] = op.emit
    if call.context != "compile":
        if lengths is not None:
            _checks.check_length_values(lengths, input.shape[1 if batch_first else 0])
        if call.context != "dispatch":
            backend = select(backends, call)
            if backend.name == "torch":
                fixed = (weights, dropout, lengths, batch_sizes)
                return *torch_network(net, input, h0, c0, *fixed), None
            if backends is op.backends:
                emit = backend.run  # no autograd formula is needed: spare the way through the op
        if call.training:
            _checks.check_devices(op.name, input, weights)
    if num_layers == 1:
        return emit(call, input, weights, h0, c0, lengths, batch_sizes)
    return _layers(net, emit, call, input, h0, c0, weights, dropout, lengths, batch_sizes)


def accepts(
    net: Network,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    dropout: float,
    lengths: State,
    batch_sizes: State,
    cell_states: bool,
) -> bool:
    """Whether the arguments of `run` fit."""
    rows = net.num_layers * net.directions
    return _checks.fits(input, h0, c0, weights, rows, net.batch_first, batch_sizes, net.projected)


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
        if own[0].shape[1] != input.shape[-1]:
            raise RuntimeError(
                f"{net.op.name}: w_ih of layer {layer} must have {input.shape[-1]} columns, "
                f"but it has {own[0].shape[1]}"
            )
        h = None if h0 is None else h0[layer * d : (layer + 1) * d]
        c = None if c0 is None else c0[layer * d : (layer + 1) * d]
        input, h_n, c_n, cells = emit(inner, input, own, h, c, lengths, batch_sizes)
        last_states.append(h_n)
        if c_n is not None:
            last_cells.append(c_n)
    h_all = torch.cat(last_states)
    return input, h_all, torch.cat(last_cells) if last_cells else None, cells


def arguments(
    op: LayerOp,
    kind: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bias: bool,
    bidirectional: bool,
    batch_first: bool,
    proj_size: int,
    lengths: Tensor | Sequence[int] | None,
    batch_sizes: State,
    weight_dtype: torch.dtype | str | None,
) -> tuple[Network, Tensor, State, State, list[Tensor], State, bool]:
    """Check a public function's arguments: (net, input, h0, c0, weights, lengths, batched)."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype must be None, torch.bfloat16 or 'int8', but it is {weight_dtype!r}"
        )
    name = WEIGHT_DTYPES[weight_dtype]
    net = Network(op, kind, num_layers, bidirectional, batch_first, proj_size > 0, name)
    weights = list(weights)
    expected = num_layers * net.directions * (2 + 2 * bias + net.projected)
    if len(weights) != expected:
        raise RuntimeError(f"{op.name}: expected {expected} weights, but got {len(weights)}")
    h0, c0 = _checks.split_states(op.name, hx)
    batched = batch_sizes is not None or input.dim() != 2
    if batch_sizes is None and input.dim() not in (2, 3):
        raise ValueError(
            f"{op.name.upper()}: Expected input to be 2D or 3D, got {input.dim()}D instead"
        )
    if lengths is not None and (batch_sizes is not None or not batched):
        raise ValueError(
            f"{op.name}: lengths needs a padded 3-D input, not "
            + ("a packed one" if batched else "a single 2-D sequence")
        )
    if not batched:
        input = input.unsqueeze(0 if batch_first else 1)
        h0 = None if h0 is None else h0.unsqueeze(1)
        c0 = None if c0 is None else c0.unsqueeze(1)
    checked = None if lengths is None else _checks.as_lengths(lengths, input, batch_first)
    return net, input, h0, c0, weights, checked, batched


def public(
    op: LayerOp,
    kind: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    dropout: float,
    training: bool,
    batch_sizes: State,
    cell_states: bool,
    **options: Any,
) -> LayerResult:
    """Check, run, and take off what an unbatched input was given."""
    net, x, h0, c0, weights, lengths, batched = arguments(
        op, kind, input, hx, weights, batch_sizes=batch_sizes, **options
    )
    p = dropout if training else 0.0
    result = run(net, x, h0, c0, weights, p, lengths, batch_sizes, cell_states)
    if result is None:
        rows = net.num_layers * net.directions
        fixed = (net.batch_first, batch_sizes, net.projected)
        if not _checks.fits(x, h0, c0, weights, rows, *fixed):
            _checks.complain(op.name, x, h0, c0, weights, rows, *fixed)
        if cell_states:
            raise BackendRefused(f"{op.name}: torch's kernel does not return the cell states")
        result = *torch_network(net, x, h0, c0, weights, p, lengths, batch_sizes), None
    return result if batched else unbatched(result, net.batch_first)


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


def describe_public(
    op: LayerOp,
    kind: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    dropout: float = 0.0,
    training: bool = False,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: State = None,
    return_cell_states: bool = False,
    weight_dtype: torch.dtype | str | None = None,
) -> Description:
    """What `explain` asks of a public function; the options are the function's own."""
    net, x, h0, c0, weights, checked, _ = arguments(
        op,
        kind,
        input,
        hx,
        weights,
        num_layers=num_layers,
        bias=bias,
        bidirectional=bidirectional,
        batch_first=batch_first,
        proj_size=proj_size,
        lengths=lengths,
        batch_sizes=batch_sizes,
        weight_dtype=weight_dtype,
    )
    rows = num_layers * net.directions
    fixed = (batch_first, batch_sizes, net.projected)
    if not _checks.fits(x, h0, c0, weights, rows, *fixed):
        _checks.complain(op.name, x, h0, c0, weights, rows, *fixed)
    return describe_network(
        net, x, h0, c0, weights, dropout, checked, batch_sizes, return_cell_states
    )


def describe_network(
    net: Network,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    dropout: float,
    lengths: State,
    batch_sizes: State,
    cell_states: bool,
) -> Description:
    """What `explain` needs of a call; the arguments are those of `run`."""
    backends, call = describe(net, input, h0, c0, weights, lengths, batch_sizes, cell_states)
    steps: Any = input.shape[1 if net.batch_first else 0]
    batch: Any = input.shape[0 if net.batch_first else 1]
    if batch_sizes is not None:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
    hidden = weights[1].shape[0] // GATES[net.kind]
    sizes = f"T={steps} B={batch} I={input.shape[-1]} H={hidden} layers={net.num_layers}"
    sizes += f" D={net.directions} {input.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    rows = input.shape[0] if batch_sizes is not None else steps * batch
    if lengths is not None:
        rows = int(lengths.sum())

    def plan(backend: str) -> str:
        return _cpu.plan(call, steps, rows, batch, weights) if backend == "cpu" else ""

    return Description(net.kind, backends, call, sizes, plan)
