"""Gradients of scaled dot-product attention; encdec_fast/ops/attention.py has the shapes.

With P the weights before and R after dropout, dR what their users give and M what dropout
multiplied by, and no tensor of size (T, S) stored:

    dV = R' dO      dP = M (dO V' + dR)      dE = P (dP - rowsum(P dP))
    dQ = scale dE K  dK = scale dE' Q        dBias = dE, summed over what it is broadcast to

The weights are made again from forward's log_sums. rowsum(P dP) is the sum of dO times the output,
and of R times dR where the weights have gradients of their own. Then a kernel each for the queries,
the keys with the values, and the bias: no two programs add to one number, so every run gives the
same bits (Dao et al., FlashAttention, 2022, arXiv:2205.14135, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from encdec_fast.triton_kernels._tiles import dot, length_of
from encdec_fast.triton_kernels.attention import (
    WIDTHS,
    Call,
    configuration_of,
    dropout_of,
    rows_at,
    score_strides,
    scores_of,
    strides_of,
    tile_at,
    widths,
)
from encdec_fast.triton_kernels.attention_tiles import tile_of, tiles
from torch import Tensor


@triton.jit
def _given(grad_weights, b, head, t, s, n, inside, H, T, S, AVERAGE: tl.constexpr):
    """What the users of a tile of weights give; AVERAGE: they used the mean over the heads."""
    if AVERAGE:
        row, share = b * T + t.to(tl.int64), 1.0 / H
    else:
        row, share = (b * H + head) * T + t, 1.0
    at = row[:, None] * S + s[None, :]
    return tl.load(grad_weights + at, inside[:, None] & (s[None, :] < n), 0.0) * share


@triton.jit
def _side_by_side(x, b, head, t, c, inside, H, T, size):
    """Rows (head, t) of a tensor that lies in memory as (B, T, H, size)."""
    at = ((b * T + t.to(tl.int64)) * H + head) * size
    return tl.load(x + at[:, None] + c[None, :], inside[:, None] & (c[None, :] < size), 0.0)


@triton.jit
def sums_kernel(
    q, k,
    bias, mask, lengths, seed,
    log_sums, output, grad_output,
    grad_weights,  # or None
    sums,  # float32 (B, H, T)
    H, G, T, S, scale, least, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    CAUSAL: tl.constexpr, AVERAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """The sum of P dP over each row."""
    strides = (bias_batch, bias_head, bias_row, bias_key)
    strides += (mask_batch, mask_head, mask_row, mask_key)
    pair, tile = tile_at(T, ROWS)
    b, h = pair // H, pair % H
    t = tile * ROWS + tl.arange(0, ROWS)
    inside = t < T
    head = tl.full((ROWS,), 0, tl.int64) + h
    c = tl.arange(0, VALUE)
    out = _side_by_side(output, b, head, t, c, inside, H, T, V).to(tl.float32)
    grad = _side_by_side(grad_output, b, head, t, c, inside, H, T, V).to(tl.float32)
    found = tl.sum(out * grad, 1)
    row = (b * H + h) * T + t
    if grad_weights is not None:
        n = length_of(lengths, b, S)
        d = tl.arange(0, HEAD)
        query = rows_at(q, b, head, t, d, inside, D, q_batch, q_head, q_row)
        log_sum = tl.load(log_sums + row, inside, float("inf"))
        g = tl.cast(h // (H // G), tl.int64)
        for s0 in range(0, n, KEYS):
            s = s0 + tl.arange(0, KEYS)
            where = (b, head, t, s, n, inside, scale)
            e = scores_of(
                query,
                rows_at(k, b, g, s, d, s < n, D, k_batch, k_head, k_row),
                bias,
                mask,
                strides,
                *where,
                CAUSAL,
            )
            w = tl.exp(e - log_sum[:, None])
            if seed is not None:
                w *= dropout_of(seed, b, head, t, s0, H, T, least, factor, KEYS)
            found += tl.sum(w * _given(grad_weights, b, head, t, s, n, inside, H, T, S, AVERAGE), 1)
    tl.store(sums + row, found, inside)


@triton.jit
def _score_gradients(
    query, key, value, grad,  # tiles
    log_sum, row_sum,  # of each row
    bias, mask, strides, seed, grad_weights,
    b, head, t, s0, n, inside, H, T, S, scale, least, factor,
    CAUSAL: tl.constexpr, AVERAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(R, dE) of a tile."""
    s = s0 + tl.arange(0, KEYS)
    where = (b, head, t, s, n, inside, scale)
    e = scores_of(query, key, bias, mask, strides, *where, CAUSAL)
    w = tl.exp(e - log_sum[:, None])
    dw = dot(grad, tl.trans(value))
    if grad_weights is not None:
        dw += _given(grad_weights, b, head, t, s, n, inside, H, T, S, AVERAGE)
    kept = w
    if seed is not None:
        factors = dropout_of(seed, b, head, t, s0, H, T, least, factor, KEYS)
        kept = w * factors
        dw *= factors
    return kept, w * (dw - row_sum[:, None])


@triton.jit
def query_gradients_kernel(
    q, k, v,
    bias, mask, lengths, seed,
    log_sums, sums, grad_output, grad_weights,
    grad_query,  # (B, T, H, D) in memory
    H, G, T, S, scale, least, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    CAUSAL: tl.constexpr, AVERAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    strides = (bias_batch, bias_head, bias_row, bias_key)
    strides += (mask_batch, mask_head, mask_row, mask_key)
    pair, tile = tile_at(T, ROWS)
    b, h = pair // H, pair % H
    g = h // (H // G)
    t = tile * ROWS + tl.arange(0, ROWS)
    inside = t < T
    head = tl.full((ROWS,), 0, tl.int64) + h
    d, c = tl.arange(0, HEAD), tl.arange(0, VALUE)
    n = length_of(lengths, b, S)
    if CAUSAL:
        n = tl.minimum(n, (tile + 1) * ROWS)
    query = rows_at(q, b, head, t, d, inside, D, q_batch, q_head, q_row)
    grad = _side_by_side(grad_output, b, head, t, c, inside, H, T, V)
    row = (b * H + h) * T + t
    log_sum = tl.load(log_sums + row, inside, float("inf"))
    row_sum = tl.load(sums + row, inside, 0.0)
    found = tl.zeros((ROWS, HEAD), tl.float32)
    for s0 in range(0, n, KEYS):
        s = s0 + tl.arange(0, KEYS)
        key = rows_at(k, b, g, s, d, s < n, D, k_batch, k_head, k_row)
        value = rows_at(v, b, g, s, c, s < n, V, v_batch, v_head, v_row)
        _, de = _score_gradients(
            *(query, key, value, grad),
            *(log_sum, row_sum),
            *(bias, mask, strides, seed, grad_weights),
            *(b, head, t, s0, n, inside, H, T, S, scale, least, factor),
            *(CAUSAL, AVERAGE, KEYS),
        )
        found += dot(de.to(key.dtype), key)
    at = ((b * T + t.to(tl.int64)) * H + h) * D
    tl.store(
        grad_query + at[:, None] + d[None, :],
        found * scale,
        inside[:, None] & (d[None, :] < D),
    )


@triton.jit
def key_gradients_kernel(
    q, k, v,
    bias, mask, lengths, seed,
    log_sums, sums, grad_output, grad_weights,
    grad_key, grad_value,  # (B, S, G, D) and (B, S, G, V) in memory
    H, G, T, S, scale, least, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    CAUSAL: tl.constexpr, AVERAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    strides = (bias_batch, bias_head, bias_row, bias_key)
    strides += (mask_batch, mask_head, mask_row, mask_key)
    pair, tile = tile_at(S, KEYS)
    b, g = pair // G, pair % G
    s0 = tile * KEYS
    s = s0 + tl.arange(0, KEYS)
    d, c = tl.arange(0, HEAD), tl.arange(0, VALUE)
    n = length_of(lengths, b, S)
    key = rows_at(k, b, g, s, d, s < n, D, k_batch, k_head, k_row)
    value = rows_at(v, b, g, s, c, s < n, V, v_batch, v_head, v_row)
    of_key = tl.zeros((KEYS, HEAD), tl.float32)
    of_value = tl.zeros((KEYS, VALUE), tl.float32)
    rows = T
    if s0 >= n:
        rows = 0
    first = 0
    if CAUSAL:
        first = s0 // ROWS * ROWS
    for i in range(H // G):
        head = tl.full((ROWS,), 0, tl.int64) + g * (H // G) + i
        for t0 in range(first, rows, ROWS):
            t = t0 + tl.arange(0, ROWS)
            inside = t < T
            query = rows_at(q, b, head, t, d, inside, D, q_batch, q_head, q_row)
            grad = _side_by_side(grad_output, b, head, t, c, inside, H, T, V)
            row = (b * H + head) * T + t
            kept, de = _score_gradients(
                *(query, key, value, grad),
                *(tl.load(log_sums + row, inside, float("inf")), tl.load(sums + row, inside, 0.0)),
                *(bias, mask, strides, seed, grad_weights),
                *(b, head, t, s0, n, inside, H, T, S, scale, least, factor),
                *(CAUSAL, AVERAGE, KEYS),
            )
            of_value += dot(tl.trans(kept.to(grad.dtype)), grad)
            of_key += dot(tl.trans(de.to(query.dtype)), query)
    at = (b * S + s.to(tl.int64)) * G + g
    tl.store(
        grad_key + at[:, None] * D + d[None, :],
        of_key * scale,
        (s[:, None] < S) & (d[None, :] < D),
    )
    tl.store(
        grad_value + at[:, None] * V + c[None, :],
        of_value,
        (s[:, None] < S) & (c[None, :] < V),
    )


@triton.jit
def bias_gradients_kernel(
    q, k, v,
    bias, mask, lengths, seed,
    log_sums, sums, grad_output, grad_weights,
    grad_bias,  # float32 (batches, heads, rows, keys), each the call's own or 1
    batches, heads, B,
    H, G, T, S, scale, least, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,  # rows, keys are 1
    CAUSAL: tl.constexpr, AVERAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    strides = (bias_batch, bias_head, bias_row, bias_key)
    strides += (mask_batch, mask_head, mask_row, mask_key)
    count = T
    if ONE_ROW:
        count = 1
    place, tile = tile_at(count, ROWS)
    own_batch, own_head = (place // heads).to(tl.int32), (place % heads).to(tl.int32)
    # What a program sums over: all of a dimension that the bias has once, else its own part.
    b_first, b_last = own_batch, own_batch + 1
    if batches == 1:
        b_last = B
    h_first, h_last = own_head, own_head + 1
    if heads == 1:
        h_last = H
    t_first, s_first = tile * ROWS, tl.program_id(1) * KEYS
    t_last, s_last = tl.minimum(t_first + ROWS, T), tl.minimum(s_first + KEYS, S)
    if ONE_ROW:
        t_last = T
    if ONE_KEY:
        s_last = S
    d, c = tl.arange(0, HEAD), tl.arange(0, VALUE)
    found = tl.zeros((ROWS, KEYS), tl.float32)
    for b32 in range(b_first, b_last):
        b = tl.cast(b32, tl.int64)
        n = length_of(lengths, b, S)
        for h in range(h_first, h_last):
            head = tl.full((ROWS,), 0, tl.int64) + h
            g = tl.cast(h // (H // G), tl.int64)
            for t0 in range(t_first, t_last, ROWS):
                t = t0 + tl.arange(0, ROWS)
                inside = t < T
                query = rows_at(q, b, head, t, d, inside, D, q_batch, q_head, q_row)
                grad = _side_by_side(grad_output, b, head, t, c, inside, H, T, V)
                row = (b * H + h) * T + t
                log_sum = tl.load(log_sums + row, inside, float("inf"))
                row_sum = tl.load(sums + row, inside, 0.0)
                for s0 in range(s_first, tl.minimum(s_last, n), KEYS):
                    s = s0 + tl.arange(0, KEYS)
                    _, de = _score_gradients(
                        *(
                            query,
                            rows_at(k, b, g, s, d, s < n, D, k_batch, k_head, k_row),
                            rows_at(v, b, g, s, c, s < n, V, v_batch, v_head, v_row),
                            grad,
                        ),
                        *(log_sum, row_sum),
                        *(bias, mask, strides, seed, grad_weights),
                        *(b, head, t, s0, n, inside, H, T, S, scale, least, factor),
                        *(CAUSAL, AVERAGE, KEYS),
                    )
                    found += de
    # Where the bias has one row or one key, the first of the tile receives the sum.
    t = t_first + tl.arange(0, ROWS)
    if ONE_ROW:
        found = tl.where((tl.arange(0, ROWS) == 0)[:, None], tl.sum(found, 0)[None, :], 0.0)
    s, keys = s_first + tl.arange(0, KEYS), S
    if ONE_KEY:
        found = tl.where((tl.arange(0, KEYS) == 0)[None, :], tl.sum(found, 1)[:, None], 0.0)
        keys = 1
    at = (place * count + t[:, None]) * keys + s[None, :]
    tl.store(grad_bias + at, found, (t[:, None] < count) & (s[None, :] < keys))


def backward(
    call: Call,
    grad_output: Tensor,
    grad_weights: Tensor | None,
    average: bool,
    output: Tensor,
    log_sums: Tensor,
    bias_shape: tuple[int, ...] | None,
) -> list[Tensor | None]:
    """Gradients of query, key and value, and of a bias of this shape (float32), or None.

    grad_output and output lie in memory as (B, T, H, V); grad_weights: float32, contiguous. The
    gradients of query, key and value lie as their heads side by side, too.
    """
    B, H, G, T, S, D, V = call.sizes
    like = call.query
    grad_query = like.new_empty(B, T, H, D)
    grad_key, grad_value = like.new_empty(B, S, G, D), like.new_empty(B, S, G, V)
    grad_bias = None
    if bias_shape is not None:
        grad_bias = like.new_zeros(bias_shape, dtype=torch.float32)
    found = [x.transpose(1, 2) for x in (grad_query, grad_key, grad_value)]
    if B * H * T * S == 0:
        return [x.zero_() for x in found] + [grad_bias]
    width = widths(D, V)
    masked, most = call.masked or grad_weights is not None, max(width["HEAD"], width["VALUE"])
    options = {"CAUSAL": call.causal, "AVERAGE": average, **width}
    of_queries = tile_of("queries", like.dtype, masked, most, like.device) | options
    of_keys = tile_of("keys", like.dtype, masked, most, like.device) | options
    blocks = triton.cdiv(T, of_queries["ROWS"])
    sizes, numbers = (H, G, T, S), (call.scale, *call.kept)
    masks = (call.bias, call.mask, call.lengths, call.seed)
    sums = torch.empty_like(log_sums)
    sums_kernel[(blocks * B * H,)](
        *(like, call.key, *masks, log_sums, output, grad_output, grad_weights, sums),
        *(*sizes, *numbers, *strides_of(like, call.key), *score_strides(call)),
        **of_queries,
    )
    given = (like, call.key, call.value, *masks, log_sums, sums, grad_output, grad_weights)
    strides = (*strides_of(like, call.key, call.value), *score_strides(call))
    query_gradients_kernel[(blocks * B * H,)](
        *given, grad_query, *sizes, *numbers, *strides, **of_queries
    )
    blocks = triton.cdiv(S, of_keys["KEYS"])
    key_gradients_kernel[(blocks * B * G,)](
        *given, grad_key, grad_value, *sizes, *numbers, *strides, **of_keys
    )
    if grad_bias is not None:
        batches, heads, rows, keys = grad_bias.shape
        of_bias = tile_of("bias", like.dtype, True, most, like.device) | options
        grid = (
            (1 if rows == 1 else triton.cdiv(T, of_bias["ROWS"])) * batches * heads,
            1 if keys == 1 else triton.cdiv(S, of_bias["KEYS"]),
        )
        bias_gradients_kernel[grid](
            *(*given, grad_bias, batches, heads, B, *sizes, *numbers, *strides),
            ONE_ROW=rows == 1,
            ONE_KEY=keys == 1,
            **of_bias,
        )
    return [*found, grad_bias]


TILES = tiles(["queries", "keys", "bias"])  # that may be tuned


def configurations(dtype: str) -> Iterator[Configuration]:
    """What `backward` launches, with every option, and with few; dtype: one of TYPES."""
    little = ("bias", "mask", "seed", "grad_weights")
    for width in WIDTHS:
        for absent in ((), little):
            yield configuration_of(query_gradients_kernel, "queries", dtype, width, *absent)
            yield configuration_of(key_gradients_kernel, "keys", dtype, width, *absent)
        yield configuration_of(sums_kernel, "queries", dtype, width)
        yield configuration_of(bias_gradients_kernel, "bias", dtype, width)
