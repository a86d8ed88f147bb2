"""Whether a module is still what it was when it was described."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


class Snapshot:
    """The attributes, parameters, buffers, submodules and hooks of a module and all its parts.

    They are compared by identity, all in one pass, which is cheaper than to describe them anew.
    """

    def __init__(self, root: nn.Module) -> None:
        # Without the root: a snapshot lives as long as that does, and must not keep it alive.
        modules = list(root.modules())
        self.parts = modules[1:]
        dicts: list[dict[str, Any]] = []
        for module in modules:
            own = vars(module)
            dicts += [own, *(value for value in own.values() if isinstance(value, dict))]
        self._views = [d.values() for d in dicts]  # they follow their dicts
        self._saved = tuple(chain.from_iterable(self._views))
        self._sizes = list(map(len, self._views))
        self._tensors = [*root.parameters(), *root.buffers()]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._global_hook = torch_module._has_any_global_hook()

    def fresh(self) -> bool:
        """Whether nothing was replaced, added or removed since."""
        return (
            torch_module._has_any_global_hook() == self._global_hook
            and list(map(len, self._views)) == self._sizes
            and all(map(operator.is_, chain.from_iterable(self._views), self._saved))
            # `p.data = other` moves a parameter that a description may hold a part of.
            and [tensor.data_ptr() for tensor in self._tensors] == self._addresses
        )
