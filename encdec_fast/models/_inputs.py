"""What the models check of tokens and lengths before they use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Lengths = Tensor | Sequence[int] | None


def check_tokens(name: str, what: str, tokens: Tensor) -> None:
    """RuntimeError unless tokens are int64 of two dimensions, with a position at least."""
    if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
        raise RuntimeError(
            f"{name}: {what} must be int64 of the shape (B, length), with a length of at least 1, "
            f"but it is {tokens.dtype} of the shape {tuple(tokens.shape)}"
        )


def check_same_rows(name: str, memory: Tensor, target: Tensor) -> None:
    """RuntimeError unless there is a target for every sentence."""
    if target.shape[0] != memory.shape[0]:
        raise RuntimeError(
            f"{name}: target must have a row for each of the {memory.shape[0]} sentences of "
            f"source, but it has {target.shape[0]}"
        )


def lengths_of(name: str, source: Tensor, lengths: Lengths, padding: int) -> Tensor:
    """The length of each sentence, int64 (B) on the CPU; None: its tokens that are not padding.

    RuntimeError unless there is one from 1 to S for each row of source (B, S).
    """
    if lengths is None:
        found = (source != padding).sum(1).cpu()
    else:
        found = torch.as_tensor(lengths, device="cpu")
    B, S = source.shape
    if found.shape != (B,) or (found.numel() and found.dtype != torch.int64):
        raise RuntimeError(
            f"{name}: source_lengths must be {B} integers, one for each sentence, "
            f"but they are {found.dtype} of the shape {tuple(found.shape)}"
        )
    if bool(((found < 1) | (found > S)).any()):
        raise RuntimeError(
            f"{name}: source_lengths must lie between 1 and {S}, the length of source, "
            f"but they are {found.tolist()}"
        )
    return found.long()
