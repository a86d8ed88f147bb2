"""The registry of cases: which op, at which shapes, in which dtype, and what a call costs.

The cost functions count what no implementation can avoid. `flops` counts the matrix products
only (two operations per multiply-add; gates and activations are left out). `streamed_bytes`
counts the weights as a recurrence reads them when they do not stay in registers: the input
weights once, the recurrent weights once per time step. Shapes use the field's names: `batch` B,
`time` T, `input` I, `hidden` H.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Cell = Literal["lstm", "gru", "rnn"]
DType = Literal["float32", "bfloat16", "int8", "float64"]
Suite = Literal["grid", "overhead", "lengths", "training", "fallback"]

CELLS: tuple[Cell, ...] = ("lstm", "gru", "rnn")
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "int8")
SUITES: tuple[Suite, ...] = ("grid", "overhead", "lengths", "training", "fallback")

BATCHES = (1, 4, 8, 32, 64)
TIMES = (1, 20, 50, 200)
HIDDEN = (128, 256, 512, 1024)
TRAINING_SHAPES = ((8, 50, 512), (32, 50, 512), (64, 100, 256))

GATES: dict[Cell, int] = {"lstm": 4, "gru": 3, "rnn": 1}
WEIGHT_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "float64": 8}
ACTIVATION_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "int8": 4, "float64": 8}


@dataclass(frozen=True)
class RnnCase:
    """One layer, one direction, with biases, time-major input `(T, B, I)`."""

    suite: Suite
    cell: Cell
    dtype: DType
    batch: int
    time: int
    hidden: int
    input: int
    lengths: tuple[int, ...] | None = None

    @property
    def id(self) -> str:
        """A name that is unique in the registry and safe in a pytest id."""
        shape = f"B{self.batch}-T{self.time}-H{self.hidden}"
        return f"{self.suite}-{self.cell}-{self.dtype}-{shape}"

    @property
    def training(self) -> bool:
        """Whether a call is a forward and a backward pass."""
        return self.suite == "training"

    @property
    def tokens(self) -> int:
        """Real time steps in one call."""
        return sum(self.lengths) if self.lengths else self.batch * self.time

    @property
    def weights(self) -> int:
        """Elements of both weight matrices."""
        return GATES[self.cell] * self.hidden * (self.input + self.hidden)


def flops(case: RnnCase) -> int:
    """Operations of the matrix products of one call; the backward pass costs two more forwards."""
    forward = 2 * case.tokens * case.weights
    return 3 * forward if case.training else forward


def compulsory_bytes(case: RnnCase) -> int:
    """Bytes that an inference must read or write at least once: input, output and weights."""
    activations = case.tokens * (case.input + case.hidden) * ACTIVATION_BYTES[case.dtype]
    return activations + case.weights * WEIGHT_BYTES[case.dtype]


def recurrent_bytes(case: RnnCase) -> int:
    """Bytes of the recurrent weights, which every time step reads."""
    return GATES[case.cell] * case.hidden * case.hidden * WEIGHT_BYTES[case.dtype]


def streamed_bytes(case: RnnCase) -> int:
    """Bytes of weights that pass through the cores in one inference."""
    input_bytes = GATES[case.cell] * case.hidden * case.input * WEIGHT_BYTES[case.dtype]
    steps = max(case.lengths) if case.lengths else case.time
    return input_bytes + steps * recurrent_bytes(case)


def _case(
    suite: Suite,
    cell: Cell,
    dtype: DType,
    shape: tuple[int, int, int],
    lengths: tuple[int, ...] | None = None,
) -> RnnCase:
    batch, time, hidden = shape
    return RnnCase(suite, cell, dtype, batch, time, hidden, hidden, lengths)


def uniform_lengths(batch: int, time: int) -> tuple[int, ...]:
    """`batch` lengths uniform in 1..time, the same in every run; one sentence has full length."""
    draw = random.Random(1000 * batch + time)
    lengths = [draw.randint(1, time) for _ in range(batch)]
    lengths[draw.randrange(batch)] = time
    return tuple(lengths)


def _registry() -> tuple[RnnCase, ...]:
    cases = [
        _case("grid", cell, dtype, (batch, time, hidden))
        for cell, dtype, hidden, batch, time in product(CELLS, DTYPES, HIDDEN, BATCHES, TIMES)
    ]
    cases += [_case("overhead", cell, "float32", (1, 1, 16)) for cell in CELLS]
    cases += [
        _case("lengths", cell, "float32", (32, time, 512), uniform_lengths(32, time))
        for cell, time in product(CELLS[:2], (50, 200))
    ]
    cases += [
        _case("training", cell, dtype, shape)
        for cell, dtype, shape in product(CELLS[:2], DTYPES[:2], TRAINING_SHAPES)
    ]
    cases += [
        _case("fallback", cell, "float64", shape)
        for cell, shape in product(CELLS, ((1, 1, 16), (1, 50, 128), (8, 20, 256)))
    ]
    return tuple(cases)


RNN_CASES = _registry()


def select(
    suites: Iterable[str] = ("grid",),
    cells: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    times: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    cases: Iterable[RnnCase] = RNN_CASES,
) -> list[RnnCase]:
    """The cases that match every filter; None matches everything."""
    wanted_suites = tuple(suites)

    def keep(case: RnnCase) -> bool:
        return (
            case.suite in wanted_suites
            and (not cells or case.cell in cells)
            and (not dtypes or case.dtype in dtypes)
            and (not batches or case.batch in batches)
            and (not times or case.time in times)
            and (not hidden or case.hidden in hidden)
        )

    return [case for case in cases if keep(case)]


def custom_grid(
    cells: Sequence[Cell],
    dtypes: Sequence[DType],
    batches: Sequence[int],
    times: Sequence[int],
    hidden: Sequence[int],
) -> list[RnnCase]:
    """Grid cases at shapes of the caller's choice, in or out of the registry."""
    return [
        _case("grid", cell, dtype, (batch, time, size))
        for cell, dtype, size, batch, time in product(cells, dtypes, hidden, batches, times)
    ]
