"""Additive attention; encdec_fast/ops/additive_attention.py has the shapes.

    e_ts = v' tanh(q_t + k_s)    w_ts = softmax over s of e_ts    context_t = sum_s w_ts value_s

Forward is two kernels. The first computes scores, a block of (queries, keys) a program; a program
holds tanh of a few features only, so nothing of size (B, Tq, S, A) exists. The second goes over a
row's scores twice: for their maximum and the sum of their exponentials, as it changes with the
maximum (Milakov and Gimelshein, 2018, arXiv:1805.02867), then for the weights and their products
with the values.

Backward has the weights. One kernel makes the gradients of the scores, two walk over tanh again,
for the queries (with v) and for the keys, and one multiplies weights and the context's gradients.
No two programs add to one number, so every run gives the same bits.

Keys and values past a sentence's end are never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from encdec_fast.triton_kernels._tiles import dot, length_of, place_at, rows_of, tanh
from encdec_fast.triton_kernels._tuning import Tile, tile
from torch import Tensor

# Of the kernels that compute tanh: queries, keys and features at a time.
_TANH: Tile = {"QUERIES": 4, "KEYS": 16, "FEATURES": 32, "num_warps": 4}
# Of those that multiply matrices; INNER: of the dimension that is summed over, where there are two.
_SQUARE: Tile = {"ROWS": 16, "COLUMNS": 64, "num_warps": 8}
INNER = 16
TILES = {"additive_attention tanh": _TANH, "additive_attention products": _SQUARE}


def _tiles(device: torch.device | None = None) -> list[Tile]:
    """Of the kernels that compute tanh, and of those that multiply matrices."""
    return [tile(name, default, device) for name, default in TILES.items()]


@triton.jit
def _keys(k, coverage, u, b, s, n, S, a, A):
    """Keys [s, a] of sentence b as the scores see them, in float32."""
    key = rows_of(k + b * S * A, s, n, a, A, A).to(tl.float32)
    if coverage is not None:
        c = tl.load(coverage + b * S + s, s < n, 0.0).to(tl.float32)
        key += c[:, None] * tl.load(u + a, a < A, 0.0).to(tl.float32)[None, :]
    return key


@triton.jit
def scores_kernel(
    q,
    k,
    v,
    coverage,
    u,
    lengths,
    scores,  # float32 (B, T, S)
    T,
    S,
    A,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    i, j, b = place_at(tl.cdiv(S, KEYS), tl.cdiv(T, QUERIES))
    n = length_of(lengths, b, S)
    if i * KEYS >= n:
        return
    s = i * KEYS + tl.arange(0, KEYS)
    t = j * QUERIES + tl.arange(0, QUERIES)
    e = tl.zeros((QUERIES, KEYS), tl.float32)
    for a0 in range(0, A, FEATURES):
        a = a0 + tl.arange(0, FEATURES)
        query = rows_of(q + b * T * A, t, T, a, A, A).to(tl.float32)
        key = _keys(k, coverage, u, b, s, n, S, a, A)
        weight = tl.load(v + a, a < A, 0.0).to(tl.float32)
        e += tl.sum(tanh(query[:, None, :] + key[None, :, :]) * weight[None, None, :], 2)
    inside = (t[:, None] < T) & (s[None, :] < n)
    tl.store(scores + (b * T + t[:, None]) * S + s[None, :], e, inside)


@triton.jit
def context_kernel(
    scores,
    values,
    lengths,
    weights,  # float32 (B, T, S), or None
    context,
    T,
    S,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    i, j, b = place_at(tl.maximum(tl.cdiv(D, COLUMNS), 1), tl.cdiv(T, ROWS))
    n = length_of(lengths, b, S)
    t = j * ROWS + tl.arange(0, ROWS)
    d = i * COLUMNS + tl.arange(0, COLUMNS)
    row = (b * T + t[:, None]) * S
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for s0 in range(0, n, INNER):
        s = s0 + tl.arange(0, INNER)
        # Rows past the last have zeros, so that none is without a number.
        e = tl.load(scores + row + s[None, :], (t[:, None] < T) & (s[None, :] < n), 0.0)
        e = tl.where(s[None, :] < n, e, float("-inf"))
        larger = tl.maximum(most, tl.max(e, 1))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(e - larger[:, None]), 1)
        most = larger
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s0 in range(0, n, INNER):
        s = s0 + tl.arange(0, INNER)
        inside = (t[:, None] < T) & (s[None, :] < n)
        e = tl.load(scores + row + s[None, :], inside, float("-inf"))
        w = tl.exp(e - most[:, None]) / total[:, None]
        if weights is not None:
            if i == 0:
                tl.store(weights + row + s[None, :], w, inside)
        value = rows_of(values + b * S * D, s, n, d, D, D)
        out += dot(w.to(value.dtype), value)
    if weights is not None:
        if i == 0:
            for s0 in range(n // COLUMNS * COLUMNS, S, COLUMNS):
                s = s0 + tl.arange(0, COLUMNS)
                padding = (t[:, None] < T) & (s[None, :] >= n) & (s[None, :] < S)
                tl.store(weights + row + s[None, :], 0.0, padding)
    inside = (t[:, None] < T) & (d[None, :] < D)
    tl.store(context + (b * T + t[:, None]) * D + d[None, :], out, inside)


@triton.jit
def score_gradients_kernel(
    grad_context,  # or None
    grad_weights,  # float32, or None
    values,
    weights,
    lengths,
    grads,  # float32 (B, T, S)
    T,
    S,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """de = w (dw - sum over s of w dw), where dw are the gradients of the weights."""
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = length_of(lengths, b, S)
    t = i * ROWS + tl.arange(0, ROWS)
    row = (b * T + t[:, None]) * S
    mean = tl.zeros((ROWS,), tl.float32)
    for s0 in range(0, n, COLUMNS):
        s = s0 + tl.arange(0, COLUMNS)
        inside = (t[:, None] < T) & (s[None, :] < n)
        dw = tl.zeros((ROWS, COLUMNS), tl.float32)
        if grad_context is not None:
            for d0 in range(0, D, INNER):
                d = d0 + tl.arange(0, INNER)
                grad = rows_of(grad_context + b * T * D, t, T, d, D, D)
                value = rows_of(values + b * S * D, s, n, d, D, D)
                dw += dot(grad, tl.trans(value))
        if grad_weights is not None:
            dw += tl.load(grad_weights + row + s[None, :], inside, 0.0)
        mean += tl.sum(dw * tl.load(weights + row + s[None, :], inside, 0.0), 1)
        tl.store(grads + row + s[None, :], dw, inside)
    for s0 in range(0, n, COLUMNS):
        s = s0 + tl.arange(0, COLUMNS)
        inside = (t[:, None] < T) & (s[None, :] < n)
        dw = tl.load(grads + row + s[None, :], inside, 0.0)
        w = tl.load(weights + row + s[None, :], inside, 0.0)
        tl.store(grads + row + s[None, :], w * (dw - mean[:, None]), inside)


@triton.jit
def _through_tanh(q, k, v, coverage, u, grads, b, t, T, s, n, S, a, A):
    """([t, s, a] gradients of q + k, and of what v multiplies) from those of a block of scores."""
    query = rows_of(q + b * T * A, t, T, a, A, A).to(tl.float32)
    key = _keys(k, coverage, u, b, s, n, S, a, A)
    x = tanh(query[:, None, :] + key[None, :, :])
    inside = (t[:, None] < T) & (s[None, :] < n)
    de = tl.load(grads + (b * T + t[:, None]) * S + s[None, :], inside, 0.0)[:, :, None]
    weight = tl.load(v + a, a < A, 0.0).to(tl.float32)
    return de * weight[None, None, :] * (1.0 - x * x), de * x


@triton.jit
def query_gradients_kernel(
    q,
    k,
    v,
    coverage,
    u,
    lengths,
    grads,
    grad_query,
    grad_v,  # float32 (B, blocks of queries, A): each program's part
    T,
    S,
    A,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    blocks = tl.cdiv(T, QUERIES)
    i, j, b = place_at(tl.cdiv(A, FEATURES), blocks)
    n = length_of(lengths, b, S)
    t = j * QUERIES + tl.arange(0, QUERIES)
    a = i * FEATURES + tl.arange(0, FEATURES)
    of_query = tl.zeros((QUERIES, FEATURES), tl.float32)
    of_v = tl.zeros((FEATURES,), tl.float32)
    for s0 in range(0, n, KEYS):
        s = s0 + tl.arange(0, KEYS)
        dx, dv = _through_tanh(q, k, v, coverage, u, grads, b, t, T, s, n, S, a, A)
        of_query += tl.sum(dx, 1)
        of_v += tl.sum(tl.sum(dv, 1), 0)
    inside = (t[:, None] < T) & (a[None, :] < A)
    tl.store(grad_query + (b * T + t[:, None]) * A + a[None, :], of_query, inside)
    part = b * blocks + j
    tl.store(grad_v + part * A + a, of_v, a < A)


@triton.jit
def key_gradients_kernel(
    q,
    k,
    v,
    coverage,
    u,
    lengths,
    grads,
    grad_keys,
    T,
    S,
    A,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    i, j, b = place_at(tl.cdiv(A, FEATURES), tl.cdiv(S, KEYS))
    n = length_of(lengths, b, S)
    s = j * KEYS + tl.arange(0, KEYS)
    a = i * FEATURES + tl.arange(0, FEATURES)
    of_keys = tl.zeros((KEYS, FEATURES), tl.float32)
    if j * KEYS < n:
        for t0 in range(0, T, QUERIES):
            t = t0 + tl.arange(0, QUERIES)
            dx, _ = _through_tanh(q, k, v, coverage, u, grads, b, t, T, s, n, S, a, A)
            of_keys += tl.sum(dx, 0)
    inside = (s[:, None] < S) & (a[None, :] < A)
    tl.store(grad_keys + (b * S + s[:, None]) * A + a[None, :], of_keys, inside)


@triton.jit
def value_gradients_kernel(
    grad_context,
    weights,
    lengths,
    grad_values,
    T,
    S,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i, j, b = place_at(tl.cdiv(D, COLUMNS), tl.cdiv(S, COLUMNS))
    n = length_of(lengths, b, S)
    s = j * COLUMNS + tl.arange(0, COLUMNS)
    d = i * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for t0 in range(0, T, ROWS):
        t = t0 + tl.arange(0, ROWS)
        inside = (t[:, None] < T) & (s[None, :] < n)
        w = tl.load(weights + (b * T + t[:, None]) * S + s[None, :], inside, 0.0)
        grad = rows_of(grad_context + b * T * D, t, T, d, D, D)
        out += dot(tl.trans(w.to(grad.dtype)), grad)
    inside = (s[:, None] < S) & (d[None, :] < D)
    tl.store(grad_values + (b * S + s[:, None]) * D + d[None, :], out, inside)


def _sizes(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, int, int, int, int]:
    return *query.shape, keys.shape[1], values.shape[2]


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_weight: Tensor,
    coverage: Tensor | None,
    coverage_weight: Tensor | None,
    lengths: Tensor | None,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """(context, weights in float32 or None); all tensors contiguous and on one device."""
    B, T, A, S, D = _sizes(query, keys, values)
    context = query.new_zeros(B, T, D)
    weights = query.new_zeros(B, T, S, dtype=torch.float32) if want_weights else None
    if B * T * S == 0:
        return context, weights
    scores = query.new_empty(B, T, S, dtype=torch.float32)
    tanh_tile, square = _tiles(query.device)
    programs = triton.cdiv(S, tanh_tile["KEYS"]) * triton.cdiv(T, tanh_tile["QUERIES"]) * B
    scores_kernel[programs,](
        query, keys, score_weight, coverage, coverage_weight, lengths, scores, T, S, A, **tanh_tile
    )
    programs = max(1, triton.cdiv(D, square["COLUMNS"])) * triton.cdiv(T, square["ROWS"]) * B
    tensors = (scores, values, lengths, weights, context)
    context_kernel[programs,](*tensors, T, S, D, INNER=INNER, **square)
    return context, weights


def backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_weight: Tensor,
    coverage: Tensor | None,
    coverage_weight: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys (with the coverage in them), values and score_weight (float32)."""
    B, T, A, S, D = _sizes(query, keys, values)
    found = [torch.zeros_like(tensor) for tensor in (query, keys, values)]
    grad_query, grad_keys, grad_values = found
    tanh_tile, square = _tiles(query.device)
    blocks = triton.cdiv(T, tanh_tile["QUERIES"])
    grad_v = query.new_zeros(B, blocks, A, dtype=torch.float32)
    if B * T * S * A == 0:
        return grad_query, grad_keys, grad_values, grad_v.sum((0, 1))
    grads = torch.empty_like(weights)
    score_gradients_kernel[(B, triton.cdiv(T, square["ROWS"]))](
        grad_context,
        grad_weights,
        values,
        weights,
        lengths,
        grads,
        T,
        S,
        D,
        INNER=INNER,
        **square,
    )
    shared = (query, keys, score_weight, coverage, coverage_weight, lengths, grads)
    features = triton.cdiv(A, tanh_tile["FEATURES"])
    query_gradients_kernel[features * blocks * B,](
        *shared, grad_query, grad_v, T, S, A, **tanh_tile
    )
    programs = features * triton.cdiv(S, tanh_tile["KEYS"]) * B
    key_gradients_kernel[programs,](*shared, grad_keys, T, S, A, **tanh_tile)
    if grad_context is not None and D > 0:
        programs = triton.cdiv(D, square["COLUMNS"]) * triton.cdiv(S, square["COLUMNS"]) * B
        tensors = (grad_context, weights, lengths, grad_values)
        value_gradients_kernel[programs,](*tensors, T, S, D, **square)
    return grad_query, grad_keys, grad_values, grad_v.sum((0, 1))


def configurations(dtype: str) -> Iterator[Configuration]:
    """All that `forward` and `backward` launch, with every option; dtype: one of TYPES."""
    given, number = f"*{dtype}", "*fp32"
    types = {
        **dict.fromkeys(("q", "k", "v", "coverage", "u", "values", "grad_context"), given),
        **dict.fromkeys(("context", "grad_query", "grad_keys", "grad_values"), given),
        **dict.fromkeys(("scores", "weights", "grads", "grad_weights", "grad_v"), number),
        "lengths": "*i64",
        **dict.fromkeys(("T", "S", "A", "D"), "i32"),
    }

    def with_tile(kernel: Any, own: Tile, **more: Any) -> Configuration:
        constants = {name: value for name, value in own.items() if name != "num_warps"}
        return Configuration(kernel, dtype, types, constants | more, own["num_warps"], **cores)

    tanh_tile, square = _tiles()

    cores: dict[str, bool] = {}
    options = ("coverage", "u", "lengths")
    for kernel in (scores_kernel, query_gradients_kernel, key_gradients_kernel):
        whole = with_tile(kernel, tanh_tile)
        yield from (whole, whole.plain(*options))
    cores["tensor_cores"] = dtype != "fp32"
    whole = with_tile(context_kernel, square, INNER=INNER)
    yield from (whole, whole.plain("lengths", "weights"))
    whole = with_tile(value_gradients_kernel, square)
    yield from (whole, whole.plain("lengths"))
    whole = with_tile(score_gradients_kernel, square, INNER=INNER)
    yield from (whole, whole.plain("lengths", "grad_weights"))
    cores["tensor_cores"] = False  # of the weights' own gradients
    yield with_tile(score_gradients_kernel, square, INNER=INNER).plain("grad_context", "values")
