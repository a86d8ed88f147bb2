"""Linear: a matrix product on packed weights, with what follows it in the same pass.

    y = norm(residual + activation(x W' + b))        each part but the product may be absent

    input        (..., K)
    weight       (N, K)
    bias         (N)
    residual     (..., N), the leading sizes of input
    norm         of each row y: "layer" (y - mean) / sqrt(variance + eps) * norm_weight + norm_bias,
                 "rms" y / sqrt(mean of y² + eps) * norm_weight
    norm_weight, norm_bias   (N), absent: ones and zeros
    output       (..., N)

activation: "relu", "gelu" (with erf), "gelu_tanh" or "silu". All tensors have one floating dtype
and device; errors are those of torch.nn.functional.linear. Sums are kept in float32. weight_dtype
holds the weight in fewer bits: int8 is symmetric with one scale per row of the weight, and each row
of the input is rounded to int8 with a scale of its own.

LayerNorm: Ba et al., 2016 (arXiv:1607.06450). RMSNorm: Zhang and Sennrich, 2019
(arXiv:1910.07467). GELU: Hendrycks and Gimpel, 2016 (arXiv:1606.08415).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import Backend, Description, explained_by, requested_backend, select
from encdec_fast.ops import _triton
from encdec_fast.ops._call import (
    GRAPHS,
    PLAIN_TYPES,
    WEIGHT_DTYPES,
    State,
    autocasting,
    context_of,
    device_type,
    needs_gradient,
    watched,
    weight_dtype_name,
)
from encdec_fast.ops._cpu import FORMATS, unfit
from encdec_fast.ops._packing import found, kept, settled, with_rows
from encdec_fast.ops._torch import round_weights

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")  # as linear_forward numbers them
NORMS = ("", "layer", "rms")
# Where training packs: rows, and products of a row with the weight.
LARGE_ROWS, LARGE_WEIGHT = 128, 128 * 128
MOST_NORMED = 2048  # features of a row that a Triton program holds
_RESIDUAL = 1  # its place among bias, residual, norm_weight and norm_bias

_library = torch.library.Library("encdec_fast", "FRAGMENT")
_library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight,"
    " Tensor? norm_bias, str activation, str norm, float norm_eps, str weight_dtype,"
    " int[]? rows=None) -> Tensor"
)


Rows: TypeAlias = tuple[int, int] | None


class LinearCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values.

    rows: the rows of the weight that are meant, from and to; None for all. A slice would be a new
    tensor in every call, and packed weights are found by the identity of theirs.
    """

    dtype: torch.dtype
    device: str
    training: bool
    activation: str
    norm: str
    norm_eps: float
    weight_dtype: str
    context: str  # as in ops/_call.py
    rows: Rows = None
    large: bool = False  # enough rows and weights that training may pack
    wide: bool = False  # more than MOST_NORMED features


def reference(
    input: Tensor,
    weight: Tensor,
    bias: State = None,
    residual: State = None,
    norm_weight: State = None,
    norm_bias: State = None,
    *,
    activation: str = "",
    norm: str = "",
    norm_eps: float = 1e-5,
) -> Tensor:
    """The result in plain PyTorch. The truth that backends are held to."""
    y = input @ weight.t()
    if bias is not None:
        y = y + bias
    if activation == "relu":
        y = torch.relu(y)
    elif activation == "gelu":
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    elif activation == "gelu_tanh":
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    elif activation == "silu":
        y = y * torch.sigmoid(y)
    if residual is not None:
        y = residual + y
    if norm:
        y = y - y.mean(-1, keepdim=True) if norm == "layer" else y
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + norm_eps)
        y = y if norm_weight is None else y * norm_weight
        y = y if norm_bias is None else y + norm_bias
    return y


def _part(weight: Tensor, rows: Rows) -> Tensor:
    return weight if rows is None else weight[rows[0] : rows[1]]


def _reference(call: LinearCall, input: Tensor, weight: Tensor, *rest: State) -> Tensor:
    (weight,) = round_weights([_part(weight, call.rows)], call.weight_dtype)
    options: dict[str, Any] = {"activation": call.activation, "norm": call.norm}
    return reference(input, weight, *rest, **options, norm_eps=call.norm_eps)


def _torch(
    call: LinearCall,
    input: Tensor,
    weight: Tensor,
    bias: State = None,
    residual: State = None,
    norm_weight: State = None,
    norm_bias: State = None,
) -> Tensor:
    """torch's own functions, which autograd and every transform know."""
    (weight,) = round_weights([_part(weight, call.rows)], call.weight_dtype)
    return _after(call, F.linear(input, weight, bias), residual, norm_weight, norm_bias)


def _after(
    call: LinearCall, y: Tensor, residual: State, norm_weight: State, norm_bias: State
) -> Tensor:
    """What follows the product, in torch's functions."""
    if call.activation == "relu":
        y = F.relu(y)
    elif call.activation in ("gelu", "gelu_tanh"):
        y = F.gelu(y, approximate="none" if call.activation == "gelu" else "tanh")
    elif call.activation == "silu":
        y = F.silu(y)
    if residual is not None:
        y = residual + y
    if call.norm == "layer":
        y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, call.norm_eps)
    elif call.norm == "rms":
        y = F.rms_norm(y, y.shape[-1:], norm_weight, call.norm_eps)
        y = y if norm_bias is None else y + norm_bias
    return y


class _Product(torch.autograd.Function):
    """The product in training: the weight, which will have changed by the next call, is packed in
    each. Backward's own gradients are those of torch's products.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: State) -> Tensor:
        input, weight = input.contiguous(), with_rows(weight)
        ctx.save_for_backward(input, weight)
        bias = None if bias is None else bias.contiguous()
        output: Tensor = torch.ops.encdec_fast_cpu.linear_product.default(input, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[State, State, State]:
        input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated once more
            rows = grad.flatten(0, -2)
            return (
                grad @ weight if wanted[0] else None,
                rows.t() @ input.flatten(0, -2) if wanted[1] else None,
                rows.sum(0) if wanted[2] else None,
            )
        run = torch.ops.encdec_fast_cpu.linear_backward.default
        found: list[Tensor] = run(grad.contiguous(), input, weight, *wanted)
        of_input, of_weight, of_bias = found
        return (
            of_input if wanted[0] else None,
            of_weight if wanted[1] else None,
            of_bias if wanted[2] else None,
        )


def make_pack(kind: str, weights: list[Tensor], weight_format: int) -> Tensor:
    """What `kept` calls for a linear weight."""
    packed: Tensor = torch.ops.encdec_fast_cpu.linear_pack(weights[0], weight_format)
    return packed


def _cpu(
    call: LinearCall,
    input: Tensor,
    weight: Tensor,
    bias: State = None,
    residual: State = None,
    norm_weight: State = None,
    norm_bias: State = None,
) -> Tensor:
    if call.training:
        y = _Product.apply(input, _part(weight, call.rows), bias)
        return _after(call, y, residual, norm_weight, norm_bias)
    weight_format = FORMATS[call.weight_dtype or call.dtype]
    after = (
        None if bias is None else bias.contiguous(),
        ACTIVATIONS.index(call.activation),
        None if residual is None else residual.contiguous(),
        NORMS.index(call.norm),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        call.norm_eps,
    )
    input = input.contiguous()
    run = torch.ops.encdec_fast_cpu.linear_forward.default
    rows = call.rows
    kind = "linear" if rows is None else f"linear {rows}"

    def make(kind: str, weights: list[Tensor], weight_format: int) -> Tensor:
        return make_pack(kind, [_part(weights[0], rows)], weight_format)

    def result_of(weights: list[Tensor], again: bool) -> list[Tensor]:
        block = kept(kind, weights, weight_format, make, again=again)
        # Nothing comes back where the values are not those that were packed.
        result: list[Tensor] = run(input, _part(weights[0], rows), block, *after)
        return result

    return settled([weight], result_of)[0]


def _why_not(call: LinearCall) -> list[str]:
    reasons = unfit(call)
    if call.training and call.dtype != torch.float32:
        reasons.append("it trains in float32; in the other dtypes torch's own product is as fast")
    if call.training and call.context in GRAPHS:
        reasons.append("in a graph the gradient is torch's")
    if call.training and not call.large:
        reasons.append("a gradient is needed, and packing pays from some hundred rows on")
    return reasons


class _Following(torch.autograd.Function):
    """What follows the product, by Triton's kernels; backward is given the product again."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, product: Tensor, *others: State) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(product, *others)
        with torch.cuda.device_of(product):
            own = _triton.contiguous((product, *others), product.device)
            options = (call.activation, call.norm, call.norm_eps)
            result: Tensor = _triton.kernels("linear").forward(*own, *options)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call, tensors = ctx.call, ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            return None, *_following_gradients(call, tensors[0], tensors[1:], grad)
        with torch.cuda.device_of(grad):
            own = _triton.contiguous((grad, *tensors), grad.device)
            options = (call.activation, call.norm, call.norm_eps)
            return None, *_triton.kernels("linear").backward(*own, *options)


def _following_gradients(
    call: LinearCall, product: Tensor, others: Sequence[State], grad: Tensor
) -> list[State]:
    """The gradients of `_Following`, by torch, which can be differentiated."""
    y, bias, *rest = (None if t is None else t.view_as(t) for t in (product, *others))
    assert y is not None
    own = (y, bias, *rest)
    result = _after(call, y if bias is None else y + bias, *rest)
    wanted = [t for t in own if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in own]


def _triton_run(
    call: LinearCall,
    input: Tensor,
    weight: Tensor,
    bias: State = None,
    residual: State = None,
    norm_weight: State = None,
    norm_bias: State = None,
) -> Tensor:
    product = F.linear(input, _part(weight, call.rows))
    result: Tensor = _Following.apply(call, product, bias, residual, norm_weight, norm_bias)
    return result


def _unfit_for_triton(call: LinearCall) -> list[str]:
    reasons = _triton.unfit(call)
    if call.weight_dtype:
        reasons.append(f"it has no weights held in {call.weight_dtype}")
    if not (call.activation or call.norm):
        reasons.append("nothing follows that torch's product does not do itself")
    if call.norm and call.wide:
        reasons.append(f"a program holds {MOST_NORMED} features of a row that is normed")
    return reasons


BACKENDS = (
    Backend("cpu", _cpu, _why_not),
    Backend("triton", _triton_run, _unfit_for_triton),
    Backend("torch", _torch, lambda call: []),
    Backend("reference", _reference, lambda call: []),
)


def _run(*args: Any) -> Tensor:
    tensors, (activation, norm, eps, weight_dtype, *more) = args[:6], args[6:]
    input = tensors[0]
    rows = tuple(more[0]) if more and more[0] is not None else None  # defaults are not passed on
    options = (activation, norm, eps, weight_dtype)
    wide = tensors[1].shape[0] > MOST_NORMED
    call = LinearCall(input.dtype, device_type(input), False, *options, "", rows, wide=wide)
    result: Tensor = select(BACKENDS, call).run(call, *tensors)
    return result


def _fake(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    rows = rest[8] if rest[8:] else None
    features = weight.shape[0] if rows is None else rows[1] - rows[0]
    return input.new_empty((*input.shape[:-1], features))


_library.impl("linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("encdec_fast::linear", _fake, lib=_library)


def _fits(input: Tensor, weight: Tensor, others: Sequence[State], rows: Rows) -> bool:
    """Whether the kernel may run; where not, torch says what is wrong."""
    shape, whole = input.shape, weight.shape
    if len(whole) != 2 or not shape or shape[-1] != whole[1] or 0 in whole:
        return False
    features = whole[0] if rows is None else rows[1] - rows[0]
    dtype, device = input.dtype, input.device
    if weight.dtype is not dtype or weight.device != device:
        return False
    for index, tensor in enumerate(others):
        if tensor is None:
            continue
        wanted = (*shape[:-1], features) if index == _RESIDUAL else (features,)
        if tensor.dtype is not dtype or tensor.device != device or tensor.shape != wanted:
            return False
    return True


def describe_call(
    input: Tensor,
    weight: Tensor,
    others: Sequence[State],
    activation: str,
    norm: str,
    norm_eps: float,
    weight_dtype: str,
    rows: Rows = None,
) -> tuple[tuple[Backend, ...], LinearCall]:
    """The backends that may run a call, and what they judge."""
    given = [weight]
    for tensor in others:
        if tensor is not None:
            given.append(tensor)
    training = torch.is_grad_enabled() and needs_gradient([input, *given])
    if training and weight_dtype:
        weight_dtype_name(weight_dtype, training)  # raises
    device = device_type(input)
    if torch.compiler.is_compiling():
        context = "compile"
    elif autocasting(device):
        context = "autocast"
    else:
        context = context_of(input, given)
    fixed = (activation, norm, norm_eps, weight_dtype)
    wide = norm != "" and context not in GRAPHS and weight.shape[:1] > (MOST_NORMED,)
    large = False
    if training and context not in GRAPHS:  # sizes may be symbols there
        weights = weight.numel()
        large = weights >= LARGE_WEIGHT and input.numel() >= LARGE_ROWS * weight.shape[-1]
    call = LinearCall(input.dtype, device, training, *fixed, context, rows, large, wide)
    return (BACKENDS if _fits(input, weight, others, rows) else BACKENDS[2:]), call


def packed_again(
    input: Tensor, weights: Sequence[Tensor], others: Sequence[State], weight_dtype: str
) -> list[Tensor] | None:
    """The packed form of these weights, where a call on them has nothing to ask.

    others: the tensors that the call reads beside the input and the weights. None for a gradient,
    a transform, a tracer, another backend, a tensor that is not torch's own or not on the CPU, and
    for weights that are not packed.
    """
    if watched() or requested_backend() not in (None, "cpu"):
        return None
    for tensor in (input, *weights, *others):
        if tensor is not None and (type(tensor) not in PLAIN_TYPES or not tensor.is_cpu):
            return None
    weight_format = FORMATS.get(weight_dtype or input.dtype)
    if weight_format is None:
        return None
    blocks = []
    for weight in weights:
        block = found("linear", [weight], weight_format)
        if block is None:
            return None
        blocks.append(block)
    return blocks


@functools.cache
def _forward() -> Any:
    return torch.ops.encdec_fast_cpu.linear_forward.default


def _again(
    input: Tensor, weight: Tensor, bias: State, activation: str, weight_dtype: str
) -> Tensor | None:
    """What `run` gives where nothing follows the activation, in half the time of asking; or None,
    wherever there is anything to ask or to complain of.
    """
    blocks = packed_again(input, (weight,), (bias,), weight_dtype)
    if blocks is None:
        return None
    dtype, shape = input.dtype, weight.shape
    if weight.dtype is not dtype or input.dim() == 0 or input.shape[-1] != shape[1]:
        return None
    if bias is not None:
        if bias.dtype is not dtype or bias.shape != shape[:1]:
            return None
        bias = bias.contiguous()
    after = (bias, ACTIVATIONS.index(activation), None, 0, None, None, 0.0)
    result = _forward()(input.contiguous(), weight, blocks[0], *after)
    return result[0] if result else None  # nothing: other values than those that were packed


def run(
    input: Tensor,
    weight: Tensor,
    bias: State,
    residual: State = None,
    norm_weight: State = None,
    norm_bias: State = None,
    activation: str = "",
    norm: str = "",
    norm_eps: float = 1e-5,
    weight_dtype: str = "",
    rows: Rows = None,
) -> Tensor:
    """`linear` without the checks of its options.

    rows: only these rows of the weight, from and to; bias has their number of elements.
    """
    if residual is None and not norm and rows is None:
        again = _again(input, weight, bias, activation, weight_dtype)
        if again is not None:
            return again
    others = (bias, residual, norm_weight, norm_bias)
    options = (activation, norm, norm_eps, weight_dtype, rows)
    backends, call = describe_call(input, weight, others, *options)
    if call.context not in GRAPHS:
        chosen: Tensor = select(backends, call).run(call, input, weight, *others)
        return chosen
    if backends is BACKENDS and not call.training and not autocasting(call.device):
        result: Tensor = torch.ops.encdec_fast.linear(input, weight, *others, *options)
        return result
    return _torch(call, input, weight, *others)


def _checked(activation: str | None, norm: str | None, weight_dtype: Any) -> tuple[str, str, str]:
    if (activation or "") not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS[1:])
        raise ValueError(f"activation must be None, {names}, but it is {activation!r}")
    if (norm or "") not in NORMS:
        raise ValueError(f"norm must be None, 'layer' or 'rms', but it is {norm!r}")
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype must be None, torch.bfloat16 or 'int8', but it is {weight_dtype!r}"
        )
    return activation or "", norm or "", WEIGHT_DTYPES[weight_dtype]


def describe(
    input: Tensor,
    weight: Tensor,
    bias: State = None,
    *,
    activation: str | None = None,
    residual: State = None,
    norm: str | None = None,
    norm_weight: State = None,
    norm_bias: State = None,
    norm_eps: float = 1e-5,
    weight_dtype: torch.dtype | str | None = None,
) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    names = _checked(activation, norm, weight_dtype)
    others = (bias, residual, norm_weight, norm_bias)
    backends, call = describe_call(input, weight, others, *names[:2], norm_eps, names[2])
    rows = input.numel() // max(1, input.shape[-1])
    sizes = f"M={rows} N={weight.shape[0]} K={weight.shape[1]} {call.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    return Description("linear", backends, call, sizes, lambda backend: "")


@explained_by(describe)
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    weight_dtype: torch.dtype | str | None = None,
) -> Tensor:
    """norm(residual + activation(input weight' + bias)); shapes are in this file's docstring.

    weight_dtype: None, torch.bfloat16 or "int8", in which inference holds the weight, packed once;
    RuntimeError where a gradient is needed. ValueError for an unknown activation, norm or dtype.
    """
    activation, norm, name = _checked(activation, norm, weight_dtype)
    others = (residual, norm_weight, norm_bias)
    return run(input, weight, bias, *others, activation, norm, norm_eps, name)
