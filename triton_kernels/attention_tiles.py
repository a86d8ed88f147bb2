"""What a program of attention's kernels holds at a time, where nobody has tuned (_tuning.py).

For each kernel, each precision and each width (the power of 2 that holds a query's or a value's
numbers) what `OPTIONS` names. "masked" stands for calls with a bias, a mask, dropout or gradients
of the weights, which take more registers than lengths and causal masks do. Each is the first, in an
order by size, that neither spills nor exceeds the shared memory of any compute capability in
`report.py`, with Triton 3.6 and 3.9; none has been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from encdec_fast.triton_kernels._tuning import Tile, tile

# maxnreg: registers that a thread may have; None leaves it to ptxas, which saves some for programs
# side by side and may spill, or not.
OPTIONS = ("ROWS", "KEYS", "num_warps", "num_stages", "maxnreg")
_Options = tuple[int, int, int, int, int | None]

TILES: dict[str, dict[tuple[str, str], dict[int, _Options]]] = {
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


def tile_of(
    kernel: str, dtype: torch.dtype, masked: bool, width: int, device: torch.device | None = None
) -> Tile:
    """ROWS, KEYS and the compiler's options; width: the larger of HEAD and VALUE.

    device: on which it is launched, or None.
    """
    precision = "float" if dtype == torch.float32 else "half"
    kind = (precision, "masked" if masked else "plain")
    return tile(
        _name(kernel, kind, max(64, width)), _defaults(kernel, kind, max(64, width)), device
    )


def _name(kernel: str, kind: tuple[str, str], width: int) -> str:
    return f"attention {kernel}, {' '.join(kind)}, {width}"


def _defaults(kernel: str, kind: tuple[str, str], width: int) -> Tile:
    return dict(zip(OPTIONS, TILES[kernel][kind][width], strict=True))


def tiles(kernels: Sequence[str]) -> dict[str, Tile]:
    """The default tiles of these kernels by their names."""
    return {
        _name(kernel, kind, width): _defaults(kernel, kind, width)
        for kernel in kernels
        for kind, by_width in TILES[kernel].items()
        for width in by_width
    }
