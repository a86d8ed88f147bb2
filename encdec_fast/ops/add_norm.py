"""Residual and normalization in one pass: what stands between two blocks of a Transformer.

    sum = input + residual
    layer   output = (sum - mean) / sqrt(mean of (sum - mean)² + eps) · weight + bias
    rms     output = sum / sqrt(mean of sum² + eps) · weight + bias

    input     (..., N): what is normed are its rows of N features
    residual  as input; absent: sum is the input
    weight    (N); absent: ones
    bias      (N); absent: zeros
    output    as input, and where there is a residual the sum, too

All tensors have one floating dtype and device; means are computed in float32 or wider, and the sum
is rounded to the dtype after the norm has read it. Where blocks end with their norms, `linear` does
all of this at the end of its product.

LayerNorm: Ba, Kiros and Hinton, 2016 (arXiv:1607.06450); RMSNorm: Zhang and Sennrich, 2019
(arXiv:1910.07467); before the blocks: Xiong et al., 2020 (arXiv:2002.04745).
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
from encdec_fast.ops._call import State, autocasting, context_of, device_type, needs_gradient
from encdec_fast.ops._derivatives import recompute
from encdec_fast.ops._tensor_op import TensorOp, reference_backend
from encdec_fast.ops.linear import MOST_NORMED

_library = torch.library.Library("encdec_fast", "FRAGMENT")
NORMS = ("layer", "rms")


class AddNormCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    norm: str
    eps: float
    wide: bool  # more features than a program of Triton's holds
    context: str  # as in ops/_call.py


def _call(tensors: Sequence[Any], flags: Sequence[Any], training: bool) -> AddNormCall:
    input, (norm, eps) = tensors[0], flags
    wide = input.shape[-1] > MOST_NORMED
    return AddNormCall(input.dtype, device_type(input), training, norm, eps, wide, "")


def reference(
    input: Tensor,
    residual: State = None,
    weight: State = None,
    bias: State = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(output, sum) in plain PyTorch, in any dtype; differentiable any number of times."""
    total = input if residual is None else input + residual
    y = total - total.mean(-1, keepdim=True) if norm == "layer" else total
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, total


def _wanted(output: Tensor, total: Tensor, residual: State) -> tuple[Tensor, ...]:
    """The results of the op: without a residual the sum is nobody's."""
    return output, total.new_empty(0) if residual is None else total


def _reference(
    call: AddNormCall, input: Tensor, residual: State, weight: State, bias: State
) -> tuple[Tensor, ...]:
    found = reference(input, residual, weight, bias, norm=call.norm, eps=call.eps)
    return _wanted(*found, residual)


def _fake(
    call: AddNormCall, input: Tensor, residual: State, weight: State, bias: State
) -> tuple[Tensor, ...]:
    return _wanted(input.new_empty(input.shape), input.new_empty(input.shape), residual)


OP = TensorOp(
    "add_norm",
    tensors="Tensor input, Tensor? residual, Tensor? weight, Tensor? bias",
    differentiable=4,
    flags="str norm, float eps",
    results="Tensor output, Tensor total",
    saved="",
    make_call=_call,
    reference=_reference,
    fake=_fake,
)
OP.register(_library)


def _triton_run(call: AddNormCall, *tensors: State) -> tuple[Tensor, ...]:
    first = tensors[0]
    assert first is not None
    with torch.cuda.device_of(first):
        input, residual, weight, bias = _triton.contiguous(tensors, first.device)
        total = None if residual is None else torch.empty_like(input)
        given = (input, None, residual, weight, bias, "", call.norm, call.eps)
        output = _triton.kernels("linear").forward(*given, before=total)
    return output, input.new_empty(0) if total is None else total


def _triton_backward(
    call: AddNormCall, grads: Sequence[State], tensors: Sequence[State], kept: Sequence[Tensor]
) -> list[State]:
    first = tensors[0]
    assert first is not None
    with torch.cuda.device_of(first):
        input, residual, weight, bias = _triton.contiguous(tensors, first.device)
        grad, of_total = _triton.contiguous(grads, first.device)
        grad = torch.zeros_like(input) if grad is None else grad
        of_total = None if residual is None else of_total  # the gradient of nothing has no numbers
        given = (grad, input, None, residual, weight, bias, "", call.norm, call.eps)
        found = _triton.kernels("linear").backward(*given, of_before=of_total)
    return [found[0], *found[2:]]


def _why_not_triton(call: AddNormCall) -> list[str]:
    reasons = _triton.unfit(call)
    if call.wide:
        reasons.append(f"a program holds {MOST_NORMED} features of a row")
    return reasons


def _torch(
    call: AddNormCall, input: Tensor, residual: State, weight: State, bias: State
) -> tuple[Tensor, ...]:
    total = input if residual is None else input + residual
    size = (input.shape[-1],)
    if call.norm == "layer":
        output = F.layer_norm(total, size, weight, bias, call.eps)
    else:
        output = F.rms_norm(total, size, weight, call.eps)
        output = output if bias is None else output + bias
    return _wanted(output.contiguous(), total.contiguous(), residual)


def _torch_backward(
    call: AddNormCall, grads: Sequence[State], tensors: Sequence[State], kept: Sequence[Tensor]
) -> list[State]:
    plain = call._replace(training=False)
    return recompute(lambda *own: _torch(plain, *own), grads, tensors)


BACKENDS = (
    Backend("triton", _triton_run, _why_not_triton, backward=_triton_backward),
    Backend("torch", _torch, lambda call: [], backward=_torch_backward),
    reference_backend(OP),
)
OP.backends = BACKENDS


def _prepare(
    input: Tensor,
    residual: State = None,
    weight: State = None,
    bias: State = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[AddNormCall, list[State]]:
    """The metadata and the tensors of a call of the public function."""
    name = "add_norm"
    if norm not in NORMS:
        raise ValueError(f"{name}: norm must be 'layer' or 'rms', but it is {norm!r}")
    if input.dim() == 0 or input.shape[-1] == 0:
        raise RuntimeError(
            f"{name}: input must have rows of features, but its shape is {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point tensors, but input is {input.dtype}")
    tensors: list[State] = [input, residual, weight, bias]
    if autocasting(device_type(input)):  # as torch has it for norms
        tensors = [None if t is None else t.float() for t in tensors]
        input = input.float()
    sizes = (tuple(input.shape), (input.shape[-1],), (input.shape[-1],))
    names = ("residual", "weight", "bias")
    shapes: dict[str, tuple[State, tuple[int, ...]]] = {
        what: (tensor, shape)
        for what, tensor, shape in zip(names, tensors[1:], sizes, strict=True)
        if tensor is not None
    }
    check_shapes(name, "input", input, shapes)
    given = [tensor for tensor in tensors if tensor is not None]
    context = "compile" if torch.compiler.is_compiling() else context_of(input, given[1:])
    call = _call(tensors, (norm, float(eps)), needs_gradient(given))
    return call._replace(context=context), tensors


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, (input, *_) = _prepare(*args, **options)
    assert input is not None
    sizes = f"{call.norm} {tuple(input.shape)} {call.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    return Description("add_norm", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def add_norm(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
) -> Any:
    """LayerNorm or RMSNorm of input + residual; shapes are in this file's docstring.

    Returns (output, sum), and without a residual the output alone. RuntimeError for tensors whose
    shapes, dtypes or devices do not fit; ValueError for another norm than "layer" and "rms".
    """
    call, tensors = _prepare(input, residual, weight, bias, norm=norm, eps=eps)
    output, total = OP.emit(call, tensors, (norm, call.eps))
    return output if residual is None else (output, total)
