"""Tensors of every memory layout, and packed data that does not add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import KINDS, OURS, Case, make_modules
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from encdec_fast import use_backend

ALL = pytest.mark.parametrize("kind", KINDS)
T, B, I, H = 4, 3, 5, 7


def hx(kind: str, *shape: int) -> Any:
    h = torch.randn(*shape)
    return (h, h) if kind == "lstm" else h


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors with the values of x, (T, B, I), in other layouts."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "features first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every other feature": torch.stack([x, x], dim=-1).flatten(2)[..., ::2],
        "a window": torch.cat([x, x, x], dim=2)[:, :, x.shape[2] : 2 * x.shape[2]],
        "every other step": torch.stack([x, x], dim=1).flatten(0, 1)[::2],
    }


@ALL
@pytest.mark.parametrize("grad", [False, True])
def test_input_and_states(kind: str, grad: bool, backend: str) -> None:
    module = OURS[kind](I, H, bidirectional=True)
    x, states = torch.randn(T, B, I), hx(kind, 2, B, H)
    wide = hx(kind, H, B, 2)
    turned = tuple(h.permute(2, 1, 0) for h in wide) if kind == "lstm" else wide.permute(2, 1, 0)
    same = tuple(h.contiguous() for h in turned) if kind == "lstm" else turned.contiguous()
    with torch.set_grad_enabled(grad), use_backend(backend):
        expected = module(x, states)[0]
        for name, other in layouts(x).items():
            assert torch.equal(other, x), name
            torch.testing.assert_close(module(other, states)[0], expected, msg=name)
        torch.testing.assert_close(module(x, turned)[0], module(x, same)[0])
        spread = torch.randn(1, 1, I).expand(T, B, I)
        torch.testing.assert_close(module(spread)[0], module(spread.contiguous())[0])


@ALL
def test_gradients(kind: str, backend: str) -> None:
    """Gradients that come in expanded or transposed, for inputs that are views."""
    _, theirs, ours = make_modules(kind, Case(T=T, B=B, I=I, H=H), torch.float32)
    x = torch.randn(B, T, I).transpose(0, 1)
    for reduce in (lambda y: y.sum(), lambda y: y.transpose(0, 2).contiguous().square().sum()):
        found = []
        for module in (theirs, ours):
            leaf = x.detach().requires_grad_()
            with use_backend(backend):
                total = reduce(module(leaf)[0])
                found.append(torch.autograd.grad(total, [leaf, *module.parameters()]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@ALL
def test_weights(kind: str, backend: str) -> None:
    module = OURS[kind](I, H)
    x = torch.randn(T, B, I)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), use_backend(backend):
            expected = module(x)[0]
            for name in ("weight_ih_l0", "weight_hh_l0"):
                weight = getattr(module, name)
                setattr(module, name, nn.Parameter(weight.detach().t().contiguous().t()))
            torch.testing.assert_close(module(x)[0], expected)


@ALL
def test_one_feature_with_a_stride_of_its_own(kind: str, backend: str) -> None:
    """A dimension of size one may have any stride."""
    module = OURS[kind](1, H)
    x = torch.randn(T, B, 6)[:, :, 2:3]
    odd = x.as_strided(x.shape, (*x.stride()[:2], 77), x.storage_offset())
    for grad in (False, True):
        with torch.set_grad_enabled(grad), use_backend(backend):
            torch.testing.assert_close(module(odd)[0], module(x.clone())[0])


@ALL
@pytest.mark.parametrize("grad", [False, True])
def test_packed_data_that_does_not_add_up(kind: str, grad: bool) -> None:
    module = OURS[kind](I, H)
    data = torch.randn(7, I)
    for sizes in ([3, 2, 1], [3, 3, 2], [2, 3, 2], [4, 3, 0]):
        with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
            module(PackedSequence(data, torch.tensor(sizes)))


@ALL
def test_another_default_device(kind: str, backend: str) -> None:
    """Nothing of a call is made on torch's default device: it follows the input."""
    _, _, module = make_modules(kind, Case(T=T, B=B, I=I, H=H), torch.float32)
    x = torch.randn(T, B, I)
    lengths = [1 + b % T for b in range(B)]
    with use_backend(backend):
        expected = module(x, lengths=lengths)[0]
        with torch.device("meta"):
            found = module(x, lengths=lengths)[0]
            found.sum().backward()
    assert torch.equal(found, expected)
