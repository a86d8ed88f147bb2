"""The cells: nn.LSTMCell, GRUCell, RNNCell and the functions behind them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_as_good, poison, two_threads
from torch import Tensor, nn

import encdec_fast
from encdec_fast import explain, ops, use_backend

THEIRS: dict[str, Any] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": nn.RNNCell,
}
OURS: dict[str, Any] = {
    "lstm": encdec_fast.nn.LSTMCell,
    "gru": encdec_fast.nn.GRUCell,
    "rnn_tanh": encdec_fast.nn.RNNCell,
    "rnn_relu": encdec_fast.nn.RNNCell,
}
FUNCTIONS: dict[str, Any] = {
    "lstm": ops.lstm_cell,
    "gru": ops.gru_cell,
    "rnn_tanh": ops.rnn_cell,
    "rnn_relu": ops.rnn_cell,
}
KINDS = pytest.mark.parametrize("kind", list(THEIRS))
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)


def make(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Any, Any]:
    """(torch's cell, ours) with the same weights."""
    extra = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    theirs = THEIRS[kind](5, 17, bias=bias, **extra).to(dtype)
    ours = OURS[kind](5, 17, bias=bias, **extra).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def states(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    h = torch.randn(*shape, 17).to(dtype)
    return (h, torch.randn(*shape, 17).to(dtype)) if kind == "lstm" else h


def double(hx: Any) -> Any:
    return tuple(h.double() for h in hx) if isinstance(hx, tuple) else hx.double()


@KINDS
@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (9,)], ids=["one", "batch of one", "batch"])
def test_step(kind: str, dtype: torch.dtype, bias: bool, shape: Any, backend: str) -> None:
    if dtype == torch.float64 and backend in ("cpu", "triton"):
        pytest.skip("it has no float64")
    theirs, ours = make(kind, dtype, bias)
    x = torch.randn(*shape, 5).to(dtype)
    hx = states(kind, *shape, dtype=dtype)
    truth = copy.deepcopy(theirs).double()
    with torch.no_grad():
        expected = flat(truth(x.double(), double(hx)))
        torchs = flat(theirs(x, hx))
        with use_backend(backend), two_threads():
            poison()
            assert explain(ours, x, hx).backend == backend
            results = flat(ours(x, hx))
    assert_as_good(results, torchs, expected, 2.0)


@KINDS
def test_zero_states(kind: str, backend: str) -> None:
    theirs, ours = make(kind)
    x = torch.randn(3, 5)
    with torch.no_grad(), use_backend(backend):
        torch.testing.assert_close(flat(ours(x)), flat(theirs(x)))


@KINDS
def test_function(kind: str) -> None:
    theirs, ours = make(kind)
    x, hx = torch.randn(3, 5), states(kind, 3)
    extra = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    with torch.no_grad():
        results = flat(FUNCTIONS[kind](x, hx, *ours.parameters(), **extra))
        torch.testing.assert_close(results, flat(theirs(x, hx)))
        single = tuple(h[0] for h in hx) if isinstance(hx, tuple) else hx[0]
        alone = flat(FUNCTIONS[kind](x[0], single, *ours.parameters(), **extra))
    for result, row in zip(results, alone, strict=True):
        torch.testing.assert_close(result[0], row)


@KINDS
def test_gradients_are_torchs(kind: str) -> None:
    theirs, ours = make(kind)
    x, hx = torch.randn(3, 5, requires_grad=True), states(kind, 3)
    assert explain(ours, x, hx).backend == "torch"
    expected = torch.autograd.grad(flat(theirs(x, hx))[0].sum(), [x, *theirs.parameters()])
    results = torch.autograd.grad(flat(ours(x, hx))[0].sum(), [x, *ours.parameters()])
    for result, true in zip(results, expected, strict=True):
        assert torch.equal(result, true)


@KINDS
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
def test_weight_dtype(kind: str, weight_dtype: Any, other_backend: str) -> None:
    theirs, ours = make(kind)
    ours.weight_dtype = weight_dtype
    x, hx = torch.randn(3, 5), states(kind, 3)
    with torch.no_grad(), use_backend(other_backend):
        results = flat(ours(x, hx))
        expected = flat(theirs(x, hx))
    # A unit of an int8 weight is 1/127 of the largest of its row, and there are 22 products.
    bound = 0.06 if weight_dtype == "int8" else 0.02
    for result, true in zip(results, expected, strict=True):
        assert (result - true).abs().max() < bound
    with pytest.raises(RuntimeError, match="weight_dtype"):
        ours(x, hx)


@KINDS
def test_autocast_is_torchs(kind: str) -> None:
    theirs, ours = make(kind)
    x, hx = torch.randn(3, 5), states(kind, 3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            results, expected = flat(ours(x, hx)), flat(theirs(x, hx))
        for result, true in zip(results, expected, strict=True):
            assert result.dtype == true.dtype
            assert torch.equal(result, true)


@KINDS
@pytest.mark.parametrize("grad", [False, True])
def test_compile(kind: str, grad: bool) -> None:
    _, ours = make(kind)
    x, hx = torch.randn(3, 5), states(kind, 3)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(flat(compiled(x, hx)), flat(ours(x, hx)))


@KINDS
def test_vmap(kind: str) -> None:
    _, ours = make(kind)
    x, hx = torch.randn(4, 3, 5), states(kind, 4, 3)
    with torch.no_grad():
        batched = flat(torch.vmap(ours)(x, hx))
        for i in range(4):
            one = tuple(h[i] for h in hx) if isinstance(hx, tuple) else hx[i]
            for result, true in zip(batched, flat(ours(x[i], one)), strict=True):
                torch.testing.assert_close(result[i], true)


@KINDS
def test_errors_are_torchs(kind: str) -> None:
    theirs, ours = make(kind)
    x, hx = torch.randn(3, 5), states(kind, 3)
    wrong: list[tuple[Any, Any]] = [
        (torch.randn(2, 3, 5), None),
        (torch.randn(3, 6), None),
        (x, states(kind, 2)),
        (x, states(kind, 1, 3)),
        (x, states(kind)),
        (x.double(), hx),
        (x, double(hx)),
        (x.to("meta"), None),
        (x, "no state"),
    ]
    for arguments in wrong:
        with pytest.raises(Exception) as expected:
            theirs(*arguments)
        with pytest.raises(type(expected.value)) as found:
            ours(*arguments)
        assert str(found.value) == str(expected.value)


@KINDS
def test_empty_batch(kind: str) -> None:
    theirs, ours = make(kind)
    x = torch.randn(0, 5)
    with torch.no_grad():
        shapes = [result.shape for result in flat(theirs(x))]
        assert [result.shape for result in flat(ours(x))] == shapes
