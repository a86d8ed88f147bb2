"""What kernels share: tiles of matrices and their products."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 as if they were integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rows_of(base, rows, count, columns, width):
    """A tile [rows, columns] of a matrix of rows of `width` numbers, zeros outside of it."""
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    return tl.load(base + rows[:, None].to(tl.int64) * width + columns[None, :], inside, 0.0)


@triton.jit
def dot(a, b):
    """a b in float32, of tiles of one dtype; float32 is not rounded to TF32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
