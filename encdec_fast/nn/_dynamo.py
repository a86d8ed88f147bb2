"""Lets torch.compile into the recurrent modules of this package.

Dynamo stops at every instance of torch.nn.LSTM, GRU and RNN, whose forward it would unroll, unless
`torch._dynamo.config.allow_rnn` is set. Ours become one op, so the setting is turned on while one
of them is looked at, and only then: a plain torch.nn.LSTM is treated as ever. Importing dynamo
takes more than a second, so nothing is done before somebody else imports it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from encdec_fast.nn._recurrent import RecurrentModule

_BUILDER = "torch._dynamo.variables.builder"


def _allow(builder: Any) -> None:
    """Make dynamo's `wrap_module` accept the modules of this package."""
    config: Any = sys.modules["torch._dynamo.config"]
    original = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
    if original is None:  # another dynamo than the ones this was written for: the setting, for all
        config.allow_rnn = True
        return

    @functools.wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, RecurrentModule):
            return original(self, value)
        with config.patch(allow_rnn=True):
            return original(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


class _Hook(importlib.abc.MetaPathFinder):
    """Finds dynamo's builder as anybody would, and calls `_allow` once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _allow(module)

            loader.exec_module = exec_module
        return spec


def install() -> None:
    """Call `_allow` now, or when dynamo is imported."""
    if _BUILDER in sys.modules:
        _allow(sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _Hook())
