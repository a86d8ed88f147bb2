"""What a peer offers: contenders for a case, or the reason why it has none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

from torch import Tensor

from benchmarks.cases import DType
from benchmarks.workload import Workload


@dataclass
class Contender:
    """One thing to time.

    `call` does the timed work and nothing else; `outputs` turns what a call returned into named
    tensors, untimed, for the comparison. `role` is "peer", "ours", or "kernel" (our C++ call alone,
    under the module). `variant` tells the ways to hand over the input apart; `dtype` differs from
    the case's only where a case asks for a comparison across dtypes. `full` marks a contender of an
    unequal-length case that computes every padded step: the measure of what a real token may cost.
    """

    peer: str
    dtype: DType
    call: Callable[[], object]
    outputs: Callable[[Any], dict[str, Tensor]]
    tokens: int
    variant: str = ""
    role: str = "peer"
    full: bool = False

    @property
    def name(self) -> str:
        """The name in tables and files."""
        return f"{self.peer} {self.variant}".strip()


@dataclass
class Offer:
    """A peer's answer for a case: contenders and, by name, the reasons for what is absent."""

    contenders: list[Contender] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


class Peer(Protocol):
    """A library that can compute some of the cases."""

    name: str

    def offer(self, work: Workload, threads: int) -> Offer:
        """Contenders for the case; an absent package or feature is a reason, not an error."""
        ...

    def version(self) -> str | None:
        """The installed version, or None."""
        ...


def package_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def optional(module: str) -> Any:
    """An imported module, or None where it is not installed or cannot be loaded."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def not_installed(package: str) -> str:
    """The reason of an absent package, with what to do."""
    return f"{package} is not installed (pip install {package})"


def dtypes_to_run(work: Workload) -> list[DType]:
    """The case's dtype; at int8's point of comparison with float32, that too."""
    case = work.case
    if case.dtype == "int8" and (case.batch, case.time, case.hidden) == (1, 50, 512):
        return ["int8", "float32"]
    return [case.dtype]


def variant_of(dtype: DType, work: Workload) -> str:
    """The part of a contender's name that says it runs in another dtype than its case."""
    return "" if dtype == work.case.dtype else dtype
