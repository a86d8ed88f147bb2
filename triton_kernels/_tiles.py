"""What kernels share: functions of numbers, tiles of matrices and their products."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 as if they were integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tanh(x):
    """Of one exponential and one division; its error is below 2e-7 everywhere."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def place_at(first, second):
    """(i, j, b) of a program, i below `first` and j below `second`, i the fastest.

    The first dimension of a grid alone may have more than 65,535 programs.
    """
    p = tl.program_id(0)
    return p % first, p // first % second, (p // first // second).to(tl.int64)


@triton.jit
def length_of(lengths, b, S):
    """How many keys sentence b has; lengths: None, or a pointer to numbers that nobody checked."""
    if lengths is None:
        n = S
    else:
        n = tl.minimum(tl.maximum(tl.load(lengths + b), 0), S).to(tl.int32)
    return n


@triton.jit
def rows_of(base, rows, count, columns, width, stride):
    """A tile [rows, columns] of a matrix (count, width), zeros outside of it.

    stride: numbers from one of its rows to the next.
    """
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], inside, 0.0)


@triton.jit
def dot(a, b):
    """a b in float32, of tiles of one dtype; float32 is not rounded to TF32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
