"""Weights packed for the CPU kernels, kept for as long as the parameters they were made from.

A stale pack is a wrong result. An entry belongs to exactly these tensor objects (it goes when any
of them or its memory dies), and is used only while each has the memory and the version counter that
it was packed from. What leaves neither trace (`p.data.add_()`, tensors made under inference_mode)
is caught by the kernel, which compares a fingerprint of the values when it runs. A change of a few
elements through `.data` can escape even that: call `repack`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from encdec_fast.backends.locks import ForkSafeLock

_Key: TypeAlias = tuple[Any, ...]


class _Entry:
    """One direction's pack, the traces of the weights in it, and what drops it when they die."""

    __slots__ = ("blob", "pointers", "references", "versions")

    def __init__(self, key: _Key, weights: list[Tensor], blob: Tensor) -> None:
        self.blob = blob
        self.pointers = [weight.data_ptr() for weight in weights]
        # Inference tensors have no version counter: reading it raises.
        tracked = not any(weight.is_inference() for weight in weights)
        self.versions = [weight._version for weight in weights] if tracked else None

        def drop(_: Any) -> None:
            _entries.pop(key, None)

        # A weak reference to a parameter would keep torch.utils.swap_tensors from moving it; its
        # memory does as well, since nobody makes parameters on the same memory again and again.
        # Plain tensors are made that way (`p.data` in every call, each with the same id).
        self.references = [
            weakref.ref(w.untyped_storage() if type(w) is torch.nn.Parameter else w, drop)
            for w in weights
        ]

    def fresh(self, weights: list[Tensor]) -> bool:
        pointers, versions = self.pointers, self.versions
        for index, weight in enumerate(weights):
            if weight.data_ptr() != pointers[index]:
                return False
            if versions is not None and weight._version != versions[index]:
                return False
        return True


# By the identity of a direction's weights. Python's own lock makes each get, set and pop atomic;
# `_packing` only keeps two threads from making the same pack at once. A thread may come back to it
# while it holds it: from a signal handler or a finalizer that calls a module.
_entries: dict[_Key, _Entry] = {}
_packing = ForkSafeLock()


def with_rows(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy, with a contiguous last dimension, as the kernels read it."""
    if tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def found(kind: str, weights: list[Tensor], weight_format: int) -> Tensor | None:
    """The packed form of these weights if it is there and fresh; as `kept` takes them."""
    entry = _entries.get((weight_format, kind, *map(id, weights)))
    return entry.blob if entry is not None and entry.fresh(weights) else None


def kept(
    kind: str,
    weights: list[Tensor],
    weight_format: int,
    make: Callable[[str, list[Tensor], int], Tensor],
    *,
    again: bool = False,
) -> Tensor:
    """The packed form of these weights; made where it is missing, stale or `again`.

    kind: whose weights they are. weight_format: as the pack ops number them. make: (kind, weights
    with contiguous rows, weight_format) -> an opaque uint8 tensor; it raises what is to be raised
    for weights that do not fit each other.
    """
    blob = None if again else found(kind, weights, weight_format)
    if blob is not None:
        return blob
    key = (weight_format, kind, *map(id, weights))
    with _packing.current:
        entry = _entries.get(key)
        if entry is None or again or not entry.fresh(weights):
            # Traces first: a change while the kernel packs must leave the entry stale.
            entry = _Entry(key, weights, torch.empty(0))
            entry.blob = make(kind, [with_rows(weight) for weight in weights], weight_format)
            _entries[key] = entry
        return entry.blob


def settled(
    weights: list[Tensor], run: Callable[[list[Tensor], bool], list[Tensor]]
) -> list[Tensor]:
    """What `run` makes of weights that another thread may be changing even now.

    run: (weights, whether to pack them again) -> results, or none where the weights have other
    values than those that were packed. Where they have been changing all along, it is given copies:
    values from before and after a change side by side, as torch's own kernels would read them.
    """
    return (
        run(weights, False)
        or run(weights, True)
        or run([weight.detach().clone() for weight in weights], False)
    )


def repack(what: torch.nn.Module | Tensor | Iterable[Tensor]) -> None:
    """Forget the packed form of these weights; the next call packs them anew.

    Needed only after a change that no trace shows: a few elements written through `.data`, numpy or
    another process. what: a module (with all its parameters and buffers), a tensor or tensors.
    """
    if isinstance(what, torch.nn.Module):
        tensors: list[Tensor] = [*what.parameters(), *what.buffers()]
    else:
        tensors = [what] if isinstance(what, Tensor) else list(what)
    identities = {id(tensor) for tensor in tensors}
    for key in list(_entries):
        if not identities.isdisjoint(key[2:]):
            _entries.pop(key, None)
