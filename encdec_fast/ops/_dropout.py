"""Random numbers that depend on nothing but a seed and a place, as csrc/core/random.h makes them.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def drawn_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator: int64, on the CPU for the CPU's kernels."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def _wide(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of the products: int64 wraps, and its 64 bits are those of unsigned numbers."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Four words of random bits, in int64, for a counter of four words."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _wide(0xD2511F53, c0)
        high1, low1 = _wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def dropout_factors(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """What dropout multiplies a tensor of rows by: 0 with probability p, else 1 / (1 - p).

    Number i of row r has word (i % 64) / 16 of the counter (i / 64 * 16 + i % 16, 0, r), r of two
    words.
    """
    n = like.shape[-1]
    rows = torch.arange(like.numel() // max(1, n), device=like.device).unsqueeze(1)
    places = torch.arange(-(-n // 64) * 16, device=like.device).unsqueeze(0)
    zero = torch.zeros_like(places)
    words = philox([places, zero, rows & _WORD, rows >> 32], seed)
    # [rows, blocks, 16] of each word -> [rows, blocks, 4, 16]
    bits = torch.stack([w.expand(len(rows), -1).unflatten(1, (-1, 16)) for w in words], dim=2)
    least = _WORD if p >= 1 else int(p * 2.0**32)
    kept = bits.flatten(1)[:, :n].reshape(like.shape) >= least
    return kept.to(like.dtype) * (0.0 if p >= 1 else 1 / (1 - p))
