"""What stands between a module and its tensors: torch.func, dispatch modes, tracers, subclasses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import KINDS, OURS, THEIRS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from encdec_fast import explain

ALL = pytest.mark.parametrize("kind", KINDS)
I, H = 5, 7


def extra(kind: str) -> dict[str, Any]:
    return {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}


def op_name(kind: str) -> str:
    return "encdec_fast::" + (kind[:3] if kind.startswith("rnn") else kind)


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """(torch's module, ours), with the same weights."""
    theirs = THEIRS[kind](I, H, **extra(kind), **options)
    ours = OURS[kind](I, H, **extra(kind), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@ALL
def test_transforms_of_torch_func(kind: str) -> None:
    """vmap, grad, per-sample gradients, jvp, hessian. Torch's own modules lack most of them."""
    _, module = pair(kind, bidirectional=True)
    x = torch.randn(3, 4, 2, I)
    rows = torch.stack([module(row)[0] for row in x])
    torch.testing.assert_close(torch.vmap(lambda row: module(row)[0])(x), rows)

    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        total: Tensor = torch.func.functional_call(module, parameters, (row,))[0].square().sum()
        return total

    alone = [torch.func.grad(loss)(parameters, row) for row in x]
    together = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, value in together.items():
        torch.testing.assert_close(
            value, torch.stack([g[name] for g in alone]), rtol=1e-4, atol=1e-5
        )
    leaf = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf)

    def of_input(row: Tensor) -> Tensor:
        return loss(parameters, row)

    _, slope = torch.func.jvp(of_input, (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-4, atol=1e-5)
    small = torch.randn(2, 1, I)
    curvature = torch.func.hessian(of_input)(small)
    assert curvature.shape == (2, 1, I, 2, 1, I)


@ALL
def test_forward_mode_gradients(kind: str) -> None:
    _, module = pair(kind)
    x = torch.randn(4, 2, I)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent
    step = 1e-2
    with torch.no_grad():
        difference = (module(x + step)[0] - module(x - step)[0]) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-3)


@ALL
def test_jit_trace(kind: str) -> None:
    """A trace holds the generic op with the weights as its inputs, so they may still change."""
    _, module = pair(kind)
    x = torch.randn(4, 2, I)
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,), check_trace=False)
        assert op_name(kind) in str(traced.graph)
        for parameter in module.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(traced(x)[0], module(x)[0])


@ALL
def test_jit_trace_with_gradients(kind: str) -> None:
    _, module = pair(kind, bidirectional=True)
    x = torch.randn(4, 2, I)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    assert op_name(kind) + "_train" in str(traced.graph)
    parameters = list(module.parameters())
    found, expected = traced(x)[0], module(x)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
    )


@ALL
def test_dispatch_modes_see_one_op(kind: str) -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    _, module = pair(kind)
    name = op_name(kind)
    with torch.no_grad(), Watch():
        module(torch.randn(4, 2, I))
    assert name in seen
    seen.clear()
    with Watch():
        module(torch.randn(4, 2, I))[0].sum().backward()
    assert name + "_train" in seen
    assert name + "_backward" in seen


@ALL
def test_fake_tensors(kind: str) -> None:
    with FakeTensorMode():
        module = OURS[kind](I, H, **extra(kind), num_layers=2, batch_first=True)
        output, _ = module(torch.randn(3, 4, I))
        output.sum().backward()
    assert output.shape == (3, 4, H)
    assert module.weight_hh_l1.grad.shape == module.weight_hh_l1.shape


@ALL
def test_meta_device(kind: str) -> None:
    theirs, ours = (module.to("meta") for module in pair(kind))
    x = torch.randn(4, 2, I, device="meta")
    assert ours(x)[0].shape == theirs(x)[0].shape
    with torch.autocast("cpu", torch.bfloat16):  # says nothing of the meta device
        assert ours(x)[0].shape == theirs(x)[0].shape


@ALL
def test_subclass_of_tensor(kind: str) -> None:
    class Mine(Tensor):
        pass

    theirs, ours = pair(kind)
    x = torch.randn(4, 2, I).as_subclass(Mine)
    assert explain(ours, x).backend == "torch"
    expected, output = theirs(x)[0], ours(x)[0]
    assert type(output) is type(expected)
    torch.testing.assert_close(output, expected)


@ALL
def test_gradients_of_many_directions_at_once(kind: str) -> None:
    """is_grads_batched, jacobian and hessian of torch.autograd, vectorized or not."""
    _, module = pair(kind, bidirectional=True)
    x = torch.randn(3, 2, I, requires_grad=True)
    output = module(x)[0]
    seeds = torch.randn(4, *output.shape)
    leaves = [x, *module.parameters()]
    together = torch.autograd.grad(output, leaves, seeds, is_grads_batched=True, retain_graph=True)
    for i, seed in enumerate(seeds):
        alone = torch.autograd.grad(output, leaves, seed, retain_graph=True)
        for batched, one in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[i], one, rtol=1e-4, atol=1e-5)

    def loss(x: Tensor) -> Tensor:
        total: Tensor = module(x)[0].square().sum()
        return total

    small = torch.randn(2, 1, I)
    one_by_one = torch.autograd.functional.hessian(loss, small)
    at_once = torch.autograd.functional.hessian(loss, small, vectorize=True)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-5)


@ALL
def test_hooks_on_what_is_saved(kind: str) -> None:
    """Saved tensors pass through the hooks that offload or compress them."""
    _, module = pair(kind)
    x = torch.randn(3, 2, I, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
    with torch.autograd.graph.save_on_cpu():
        output = module(x)[0]
    (result,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(result, expected)
