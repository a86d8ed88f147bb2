"""What a program of attention's kernels holds at a time, where nobody has tuned.

For each kernel, each precision and each width (the power of 2 that holds a query's or a value's
numbers) what `OPTIONS` names. "masked" stands for calls with a bias, a mask, dropout or gradients
of the weights, which take more registers than lengths and causal masks do. Each is the first, in an
order by size, that neither spills nor exceeds the shared memory of any compute capability in
`report.py`, with Triton 3.6 and 3.9; none has been timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

# maxnreg: registers that a thread may have; None leaves it to ptxas, which saves some for programs
# side by side and may spill, or not.
OPTIONS = ("ROWS", "KEYS", "num_warps", "num_stages", "maxnreg")
Tile = tuple[int, int, int, int, int | None]

TILES: dict[str, dict[tuple[str, str], dict[int, Tile]]] = {
    "forward": {
        ("half", "plain"): {
            64: (64, 64, 8, 3, 255),
            128: (64, 32, 8, 3, None),
            256: (32, 64, 8, 2, None),
        },
        ("half", "masked"): {
            64: (64, 32, 8, 2, None),
            128: (32, 32, 8, 3, None),
            256: (16, 64, 8, 2, None),
        },
        ("float", "plain"): {
            64: (32, 32, 8, 1, 255),
            128: (16, 32, 8, 1, None),
            256: (16, 16, 8, 1, None),
        },
        ("float", "masked"): {
            64: (32, 32, 8, 1, 255),
            128: (32, 32, 8, 1, 255),
            256: (16, 32, 8, 1, None),
        },
    },
    # Gradients of the queries, and the sums that all gradients need.
    "queries": {
        ("half", "plain"): {
            64: (64, 64, 8, 3, None),
            128: (64, 64, 8, 2, None),
            256: (32, 32, 4, 3, None),
        },
        ("half", "masked"): {
            64: (32, 64, 8, 2, 255),
            128: (32, 32, 8, 3, 255),
            256: (16, 64, 8, 2, None),
        },
        ("float", "plain"): {
            64: (32, 32, 8, 1, 255),
            128: (32, 32, 8, 1, 255),
            256: (16, 32, 8, 1, 255),
        },
        ("float", "masked"): {
            64: (32, 32, 8, 1, 255),
            128: (32, 32, 8, 1, 255),
            256: (16, 16, 8, 1, None),
        },
    },
    # Gradients of the keys and values.
    "keys": {
        ("half", "plain"): {
            64: (64, 32, 8, 3, 255),
            128: (32, 64, 8, 2, 255),
            256: (32, 32, 8, 2, None),
        },
        ("half", "masked"): {
            64: (32, 32, 8, 1, None),
            128: (16, 32, 8, 2, None),
            256: (16, 16, 8, 1, 255),
        },
        ("float", "plain"): {
            64: (32, 32, 8, 1, 255),
            128: (16, 32, 8, 1, 255),
            256: (16, 16, 8, 1, None),
        },
        ("float", "masked"): {
            64: (16, 32, 8, 1, 255),
            128: (16, 32, 8, 1, 255),
            256: (16, 16, 8, 1, None),
        },
    },
    # Gradients of the bias.
    "bias": {
        ("half", "masked"): {
            64: (16, 32, 8, 3, None),
            128: (16, 16, 8, 2, None),
            256: (16, 32, 8, 1, None),
        },
        ("float", "masked"): {
            64: (32, 32, 8, 1, None),
            128: (16, 16, 8, 1, 255),
            256: (16, 16, 8, 1, 255),
        },
    },
}


def tile_of(kernel: str, dtype: torch.dtype, masked: bool, width: int) -> dict[str, Any]:
    """ROWS, KEYS and the compiler's options; width: the larger of HEAD and VALUE."""
    precision = "float" if dtype == torch.float32 else "half"
    tile = TILES[kernel][precision, "masked" if masked else "plain"][max(64, width)]
    return dict(zip(OPTIONS, tile, strict=True))
