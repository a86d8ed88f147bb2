"""What does not fit, is empty, strided, NaN or infinite: torch's behaviour and named arguments."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import FUNCTIONS, KINDS, OURS, THEIRS
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import encdec_fast
from encdec_fast import ops, use_backend

T, B, I, H = 4, 3, 5, 6
CELLS: dict[str, Any] = {
    "lstm": (nn.LSTMCell, encdec_fast.nn.LSTMCell, ops.lstm_cell),
    "gru": (nn.GRUCell, encdec_fast.nn.GRUCell, ops.gru_cell),
    "rnn_tanh": (nn.RNNCell, encdec_fast.nn.RNNCell, ops.rnn_cell),
    "rnn_relu": (nn.RNNCell, encdec_fast.nn.RNNCell, ops.rnn_cell),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_MODE = pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])


def peers(kind: str, cell: bool = False, **options: Any) -> tuple[Any, Any, Any]:
    """torch's module, ours with the same weights, and our function of (input, hx, weights)."""
    own = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    types = CELLS[kind][:2] if cell else (THEIRS[kind], OURS[kind])
    theirs, ours = (new(I, H, **own, **options) for new in types)
    ours.load_state_dict(theirs.state_dict())

    def run(x: Any, hx: Any = None, weights: Any = None, **more: Any) -> Any:
        weights = list(ours.parameters()) if weights is None else weights
        if cell:
            return CELLS[kind][2](x, hx, *weights, **own, **more)
        return FUNCTIONS[kind](x, hx, weights, **own, **options, **more)

    return theirs, ours, run


def tensors(results: Any) -> list[Tensor]:
    """All tensors of results, one behind the other."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in tensors(part)]


def assert_same(found: Any, expected: Any) -> None:
    for result, true in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(result, true)


def outcome(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The exception of a call, or what its results look like."""
    try:
        return [(tuple(r.shape), r.dtype, r.device) for r in tensors(call(*args, **options))]
    except Exception as error:
        return error


@contextlib.contextmanager
def unharmed(module: Any, cell: bool = False) -> Iterator[None]:
    """Whatever happens inside, the module then gives what it gave, from the same weights."""
    x = torch.randn(B, I) if cell else torch.randn(T, B, I)
    before = module(x)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    yield
    assert_same(module(x), before)
    assert_same(module.state_dict().values(), state.values())


def assert_raised(found: Any, wanted: tuple[type, ...], word: str) -> None:
    assert isinstance(found, Exception), f"accepted: {found}"
    assert type(found) in wanted, repr(found)
    assert re.search(word, str(found)), repr(found)


def assert_refused(kind: str, x: Any, hx: Any, word: str, cell: bool) -> None:
    """By the module as by torch's; by the function likewise, with a message that has `word`."""
    theirs, ours, run = peers(kind, cell)
    with unharmed(ours, cell):
        by_torch = outcome(theirs, x, hx)
        assert isinstance(by_torch, Exception)
        assert repr(outcome(ours, x, hx)) == repr(by_torch)
        # Where torch only stumbles (AttributeError, IndexError) a function says what it wants.
        chosen = type(by_torch) in (ValueError, RuntimeError, TypeError)
        wanted = (type(by_torch),) if chosen else (TypeError, RuntimeError)
        assert_raised(outcome(run, x, hx), wanted, word)


@dataclass(frozen=True)
class Bad:
    """An input and a state, and the word that names what is wrong with them.

    wrong: which of an LSTM's states is like `state`, the other one fits.
    """

    word: str
    input: tuple[int, ...] = (T, B, I)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    state: tuple[int, ...] | None = None
    state_dtype: torch.dtype = torch.float32
    state_device: str = "cpu"
    wrong: str = "h and c"

    def make(self, kind: str) -> tuple[Tensor, Any]:
        x = torch.ones(self.input, dtype=self.dtype, device=self.device)
        if self.state is None:
            return x, None
        bad = torch.zeros(self.state, dtype=self.state_dtype, device=self.state_device)
        good = torch.zeros(1, B, H)
        pair = (bad if "h" in self.wrong else good, bad if "c" in self.wrong else good)
        return x, pair if kind == "lstm" else bad


NETWORK = {
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
    "state of a batch for one sequence": Bad("hidden", (T, I), state=(1, 1, H)),
    "features of the state of one sequence": Bad("hidden", (T, I), state=(1, H - 1)),
    "state float64": Bad("hidden", state=(1, B, H), state_dtype=torch.float64),
    "device of the state": Bad("hidden", state=(1, B, H), state_device="meta"),
}
ONE_STATE = {
    "features of h": Bad("hidden", state=(1, B, H + 1), wrong="h"),
    "features of c": Bad("hidden", state=(1, B, H + 1), wrong="c"),
    "rank of c": Bad("hidden", state=(B, H), wrong="c"),
    "c float64": Bad("hidden", state=(1, B, H), state_dtype=torch.float64, wrong="c"),
    "device of c": Bad("hidden", state=(1, B, H), state_device="meta", wrong="c"),
}
CELL = {
    "rank 3": Bad("input", (1, B, I)),
    "features": Bad("input", (B, I + 1)),
    "float64": Bad("dtype", (B, I), torch.float64),
    "integers": Bad("dtype", (B, I), torch.int64),
    "device": Bad("device", (B, I), device="meta"),
    "batch of the state": Bad("hidden", (B, I), state=(B + 1, H)),
    "features of the state": Bad("hidden", (B, I), state=(B, H + 1)),
    "rank of the state": Bad("hidden", (B, I), state=(H,)),
    "rank 3 of the state": Bad("hidden|hx", (B, I), state=(1, B, H)),
    "features of the state of one sequence": Bad("hidden", (I,), state=(H - 1,)),
    "state float64": Bad("dtype", (B, I), state=(B, H), state_dtype=torch.float64),
    "device of the state": Bad("device", (B, I), state=(B, H), state_device="meta"),
}
REFUSED = [
    pytest.param(kind, cell, bad, id=f"{kind}{' cell' * cell}-{name}")
    for cell, cases in ((False, NETWORK), (True, CELL), (False, ONE_STATE))
    for kind in (KINDS if cases is not ONE_STATE else ("lstm",))
    for name, bad in cases.items()
]


@EACH_MODE
@pytest.mark.parametrize(("kind", "cell", "bad"), REFUSED)
def test_refused(kind: str, cell: bool, bad: Bad, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert_refused(kind, *bad.make(kind), bad.word, cell)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "one tensor": lambda state: state,
    "three": lambda state: (state, state, state),
    "h alone": lambda state: (state, None),
    "c alone": lambda state: (None, state),
    "pair": lambda state: (state, state),
}


@EACH_MODE
@pytest.mark.parametrize("cell", [False, True], ids=["network", "cell"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_states(form: str, cell: bool, grad: bool) -> None:
    """Not a pair for an LSTM, a pair for the others; a half of a pair is not dropped."""
    x, state = (
        (torch.ones(B, I), torch.ones(B, H)) if cell else (torch.ones(T, B, I), torch.ones(1, B, H))
    )
    with torch.set_grad_enabled(grad):
        for kind in ("gru", "rnn_tanh") if form == "pair" else ("lstm",):
            assert_refused(kind, x, FORMS[form](state), "hx|h0|hidden|states", cell)


WEIGHTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "rows": (lambda w: torch.cat([w, w]), "w_|b_|weight"),
    "float64": (lambda w: w.double(), "w_|b_|weight"),
    "device": (lambda w: w.to("meta"), "w_|b_|weight|parameter"),
}


@EACH_MODE
@pytest.mark.parametrize("name", WEIGHTS)
@EACH_KIND
def test_weights_of_functions(kind: str, name: str, grad: bool) -> None:
    """Each weight in turn, in both directions: what does not fit the first is not read."""
    _, ours, run = peers(kind, bidirectional=True)
    change, word = WEIGHTS[name]
    with torch.set_grad_enabled(grad), unharmed(ours):
        for index in range(8):
            weights = list(ours.parameters())
            weights[index] = change(weights[index].detach())
            found = outcome(run, torch.randn(T, B, I), None, weights)
            assert_raised(found, (RuntimeError, ValueError), word)
        found = outcome(run, torch.randn(T, B, I), None, list(ours.parameters())[:-1])
        assert_raised(found, (RuntimeError,), "8 weights")


def long(*values: Any, **options: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, **options)


LENGTHS: dict[str, Any] = {
    "zero": long(1, 0, 4),
    "negative": long(1, -2, 4),
    "beyond T": long(T + 1, 1, 1),
    "too few": long(1, 2),
    "too many": long(1, 2, 3, 4),
    "none": long(),
    "float": torch.tensor([1.0, 2.0, 3.0]),
    "two dimensions": long([1, 2, 3]),
    "no dimension": torch.tensor(3),
    "device": long(1, 2, 3, device="meta"),
    "beyond T in a list": [T + 1, 1, 1],
    "list of floats": [1.0, 2.0, 3.0],
    "text": "abc",
    "number": 3,
}


@EACH_MODE
@pytest.mark.parametrize("name", LENGTHS)
@EACH_KIND
def test_lengths(kind: str, name: str, grad: bool, backend: str) -> None:
    """RuntimeError, as of pack_padded_sequence; TypeError for what are no integers at all."""
    _, ours, run = peers(kind)
    wanted = TypeError if name in ("list of floats", "text") else RuntimeError
    with torch.set_grad_enabled(grad), use_backend(backend), unharmed(ours):
        for call in (ours, run):
            found = outcome(call, torch.randn(T, B, I), lengths=LENGTHS[name])
            assert_raised(found, (wanted,), "(?i)lengths?")


@EACH_KIND
def test_lengths_without_padding(kind: str) -> None:
    _, ours, run = peers(kind)
    packed = pack_padded_sequence(torch.randn(T, B, I), long(4, 2, 1))
    with unharmed(ours):
        for call, x in ((ours, packed), (ours, torch.randn(T, I)), (run, torch.randn(T, I))):
            assert_raised(outcome(call, x, lengths=[4, 2, 1]), (ValueError,), "lengths")


@EACH_MODE
@pytest.mark.parametrize(
    ("sizes", "says"),
    [((2, 3), "rise"), ((3, 0, 2), "positive"), ((3, 3), "add up to 6"), ((2, 1), "add up to 3")],
    ids=str,
)
@EACH_KIND
def test_batch_sizes(kind: str, sizes: Any, says: str, grad: bool, kernels: str) -> None:
    """What a PackedSequence made by hand may say of its 5 rows."""
    _, ours, _ = peers(kind, bidirectional=True)
    with torch.set_grad_enabled(grad), unharmed(ours):
        found = outcome(ours, PackedSequence(torch.randn(5, I), torch.tensor(sizes)))
        assert_raised(found, (RuntimeError,), says)


@EACH_KIND
def test_good_lengths(kind: str, backend: str) -> None:
    """In any order and any form; sorted by the caller or not, each row gets the same result."""
    _, ours, _ = peers(kind, bidirectional=True)
    x, order = torch.randn(T, B, I), torch.tensor([1, 0, 2])
    plain, strided = long(2, 4, 1), long(2, 9, 4, 9, 1, 9)[::2]
    with use_backend(backend), torch.no_grad():
        expected = tensors(ours(x, lengths=plain))
        for form in ([2, 4, 1], (2, 4, 1), plain.int(), plain.to(torch.uint8), strided):
            assert_same(ours(x, lengths=form), expected)
        in_order = tensors(ours(x[:, order], lengths=long(4, 2, 1)))
    for result, true in zip(expected, in_order, strict=True):
        torch.testing.assert_close(result[:, order], true, rtol=1e-5, atol=1e-6)


EMPTY: dict[str, Bad] = {
    "batch": Bad("", (T, 0, I)),
    "batch, with states": Bad("", (T, 0, I), state=(4, 0, H)),
    "time": Bad("sequence length", (0, B, I)),
    "both": Bad("sequence length", (0, 0, I)),
    "one sequence": Bad("sequence length", (0, I)),
    "cell": Bad("", (0, I)),
}


@EACH_MODE
@pytest.mark.parametrize("name", EMPTY)
@EACH_KIND
def test_empty(kind: str, name: str, grad: bool) -> None:
    """No sequence gives empty results, no step an error, as in torch."""
    cell = name == "cell"
    theirs, ours, run = peers(
        kind, cell, **({} if cell else {"num_layers": 2, "bidirectional": True})
    )
    x, hx = EMPTY[name].make(kind)
    with torch.set_grad_enabled(grad), unharmed(ours, cell):
        by_torch = outcome(theirs, x, hx)
        assert repr(outcome(ours, x, hx)) == repr(by_torch)
        if EMPTY[name].word:
            assert isinstance(by_torch, Exception)
            assert_raised(outcome(run, x, hx), (type(by_torch),), EMPTY[name].word)
            return
        assert outcome(run, x, hx) == by_torch
        assert cell or outcome(ours, x, hx, lengths=[]) == by_torch
        if grad:
            total = tensors(ours(x, hx))[0].sum()
            assert not any(g.any() for g in torch.autograd.grad(total, list(ours.parameters())))


FORMATS: dict[str, tuple[torch.dtype, Any, float]] = {  # dtype, weight_dtype, tolerance
    "float32": (torch.float32, None, 1e-5),
    "bfloat16": (torch.bfloat16, None, 0.05),
    "float16": (torch.float16, None, 5e-3),
    "bfloat16 weights": (torch.float32, torch.bfloat16, 0.02),
    "int8 weights": (torch.float32, "int8", 0.05),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["input", "h", "c"])
@pytest.mark.parametrize("name", FORMATS)
@EACH_KIND
def test_nan_and_inf(kind: str, name: str, place: str, value: float, backend: str) -> None:
    """They spread as in torch, within their row, from their step on; the rest is bit for bit.

    int8: a row that holds one has no scale, so NaN may stand where torch has a number; and a state
    beyond ±1 gives all rows a scale of their own, which moves the others by a rounding.
    """
    if place == "c" and kind != "lstm":
        pytest.skip("only an LSTM has a cell state")
    dtype, weight_dtype, bound = FORMATS[name]
    if weight_dtype is not None and backend == "triton":
        pytest.skip("it holds no weights in fewer bits")
    theirs, ours, _ = peers(kind)
    theirs.to(dtype), ours.to(dtype)
    ours.weight_dtype = weight_dtype
    x, h, c = (t.to(dtype) for t in (torch.randn(T, B, I), *torch.rand(2, 1, B, H)))
    hx = (h, c) if kind == "lstm" else h
    with torch.no_grad(), use_backend(backend):
        clean = tensors(ours(x, hx))
        {"input": x[2], "h": h[0], "c": c[0]}[place][1, 2] = value
        found, expected = tensors(ours(x, hx)), tensors(theirs(x, hx))
    if place == "input":
        assert torch.equal(found[0][:2], clean[0][:2])
    others = torch.tensor([0, 2])
    for result, true, before in zip(found, expected, clean, strict=True):
        if weight_dtype == "int8":
            assert (result.isnan() | ~true.isnan()).all(), "NaN was lost"
            true = torch.where(result.isnan(), result, true)
            torch.testing.assert_close(result[:, others], before[:, others], rtol=0, atol=0.02)
        if weight_dtype != "int8" or place == "input":
            assert torch.equal(result[:, others], before[:, others])
        torch.testing.assert_close(result, true, rtol=bound, atol=bound, equal_nan=True)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack([t, t + 9], -1)[..., 0],
    "a part": lambda t: torch.cat([t + 9, t, t + 9], -1).narrow(-1, t.shape[-1], t.shape[-1]),
    "expanded": lambda t: t[:1].expand_as(t),
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t,
    "expanded batch": lambda t: t[:, :1].expand_as(t) if t.dim() > 2 else t,
}


@EACH_MODE
@pytest.mark.parametrize("what", ["input", "states", "weights"])
@pytest.mark.parametrize("name", STRIDED)
@EACH_KIND
def test_strides(kind: str, name: str, what: str, grad: bool, native: None) -> None:
    """Views of any strides give what contiguous copies give, gradients too."""
    for weight_dtype in (None,) if grad else (None, torch.bfloat16, "int8"):
        _, ours, run = peers(kind, bidirectional=True)
        x, h, c = torch.randn(T, B, I), *torch.rand(2, 2, B, H)
        given = {"input": [x], "states": [h, c], "weights": list(ours.parameters())}
        results = []
        for copied in (False, True):
            used = {key: [t.detach() for t in given[key]] for key in given}
            used[what] = [STRIDED[name](t) for t in used[what]]
            if copied:
                used[what] = [t.clone(memory_format=torch.contiguous_format) for t in used[what]]
            leaves = [t.requires_grad_(grad) for key in used for t in used[key]]
            hx = tuple(used["states"]) if kind == "lstm" else used["states"][0]
            options = {} if grad else {"weight_dtype": weight_dtype}
            with torch.set_grad_enabled(grad), use_backend("cpu"):
                found = tensors(run(used["input"][0], hx, used["weights"], **options))
            if grad:
                total = sum(result.square().sum() for result in found)
                found += torch.autograd.grad(
                    total, leaves, allow_unused=True, materialize_grads=True
                )
            results.append(found)
        assert_same(*results)
