"""Gradients of an op by differentiating plain PyTorch: once, and twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_fast.ops._call import LayerResult, State

# Differentiable tensors, some of them None -> results, some of them None.
Function = Callable[..., Sequence[State]]
Layer = Callable[[Tensor, list[Tensor], State, State], LayerResult]


@contextlib.contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Let autograd record inside an op's implementation, which the dispatcher runs below it."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for name in ("Other", "NestedTensor", "Functionality", "CPU", "CUDA"):
        keys = keys.remove(getattr(torch._C.DispatchKey, f"Autograd{name}"))
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, keys), torch.enable_grad():
        yield


def _pairs(results: Sequence[State], seeds: Sequence[State]) -> tuple[list[Tensor], list[Tensor]]:
    """The results that have a seed and depend on anything, and those seeds."""
    both = [
        (result, seed)
        for result, seed in zip(results, seeds, strict=True)
        if result is not None and seed is not None and result.requires_grad
    ]
    return [result for result, _ in both], [seed for _, seed in both]


def _placed(found: Sequence[State], tensors: Sequence[State]) -> list[State]:
    """What was found for the tensors that are there, with None in the others' places."""
    results = iter(found)
    return [None if tensor is None else next(results) for tensor in tensors]


def recompute(function: Function, grads: Sequence[State], tensors: Sequence[State]) -> list[Any]:
    """Gradients of `function(*tensors)` by running it once more under autograd.

    grads: of its results, None where there is none. Returns one gradient for each tensor.
    """
    with autograd_inside_op():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        results, seeds = _pairs(function(*leaves), grads)
        wanted = [leaf for leaf in leaves if leaf is not None]
        found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in wanted]
        if results:
            found = torch.autograd.grad(
                results, wanted, seeds, allow_unused=True, materialize_grads=True
            )
    return _placed(found, tensors)


def recompute_layer(
    layer: Layer, grads: Sequence[State], input: Tensor, weights: list[Tensor], h0: State, c0: State
) -> tuple[Tensor, list[Tensor], State, State]:
    """`recompute` for a layer of a recurrent network: of input, weights, h0 and c0."""
    count = len(weights)
    found = recompute(_flat(layer, count), grads, [input, *weights, h0, c0])
    return found[0], found[1 : 1 + count], found[-2], found[-1]


def _flat(layer: Layer, count: int) -> Function:
    def function(input: Tensor, *rest: Any) -> LayerResult:
        return layer(input, list(rest[:count]), rest[count], rest[count + 1])

    return function


def _alias(tensor: State) -> State:
    """The same values at a place of its own in the graph, still connected to `tensor`."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def double_backward(
    function: Function,
    grads: Sequence[State],
    tensors: Sequence[State],
    outer: Sequence[State],
) -> tuple[list[State], list[State]]:
    """Gradients of the gradients of `function(*tensors)`.

    grads: of its results, each None where there was none. outer: the gradients of the gradients of
    the tensors. Returns the gradients of grads and of tensors.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [_alias(tensor) for tensor in tensors]
        seeds = [_alias(grad) for grad in grads]
        results, given = _pairs(function(*inputs), seeds)
        leaves = [leaf for leaf in inputs if leaf is not None]
        firsts: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
        if results:
            firsts = torch.autograd.grad(
                results, leaves, given, create_graph=True, allow_unused=True, materialize_grads=True
            )
        wanted = leaves + [seed for seed in seeds if seed is not None]
        given_outer = [o for o, leaf in zip(outer, inputs, strict=True) if leaf is not None]
        second = [
            (first, o)
            for first, o in zip(firsts, given_outer, strict=True)
            if o is not None and first.requires_grad
        ]
        found: Sequence[State] = [None] * len(wanted)
        if second:
            found = torch.autograd.grad(
                [first for first, _ in second],
                wanted,
                [o for _, o in second],
                create_graph=create_graph,
                allow_unused=True,
            )
    return _placed(found[len(leaves) :], seeds), _placed(found[: len(leaves)], inputs)


def double_backward_layer(
    layer: Layer,
    grads: Sequence[State],
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    outer: tuple[State, list[State], State, State],
) -> tuple[list[State], State, list[State], State, State]:
    """`double_backward` for a layer of a recurrent network: of grads, input, weights, h0 and c0."""
    count = len(weights)
    of_grads, found = double_backward(
        _flat(layer, count), grads, [input, *weights, h0, c0], [outer[0], *outer[1], *outer[2:]]
    )
    return of_grads, found[0], found[1 : 1 + count], found[-2], found[-1]
