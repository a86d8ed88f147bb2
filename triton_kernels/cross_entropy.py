"""Softmax cross-entropy; encdec_fast/ops/cross_entropy.py has the shapes.

Forward reads each row of logits once, with a running maximum and sum, and keeps the maximum and the
logarithm of the sum of e^(x - maximum): together in one number they would lose what a large maximum
has no digits for. Backward reads the logits again and writes their gradient: nothing else of their
size is ever in memory, where a log-softmax that is kept for backward would be a second one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from torch import Tensor

MOST_CLASSES = 2048  # that a program has at a time


@triton.jit
def _target_of(target, row, V, ignore_index):
    """(the row's class, whether it counts); nobody has looked at it."""
    y = tl.load(target + row)
    return tl.minimum(tl.maximum(y, 0), V - 1), y != ignore_index


@triton.jit
def forward_kernel(
    logits,
    target,
    losses,  # float32 (N), as those that follow
    maxima,
    log_sums,
    V,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    CLASSES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y, counts = _target_of(target, row, V, ignore_index)
    logits += row * V
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    base = tl.zeros((), tl.float32)  # the smoothed part's sum is of x - base
    plain = tl.zeros((), tl.float32)
    for c0 in range(0, V, CLASSES):
        c = c0 + tl.arange(0, CLASSES)
        x = tl.load(logits + c, c < V, float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(x, 0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(x - shift), 0)
        if SMOOTH:
            base = tl.where(c0 == 0, shift, base)
            plain += tl.sum(tl.where(c < V, x - base, 0.0), 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    log_sum = tl.log(total)
    loss = log_sum - (tl.load(logits + y).to(tl.float32) - shift)
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum - (plain / V + (base - shift)))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.store(maxima + row, shift)
    tl.store(log_sums + row, log_sum)


@triton.jit
def backward_kernel(
    grad,  # float32 (N)
    logits,
    target,
    maxima,
    log_sums,
    of_logits,
    V,
    ignore_index,
    smoothing,
    CLASSES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y, counts = _target_of(target, row, V, ignore_index)
    c = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    x = tl.load(logits + row * V + c, c < V, 0.0).to(tl.float32)
    d = tl.exp(x - tl.load(maxima + row) - tl.load(log_sums + row)) - smoothing / V
    d -= tl.where(c == y, 1.0 - smoothing, 0.0)
    d = tl.where(counts, d * tl.load(grad + row), 0.0)
    tl.store(of_logits + row * V + c, d, c < V)


def _classes(V: int) -> int:
    return min(MOST_CLASSES, max(128, triton.next_power_of_2(V)))


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, ...]:
    """(losses, maxima, log_sums); logits (N, V) and target int64 (N), contiguous, on one device."""
    N, V = logits.shape
    found = tuple(logits.new_empty(N, dtype=torch.float32) for _ in range(3))
    if N > 0:
        tensors = (logits, target, *found)
        constants = {"SMOOTH": smoothing > 0, "CLASSES": _classes(V), "num_warps": 8}
        forward_kernel[N,](*tensors, V, ignore_index, smoothing, **constants)
    return found


def backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    maxima: Tensor,
    log_sums: Tensor,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """The gradient of the logits from that of the losses, float32 (N)."""
    N, V = logits.shape
    found = torch.empty_like(logits)
    if N > 0:
        grid = (N, triton.cdiv(V, _classes(V)))
        tensors = (grad, logits, target, maxima, log_sums, found)
        constants = {"CLASSES": _classes(V), "num_warps": 8}
        backward_kernel[grid](*tensors, V, ignore_index, smoothing, **constants)
    return found


def configurations(dtype: str) -> Iterator[Configuration]:
    """All that `forward` and `backward` launch; dtype: one of TYPES."""
    types = dict.fromkeys(("losses", "maxima", "log_sums", "grad"), "*fp32")
    types |= {"logits": f"*{dtype}", "of_logits": f"*{dtype}", "target": "*i64"}
    types |= {"V": "i32", "ignore_index": "i32", "smoothing": "fp32"}
    classes = 128
    while classes <= MOST_CLASSES:
        own, most = {"CLASSES": classes}, classes == MOST_CLASSES
        for smooth in (False, True):
            yield Configuration(
                forward_kernel, dtype, types, own | {"SMOOTH": smooth}, 8, default=most
            )
        yield Configuration(backward_kernel, dtype, types, own, 8, default=most)
        classes *= 2
