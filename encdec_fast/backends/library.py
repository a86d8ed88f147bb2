"""Loads the compiled libraries, and remembers what came of it.

Without them the package works on torch's own kernels; `status()` and `python -m encdec_fast info`
say what is missing and why.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch  # first: the libraries take libgomp and the C++ runtime from the copies it loaded

_PACKAGE = Path(__file__).resolve().parent.parent
_OPS = (
    "rnn_pack",
    "rnn_forward",
    "rnn_backward",
    "additive_forward",
    "additive_backward",
    "attention_forward",
    "attention_backward",
    "attention_decoder_forward",
    "attention_decoder_backward",
    "varlen_attention",
    "linear_pack",
    "linear_forward",
    "linear_product",
    "linear_backward",
    "bridge_pack",
    "bridge_forward",
)
_REBUILD = "build it with `make build` in a checkout, or `pip install --force-reinstall` the wheel"


@dataclass(frozen=True)
class LibraryStatus:
    """One compiled library: where it was looked for, whether it loaded, why not, what to do."""

    name: str
    path: str
    loaded: bool
    reason: str = ""
    hint: str = ""


def _load_ops(path: Path) -> LibraryStatus:
    name = "libencdec_ops"
    if not path.exists():
        return LibraryStatus(name, str(path), False, "the file does not exist", _REBUILD)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        hint = f"it was made for another system, compiler or torch (here {torch.__version__}): "
        return LibraryStatus(name, str(path), False, str(error).strip(), hint + _REBUILD)
    missing = [op for op in _OPS if not hasattr(torch.ops.encdec_fast_cpu, op)]
    if missing:
        reason = f"it lacks {', '.join(missing)}: it is of another version of this package"
        return LibraryStatus(name, str(path), False, reason, _REBUILD)
    return LibraryStatus(name, str(path), True)


def _load_extension() -> tuple[ModuleType | None, LibraryStatus]:
    name = "encdec_fast._C"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        path = str(_PACKAGE / "_C")
        return None, LibraryStatus(name, path, False, str(error), _REBUILD)
    return module, LibraryStatus(name, str(module.__file__), True)


_ops_status = _load_ops(_PACKAGE / "lib" / "libencdec_ops.so")
extension, _extension_status = _load_extension()


def ops_reason() -> str:
    """Why the library of compiled ops is not there; empty where it is."""
    return "" if _ops_status.loaded else f"{_ops_status.name} is not loaded: {_ops_status.reason}"


def status() -> list[LibraryStatus]:
    """The state of every compiled library of the package."""
    return [_ops_status, _extension_status]
