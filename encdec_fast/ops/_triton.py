"""The `triton` backend: whether Triton is there, and what speaks against every kernel."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

from encdec_fast.backends import requested_backend
from encdec_fast.ops._cpu import unsuited

_OLDEST = (3, 6)


@cache
def missing() -> str:
    """Why Triton cannot be used here at all; empty where it may be."""
    there = importlib.util.find_spec("triton") is not None
    return "" if there else "Triton is not installed (pip install triton)"


@cache
def _too_old() -> str:
    """Imports Triton, which takes a tenth of a second."""
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, _OLDEST))}"
    return ""


def kernels(family: str) -> ModuleType:
    """The file of triton_kernels/ of that name, imported late: it imports Triton."""
    return importlib.import_module(f"encdec_fast.triton_kernels.{family}")


def contiguous(tensors: Sequence[Any], device: torch.device) -> list[Any]:
    """Tensors as the kernels read them, all on one device; None stays None."""
    return [None if t is None else t.contiguous().to(device) for t in tensors]


def unfit_device(device: str) -> list[str]:
    """Reasons against Triton for tensors of this device."""
    if missing():
        return [missing()]
    reasons = []
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        if requested_backend() != "triton":
            reasons.append("Triton's interpreter runs only where this backend is asked for")
    elif device != "cuda":
        reasons.append(f"the tensors are on {device}")
    if not reasons and _too_old():
        reasons.append(_too_old())
    return reasons


def unfit(call: Any) -> list[str]:
    """Reasons against every Triton kernel; call: metadata with device, dtype and context."""
    reasons = unfit_device(call.device)
    return reasons if missing() else reasons + unsuited(call)
