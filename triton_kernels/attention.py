"""Scaled dot-product attention; encdec_fast/ops/attention.py has the shapes.

    e_ts = scale * (q_t . k_s) + bias_ts    w_ts = softmax over s of e_ts
    output_t = sum over s of w_ts value_s

A program of forward has a tile of queries that share a key head, head by head, and walks over their
keys once: the maximum, the sum of the exponentials and the weighted values are corrected whenever
the maximum grows (Milakov and Gimelshein, 2018, arXiv:1805.02867; Dao et al., 2022,
arXiv:2205.14135). Where there are too few tiles for a GPU, as at a decode step, the keys are cut
into parts, a program each, and a second kernel joins them (Dao et al., Flash-Decoding, 2023).

What is kept of a row is the logarithm of the sum of its exponentials: from it each weight can be
made again, for those who want to see them, by a third kernel, and for backward.

Keys and values past a sentence's end are never read. A row without any key that counts gives zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from encdec_fast.triton_kernels._tiles import dot, length_of
from encdec_fast.triton_kernels.attention_tiles import tile_of, tiles
from torch import Tensor

WIDTHS = (64, 128, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROGRAMS = 2  # that each multiprocessor should have before keys are cut into parts


@triton.jit
def tile_at(count, SIZE: tl.constexpr):
    """(Which of the pairs of a sentence and a head, which tile of its `count` rows) a program has.

    The first dimension of a grid alone may have more than 65,535 programs.
    """
    tiles = tl.cdiv(count, SIZE)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


@triton.jit
def rows_at(x, b, head, row, d, inside, size, batch_stride, head_stride, row_stride):
    """Rows (head, row) of a tensor (B, heads, rows, size), zeros outside of it."""
    at = b * batch_stride + head.to(tl.int64) * head_stride + row.to(tl.int64) * row_stride
    return tl.load(x + at[:, None] + d[None, :], inside[:, None] & (d[None, :] < size), 0.0)


@triton.jit
def places(x, b, head, t, s, batch_stride, head_stride, row_stride, key_stride):
    """Where the numbers of a bias or a mask lie for a tile of rows and keys."""
    row = b * batch_stride + head.to(tl.int64) * head_stride + t.to(tl.int64) * row_stride
    return x + row[:, None] + s.to(tl.int64)[None, :] * key_stride


@triton.jit
def scores_of(
    query, key,  # tiles
    bias, mask,
    strides,  # eight: of the bias, of the mask
    b, head, t, s, n, row_inside, scale, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of rows and keys, -infinity where a key does not count."""
    e = dot(query, tl.trans(key)) * scale
    counts = row_inside[:, None] & (s[None, :] < n)
    if CAUSAL:
        counts = counts & (s[None, :] <= t[:, None])
    if bias is not None:
        at = places(bias, b, head, t, s, strides[0], strides[1], strides[2], strides[3])
        e += tl.load(at, counts, 0.0).to(tl.float32)
    if mask is not None:
        at = places(mask, b, head, t, s, strides[4], strides[5], strides[6], strides[7])
        counts = counts & (tl.load(at, counts, 0) != 0)
    return tl.where(counts, e, float("-inf"))


@triton.jit
def dropout_of(seed, b, head, t, s0, H, T, least, factor, KEYS: tl.constexpr):
    """What dropout multiplies a tile of KEYS weights from s0 on by: encdec_fast/ops/_dropout.py.

    Four words of random bits serve 16 keys each, one set behind the other.
    """
    row = (b * H + head) * T + t
    low, high = (row & 0xFFFFFFFF).to(tl.uint32)[:, None], (row >> 32).to(tl.uint32)[:, None]
    zero = tl.zeros((row.shape[0], 16), tl.uint32)
    place = (s0 // 64 * 16 + tl.arange(0, 16)).to(tl.uint32)[None, :] + zero
    w0, w1, w2, w3 = tl.philox(tl.load(seed), place, zero, low + zero, high + zero)
    if KEYS == 64:
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
        bits = tl.reshape(tl.permute(words, (0, 3, 2, 1)), (row.shape[0], 64))
    else:
        upper = s0 % 64 >= 32
        low_word, high_word = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
        if KEYS == 32:
            words = tl.permute(tl.join(low_word, high_word), (0, 2, 1))
            bits = tl.reshape(words, (row.shape[0], 32))
        else:
            tl.static_assert(KEYS == 16)
            bits = tl.where(s0 % 32 >= 16, high_word, low_word)
    return tl.where(bits.to(tl.int64) >= least, factor, 0.0)


@triton.jit
def _store(output, log_sums, sums, most, total, b, head, t, d, inside, H, T, V):
    """A tile of the result, (B, T, H, V) in memory, and its rows' statistics."""
    out = tl.where((total == 0.0)[:, None], 0.0, sums / total[:, None])
    row = (b * T + t) * H + head
    at = row[:, None] * V + d[None, :]
    tl.store(output + at, out, inside[:, None] & (d[None, :] < V))
    if log_sums is not None:
        # Rows without a key: e - infinity, so that each weight is made again as 0.
        found = tl.where(total == 0.0, float("inf"), most + tl.log(total))
        tl.store(log_sums + (b * H + head) * T + t, found, inside)


@triton.jit
def forward_kernel(
    q, k, v,
    bias, mask, lengths, seed,  # each may be None
    output, log_sums,  # (B, T, H, V) in memory, and float32 (B, H, T) or None
    # Or, where the keys are cut into parts, float32: sums (parts, B * G, rows, V), and each row's
    # maximum and sum of exponentials (parts, B * G, rows, 2).
    parts, part_sums,
    H, G, T, S, scale, least, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr,
    HEAD: tl.constexpr, VALUE: tl.constexpr,  # the powers of 2 that hold D and V
):  # fmt: skip
    strides = (bias_batch, bias_head, bias_row, bias_key)
    strides += (mask_batch, mask_head, mask_row, mask_key)
    rows = H // G * T
    pair, tile = tile_at(rows, ROWS)
    b, g = pair // G, pair % G
    n = length_of(lengths, b, S)
    r = tile * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    head, t = g * (H // G) + r // T, r % T
    d, c = tl.arange(0, HEAD), tl.arange(0, VALUE)
    query = rows_at(q, b, head, t, d, inside, D, q_batch, q_head, q_row)
    if CAUSAL:
        n = tl.minimum(n, tl.max(tl.where(inside, t, 0), 0) + 1)
    part = tl.cdiv(tl.cdiv(n, tl.num_programs(1)), KEYS) * KEYS
    first = tl.program_id(1) * part
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUE), tl.float32)
    for s0 in range(first, tl.minimum(first + part, n), KEYS):
        s = s0 + tl.arange(0, KEYS)
        key = rows_at(k, b, g, s, d, s < n, D, k_batch, k_head, k_row)
        where = (b, head, t, s, n, inside, scale)
        e = scores_of(query, key, bias, mask, strides, *where, CAUSAL)
        larger = tl.maximum(most, tl.max(e, 1))
        # A row that has no key so far must not become -infinity less -infinity.
        level = tl.where(larger == float("-inf"), 0.0, larger)
        w = tl.exp(e - level[:, None])
        shrunk = tl.exp(most - level)
        total = total * shrunk + tl.sum(w, 1)
        if seed is not None:
            w *= dropout_of(seed, b, head, t, s0, H, T, least, factor, KEYS)
        value = rows_at(v, b, g, s, c, s < n, V, v_batch, v_head, v_row)
        sums = sums * shrunk[:, None] + dot(w.to(value.dtype), value)
        most = larger
    if parts is None:
        _store(output, log_sums, sums, most, total, b, head, t, c, inside, H, T, V)
    else:
        pairs = tl.num_programs(0) // tl.cdiv(rows, ROWS)
        at = (tl.program_id(1) * pairs + pair) * rows + r
        tl.store(parts + at[:, None] * V + c[None, :], sums, inside[:, None] & (c[None, :] < V))
        tl.store(part_sums + at * 2, most, inside)
        tl.store(part_sums + at * 2 + 1, total, inside)


@triton.jit
def join_kernel(
    parts, part_sums, output, log_sums,
    count,  # of parts
    H, G, T, V: tl.constexpr, ROWS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    rows = H // G * T
    pair, tile = tile_at(rows, ROWS)
    b, g = pair // G, pair % G
    r = tile * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    pairs = tl.num_programs(0) // tl.cdiv(rows, ROWS)
    c = tl.arange(0, VALUE)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUE), tl.float32)
    for i in range(count):
        at = (i * pairs + pair) * rows + r
        own = tl.load(part_sums + at * 2, inside, float("-inf"))
        larger = tl.maximum(most, own)
        level = tl.where(larger == float("-inf"), 0.0, larger)
        shrunk, grown = tl.exp(most - level), tl.exp(own - level)
        total = total * shrunk + tl.load(part_sums + at * 2 + 1, inside, 0.0) * grown
        part = parts + at[:, None] * V + c[None, :]
        found = tl.load(part, inside[:, None] & (c[None, :] < V), 0.0)
        sums = sums * shrunk[:, None] + found * grown[:, None]
        most = larger
    head, t = g * (H // G) + r // T, r % T
    _store(output, log_sums, sums, most, total, b, head, t, c, inside, H, T, V)


@triton.jit
def weights_kernel(
    q, k,
    bias, mask, lengths, seed,
    log_sums,
    weights,  # (B, H, T, S), or with AVERAGE (B, T, S)
    H, G, T, S, scale, least, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    CAUSAL: tl.constexpr, AVERAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    strides = (bias_batch, bias_head, bias_row, bias_key)
    strides += (mask_batch, mask_head, mask_row, mask_key)
    own_place, tile = tile_at(T, ROWS)
    if AVERAGE:
        b, first, count = own_place, 0, H
    else:
        b, first, count = own_place // H, (own_place % H).to(tl.int32), 1
    n = length_of(lengths, b, S)
    t = tile * ROWS + tl.arange(0, ROWS)
    s0 = tl.program_id(1) * KEYS
    s = s0 + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    w = tl.zeros((ROWS, KEYS), tl.float32)
    for h in range(first, first + count):
        head = tl.full((ROWS,), 0, tl.int64) + h
        g = tl.cast(h // (H // G), tl.int64)
        where = (b, head, t, s, n, t < T, scale)
        e = scores_of(
            rows_at(q, b, head, t, d, t < T, D, q_batch, q_head, q_row),
            rows_at(k, b, g, s, d, s < n, D, k_batch, k_head, k_row),
            bias,
            mask,
            strides,
            *where,
            CAUSAL,
        )
        own = tl.exp(e - tl.load(log_sums + (b * H + h) * T + t, t < T, 0.0)[:, None])
        if seed is not None:
            own *= dropout_of(seed, b, head, t, s0, H, T, least, factor, KEYS)
        w += own / count
    row = (own_place * T + t) * S
    tl.store(weights + row[:, None] + s[None, :], w, (t[:, None] < T) & (s[None, :] < S))


class Call(NamedTuple):
    """What the launchers of forward and backward are given.

    query (B, H, T, D), key (B, G, S, D), value (B, G, S, V): the last dimension contiguous. bias
    and mask: None, or expanded to (B, H, T, S), the mask's numbers in one byte each. lengths,
    seed: None, or int64 on the same device. dropout: the probability.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    causal: bool
    scale: float
    dropout: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, H, G, T, S, D, V."""
        (B, H, T, D), (_, G, S, V) = self.query.shape, self.value.shape
        return B, H, G, T, S, D, V

    @property
    def masked(self) -> bool:
        """Whether more than lengths and causality changes the scores or the weights."""
        return any(t is not None for t in (self.bias, self.mask, self.seed))

    @property
    def kept(self) -> tuple[int, float]:
        """The least word of random bits with which a weight is kept, and what multiplies it."""
        if self.dropout >= 1:
            return 0xFFFFFFFF, 0.0
        return int(self.dropout * 2.0**32), 1 / (1 - self.dropout)


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Call:
    """The tensors of the op as the kernels read them; bias and mask have 4 dimensions."""
    scores = (*query.shape[:3], key.shape[2])
    spread = [None if t is None else t.expand(scores) for t in (bias, mask)]
    if spread[1] is not None:
        spread[1] = spread[1].view(torch.uint8)
    return Call(query, key, value, *spread, lengths, seed, causal, scale, dropout)


def strides_of(*tensors: Tensor) -> list[int]:
    """Three of each tensor of rows; the fourth is 1."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def score_strides(call: Call) -> list[int]:
    """Four of the bias and four of the mask, 0 where there is none."""
    return [
        stride
        for tensor in (call.bias, call.mask)
        for stride in (tensor.stride() if tensor is not None else (0, 0, 0, 0))
    ]


def widths(D: int, V: int) -> dict[str, int]:
    """Of a query and a value, and the powers of 2 that hold their numbers."""
    whole = [max(16, triton.next_power_of_2(size)) for size in (D, V)]
    return {"D": D, "V": V, "HEAD": whole[0], "VALUE": whole[1]}


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def parts_of(call: Call, tile: dict[str, Any]) -> int:
    """Into how many parts the keys are cut, so that every multiprocessor has work."""
    B, H, G, T, S, _, _ = call.sizes
    programs = B * G * triton.cdiv(H // G * T, tile["ROWS"])
    wanted = triton.cdiv(PROGRAMS * _processors(call.query.device), programs)
    return max(1, min(wanted, S // (2 * tile["KEYS"])))


def forward(call: Call, want_weights: bool, average: bool, want_sums: bool) -> list[Tensor | None]:
    """[output, weights in float32 or None, log_sums (B, H, T) or None].

    The output lies in memory as (B, T, H, V). Weights: (B, H, T, S), or their mean over the heads.
    """
    B, H, G, T, S, D, V = call.sizes
    query = call.query
    output = query.new_empty(B, T, H, V)
    weights = log_sums = None
    if want_sums or want_weights:
        log_sums = query.new_empty(B, H, T, dtype=torch.float32)
    if want_weights:
        weights = query.new_empty(*((B, T, S) if average else (B, H, T, S)), dtype=torch.float32)
    if B * H * T == 0:
        return [output.transpose(1, 2), weights, log_sums]
    rows, width = H // G * T, widths(D, V)
    most = max(width["HEAD"], width["VALUE"])
    tile = tile_of("forward", query.dtype, call.masked, most, query.device)
    tile["ROWS"] = min(tile["ROWS"], max(16, triton.next_power_of_2(rows)))
    count = parts_of(call, tile)
    parts = part_sums = None
    if count > 1:
        parts = query.new_empty(count, B * G, rows, V, dtype=torch.float32)
        part_sums = query.new_empty(count, B * G, rows, 2, dtype=torch.float32)
    least, factor = call.kept
    scores = score_strides(call)
    forward_kernel[(triton.cdiv(rows, tile["ROWS"]) * B * G, count)](
        *(query, call.key, call.value, call.bias, call.mask, call.lengths, call.seed),
        *(output, log_sums, parts, part_sums),
        *(H, G, T, S, call.scale, least, factor),
        *strides_of(query, call.key, call.value),
        *scores,
        CAUSAL=call.causal,
        **tile,
        **width,
    )
    if count > 1:
        join_kernel[(triton.cdiv(rows, tile["ROWS"]) * B * G,)](
            *(parts, part_sums, output, log_sums, count, H, G, T),
            V=V,
            ROWS=tile["ROWS"],
            VALUE=width["VALUE"],
            num_warps=tile["num_warps"],
        )
    if weights is not None and S > 0:
        tiles = triton.cdiv(T, tile["ROWS"]) * B * (1 if average else H)
        weights_kernel[(tiles, triton.cdiv(S, tile["KEYS"]))](
            *(query, call.key, call.bias, call.mask, call.lengths, call.seed, log_sums, weights),
            *(H, G, T, S, call.scale, least, factor),
            *strides_of(query, call.key),
            *scores,
            CAUSAL=call.causal,
            AVERAGE=average,
            D=D,
            HEAD=width["HEAD"],
            **tile,
        )
    return [output.transpose(1, 2), weights, log_sums]


TILES = tiles(["forward"])  # that may be tuned


# Strides of rows whose sizes are multiples of 16.
ALIGNED = tuple(f"{x}_{what}" for x in ("q", "k", "v") for what in ("batch", "head", "row"))


def types_of(dtype: str) -> dict[str, str]:
    """Of every argument of these kernels and of backward's; dtype: one of TYPES."""
    rows = ("q", "k", "v", "bias", "output", "grad_output", "grad_query", "grad_key", "grad_value")
    numbers = ("log_sums", "parts", "part_sums", "weights", "sums", "grad_weights", "grad_bias")
    sizes = ("H", "G", "T", "S", "B", "count", "batches", "heads")
    strides = [f"{x}_{what}" for x in ("bias", "mask") for what in ("batch", "head", "row", "key")]
    return {
        **dict.fromkeys(rows, f"*{dtype}"),
        **dict.fromkeys(numbers, "*fp32"),
        **dict.fromkeys(("lengths", "seed"), "*i64"),
        **dict.fromkeys(("scale", "factor"), "fp32"),
        "mask": "*u8",
        "least": "i64",
        **dict.fromkeys((*sizes, *strides, *ALIGNED), "i32"),
    }


def configuration_of(
    kernel: Any, tiles: str, dtype: str, width: int, *absent: str, **constants: Any
) -> Configuration:
    """A kernel as the launchers compile it for queries and values of `width` numbers."""
    masked = not {"bias", "mask", "seed"} <= set(absent)
    tile = tile_of(tiles, DTYPES[dtype], masked, width) | constants
    options = [tile.pop(option) for option in ("num_warps", "num_stages", "maxnreg")]
    constants = {"CAUSAL": True, "AVERAGE": True, "ONE_ROW": False, "ONE_KEY": False}
    constants |= {"D": width, "V": width, "HEAD": width, "VALUE": width, **tile}
    names = kernel.arg_names
    return Configuration(
        kernel,
        dtype,
        types_of(dtype),
        {name: value for name, value in constants.items() if name in names},
        options[0],
        dtype != "fp32" and kernel is not join_kernel,
        tuple(name for name in absent if name in names),
        ALIGNED,
        *options[1:],
        default=width == WIDTHS[0],
    )


def configurations(dtype: str) -> Iterator[Configuration]:
    """What `forward` launches, with every option, and with few; dtype: one of TYPES."""
    whole, masks = ("parts", "part_sums"), ("bias", "mask", "seed")
    for width in WIDTHS:
        yield configuration_of(forward_kernel, "forward", dtype, width, *whole)
        yield configuration_of(forward_kernel, "forward", dtype, width, *whole, *masks)
    step = ("output", "log_sums", *masks)  # a decode step
    yield configuration_of(forward_kernel, "forward", dtype, 64, *step, ROWS=16)
    yield configuration_of(join_kernel, "forward", dtype, 64, *masks, ROWS=16)
    for width in WIDTHS:
        yield configuration_of(weights_kernel, "forward", dtype, width)
