"""What follows the product of linear; encdec_fast/ops/linear.py and add_norm.py have the shapes.

    y = norm(residual + activation(product + bias))

The product is torch's (cuBLAS). Forward reads it once and writes the result: a program has whole
rows, so that a norm's mean and variance stay in registers. Backward makes the row again from the
product, in the same way. Its gradients of the bias and of the norm's weights are sums over all
rows: each program sums over its own, and the few sums are added by torch, in the same order in
every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from encdec_fast.triton_kernels._tiles import sigmoid, tanh
from torch import Tensor

# As the kernels number them.
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")
NORMS = ("", "layer", "rms")

# Of a program of 8 warps. Backward with a norm has some ten registers for each number of a thread:
# rows with more features than this would spill.
NUMBERS = 2048
PARTS = 256  # sums over rows that backward leaves to torch, at most


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = tl.where(x < 0.0, 0.0, x)  # NaN stays
    elif ACTIVATION == 2:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 4:
        y = x * sigmoid(x)
    else:
        y = x
    return y


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of _activated."""
    if ACTIVATION == 1:
        d = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == 2:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == 3:
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACTIVATION == 4:
        s = sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    else:
        d = tl.full(x.shape, 1.0, tl.float32)
    return d


@triton.jit
def _row(vector, n, N):
    """Numbers n of a vector (N), as a row of a tile in float32."""
    return tl.load(vector + n, n < N, 0.0).to(tl.float32)[None, :]


@triton.jit
def _before_norm(product, bias, residual, at, inside, n, N, ACTIVATION: tl.constexpr):
    """(what the activation is given, what the norm is given), zeros outside of the matrix."""
    x = tl.load(product + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        x += _row(bias, n, N)
    y = _activated(x, ACTIVATION)
    if residual is not None:
        y += tl.load(residual + at, inside, 0.0).to(tl.float32)
    return x, tl.where(inside, y, 0.0)


@triton.jit
def _normed(y, inside, N, eps, NORM: tl.constexpr):
    """(y normed, without weights; what it was multiplied by)."""
    if NORM == 1:
        y = tl.where(inside, y - (tl.sum(y, 1) / N)[:, None], 0.0)
    rate = 1.0 / tl.sqrt_rn(tl.sum(y * y, 1) / N + eps)
    return y * rate[:, None], rate[:, None]


@triton.jit
def forward_kernel(
    product,
    bias,  # it and those that follow: or None
    residual,
    norm_weight,
    norm_bias,
    before,  # None, or where to write what the norm is given
    result,
    M,
    N,
    eps,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = m[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    _, y = _before_norm(product, bias, residual, at, inside, n, N, ACTIVATION)
    if before is not None:
        tl.store(before + at, y, inside)
    if NORM != 0:
        y, _ = _normed(y, inside, N, eps, NORM)
        if norm_weight is not None:
            y *= _row(norm_weight, n, N)
        if norm_bias is not None:
            y += _row(norm_bias, n, N)
    tl.store(result + at, y, inside)


@triton.jit
def backward_kernel(
    grad,
    of_before,  # the gradient of what the norm was given, or None
    product,
    bias,
    residual,
    norm_weight,
    of_product,
    of_residual,  # or None
    of_bias,  # float32 (parts, N), or None: sums over the rows of a program
    of_norm_weight,
    of_norm_bias,
    M,
    N,
    eps,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias_sum = tl.zeros((COLUMNS,), tl.float32)
    weight_sum = tl.zeros((COLUMNS,), tl.float32)
    shift_sum = tl.zeros((COLUMNS,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        m = tl.full((ROWS,), block, tl.int64) * ROWS + tl.arange(0, ROWS)
        at = m[:, None] * N + n[None, :]
        inside = (m[:, None] < M) & (n[None, :] < N)
        d = tl.load(grad + at, inside, 0.0).to(tl.float32)
        x, y = _before_norm(product, bias, residual, at, inside, n, N, ACTIVATION)
        if NORM != 0:
            y, rate = _normed(y, inside, N, eps, NORM)
            weight_sum += tl.sum(tl.where(inside, d * y, 0.0), 0)
            shift_sum += tl.sum(d, 0)
            if norm_weight is not None:
                d *= _row(norm_weight, n, N)
            d -= y * (tl.sum(d * y, 1) / N)[:, None] + _mean(d, N, NORM)
            d = tl.where(inside, d * rate, 0.0)
        if of_before is not None:
            d += tl.load(of_before + at, inside, 0.0).to(tl.float32)
        if of_residual is not None:
            tl.store(of_residual + at, d, inside)
        d *= _slope(x, ACTIVATION)
        bias_sum += tl.sum(tl.where(inside, d, 0.0), 0)
        tl.store(of_product + at, d, inside)
    part = tl.program_id(0).to(tl.int64) * N + n
    if of_bias is not None:
        tl.store(of_bias + part, bias_sum, n < N)
    if of_norm_weight is not None:
        tl.store(of_norm_weight + part, weight_sum, n < N)
    if of_norm_bias is not None:
        tl.store(of_norm_bias + part, shift_sum, n < N)


@triton.jit
def _mean(d, N, NORM: tl.constexpr):
    """What the subtraction of a row's mean takes from its gradients; RMSNorm has none."""
    if NORM == 1:
        mean = (tl.sum(d, 1) / N)[:, None]
    else:
        mean = tl.zeros((d.shape[0], 1), tl.float32)
    return mean


def _tile(N: int, norm: str) -> dict[str, int]:
    """Rows and features of a program, and its warps. ValueError where a norm's row does not fit."""
    columns = max(16, triton.next_power_of_2(N))
    if norm and columns > NUMBERS:
        raise ValueError(f"a program holds {NUMBERS} features of a row that is normed, not {N}")
    columns = min(columns, NUMBERS)
    return {"ROWS": NUMBERS // columns, "COLUMNS": columns, "num_warps": 8}


def _options(activation: str, norm: str, N: int) -> dict[str, int]:
    options = {"ACTIVATION": ACTIVATIONS.index(activation), "NORM": NORMS.index(norm)}
    return options | _tile(N, norm)


def forward(
    product: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    norm: str,
    eps: float,
    before: Tensor | None = None,
) -> Tensor:
    """The result; all tensors contiguous and on one device. With a norm: up to NUMBERS features.

    before: as product; receives what the norm is given.
    """
    result = torch.empty_like(product)
    if product.numel() > 0:
        N = product.shape[-1]
        M, options = product.numel() // N, _options(activation, norm, N)
        grid = (triton.cdiv(M, options["ROWS"]), triton.cdiv(N, options["COLUMNS"]))
        tensors = (product, bias, residual, norm_weight, norm_bias, before, result)
        forward_kernel[grid](*tensors, M, N, eps, **options)
    return result


def backward(
    grad: Tensor,
    product: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    norm: str,
    eps: float,
    of_before: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of the five tensors of `forward`, None for those that are absent.

    of_before: the gradient of what the norm was given, from elsewhere.
    """
    of_product = torch.empty_like(product)
    of_residual = None if residual is None else torch.empty_like(product)
    N = product.shape[-1]
    M, options = product.numel() // max(1, N), _options(activation, norm, N)
    parts = min(PARTS, triton.cdiv(M, options["ROWS"]))
    sums = [
        None if vector is None else product.new_zeros(parts, N, dtype=torch.float32)
        for vector in (bias, norm_weight, norm_bias)
    ]
    if product.numel() > 0:
        grid = (parts, triton.cdiv(N, options["COLUMNS"]))
        tensors = (grad, of_before, product, bias, residual, norm_weight, of_product, of_residual)
        backward_kernel[grid](*tensors, *sums, M, N, eps, **options)
    found = [None if part is None else part.sum(0).to(product.dtype) for part in sums]
    return [of_product, found[0], of_residual, *found[1:]]


def configurations(dtype: str) -> Iterator[Configuration]:
    """What `forward` and `backward` launch, with all tensors and few; dtype: one of TYPES.

    The costliest activation and norm, on the widest rows, and no norm on narrow ones.
    """
    names = (*forward_kernel.arg_names, *backward_kernel.arg_names)
    types = {name: f"*{dtype}" for name in names if name.islower()}
    types |= dict.fromkeys(("of_bias", "of_norm_weight", "of_norm_bias"), "*fp32")
    types |= {"M": "i32", "N": "i32", "eps": "fp32"}
    absent = ("bias", "residual", "norm_weight", "norm_bias", "before", "of_before")
    sums = ("of_residual", "of_bias", "of_norm_weight", "of_norm_bias")
    for kernel in (forward_kernel, backward_kernel):
        options = _options("gelu_tanh", "layer", NUMBERS)
        warps = options.pop("num_warps")
        yield Configuration(kernel, dtype, types, options, warps)
        options = _options("gelu_tanh", "", 512)
        warps = options.pop("num_warps")
        here = [name for name in (*absent, *sums) if name in kernel.arg_names]
        yield Configuration(kernel, dtype, types, options, warps).plain(*here)
