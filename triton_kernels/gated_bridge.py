"""The gated bridge; encdec_fast/ops/gated_bridge.py has the shapes.

    g = sigmoid(W_g [s; c] + b)      u = tanh(W_c c)      s' = g * s + (1 - g) * u

Forward is one kernel: a program has a tile of s', whose three products stay in registers until the
gate mixes them. Backward makes the gradients of what enters sigmoid and tanh in one pass over the
numbers; its products are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from encdec_fast.triton_kernels._tiles import dot, place_at, rows_of, sigmoid, tanh
from encdec_fast.triton_kernels._tuning import Tile, tile
from torch import Tensor

# Rows of the state, and its features.
TILES: dict[str, Tile] = {"gated_bridge": {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}}
NUMBERS = 1024  # of a program of backward


@triton.jit
def forward_kernel(
    state,
    context,
    gate_weight,
    context_weight,
    bias,  # or None
    result,
    gate,  # None, with candidate, where no gradient is needed
    candidate,
    M,
    H,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    i, _, j = place_at(tl.cdiv(H, COLUMNS), 1)
    m = j * ROWS + tl.arange(0, ROWS)
    h = i * COLUMNS + tl.arange(0, COLUMNS)
    logit = tl.zeros((ROWS, COLUMNS), tl.float32)
    mixed_in = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k0 in range(0, H, INNER):
        k = k0 + tl.arange(0, INNER)
        weight = rows_of(gate_weight, h, H, k, H, H + C)
        logit += dot(rows_of(state, m, M, k, H, H), tl.trans(weight))
    for k0 in range(0, C, INNER):
        k = k0 + tl.arange(0, INNER)
        c = rows_of(context, m, M, k, C, C)
        logit += dot(c, tl.trans(rows_of(gate_weight + H, h, H, k, C, H + C)))
        mixed_in += dot(c, tl.trans(rows_of(context_weight, h, H, k, C, C)))
    if bias is not None:
        logit += tl.load(bias + h, h < H, 0.0).to(tl.float32)[None, :]
    g = sigmoid(logit)
    u = tanh(mixed_in)
    s = rows_of(state, m, M, h, H, H).to(tl.float32)
    inside = (m[:, None] < M) & (h[None, :] < H)
    at = m[:, None] * H + h[None, :]
    tl.store(result + at, g * s + (1.0 - g) * u, inside)
    if gate is not None:
        tl.store(gate + at, g, inside)
        tl.store(candidate + at, u, inside)


@triton.jit
def gradients_kernel(
    grad,
    state,
    gate,
    candidate,
    of_state,  # the part that does not come through the gate
    of_logit,
    of_candidate,
    count,
    NUMBERS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = at < count
    d = tl.load(grad + at, inside, 0.0).to(tl.float32)
    s = tl.load(state + at, inside, 0.0).to(tl.float32)
    g = tl.load(gate + at, inside, 0.0).to(tl.float32)
    u = tl.load(candidate + at, inside, 0.0).to(tl.float32)
    tl.store(of_state + at, d * g, inside)
    tl.store(of_logit + at, d * (s - u) * g * (1.0 - g), inside)
    tl.store(of_candidate + at, d * (1.0 - g) * (1.0 - u * u), inside)


def _inner(narrow: bool) -> int:
    """Features that are summed over at a time; narrow: in half precision."""
    return 32 if narrow else 16


def forward(
    state: Tensor,
    context: Tensor,
    gate_weight: Tensor,
    context_weight: Tensor,
    bias: Tensor | None,
    training: bool,
) -> list[Tensor]:
    """[result], in training [result, g, u]; all tensors contiguous and on one device."""
    H, C = state.shape[-1], context.shape[-1]
    M = state.numel() // H
    found = [torch.empty_like(state) for _ in range(3 if training else 1)]
    if M > 0:
        own = tile("gated_bridge", TILES["gated_bridge"], state.device)
        grid = (triton.cdiv(H, own["COLUMNS"]) * triton.cdiv(M, own["ROWS"]),)
        gate, candidate = found[1:] if training else (None, None)
        tensors = (state, context, gate_weight, context_weight, bias, found[0], gate, candidate)
        inner = _inner(state.dtype != torch.float32)
        forward_kernel[grid](*tensors, M, H, C, INNER=inner, **own)
    return found


def gradients(grad: Tensor, state: Tensor, gate: Tensor, candidate: Tensor) -> list[Tensor]:
    """Of the state (without what comes through the gate), the gate's logit, tanh's argument."""
    found = [torch.empty_like(state) for _ in range(3)]
    if state.numel() > 0:
        grid = (triton.cdiv(state.numel(), NUMBERS),)
        tensors = (grad, state, gate, candidate, *found)
        gradients_kernel[grid](*tensors, state.numel(), NUMBERS=NUMBERS)
    return found


def configurations(dtype: str) -> Iterator[Configuration]:
    """All that `forward` and `gradients` launch, with every option; dtype: one of TYPES."""
    names = (*forward_kernel.arg_names, *gradients_kernel.arg_names)
    types = {name: f"*{dtype}" for name in names if name.islower()}
    types |= {"M": "i32", "H": "i32", "C": "i32", "count": "i64"}
    cores = dtype != "fp32"
    own = {**tile("gated_bridge", TILES["gated_bridge"]), "INNER": _inner(cores)}
    warps = own.pop("num_warps")
    whole = Configuration(forward_kernel, dtype, types, own, warps, cores)
    yield from (whole, whole.plain("bias", "gate", "candidate"))
    yield Configuration(gradients_kernel, dtype, types, {"NUMBERS": NUMBERS})
