"""A plain product with packed weights goes straight to its kernel; any other call asks first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_short_way import Subclass, Watching, counted
from torch import Tensor, nn

import encdec_fast
from encdec_fast import use_backend
from encdec_fast.ops import linear as linear_op

M, K, N = 3, 20, 33
linear: Any = importlib.import_module("encdec_fast.ops.linear")


@pytest.fixture
def asked(native: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Grows by one with each call that was asked about."""
    calls = counted(monkeypatch, linear, "describe_call")
    with torch.no_grad(), use_backend(None):
        yield calls


def packed(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A module that was called, its input, and what it gave."""
    torch.manual_seed(0)
    module = encdec_fast.nn.Linear(K, N, **options).to(dtype)
    x = torch.randn(M, K, dtype=dtype)
    return module, x, module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, "int8"], ids=str)
def test_plain_calls(dtype: torch.dtype, bias: bool, weight_dtype: Any, asked: list[Any]) -> None:
    module, x, _ = packed(dtype, bias=bias)
    module.weight_dtype = weight_dtype
    first = module(x)
    asked.clear()
    for backend in (None, "cpu"):
        with use_backend(backend), torch.inference_mode():
            assert torch.equal(module(x), first)
    assert torch.equal(module(x.t().contiguous().t()), first)  # other strides
    torch.testing.assert_close(module(x[0]), first[0])  # one row's sums have another order
    assert torch.equal(module(x.unsqueeze(1)), first.unsqueeze(1))
    assert module(x[:0]).shape == (0, N)
    assert not asked
    # The values are new, and the short way is the right one for them, too.
    module.weight.mul_(2)
    changed = module(x)
    assert len(asked) == 1 and not torch.equal(changed, first)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(activation: str, asked: list[Any]) -> None:
    module, x, _ = packed()
    asked.clear()
    found = linear_op(x, module.weight, module.bias, activation=activation)
    assert not asked
    with use_backend("reference"):
        expected = linear_op(x, module.weight, module.bias, activation=activation)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _watched(module: nn.Module, x: Tensor) -> Tensor:
    with Watching():
        result: Tensor = module(x)
    return result


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gradient": lambda module, x: torch.enable_grad()(module)(x),
    "autocast": lambda module, x: torch.autocast("cpu", torch.bfloat16)(module)(x),
    "torch": lambda module, x: use_backend("torch")(module)(x),
    "reference": lambda module, x: use_backend("reference")(module)(x),
    "dispatch mode": _watched,
    "subclass": lambda module, x: module(x.as_subclass(Subclass)),
    "vmap": lambda module, x: torch.vmap(module)(x),
    "residual": lambda module, x: linear_op(
        x, module.weight, module.bias, residual=torch.zeros(M, N)
    ),
    "a weight of another type": lambda module, x: linear_op(
        x, module.weight.detach().as_subclass(Subclass), module.bias
    ),
    "a bias of another type": lambda module, x: linear_op(
        x, module.weight, module.bias.detach().as_subclass(Subclass)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls(name: str, asked: list[Any]) -> None:
    module, x, expected = packed()
    asked.clear()
    output = OTHERS[name](module, x)
    assert asked
    loose = {"rtol": 2e-2, "atol": 2e-2} if name == "autocast" else {}
    torch.testing.assert_close(output.float().as_subclass(Tensor), expected, **loose)
    assert output.requires_grad == (name == "gradient")


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.weight.mul_(-1),
        lambda module: module.weight.data.add_(1),  # leaves no trace but the values
        lambda module: setattr(module, "weight", nn.Parameter(-module.weight)),
        lambda module: encdec_fast.repack(module),
    ],
    ids=["in place", "through data", "another parameter", "repack"],
)
def test_weights_that_change(change: Any, asked: list[Any]) -> None:
    module, x, _ = packed()
    change(module)
    expected = x @ module.weight.t() + module.bias
    asked.clear()
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert len(asked) == 1
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert len(asked) == 1


def test_bad_input(asked: list[Any]) -> None:
    module, x, _ = packed()
    for wrong in (x.double(), x[:, 1:], x.to(torch.float16), torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            module(wrong)
    for bias in (torch.zeros(N + 1), torch.zeros(N, dtype=torch.double)):
        module.bias = nn.Parameter(bias)
        with pytest.raises(RuntimeError):
            module(x)
