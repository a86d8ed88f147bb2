"""A step of attention to what was written; encdec_fast/ops/cached_attention.py has the shapes.

A program has one head of one hypothesis: it writes the new key and value to the cache, starts from
them, and goes over the earlier positions in tiles, each position in the row where the hypothesis'
own key lies. The softmax runs along (Milakov and Gimelshein, 2018, arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from torch import Tensor

NUMBERS = 2048  # of a tile of keys: with more some spill on 8.0 and 10.0
MOST_NUMBERS = 256  # of a head


@triton.jit
def step_kernel(
    query,
    key,
    value,
    keys,  # (P, R, H, D), as values
    values,
    rows,  # int32 (R, P)
    places,  # int64 (R)
    bias,  # (H, P) or None
    output,  # (R, H, D)
    R,
    P,
    H,
    scale,
    q_row,  # numbers from one hypothesis to the next
    k_row,
    v_row,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,  # the power of 2 that holds D
):
    r, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    # Nobody has looked at places and rows.
    n = tl.minimum(tl.maximum(tl.load(places + r), 0), P - 1)
    d = tl.arange(0, HEAD)
    q = tl.load(query + r * q_row + h * D + d, d < D, 0.0).to(tl.float32) * scale
    new_key = tl.load(key + r * k_row + h * D + d, d < D, 0.0)
    new_value = tl.load(value + r * v_row + h * D + d, d < D, 0.0)
    own = ((n * R + r) * H + h) * D + d
    tl.store(keys + own, new_key, d < D)
    tl.store(values + own, new_value, d < D)
    most = tl.sum(q * new_key.to(tl.float32), 0)
    if bias is not None:
        most += tl.load(bias + h * P + n).to(tl.float32)
    total = tl.full((), 1.0, tl.float32)
    sums = new_value.to(tl.float32)
    for s0 in range(0, n, KEYS):
        s = s0 + tl.arange(0, KEYS)
        row = tl.load(rows + r * P + s, s < n, 0)
        row = tl.minimum(tl.maximum(row, 0), R - 1)
        at = ((s.to(tl.int64) * R + row) * H + h) * D
        inside = (s[:, None] < n) & (d[None, :] < D)
        k = tl.load(keys + at[:, None] + d[None, :], inside, 0.0).to(tl.float32)  # [KEYS, HEAD]
        e = tl.sum(q[None, :] * k, 1)
        if bias is not None:
            e += tl.load(bias + h * P + s, s < n, 0.0).to(tl.float32)
        e = tl.where(s < n, e, float("-inf"))
        larger = tl.maximum(most, tl.max(e, 0))
        w, shrunk = tl.exp(e - larger), tl.exp(most - larger)
        v = tl.load(values + at[:, None] + d[None, :], inside, 0.0).to(tl.float32)
        sums = sums * shrunk + tl.sum(w[:, None] * v, 0)
        total = total * shrunk + tl.sum(w, 0)
        most = larger
    tl.store(output + (r * H + h) * D + d, sums / total, d < D)


def _tile(D: int) -> dict[str, int]:
    """The power of 2 that holds a head, and how many keys a tile has."""
    head = triton.next_power_of_2(D)
    return {"D": D, "HEAD": head, "KEYS": min(32, NUMBERS // head)}


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    places: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The output (R, H, D); keys and values get the new ones.

    All but query, key and value contiguous; of these the last two dimensions are.
    """
    P, R, H, D = keys.shape
    output = query.new_empty(R, H, D)
    if output.numel() > 0:
        strides = [tensor.stride(0) for tensor in (query, key, value)]
        tensors = (query, key, value, keys, values, rows, places, bias, output)
        step_kernel[R * H,](*tensors, R, P, H, scale, *strides, **_tile(D), num_warps=4)
    return output


def configurations(dtype: str) -> Iterator[Configuration]:
    """What `step` launches; dtype: one of TYPES."""
    tensors = ("query", "key", "value", "keys", "values", "bias", "output")
    types = dict.fromkeys(tensors, f"*{dtype}") | {"rows": "*i32", "places": "*i64"}
    types |= dict.fromkeys(("R", "P", "H", "q_row", "k_row", "v_row"), "i32") | {"scale": "fp32"}
    strides = ("q_row", "k_row", "v_row")
    for size in (64, 32, 128, 256):
        most = size == 64
        whole = Configuration(
            step_kernel, dtype, types, _tile(size), 4, aligned=strides, default=most
        )
        yield from (whole, whole.plain("bias"))
