"""The k best log probabilities of each row; encdec_fast/ops/log_softmax_topk.py has the shapes.

A row is cut into parts, each of a program that reads its logits once, for their maximum, the sum of
their exponentials and the k best; a second kernel joins the parts of a row. Nothing of the logits'
size is written. A logit and its class are one integer, of which the larger is the better: the bits
of the logit in the order of numbers, then the class, the first one the largest. So one maximum
finds both, and equal logits come in the order of their classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from torch import Tensor

CLASSES = 2048  # of a part
MOST_KEPT = 64  # k
MOST_JOINED = 8192  # candidates of all parts of a row

_NONE = tl.constexpr(-(2**63))  # less than every logit with its class
_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _key_of(x, c):
    """Of logits and their classes."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 is as good as 0
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & _LAST)
    return (ordered.to(tl.int64) << 32) | (c.to(tl.int64) ^ _LAST)  # LAST - c


@triton.jit
def _logit_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def part_kernel(
    logits,
    forbidden,  # bytes (rows / shared, V), or None
    keys,  # int64 (rows, parts, K)
    sums,  # float32 (rows, parts, 2): maximum, and the sum of e^(x - maximum)
    V,
    shared,
    COUNTED: tl.constexpr,  # whether forbidden logits belong to the sum
    K: tl.constexpr,
    CLASSES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    c = part * CLASSES + tl.arange(0, CLASSES)
    x = tl.load(logits + row * V + c, c < V, float("-inf")).to(tl.float32)
    summed = x
    if forbidden is not None:
        ruled_out = tl.load(forbidden + row // shared * V + c, c < V, 0) != 0
        x = tl.where(ruled_out, float("-inf"), x)
        if not COUNTED:
            summed = x
    largest = tl.max(summed, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    at = row * tl.num_programs(1) + part
    tl.store(sums + at * 2, largest)
    tl.store(sums + at * 2 + 1, tl.sum(tl.exp(summed - shift), 0))
    key = tl.where(c < V, _key_of(x, c), _NONE)
    for i in range(K):
        best = tl.max(key, 0)
        tl.store(keys + at * K + i, best)
        key = tl.where(key == best, _NONE, key)


@triton.jit
def join_kernel(
    keys,
    sums,
    values,  # float32 (rows, K)
    classes,  # int64 (rows, K)
    log_sums,  # float32 (rows)
    parts,
    K: tl.constexpr,
    PARTS: tl.constexpr,  # the powers of 2 that hold them and their candidates
    KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p, j = tl.arange(0, PARTS), tl.arange(0, KEYS)
    own = sums + (row * parts + p) * 2
    largest = tl.load(own, p < parts, float("-inf"))
    total = tl.load(own + 1, p < parts, 0.0)
    most = tl.max(largest, 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.where(total == 0.0, 0.0, total * tl.exp(largest - shift)), 0)
    log_sum = shift + tl.log(total)
    tl.store(log_sums + row, log_sum)
    key = tl.load(keys + row * parts * K + j, j < parts * K, _NONE)
    for i in range(K):
        best = tl.max(key, 0)
        x = _logit_of(best)
        # The maximum first: in one number with the sum's logarithm it would lose digits.
        value = tl.where(x == float("-inf"), x, (x - shift) - tl.log(total))
        tl.store(values + row * K + i, value)
        tl.store(classes + row * K + i, (best & _LAST) ^ _LAST)
        key = tl.where(key == best, _NONE, key)


def _parts(V: int) -> int:
    return int(triton.cdiv(V, CLASSES))


def why_not(V: int, k: int) -> list[str]:
    """Reasons against k of V classes."""
    reasons = []
    if k > MOST_KEPT:
        reasons.append(f"k is {k}, and it keeps at most {MOST_KEPT}")
    elif _parts(V) * k > MOST_JOINED:
        reasons.append(f"of {V} classes it keeps at most {MOST_JOINED // _parts(V)}, not {k}")
    return reasons


def forward(logits: Tensor, k: int, forbidden: Tensor | None, counted: bool) -> list[Tensor]:
    """[values (N, k), classes (N, k), log_sums (N)] of contiguous logits (N, V).

    forbidden: None, or bool (M, V), contiguous, N a multiple of M.
    """
    N, V = logits.shape
    values, log_sums = (logits.new_empty(s, dtype=torch.float32) for s in ((N, k), (N,)))
    classes = logits.new_empty(N, k, dtype=torch.int64)
    if N > 0:
        parts = _parts(V)
        keys = logits.new_empty(N, parts, k, dtype=torch.int64)
        sums = logits.new_empty(N, parts, 2, dtype=torch.float32)
        size = min(CLASSES, max(128, triton.next_power_of_2(V)))
        shared = 1 if forbidden is None else N // forbidden.shape[0]
        masks = None if forbidden is None else forbidden.view(torch.uint8)
        own = (logits, masks, keys, sums, V, shared)
        part_kernel[N, parts](*own, COUNTED=counted, K=k, CLASSES=size, num_warps=4)
        held = {"PARTS": parts, "KEYS": max(32, parts * k)}
        whole = {name: triton.next_power_of_2(size) for name, size in held.items()}
        join_kernel[N,](keys, sums, values, classes, log_sums, parts, K=k, **whole, num_warps=4)
    return [values, classes, log_sums]


def configurations(dtype: str) -> Iterator[Configuration]:
    """What `forward` launches for a few sizes; dtype: one of TYPES."""
    types = dict.fromkeys(("sums", "values", "log_sums"), "*fp32")
    types |= {"logits": f"*{dtype}", "forbidden": "*u8", "keys": "*i64", "classes": "*i64"}
    types |= dict.fromkeys(("V", "shared", "parts"), "i32")
    for k, classes in ((8, CLASSES), (1, CLASSES), (MOST_KEPT, CLASSES), (8, 128)):
        own = {"K": k, "COUNTED": False, "CLASSES": classes}
        part = Configuration(part_kernel, dtype, types, own, 4, default=k == 8)
        yield from (part, part.plain("forbidden"))
    for k, parts in ((8, 16), (1, 1), (MOST_KEPT, MOST_JOINED // MOST_KEPT)):
        own = {"K": k, "PARTS": parts, "KEYS": max(32, parts * k)}
        yield Configuration(join_kernel, dtype, types, own, 4, default=k == 8)
