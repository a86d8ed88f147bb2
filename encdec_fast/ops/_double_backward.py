"""The gradient of a layer's backward, by differentiating the reference twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from encdec_fast.ops._call import LayerResult, State

_Layer = Callable[[Tensor, list[Tensor], State, State], LayerResult]


def _alias(tensor: Any) -> Any:
    """The same values at a place of its own in the graph, still connected to `tensor`."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def double_backward(
    reference: _Layer,
    grads: tuple[State, State, State, State],
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    outer: tuple[State, list[State], State, State],
) -> tuple[list[State], State, list[State], State, State]:
    """Gradients of the op `*_backward`.

    grads: of output, h_n, c_n and the cells, each None where there was none. outer: the gradients
    of the backward op's own results. Returns the gradients of grads, input, weights, h0 and c0.
    """
    create_graph = torch.is_grad_enabled()
    outer_input, outer_weights, outer_h0, outer_c0 = outer
    with torch.enable_grad():
        x, h, c = _alias(input), _alias(h0), _alias(c0)
        w = [_alias(weight) for weight in weights]
        seeds = [_alias(grad) for grad in grads]
        pairs = [
            (result, seed)
            for result, seed in zip(reference(x, w, h, c), seeds, strict=True)
            if result is not None and seed is not None
        ]
        leaves = [t for t in (x, *w, h, c) if t is not None]
        firsts = torch.autograd.grad(
            [result for result, _ in pairs],
            leaves,
            [seed for _, seed in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        outers = [outer_input, *outer_weights]
        outers += [o for o, state in ((outer_h0, h0), (outer_c0, c0)) if state is not None]
        second = [
            (first, o)
            for first, o in zip(firsts, outers, strict=True)
            if o is not None and first.requires_grad
        ]
        wanted = leaves + [seed for seed in seeds if seed is not None]
        if second:
            found: list[Any] = list(
                torch.autograd.grad(
                    [first for first, _ in second],
                    wanted,
                    [o for _, o in second],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        else:
            found = [None] * len(wanted)
    results = iter(found)
    of_input = next(results)
    of_weights = [next(results) for _ in weights]
    of_h0 = None if h0 is None else next(results)
    of_c0 = None if c0 is None else next(results)
    return [None if s is None else next(results) for s in seeds], of_input, of_weights, of_h0, of_c0
