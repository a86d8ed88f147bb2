"""A plain call of one packed layer goes straight to its kernel; any other asks first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import KINDS, OURS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import encdec_fast
from encdec_fast import use_backend
from encdec_fast.ops import _recurrent

T, B, I, H = 3, 2, 5, 7


class Subclass(Tensor):
    """A tensor type that is not torch's own."""


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Grows by the arguments of each call of this function of a module."""
    calls: list[Any] = []
    real = getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.fixture
def asked(native: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Grows by one with each call that was asked about."""
    calls = counted(monkeypatch, _recurrent, "run")
    with torch.no_grad(), use_backend(None):
        yield calls


def packed(kind: str, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A module that was called, its input, and what the reference makes of it."""
    module = OURS[kind](I, H, **options).eval()
    x = torch.randn(T, B, I)
    with use_backend("reference"):
        expected = module(x)[0]
    module(x)
    return module, x, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}], ids=str)
def test_plain_calls(kind: str, options: dict[str, Any], asked: list[Any]) -> None:
    module, x, expected = packed(kind, **options)
    asked.clear()
    for backend in (None, "cpu"):
        with use_backend(backend):
            torch.testing.assert_close(module(x)[0], expected)
    with torch.inference_mode():
        torch.testing.assert_close(module(x)[0], expected)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)  # other strides of steps and rows
    torch.testing.assert_close(module(turned)[0], expected)
    assert not asked


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
def test_weights_in_fewer_bits(weight_dtype: Any, asked: list[Any]) -> None:
    module = encdec_fast.optimize(nn.Sequential(nn.LSTM(I, H)).eval(), weight_dtype)[0]
    x = torch.randn(T, B, I)
    first = module(x)
    asked.clear()
    again = module(x)
    assert not asked
    assert torch.equal(again[0], first[0]) and torch.equal(again[1][1], first[1][1])


def test_cell_states(asked: list[Any]) -> None:
    module, x, expected = packed("lstm")
    asked.clear()
    output, (_, c_n), cells = module(x, return_cell_states=True)
    assert not asked
    torch.testing.assert_close(output, expected)
    assert torch.equal(cells[-1], c_n[0])


def _under(context: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        with context():
            result: Tensor = module(x)[0]
        return result

    return call


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gradient": _under(torch.enable_grad),
    "autocast": _under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "torch": _under(lambda: use_backend("torch")),
    "reference": _under(lambda: use_backend("reference")),
    "dispatch mode": _under(Watching),
    "vmap": lambda module, x: torch.vmap(module)(torch.stack([x, x]))[0][1],
    "subclass": lambda module, x: module(x.as_subclass(Subclass))[0],
    "features apart": lambda module, x: module(torch.stack([x, x], -1)[..., 0])[0],
    "lengths": lambda module, x: module(x, lengths=[T, T])[0],
    "one sequence": lambda module, x: torch.stack([module(x[:, b])[0] for b in range(B)], 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_calls(kind: str, name: str, asked: list[Any]) -> None:
    module, x, expected = packed(kind)
    asked.clear()
    output = OTHERS[name](module, x)
    assert asked
    loose = {"rtol": 2e-2, "atol": 2e-2} if name == "autocast" else {}
    torch.testing.assert_close(output.float().as_subclass(Tensor), expected, **loose)
    assert output.requires_grad == (name == "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind: str, asked: list[Any]) -> None:
    module, x, _ = packed(kind)
    for wrong in (x.double(), x[..., 1:], x.to(torch.float16), x[:0]):
        with pytest.raises((RuntimeError, ValueError)):
            module(wrong)
    assert module(x[:, :0])[0].shape == (T, 0, H)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.weight_ih_l0.mul_(-1),
        lambda module: module.weight_hh_l0.data.add_(1),  # leaves no trace but the values
        lambda module: setattr(module, "weight_hh_l0", nn.Parameter(-module.weight_hh_l0)),
        lambda module: encdec_fast.repack(module),
    ],
    ids=["in place", "through data", "another parameter", "repack"],
)
def test_weights_that_change(kind: str, change: Any, asked: list[Any]) -> None:
    module, x, _ = packed(kind)
    change(module)
    with use_backend("reference"):
        expected = module(x)[0]
    asked.clear()
    torch.testing.assert_close(module(x)[0], expected)
    assert asked
    asked.clear()
    torch.testing.assert_close(module(x)[0], expected)
    assert not asked


@pytest.mark.parametrize("weight_dtype", ["", "int4", torch.float16], ids=repr)
def test_weight_dtypes_that_there_are_not(weight_dtype: Any, asked: list[Any]) -> None:
    module, x, _ = packed("lstm")
    module.weight_dtype = weight_dtype
    with pytest.raises(ValueError, match="weight_dtype must be"):
        module(x)
