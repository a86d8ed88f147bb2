"""Direct bridge: the final states of a recurrent encoder as the first ones of a decoder.

    states    (L, B, H), or for an LSTM the pair (h, c) of two such tensors; from an encoder with
              two directions (2 L, B, H), layer by layer, each forward and then backward
    merged    "concat": (L, B, 2 H), forward first; "sum": (L, B, H)
    result    (N, B, ·), for a decoder of N layers

These are copies and views, and torch's own operations make them: there is no kernel, no backend to
choose and so nothing to explain.

Sutskever, Vinyals and Le, 2014 (arXiv:1409.3215); the merging of directions: Britz et al., 2017
(arXiv:1703.03906).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

MERGES = ("concat", "sum")
States = TypeVar("States", Tensor, tuple[Tensor, Tensor])


def check_merge(name: str, merge: str, known: tuple[str, ...] = MERGES) -> None:
    """ValueError for a way to merge that there is not."""
    if merge not in known:
        names = ", ".join(repr(one) for one in known)
        raise ValueError(f"{name}: merge must be one of {names}, but it is {merge!r}")


def merge_directions(state: Tensor, merge: str = "concat") -> Tensor:
    """(2 L, B, H) of both directions to (L, B, 2 H) by "concat" or (L, B, H) by "sum".

    RuntimeError for another rank or an odd number of states, ValueError for another `merge`.
    """
    check_merge("merge_directions", merge)
    if state.dim() != 3:
        raise RuntimeError(f"merge_directions: state must have 3 dimensions, got {state.dim()}")
    if state.shape[0] % 2:
        raise RuntimeError(
            "merge_directions: state must have two directions for each layer, "
            f"but its shape is {tuple(state.shape)}"
        )
    forward, backward = state[0::2], state[1::2]
    return torch.cat([forward, backward], -1) if merge == "concat" else forward + backward


def _layers(state: Tensor, num_layers: int | None, last_layers: bool) -> Tensor:
    """The states of as many layers as the decoder has."""
    found = state.shape[0]
    if num_layers is None or num_layers == found:
        return state
    if not last_layers or num_layers > found:
        hint = "" if num_layers > found else "; last_layers=True takes the last ones"
        raise RuntimeError(
            f"direct_bridge: the decoder has {num_layers} layers, "
            f"but the encoder gives the states of {found}{hint}"
        )
    return state[found - num_layers :]


def direct_bridge(
    states: States,
    num_layers: int | None = None,
    *,
    bidirectional: bool = False,
    merge: str = "concat",
    last_layers: bool = False,
) -> States:
    """A decoder's first states from an encoder's final ones; shapes are in this file's docstring.

    num_layers: of the decoder; None: as many as the encoder has. last_layers: of an encoder with
    more layers take the last ones; else, and where it has fewer, RuntimeError. RuntimeError for
    states of another rank and for h and c of unequal numbers of layers or rows, ValueError for
    another `merge`.
    """
    check_merge("direct_bridge", merge)
    pair = states if isinstance(states, tuple) else (states,)
    if isinstance(states, tuple) and len(pair) != 2:
        raise RuntimeError(
            f"direct_bridge: states must be a tensor or the pair (h, c), got {len(pair)} of them"
        )
    for state in pair:
        if state.dim() != 3:
            raise RuntimeError(
                "direct_bridge: states must be (layers, B, H), "
                f"but a state has the shape {tuple(state.shape)}"
            )
        if state.shape[:2] != pair[0].shape[:2]:
            raise RuntimeError(
                f"direct_bridge: h and c must have the same layers and rows, "
                f"but they are {tuple(pair[0].shape)} and {tuple(state.shape)}"
            )
    found = [merge_directions(state, merge) if bidirectional else state for state in pair]
    found = [_layers(state, num_layers, last_layers) for state in found]
    return (found[0], found[1]) if isinstance(states, tuple) else found[0]
