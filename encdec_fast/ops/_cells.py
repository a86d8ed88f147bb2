"""One step of a recurrent layer. A cell is the layer's op with T = 1; it has none of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import _VF, Tensor

from encdec_fast.backends import Backend, Description, select
from encdec_fast.ops import _cpu
from encdec_fast.ops._call import (
    GATES,
    GRAPHS,
    WEIGHT_DTYPES,
    LayerResult,
    RecurrentCall,
    State,
    autocasting,
    context_of,
    device_type,
    needs_grad,
)
from encdec_fast.ops._checks import split_states
from encdec_fast.ops._layer import LayerOp
from encdec_fast.ops._torch import round_weights

States: TypeAlias = tuple[Tensor, State]

_KERNELS: dict[str, Any] = {
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
}


def fits(input: Tensor, h: State, c: State, weights: list[Tensor]) -> bool:
    """Whether input (B, I), h and c (B, H) have what the weights ask for."""
    w_ih = weights[0]
    if input.dim() != 2 or input.shape[1] != w_ih.shape[1]:
        return False
    if input.dtype is not w_ih.dtype or input.device != w_ih.device:
        return False
    if (c is None) != (h is None) and weights[1].shape[0] == GATES["lstm"] * weights[1].shape[1]:
        return False  # half of an LSTM's pair
    shape = (input.shape[0], weights[1].shape[1])
    for state in (h, c):
        if state is not None and (
            state.shape != shape or state.dtype is not input.dtype or state.device != input.device
        ):
            return False
    return True


def _choose(
    op: LayerOp, kind: str, input: Tensor, h: State, c: State, weights: list[Tensor], dtype: str
) -> tuple[tuple[Backend, ...], RecurrentCall]:
    """The backends that may run a step that fits, and what they judge."""
    training = needs_grad(input, h, c, weights)
    if training and dtype:
        raise RuntimeError(
            f"weight_dtype={dtype!r} is for inference, and a gradient is needed here: "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    if torch.compiler.is_compiling():
        context = "compile"
    elif autocasting(device_type(input)):
        context = "autocast"
    else:
        context = context_of(input, weights)
    empty = context not in GRAPHS and input.numel() == 0
    device = device_type(input)
    flags = (False, False, False, dtype, "step", context, empty)
    return op.backends, RecurrentCall(kind, input.dtype, device, training, len(weights), *flags)


def step(
    op: LayerOp, kind: str, input: Tensor, h: State, c: State, weights: list[Tensor], dtype: str
) -> States | None:
    """(h', c') of a step, or None if the arguments do not fit.

    input: (B, I). h and c: (B, H) or None. weights: two or four. dtype: as in RecurrentCall.
    """
    if not fits(input, h, c, weights):
        return None
    backends, call = _choose(op, kind, input, h, c, weights, dtype)
    if call.context in GRAPHS:
        if call.training:  # autograd and the compiler know torch's cell like any other formula
            return torch_step(kind, input, h, c, weights, dtype)
        run: Callable[..., LayerResult] = op.emit
    else:
        backend = select(backends, call)
        if backend.name == "torch":
            return torch_step(kind, input, h, c, weights, dtype)
        run = backend.run
    h = None if h is None else h.unsqueeze(0)
    c = None if c is None else c.unsqueeze(0)
    _, h_n, c_n, _ = run(call, input.unsqueeze(0), weights, h, c, None, None)
    return h_n.squeeze(0), None if c_n is None else c_n.squeeze(0)


def torch_step(
    kind: str, input: Tensor, h: State, c: State, weights: list[Tensor], dtype: str
) -> States:
    """(h', c') from torch's own cell, which checks its arguments."""
    four: list[Any] = [*round_weights(weights, dtype), None, None][:4]
    if h is None:
        h = c = input.new_zeros(input.shape[0], weights[1].shape[1])
    if kind != "lstm":
        return _KERNELS[kind](input, h, *four), None
    result: States = _KERNELS[kind](input, (h, c), *four)
    return result


def _arguments(
    op: LayerOp,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: State,
    b_hh: State,
    weight_dtype: torch.dtype | str | None,
) -> tuple[Tensor, State, State, list[Tensor], str]:
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype must be None, torch.bfloat16 or 'int8', but it is {weight_dtype!r}"
        )
    if (b_ih is None) != (b_hh is None):
        raise ValueError(f"{op.name}_cell: b_ih and b_hh must both be given, or neither")
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    h, c = split_states(op.name, hx)
    name = f"{op.name.upper()}Cell"
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for state in (h, c):
        if state is not None and state.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected hx to be 1D or 2D, got {state.dim()}D instead")
    if input.dim() == 1:
        input = input.unsqueeze(0)
        h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
    return input, h, c, weights, WEIGHT_DTYPES[weight_dtype]


def run(
    op: LayerOp,
    kind: str,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: State,
    b_hh: State,
    weight_dtype: torch.dtype | str | None,
) -> Any:
    """The body of the public cells: (h', c'), with or without a batch dimension."""
    x, h, c, weights, dtype = _arguments(op, input, hx, w_ih, w_hh, b_ih, b_hh, weight_dtype)
    results = step(op, kind, x, h, c, weights, dtype)
    if results is None:
        results = torch_step(kind, x, h, c, weights, dtype)
    if input.dim() == 2:
        return results
    return tuple(None if result is None else result.squeeze(0) for result in results)


def describe(
    op: LayerOp,
    kind: str,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: State = None,
    b_hh: State = None,
    *,
    weight_dtype: torch.dtype | str | None = None,
) -> Description:
    """What `explain` asks of a cell."""
    x, h, c, weights, dtype = _arguments(op, input, hx, w_ih, w_hh, b_ih, b_hh, weight_dtype)
    return describe_step(op, kind, x, h, c, weights, dtype)


def describe_step(
    op: LayerOp, kind: str, input: Tensor, h: State, c: State, weights: list[Tensor], dtype: str
) -> Description:
    backends, call = _choose(op, kind, input, h, c, weights, dtype)
    hidden = weights[1].shape[0] // GATES[kind]
    sizes = f"one step, B={input.shape[0]} I={input.shape[1]} H={hidden} {input.dtype}"
    sizes += f" {call.device} {'training' if call.training else 'inference'}"

    def plan(backend: str) -> str:
        batch = input.shape[0]
        return _cpu.plan(call, 1, batch, batch, weights) if backend == "cpu" else ""

    return Description(f"{kind}_cell", backends, call, sizes, plan)
