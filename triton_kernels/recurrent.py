"""LSTM, GRU and RNN over whole sequences; encdec_fast/ops/{lstm,gru,rnn}.py have the mathematics.

The input's products are torch's (one product for all steps and both directions, in float32), and so
are backward's of the input and of the weights. What depends on the step before is here, in the two
kernels of recurrent_kernels.py.

One launch does one step, a program for each tile of units, or all steps, a program for all units of
its sequences, which then needs a barrier between steps and no launch: `whole` chooses. Launches for
single steps are captured as a CUDA graph.

Sequences lie in the order of their lengths, longest first. A row is one step of one sequence:
number `starts[t] + r` (packed), or t * step + r * sequence where all have T steps. `places` says
where a row lies in a padded tensor. Step i is t = i, and in the reverse direction t = T - 1 - i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from encdec_fast.triton_kernels._configuration import Configuration
from encdec_fast.triton_kernels._replay import Replays, Tensors
from encdec_fast.triton_kernels._tuning import Tile, tile
from encdec_fast.triton_kernels.recurrent_kernels import (
    CELLS,
    GATES,
    SEGMENTS,
    backward_kernel,
    forward_kernel,
)
from torch import Tensor


class Walk(NamedTuple):
    """Which steps there are, and where they lie; see this file's docstring.

    rows: that there is room for, of padded sequences T * B. They and `places` are as long for all
    lengths, so that a graph serves them all.
    """

    T: int
    B: int
    rows: int
    step: int
    sequence: int
    lengths: Tensor | None
    starts: Tensor | None
    places: Tensor | None


def _rows_of_program(B: int) -> int:
    """Sequences of a program: more of them read W_hh less often."""
    return 16 if B <= 16 else 32 if B <= 32 else 64


# For each kernel, precision and number of sequences of a program, OPTIONS: the largest that neither
# spill nor exceed the shared memory of any compute capability in report.py, with Triton 3.6 and
# 3.9. None has been timed on a GPU.
OPTIONS = ("UNITS", "INNER", "num_warps", "num_stages", "maxnreg")
_TILES: dict[tuple[str, str, int], tuple[int, int, int, int, int | None]] = {
    ("forward", "half", 16): (16, 64, 8, 3, 255),
    ("forward", "half", 32): (16, 64, 8, 3, 255),
    ("forward", "half", 64): (16, 32, 8, 1, 255),
    ("forward", "float", 16): (32, 32, 8, 1, 255),
    ("forward", "float", 32): (16, 32, 8, 1, 255),
    ("forward", "float", 64): (16, 16, 8, 1, 255),
    ("backward", "half", 16): (32, 64, 8, 3, 255),
    ("backward", "half", 32): (32, 64, 8, 3, 255),
    ("backward", "half", 64): (16, 32, 8, 3, 255),
    ("backward", "float", 16): (32, 32, 4, 1, 255),
    ("backward", "float", 32): (32, 32, 8, 1, 255),
    ("backward", "float", 64): (16, 32, 8, 1, 255),
}


def _name(kernel: str, precision: str, rows: int) -> str:
    return f"recurrent {kernel}, {precision}, {rows} sequences"


TILES: dict[str, Tile] = {
    _name(*key): dict(zip(OPTIONS, values, strict=True)) for key, values in _TILES.items()
}


def _tile(kernel: Any, dtype: torch.dtype, rows: int, device: torch.device | None = None) -> Tile:
    """ROWS and OPTIONS; device: on which it is launched, or None."""
    direction = "forward" if kernel is forward_kernel else "backward"
    name = _name(direction, "float" if dtype == torch.float32 else "half", rows)
    return {"ROWS": rows, **tile(name, TILES[name], device)}


# What a step costs, in microseconds: predictions, from figures for an H100 and nothing measured
# here. A launch in a CUDA graph; reading weights from L2 by one program and by all of them.
_LAUNCH = 2.5
_L2_OF_ONE, _L2_OF_ALL = 110e3, 4e6  # bytes a microsecond
_MULTIPLIES_OF_ONE = {True: 3.5e6, False: 0.25e6}  # a microsecond; True: on tensor cores


def whole(cell: str, B: int, H: int, D: int, dtype: torch.dtype) -> bool:
    """Whether one launch for all steps should beat a launch for each."""
    weights = GATES[CELLS[cell]] * H * H
    tiles = triton.cdiv(B, _rows_of_program(B))
    rows = min(B, _rows_of_program(B))
    multiplies = weights * max(rows, 16) / _MULTIPLIES_OF_ONE[dtype != torch.float32]
    inside = max(weights * dtype.itemsize / _L2_OF_ONE, multiplies)
    launched = _LAUNCH + weights * dtype.itemsize * tiles * D / _L2_OF_ALL
    return inside < launched


# For each kernel the tensors whose contents matter before and after it: those that it fills count
# only after it, but where padding or what is not asked for must stay as it was; `states` only
# before.
_LIES = ("lengths", "starts", "places")
_GIVEN = ("grad_output", "grad_h_n", "grad_cells", "weight", "gates", "output", "cells", "h0", "c0")
_CONTENTS = {
    "forward": (
        ("products", "weight", "bias", "states", "c", "output", "cells", *_LIES),
        ("c", "output", "cells", "gates", "h_n"),
    ),
    "backward": (
        (*_GIVEN, "carry", *_LIES),
        ("grads", "previous", "carry", "grad_h0"),
    ),
}
_REPLAYS = Replays()


def _can_capture(tensor: Tensor) -> bool:
    """Not inside of somebody else's graph: the launches themselves go into that one."""
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    weight: Tensor,
    cell: str,
    walk: Walk,
    steps: range,
    in_one: bool,
) -> None:
    """The kernel for these steps, in their order: in one launch, or one for each."""
    name = "forward" if kernel is forward_kernel else "backward"
    D, H, number = weight.shape[0], weight.shape[2], CELLS[cell]
    own_tile = _tile(kernel, weight.dtype, _rows_of_program(walk.B), weight.device)
    constants = {"CELL": number, "GATES": GATES[number], **own_tile}
    if kernel is backward_kernel:
        constants["SEGMENTS"] = SEGMENTS[number]
    sizes = (walk.T, walk.B, H, walk.rows, walk.step, walk.sequence)
    batch = triton.cdiv(walk.B, own_tile["ROWS"])
    tensors += (walk.lengths, walk.starts, walk.places)
    if in_one:
        kernel[1, batch, D](*tensors, steps[0], len(steps), *sizes, **constants)
        return

    def launch(own: Tensors) -> None:
        for i in steps:
            grid = (triton.cdiv(H, own_tile["UNITS"]), batch, D)
            kernel[grid](*own, i, 1, *sizes, **constants)

    if _can_capture(weight):
        numbers = ([kernel.arg_names.index(n) for n in names] for names in _CONTENTS[name])
        _REPLAYS.run((name, cell, steps, sizes, *own_tile.values()), tensors, *numbers, launch)
    else:
        launch(tensors)


def forward(
    cell: str,
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    c: Tensor | None,
    output: Tensor,
    cells: Tensor | None,
    gates: Tensor | None,
    h_n: Tensor,
    walk: Walk,
    in_one: bool,
) -> None:
    """Fill output, h_n, c and what is there of cells and gates; shapes are the kernel's."""
    tensors = (products, weight, bias, states, c, output, cells, gates, h_n)
    _launch(forward_kernel, tensors, weight, cell, walk, range(walk.T), in_one)


def backward(
    cell: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_cells: Tensor | None,
    weight: Tensor,
    gates: Tensor | None,
    output: Tensor,
    cells: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    grads: Tensor,
    previous: Tensor,
    carry: Tensor | None,
    grad_h0: Tensor | None,
    walk: Walk,
    in_one: bool,
) -> None:
    """Fill grads, previous, grad_h0, and carry with grad_c0; shapes are the kernel's."""
    of_what = (grad_output, grad_h_n, grad_cells, weight, gates, output, cells, h0, c0)
    tensors = (*of_what, grads, previous, carry, grad_h0)
    last = -1 if grad_h0 is None else -2
    steps = range(walk.T - 1, last, -1)
    _launch(backward_kernel, tensors, weight, cell, walk, steps, in_one)


def configurations(dtype: str) -> Iterator[Configuration]:
    """All that `forward` and `backward` launch, with every option; dtype: one of TYPES."""
    types = {
        name: f"*{dtype}"
        for kernel in (forward_kernel, backward_kernel)
        for name in kernel.arg_names
        if name.islower()
    }
    types |= {"products": "*fp32", "c": "*fp32", "carry": "*fp32", "lengths": "*i32"}
    types |= {"starts": "*i64", "places": "*i64"}
    sizes = ("first", "count", "T", "B", "H", "rows", "step", "sequence")
    types |= dict.fromkeys(sizes, "i32")
    precision = torch.float32 if dtype == "fp32" else torch.float16
    ragged = ("lengths", "starts", "places")
    for (name, cell), rows, kernel in product(
        CELLS.items(), (16, 32, 64), (forward_kernel, backward_kernel)
    ):
        own = _tile(kernel, precision, rows)
        warps, stages, registers = (own.pop(option) for option in OPTIONS[2:])
        constants = {"CELL": cell, "GATES": GATES[cell], **own}
        absent = {"c", "cells", "grad_cells", "c0"} if name != "lstm" else set()
        absent |= {"bias"} if name != "gru" else set()
        absent |= {"gates", "carry"} if name.startswith("rnn") else set()
        if kernel is backward_kernel:
            constants["SEGMENTS"] = SEGMENTS[cell]
            plain = {"grad_h_n", "grad_cells", "h0", "c0", "grad_h0", *ragged}
        else:
            plain = {"cells", "gates", *ragged}
        names = set(kernel.arg_names)
        whole = Configuration(
            kernel,
            dtype,
            types,
            constants,
            warps,
            dtype != "fp32",
            stages=stages,
            registers=registers,
            default=rows == 16,
        )
        yield whole.plain(*(absent & names))
        yield replace(whole, absent=tuple((absent | plain) & names), aligned=("H",))
