"""A larger Transformer that begins as a smaller one: Chen et al., 2016, Net2Net, arXiv:1511.05641.

What is added has no effect on the result at first. A layer more adds zero to its input, since its
norms come first and what its attentions and its feed-forward block end with is zero; a feature more
inside a feed-forward block is read with weights of zero. Both learn from the first step on.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

# What ends a branch beside a layer's input.
ENDS = re.compile(r"\.(?:out_proj|linear2)\.(?:weight|bias)$")
FEEDFORWARD = re.compile(r"\.linear[12]\.(?:weight|bias)$")


def grown(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state for `model`, from the tensors of the same or of a smaller one.

    model: new, with its initial weights; a Transformer may have more layers, with norms first, and
        wider feed-forward blocks than the tensors. Whatever else differs is left as it is, for
        `load_state_dict` to name.
    """
    initial = model.state_dict()
    state = dict(tensors)
    layers = re.compile(r"(.*\.layers\.)(\d+)\.")
    known = {found[0] for name in tensors if (found := layers.match(name))}
    for name, value in initial.items():
        found = layers.match(name)
        if name in tensors:
            if FEEDFORWARD.search(name) and value.shape != tensors[name].shape:
                state[name] = _wider(tensors[name], value)
        elif found and found[0] not in known and f"{found[1]}0." in known:
            state[name] = torch.zeros_like(value) if ENDS.search(name) else value
    return state


def _wider(small: Tensor, initial: Tensor) -> Tensor:
    """`small` in a corner of `initial`; its other columns are zero, its other rows unchanged."""
    if any(a > b for a, b in zip(small.shape, initial.shape, strict=True)):
        return small
    rows = initial.clone()
    rows[: len(small)] = 0
    rows[tuple(slice(size) for size in small.shape)] = small
    return rows
