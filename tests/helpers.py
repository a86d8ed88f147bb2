"""Cases of recurrent networks, the truth about them, and how far from it a result may be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import encdec_fast
from encdec_fast import ops

THEIRS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
OURS: dict[str, Any] = {
    "lstm": encdec_fast.nn.LSTM,
    "gru": encdec_fast.nn.GRU,
    "rnn_tanh": encdec_fast.nn.RNN,
    "rnn_relu": encdec_fast.nn.RNN,
}
FUNCTIONS: dict[str, Any] = {
    "lstm": ops.lstm,
    "gru": ops.gru,
    "rnn_tanh": ops.rnn,
    "rnn_relu": ops.rnn,
}
KINDS = tuple(THEIRS)


@dataclass(frozen=True)
class Case:
    """Sizes and options of a network. ragged: "", "lengths" or "packed"."""

    T: int = 6
    B: int = 4
    I: int = 5
    H: int = 7
    ragged: str = ""
    states: bool = False
    batched: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def batch_first(self) -> bool:
        return bool(self.options.get("batch_first"))

    def arguments(self, kind: str) -> dict[str, Any]:
        """Keyword arguments of the modules."""
        extra = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
        return {"input_size": self.I, "hidden_size": self.H, **extra, **self.options}


def _case(options: str = "", **fields: Any) -> Case:
    """options: words like "bidirectional" and "num_layers=2"."""
    parsed: dict[str, Any] = {}
    for word in options.split():
        name, _, value = word.partition("=")
        parsed[name] = value == "True" if value in ("True", "False") else int(value or 1)
        if not value:
            parsed[name] = True
    return Case(options=parsed, **fields)


CASES = {
    "plain": _case(),
    "one step": _case(T=1, B=1, I=16, H=16),
    "one feature": _case(T=5, B=3, I=1, H=33),
    "tall": _case(T=40, B=2, I=3, H=20, states=True),
    "large": _case(T=9, B=19, I=70, H=130),
    "whole blocks": _case("bidirectional", T=7, B=13, I=20, H=96),
    "alone, as long as a chunk": _case(T=16, B=1, I=20, H=136),
    "alone, as long as a GRU's chunk": _case(T=12, B=1, I=20, H=136),
    "no bias": _case("bias=False", states=True),
    "batch first": _case("batch_first", states=True),
    "states": _case(states=True),
    "both directions": _case("bidirectional", B=5),
    "layers": _case("num_layers=3", states=True),
    "everything": _case("num_layers=2 bidirectional batch_first", states=True, H=24),
    "one sequence": _case("bidirectional", states=True, batched=False),
    "one sequence, batch first": _case("batch_first num_layers=2", batched=False),
    "lengths": _case(ragged="lengths", T=9, B=7),
    "lengths, everything": _case(
        "num_layers=2 bidirectional batch_first", ragged="lengths", states=True, T=7, B=11
    ),
    "packed": _case(ragged="packed", T=8, B=6),
    "packed, everything": _case("num_layers=2 bidirectional", ragged="packed", states=True, B=9),
}
PROJECTED = {
    "projection": _case("proj_size=3"),
    "projection, everything": _case(
        "proj_size=9 num_layers=2 bidirectional batch_first", H=20, states=True
    ),
    "projection, lengths": _case("proj_size=4 bidirectional", ragged="lengths", states=True),
}

# One sequence, long and wide enough for input products beside its steps (docs/design.md).
ALONE = _case("bidirectional num_layers=2", T=29, B=1, I=20, H=136, states=True)

# As many sequences for each of two threads, small enough a network: sequences over threads.
APART = {
    "equal": _case("num_layers=2 batch_first", T=23, B=16, I=20, H=72, states=True),
    "odd": _case(T=20, B=33, I=40, H=50),
    "lengths": _case("batch_first", ragged="lengths", T=25, B=18, I=20, H=72, states=True),
    "packed": _case("num_layers=2", ragged="packed", T=25, B=16, I=20, H=72, states=True),
}


def lengths_of(case: Case) -> Tensor:
    """B lengths from 1 to T, in no order, with both extremes."""
    lengths = torch.randint(1, case.T + 1, (case.B,))
    lengths[0], lengths[-1] = 1, case.T
    return lengths


@dataclass
class Data:
    """Input, states and lengths of a case. hx is what a module takes."""

    input: Tensor
    hx: Any
    lengths: Tensor | None

    def to(self, dtype: torch.dtype) -> Data:
        """A copy in another dtype, with no history, whose tensors ask for gradients if ours do."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

        hx = self.hx
        if isinstance(hx, tuple):
            hx = tuple(copy(state) for state in hx)
        elif hx is not None:
            hx = copy(hx)
        return Data(copy(self.input), hx, self.lengths)

    def leaves(self) -> list[Tensor]:
        states = self.hx if isinstance(self.hx, tuple) else (self.hx,)
        return [self.input, *(state for state in states if state is not None)]


def make_data(kind: str, case: Case, dtype: torch.dtype, grad: bool = False) -> Data:
    """Random data in `dtype`."""
    shape = (case.B, case.T) if case.batch_first else (case.T, case.B)
    if not case.batched:
        shape = (case.T,)
    hx: Any = None
    if case.states:
        rows = case.options.get("num_layers", 1) * (2 if case.options.get("bidirectional") else 1)
        batch = (case.B,) if case.batched else ()
        out = case.options.get("proj_size", 0) or case.H
        hx = torch.randn(rows, *batch, out).to(dtype).requires_grad_(grad)
        if kind == "lstm":
            hx = hx, torch.randn(rows, *batch, case.H).to(dtype).requires_grad_(grad)
    input = torch.randn(*shape, case.I).to(dtype).requires_grad_(grad)
    return Data(input, hx, lengths_of(case) if case.ragged else None)


def make_modules(kind: str, case: Case, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(the truth in float64, torch's module, ours), the latter two in `dtype`: same weights."""
    theirs = THEIRS[kind](**case.arguments(kind)).to(dtype)
    truth = THEIRS[kind](**case.arguments(kind)).double()
    ours = OURS[kind](**case.arguments(kind)).to(dtype)
    truth.load_state_dict(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return truth, theirs, ours


def _pack(data: Data, case: Case) -> PackedSequence:
    assert data.lengths is not None
    return pack_padded_sequence(data.input, data.lengths, case.batch_first, enforce_sorted=False)


def call(module: Any, case: Case, data: Data) -> list[Tensor]:
    """[output, h_n] and c_n of a module; output padded, where it is packed too.

    Torch's modules take lengths as a PackedSequence, ours as `lengths` or so, as the case says.
    """
    ours = isinstance(module, tuple(OURS.values()))
    if not case.ragged:
        output, states = module(data.input, data.hx)
    elif ours and case.ragged == "lengths":
        output, states = module(data.input, data.hx, lengths=data.lengths)
    else:
        output, states = module(_pack(data, case), data.hx)
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, case.batch_first, total_length=case.T)
    return [output, *(states if isinstance(states, tuple) else (states,))]


def gradients(module: Any, case: Case, data: Data, seeds: list[Tensor]) -> list[Tensor]:
    """Gradients of Σ seed · result, of the data and of the parameters."""
    results = call(module, case, data)
    total = sum((r * s.to(r.dtype)).sum() for r, s in zip(results, seeds, strict=True))
    return list(torch.autograd.grad(total, [*data.leaves(), *module.parameters()]))


def poison() -> None:
    """Leave NaN in the memory that the allocator will hand out next."""
    sizes = [2**n for n in range(2, 16)]
    held = [torch.full((size,), torch.nan) for size in sizes for _ in range(4)]
    del held


# Beside the factor a result may be off by this many units in the last place of its largest value:
# where torch happens to be exact, roundings of the result itself must still be allowed. A gradient
# is a sum over all steps and rows, and its order is free.
FLOOR_UNITS = {2.0: 2.0, 3.0: 4.0}  # by factor: of values and of gradients


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    """The tests run on one thread, for the sake of busy machines; what is tested, on two."""
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def error(result: Tensor, truth: Tensor, mean: bool = False) -> float:
    """The largest absolute error, or the mean; infinite where a NaN is on one side only."""
    a, b = result.detach().double(), truth.detach().double()
    assert a.shape == b.shape, (a.shape, b.shape)
    if a.numel() == 0:
        return 0.0
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    difference = (a - b).nan_to_num(0.0).abs()
    return float(difference.mean() if mean else difference.max())


def assert_as_good(
    results: list[Tensor],
    theirs: list[Tensor],
    truths: list[Tensor],
    factor: float,
    mean: bool = False,
    relative: float = 0.0,
) -> None:
    """The tolerance rule: at most `factor` × torch's own error in that dtype, plus the floor.

    relative: what an op's own stated bound adds to the floor, in parts of the largest value.
    """
    for index, (result, their, truth) in enumerate(zip(results, theirs, truths, strict=True)):
        assert result.dtype == their.dtype
        scale = max(1.0, float(truth.detach().abs().max())) if truth.numel() else 1.0
        floor = (FLOOR_UNITS[factor] * torch.finfo(result.dtype).eps + relative) * scale
        ours, torchs = error(result, truth, mean), error(their, truth, mean)
        # A limit that is infinite would let anything pass.
        assert math.isfinite(torchs) and math.isfinite(scale), f"result {index}: {torchs}, {scale}"
        assert ours <= factor * torchs + floor, f"result {index}: {ours:.3g}, torch {torchs:.3g}"


def assert_same_gradients(found: Any, expected: Any, module: Any, inputs: Sequence[Tensor]) -> None:
    """Two results of a module: the gradients of its parameters and of the inputs that need some."""
    leaves = [t for t in (*module.parameters(), *inputs) if t.requires_grad]
    results = [[r] if isinstance(r, Tensor) else list(r) for r in (found, expected)]
    seeds = [torch.randn_like(r) for r in results[0]]
    ours, theirs = (torch.autograd.grad(r, leaves, seeds, allow_unused=True) for r in results)
    assert any(grad is not None and grad.abs().sum() > 0 for grad in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
