"""Input that does not fit, is empty, strided, NaN or infinite: torch's behaviour, named arguments."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import FUNCTIONS, KINDS, OURS, THEIRS, Case, make_modules
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import encdec_fast
from encdec_fast import ops, use_backend

T, B, I, H = 4, 3, 5, 6
CELLS = {
    "lstm": (nn.LSTMCell, encdec_fast.nn.LSTMCell, ops.lstm_cell),
    "gru": (nn.GRUCell, encdec_fast.nn.GRUCell, ops.gru_cell),
    "rnn_tanh": (nn.RNNCell, encdec_fast.nn.RNNCell, ops.rnn_cell),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_CELL = pytest.mark.parametrize("kind", CELLS)
EACH_MODE = pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])


def extra(kind: str) -> dict[str, str]:
    return {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}


def function(kind: str, module: Any, *args: Any, **options: Any) -> Any:
    return FUNCTIONS[kind](*args, list(module.parameters()), **extra(kind), **options)


def tensors(results: Any) -> list[Tensor]:
    """All tensors of results, one behind the other."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results if part is not None for tensor in tensors(part)]


def outcome(call: Callable[[], Any]) -> Any:
    """The exception of a call, or what its results look like."""
    try:
        return [(tuple(r.shape), r.dtype, r.device) for r in tensors(call())]
    except Exception as error:
        return error


def assert_refused(found: Any, by_torch: Any, word: str) -> None:
    """found: the outcome of a function. The type that torch raises, where torch raises on purpose."""
    assert isinstance(by_torch, Exception)
    assert isinstance(found, Exception), f"accepted: {found}"
    chosen = type(by_torch) in (ValueError, RuntimeError, TypeError)
    wanted = (type(by_torch),) if chosen else (TypeError, RuntimeError)
    assert type(found) in wanted, repr(found)
    assert re.search(word, str(found)), repr(found)


def assert_as_torch(found: Any, by_torch: Any) -> None:
    """The outcome of a module: torch's exception, word for word, or results that look like its."""
    if isinstance(by_torch, Exception):
        assert (type(found), str(found)) == (type(by_torch), str(by_torch))
    else:
        assert found == by_torch


@contextlib.contextmanager
def unharmed(module: Any, *good: Any) -> Iterator[None]:
    """Whatever happens inside, the module gives what it gave before, from the same weights."""
    before = tensors(module(*good))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    yield
    for result, true in zip(tensors(module(*good)), before, strict=True):
        assert torch.equal(result, true)
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])


@dataclass(frozen=True)
class Bad:
    """Sizes and kinds of an input and of a state, and the word that names the culprit.

    cell: which of an LSTM's states is `state`: both, h or c; the other one fits.
    """

    word: str
    input: tuple[int, ...] = (T, B, I)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    state: tuple[int, ...] | None = None
    state_dtype: torch.dtype = torch.float32
    state_device: str = "cpu"
    cell: str = "both"

    def make(self, kind: str, fitting: tuple[int, ...]) -> tuple[Tensor, Any]:
        x = torch.ones(self.input, dtype=self.dtype, device=self.device)
        if self.state is None:
            return x, None
        bad = torch.zeros(self.state, dtype=self.state_dtype, device=self.state_device)
        if kind != "lstm":
            return x, bad
        good = torch.zeros(fitting)
        return x, (bad if self.cell != "c" else good, bad if self.cell != "h" else good)


NETWORK = {
    "rank 0": Bad("input", ()),
    "rank 1": Bad("input", (I,)),
    "rank 4": Bad("input", (1, T, B, I)),
    "features": Bad("input", (T, B, I + 1)),
    "no features": Bad("input", (T, B, 0)),
    "features of one sequence": Bad("input", (T, I - 1)),
    "float64": Bad("input", dtype=torch.float64),
    "bfloat16": Bad("input", dtype=torch.bfloat16),
    "integers": Bad("input", dtype=torch.int64),
    "device": Bad("(?i)input", device="meta"),
    "layers of the state": Bad("hidden", state=(2, B, H)),
    "batch of the state": Bad("hidden", state=(1, B + 1, H)),
    "one state for all": Bad("hidden", state=(1, 1, H)),
    "features of the state": Bad("hidden", state=(1, B, H + 1)),
    "rank of the state": Bad("hidden", state=(B, H)),
    "rank 4 of the state": Bad("hidden", state=(1, 1, B, H)),
    "state of a batch for one sequence": Bad("hidden", (T, I), state=(1, 1, H)),
    "features of the state of one sequence": Bad("hidden", (T, I), state=(1, H - 1)),
    "state float64": Bad("hidden", state=(1, B, H), state_dtype=torch.float64),
    "state bfloat16": Bad("hidden", state=(1, B, H), state_dtype=torch.bfloat16),
    "device of the state": Bad("hidden", state=(1, B, H), state_device="meta"),
}
CELL_STATE = {
    "features of h": Bad("hidden", state=(1, B, H + 1), cell="h"),
    "features of c": Bad("hidden", state=(1, B, H + 1), cell="c"),
    "batch of c": Bad("hidden", state=(1, B - 1, H), cell="c"),
    "rank of c": Bad("hidden", state=(B, H), cell="c"),
    "c float64": Bad("hidden", state=(1, B, H), state_dtype=torch.float64, cell="c"),
    "device of c": Bad("hidden", state=(1, B, H), state_device="meta", cell="c"),
}


def refuse(kind: str, bad: Bad, grad: bool) -> None:
    _, theirs, ours = make_modules(kind, Case(T, B, I, H), torch.float32)
    x, hx = bad.make(kind, (1, B, H))
    with torch.set_grad_enabled(grad), unharmed(ours, torch.randn(T, B, I)):
        by_torch = outcome(lambda: theirs(x, hx))
        assert isinstance(by_torch, Exception)
        assert_as_torch(outcome(lambda: ours(x, hx)), by_torch)
        assert_refused(outcome(lambda: function(kind, ours, x, hx)), by_torch, bad.word)


@EACH_MODE
@pytest.mark.parametrize("name", NETWORK)
@EACH_KIND
def test_network(kind: str, name: str, grad: bool) -> None:
    refuse(kind, NETWORK[name], grad)


@EACH_MODE
@pytest.mark.parametrize("name", CELL_STATE)
def test_states_of_lstm(name: str, grad: bool) -> None:
    refuse("lstm", CELL_STATE[name], grad)


CELL = {
    "rank 0": Bad("input", ()),
    "rank 3": Bad("input", (1, B, I)),
    "features": Bad("input", (B, I + 1)),
    "features of one sequence": Bad("input", (I + 1,)),
    "float64": Bad("dtype", (B, I), torch.float64),
    "integers": Bad("dtype", (B, I), torch.int64),
    "device": Bad("device", (B, I), device="meta"),
    "batch of the state": Bad("hidden", (B, I), state=(B + 1, H)),
    "one state for all": Bad("hidden", (B, I), state=(1, H)),
    "features of the state": Bad("hidden", (B, I), state=(B, H + 1)),
    "rank of the state": Bad("hidden", (B, I), state=(H,)),
    "rank 3 of the state": Bad("hidden|hx", (B, I), state=(1, B, H)),
    "features of the state of one sequence": Bad("hidden", (I,), state=(H - 1,)),
    "state float64": Bad("dtype", (B, I), state=(B, H), state_dtype=torch.float64),
    "device of the state": Bad("device", (B, I), state=(B, H), state_device="meta"),
}


@EACH_MODE
@pytest.mark.parametrize("name", CELL)
@EACH_CELL
def test_cell(kind: str, name: str, grad: bool) -> None:
    their_type, our_type, run = CELLS[kind]
    theirs, ours = their_type(I, H), our_type(I, H)
    x, hx = CELL[name].make(kind, (B, H))
    with torch.set_grad_enabled(grad), unharmed(ours, torch.randn(B, I)):
        by_torch = outcome(lambda: theirs(x, hx))
        assert isinstance(by_torch, Exception)
        assert_as_torch(outcome(lambda: ours(x, hx)), by_torch)
        assert_refused(outcome(lambda: run(x, hx, *ours.parameters())), by_torch, CELL[name].word)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "other kind's": lambda state: state,  # a pair for all but the LSTM
    "three": lambda state: (state, state, state),
    "h alone": lambda state: (state, None),
    "c alone": lambda state: (None, state),
}


@EACH_MODE
@pytest.mark.parametrize("form", FORMS)
@EACH_CELL
def test_forms_of_states(kind: str, form: str, grad: bool) -> None:
    """Not a pair for an LSTM, not a tensor for the others; a half of a pair is not dropped."""
    their_type, our_type, run = CELLS[kind]
    for shape, theirs, ours in (
        ((1, B, H), THEIRS[kind](I, H), OURS[kind](I, H)),
        ((B, H), their_type(I, H), our_type(I, H)),
    ):
        state = torch.ones(shape)
        hx = (state, state) if kind != "lstm" and form == "other kind's" else FORMS[form](state)
        x = torch.randn(T, B, I) if len(shape) == 3 else torch.randn(B, I)
        with torch.set_grad_enabled(grad), unharmed(ours, x):
            by_torch = outcome(lambda: theirs(x, hx))  # noqa: B023
            found = outcome(lambda: ours(x, hx))  # noqa: B023
            assert_as_torch(found, by_torch)
            if len(shape) == 3:
                found = outcome(lambda: function(kind, ours, x, hx))  # noqa: B023
            else:
                found = outcome(lambda: run(x, hx, *ours.parameters()))  # noqa: B023
            assert_refused(found, by_torch, "hx|h0|hidden|states")


def long(*values: Any, **options: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, **options)


LENGTHS: dict[str, Any] = {
    "zero": long(1, 0, 4),
    "negative": long(1, -2, 4),
    "beyond T": long(T + 1, 1, 1),
    "far beyond T": long(2**62, 1, 1),
    "too few": long(1, 2),
    "too many": long(1, 2, 3, 4),
    "none": long(),
    "float": torch.tensor([1.0, 2.0, 3.0]),
    "bool": torch.tensor([True, True, True]),
    "two dimensions": long([1, 2, 3]),
    "no dimension": torch.tensor(3),
    "device": long(1, 2, 3, device="meta"),
    "zero in a list": [1, 0, 4],
    "beyond T in a list": [T + 1, 1, 1],
    "short list": [1, 2],
    "list of floats": [1.0, 2.0, 3.0],
    "text": "abc",
    "number": 3,
}


@EACH_MODE
@pytest.mark.parametrize("name", LENGTHS)
@EACH_KIND
def test_lengths(kind: str, name: str, grad: bool, backend: str) -> None:
    """RuntimeError, as of pack_padded_sequence; TypeError for what are no integers at all."""
    module = OURS[kind](I, H, **extra(kind))
    x = torch.randn(T, B, I)
    by_type = name in ("list of floats", "text")
    with torch.set_grad_enabled(grad), use_backend(backend), unharmed(module, x):
        for call in (module, lambda x, **options: function(kind, module, x, None, **options)):
            error = outcome(lambda: call(x, lengths=LENGTHS[name]))  # noqa: B023
            assert type(error) is (TypeError if by_type else RuntimeError), repr(error)
            assert "ength" in str(error)


@EACH_KIND
def test_lengths_without_padding(kind: str) -> None:
    module = OURS[kind](I, H, **extra(kind))
    packed = pack_padded_sequence(torch.randn(T, B, I), long(4, 2, 1))
    with unharmed(module, torch.randn(T, B, I)):
        for x in (packed, torch.randn(T, I)):
            with pytest.raises(ValueError, match="lengths"):
                module(x, lengths=[4, 2, 1])
        with pytest.raises(ValueError, match="lengths"):
            function(kind, module, torch.randn(T, I), None, lengths=[4])


GOOD_LENGTHS: dict[str, Any] = {
    "list": [2, 4, 1],
    "tuple": (2, 4, 1),
    "int32": torch.tensor([2, 4, 1], dtype=torch.int32),
    "uint8": torch.tensor([2, 4, 1], dtype=torch.uint8),
    "strided": long(2, 9, 4, 9, 1, 9)[::2],
}


@pytest.mark.parametrize("name", GOOD_LENGTHS)
@EACH_KIND
def test_good_lengths(kind: str, name: str, backend: str) -> None:
    """In any order and any form; sorted by the caller or not, each row gets the same result."""
    module = OURS[kind](I, H, bidirectional=True, **extra(kind))
    x, order = torch.randn(T, B, I), torch.tensor([1, 0, 2])
    with use_backend(backend), torch.no_grad():
        found = tensors(module(x, lengths=GOOD_LENGTHS[name]))
        for result, true in zip(found, tensors(module(x, lengths=long(2, 4, 1))), strict=True):
            assert torch.equal(result, true)
        in_order = tensors(module(x[:, order], lengths=long(4, 2, 1)))
    for result, true in zip(found, in_order, strict=True):
        torch.testing.assert_close(result[:, order], true, rtol=1e-5, atol=1e-6)


EMPTY: dict[str, Bad] = {
    "batch": Bad("", (T, 0, I)),
    "batch, with states": Bad("", (T, 0, I), state=(4, 0, H)),
    "batch, with too many states": Bad("", (T, 0, I), state=(4, 1, H)),
    "time": Bad("", (0, B, I)),
    "time, with states": Bad("", (0, B, I), state=(4, B, H)),
    "both": Bad("", (0, 0, I)),
    "sequence": Bad("", (0, I)),
}


@EACH_MODE
@pytest.mark.parametrize("name", EMPTY)
@EACH_KIND
def test_empty(kind: str, name: str, grad: bool) -> None:
    """No sequence gives empty results, no step an error, as in torch."""
    case = Case(T, B, I, H, options={"num_layers": 2, "bidirectional": True})
    _, theirs, ours = make_modules(kind, case, torch.float32)
    x, hx = EMPTY[name].make(kind, (4, 0, H))
    with torch.set_grad_enabled(grad), unharmed(ours, torch.randn(T, B, I)):
        by_torch = outcome(lambda: theirs(x, hx))
        assert_as_torch(outcome(lambda: ours(x, hx)), by_torch)
        found = outcome(lambda: function(kind, ours, x, hx, **case.options))
        if isinstance(by_torch, Exception):
            assert_refused(found, by_torch, "sequence length|hidden")
            return
        assert found == by_torch
        assert outcome(lambda: ours(x, hx, lengths=[])) == by_torch
        if grad:
            grads = torch.autograd.grad(ours(x, hx)[0].sum(), list(ours.parameters()))
            assert not any(g.any() for g in grads)


@EACH_MODE
@EACH_CELL
def test_empty_cell(kind: str, grad: bool) -> None:
    their_type, our_type, run = CELLS[kind]
    theirs, ours, x = their_type(I, H), our_type(I, H), torch.randn(0, I)
    with torch.set_grad_enabled(grad), unharmed(ours, torch.randn(B, I)):
        by_torch = outcome(lambda: theirs(x))
        assert outcome(lambda: ours(x)) == by_torch
        assert outcome(lambda: run(x, None, *ours.parameters())) == by_torch
