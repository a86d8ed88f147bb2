"""Gated bridge: a decoder's state mixed with a context, as much of each as a gate says.

    g = sigmoid(W_g [s; c] + b)
    s' = g * s + (1 - g) * tanh(W_c c)

    state           (..., H)        s: the decoder's
    context         (..., C)        c: the encoder's or an attention's; leading sizes as the state
    gate_weight     (H, H + C)      W_g
    gate_bias       (H)             b, may be absent
    context_weight  (H, C)          W_c
    result          (..., H)        s'

All tensors have one floating dtype and device. NaN in a state or a context stays in its row. Sums
are kept in float32. weight_dtype holds the weights in fewer bits: int8 is symmetric with one scale
for each row of each of the three matrices that meet a state or a context (the gate's weight is two
of them), and each state and context is rounded to int8 with a scale of its own. Training stores g
and tanh(W_c c). Under torch.autocast everything is cast to its dtype, the result too.

The gate is the update gate of Cho et al., 2014 (arXiv:1406.1078), with a candidate that sees the
context only: where the gate opens, the state starts again from what the encoder says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import Backend, Description, explained_by
from encdec_fast.ops import _triton
from encdec_fast.ops._attention_checks import check_shapes
from encdec_fast.ops._call import (
    State,
    autocasting,
    context_of,
    device_type,
    needs_gradient,
    weight_dtype_name,
)
from encdec_fast.ops._cpu import FORMATS, unfit
from encdec_fast.ops._packing import kept, settled, with_rows
from encdec_fast.ops._tensor_op import TensorOp, reference_backend
from encdec_fast.ops._torch import round_weights

_library = torch.library.Library("encdec_fast", "FRAGMENT")


class GatedBridgeCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    weight_dtype: str
    context: str  # as in ops/_call.py


def _call(tensors: Sequence[Any], flags: Sequence[Any], training: bool) -> GatedBridgeCall:
    state = tensors[0]
    return GatedBridgeCall(state.dtype, device_type(state), training, flags[0], "")


def _parts(
    state: Tensor, context: Tensor, gate_weight: Tensor, context_weight: Tensor, gate_bias: State
) -> tuple[Tensor, Tensor]:
    """g and tanh(W_c c)."""
    gate = torch.sigmoid(F.linear(torch.cat([state, context], -1), gate_weight, gate_bias))
    return gate, torch.tanh(F.linear(context, context_weight))


def reference(
    state: Tensor,
    context: Tensor,
    gate_weight: Tensor,
    context_weight: Tensor,
    gate_bias: State = None,
) -> Tensor:
    """The new state in plain PyTorch. The truth that backends are held to."""
    gate, candidate = _parts(state, context, gate_weight, context_weight, gate_bias)
    return gate * state + (1 - gate) * candidate


def _rounded(
    call: GatedBridgeCall, gate_weight: Tensor, context_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights with the values that they have in the call's weight_dtype."""
    if not call.weight_dtype:
        return gate_weight, context_weight
    hidden = gate_weight.shape[0]
    matrices = [gate_weight[:, :hidden], gate_weight[:, hidden:], context_weight]
    of_state, of_context, candidate = round_weights(matrices, call.weight_dtype)
    return torch.cat([of_state, of_context], 1), candidate


def _reference(call: GatedBridgeCall, *tensors: Any) -> tuple[Tensor, ...]:
    state, context, gate_weight, context_weight, gate_bias = tensors
    gate_weight, context_weight = _rounded(call, gate_weight, context_weight)
    gate, candidate = _parts(state, context, gate_weight, context_weight, gate_bias)
    result = gate * state + (1 - gate) * candidate
    return (result, gate, candidate) if call.training else (result,)


def _fake(call: GatedBridgeCall, *tensors: Any) -> tuple[Tensor, ...]:
    state = tensors[0]
    return tuple(state.new_empty(state.shape) for _ in range(3 if call.training else 1))


OP = TensorOp(
    "gated_bridge",
    tensors="Tensor state, Tensor context, Tensor gate_weight, Tensor context_weight, "
    "Tensor? gate_bias",
    differentiable=5,
    flags="str weight_dtype",
    results="Tensor result",
    saved="Tensor gate, Tensor candidate",
    make_call=_call,
    reference=_reference,
    fake=_fake,
)
OP.register(_library)


def make_pack(kind: str, weights: list[Tensor], weight_format: int) -> Tensor:
    """What `kept` calls for the weights of a bridge."""
    packed: Tensor = torch.ops.encdec_fast_cpu.bridge_pack(*weights, weight_format)
    return packed


def _cpu(call: GatedBridgeCall, *tensors: Any) -> tuple[Tensor, ...]:
    state, context, gate_weight, context_weight, gate_bias = tensors
    state, context = state.contiguous(), context.contiguous()
    bias = None if gate_bias is None else gate_bias.contiguous()
    forward = torch.ops.encdec_fast_cpu.bridge_forward.default
    weight_format = FORMATS[call.weight_dtype or call.dtype]

    def run(weights: list[Tensor], again: bool) -> list[Tensor]:
        if call.training:  # the weights are about to change: they are packed for this call only
            packed = make_pack("", [with_rows(weight) for weight in weights], weight_format)
        else:
            packed = kept("gated_bridge", weights, weight_format, make_pack, again=again)
        found: list[Tensor] = forward(state, context, *weights, packed, bias, call.training)
        return found

    return tuple(settled([gate_weight, context_weight], run))


def _cpu_backward(
    call: GatedBridgeCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    """torch's products of what the gate, elementwise in float32, makes of the gradient."""
    assert grads[0] is not None
    s = tensors[0]
    grad, g, u = (t.float() for t in (grads[0], kept[1], kept[2]))
    of_state = (grad * g).to(call.dtype)
    of_logit = (grad * (s - u) * g * (1 - g)).to(call.dtype)
    of_candidate = (grad * (1 - g) * (1 - u * u)).to(call.dtype)
    return _products(tensors, of_state, of_logit, of_candidate)


def _products(
    tensors: Sequence[Any], of_state: Tensor, of_logit: Tensor, of_candidate: Tensor
) -> list[State]:
    """The gradients from those of the state alone, of the gate's logit and of tanh's argument."""
    state, context, gate_weight, context_weight = tensors[:4]
    hidden = gate_weight.shape[0]
    s, c = state.reshape(-1, hidden), context.reshape(-1, context.shape[-1])
    of_state, of_logit, of_candidate = (
        t.reshape(-1, hidden) for t in (of_state, of_logit, of_candidate)
    )
    of_state = torch.addmm(of_state, of_logit, gate_weight[:, :hidden])
    of_context = torch.addmm(of_logit @ gate_weight[:, hidden:], of_candidate, context_weight)
    return [
        of_state.view(state.shape),
        of_context.view(context.shape),
        torch.cat([of_logit.t() @ s, of_logit.t() @ c], 1),
        of_candidate.t() @ c,
        of_logit.sum(0),
    ]


def _unfit_for_triton(call: GatedBridgeCall) -> list[str]:
    reasons = _triton.unfit(call)
    if call.weight_dtype:
        reasons.append(f"it has no weights held in {call.weight_dtype}")
    return reasons


def _triton_run(call: GatedBridgeCall, *tensors: Any) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(tensors[0]):
        own = _triton.contiguous(tensors, tensors[0].device)
        return tuple(_triton.kernels("gated_bridge").forward(*own, call.training))


def _triton_backward(
    call: GatedBridgeCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    state = tensors[0]
    with torch.cuda.device_of(state):
        own = _triton.contiguous((grads[0], state, *kept[1:3]), state.device)
        return _products(tensors, *_triton.kernels("gated_bridge").gradients(*own))


BACKENDS = (
    Backend("triton", _triton_run, _unfit_for_triton, backward=_triton_backward),
    Backend("cpu", _cpu, unfit, backward=_cpu_backward),
    reference_backend(OP),
)
OP.backends = BACKENDS


def _check(
    state: Tensor, context: Tensor, gate_weight: Tensor, context_weight: Tensor, gate_bias: State
) -> None:
    """RuntimeError unless the tensors fit the state."""
    name = "gated_bridge"
    for what, tensor in (("state", state), ("context", context)):
        if tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise RuntimeError(
                f"{name}: {what} must have features in its last dimension, "
                f"but its shape is {tuple(tensor.shape)}"
            )
    if not state.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point tensors, but state is {state.dtype}")
    hidden, size = state.shape[-1], context.shape[-1]
    shapes: dict[str, tuple[State, tuple[int, ...]]] = {
        "context": (context, (*state.shape[:-1], size)),
        "gate_weight": (gate_weight, (hidden, hidden + size)),
        "context_weight": (context_weight, (hidden, size)),
    }
    if gate_bias is not None:
        shapes["gate_bias"] = (gate_bias, (hidden,))
    check_shapes(name, "state", state, shapes)


def _prepare(
    state: Tensor,
    context: Tensor,
    gate_weight: Tensor,
    context_weight: Tensor,
    gate_bias: State = None,
    *,
    weight_dtype: torch.dtype | str | None = None,
) -> tuple[GatedBridgeCall, list[Any]]:
    """The metadata and the tensors of a call of the public function."""
    own: list[Any] = [state, context, gate_weight, context_weight, gate_bias]
    device = device_type(state)
    cast = autocasting(device)
    if cast:
        dtype = torch.get_autocast_dtype(device)
        own = [None if tensor is None else tensor.to(dtype) for tensor in own]
    _check(*own)
    given = [tensor for tensor in own if tensor is not None]
    training = needs_gradient(given)
    name = weight_dtype_name(weight_dtype, training)
    watched = "compile" if torch.compiler.is_compiling() else context_of(given[0], given[1:])
    if cast and not training and not watched:  # a copy of the weights would be packed in every call
        watched = "autocast"
    return GatedBridgeCall(given[0].dtype, device, training, name, watched), own


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, (state, context, *_) = _prepare(*args, **options)
    rows = state.numel() // state.shape[-1]
    sizes = f"M={rows} H={state.shape[-1]} C={context.shape[-1]} {call.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    return Description("gated_bridge", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def gated_bridge(
    state: Tensor,
    context: Tensor,
    gate_weight: Tensor,
    context_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    weight_dtype: torch.dtype | str | None = None,
) -> Tensor:
    """A state mixed with a context by a gate; shapes are in this file's docstring.

    weight_dtype: None, torch.bfloat16 or "int8", in which inference holds the weights, packed once;
    RuntimeError where a gradient is needed, ValueError for another. RuntimeError for tensors whose
    sizes, dtypes or devices do not fit.
    """
    call, tensors = _prepare(
        state, context, gate_weight, context_weight, gate_bias, weight_dtype=weight_dtype
    )
    (result,) = OP.emit(call, tensors, (call.weight_dtype,))
    return result
