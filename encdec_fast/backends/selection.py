"""Choose the backend of a call: the first that accepts it, or the one that was asked for."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

NAMES = ("cuda", "triton", "cpu", "torch", "reference")


class BackendRefused(RuntimeError):
    """The backend that was asked for, or every backend there is, cannot run the call."""


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of an op.

    name: one of NAMES.
    run: computes the result; its arguments are the op family's own.
    why_not: reasons why it cannot run a call, from the call's metadata only; empty where it can.
    deterministic: whether the same call gives the same bits twice.
    backward: the gradients of `run`, for backends of an op that trains.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Any], list[str]]
    deterministic: bool = True
    backward: Callable[..., Any] | None = None


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend '{name}', expected one of {', '.join(NAMES)}")
    return name


def _from_environment() -> str | None:
    name = os.environ.get("ENCDEC_FAST_BACKEND")
    return _checked(name, "ENCDEC_FAST_BACKEND") if name else None


# A context variable: each thread and each task has its own, and starts from the environment's.
_ENVIRONMENT = _from_environment()
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "encdec_fast_backend",
    default=_ENVIRONMENT,
)
_chosen: dict[tuple[Any, ...], Backend] = {}


def requested_backend() -> str | None:
    """The name that `use_backend` or ENCDEC_FAST_BACKEND asks for here, or None."""
    return _requested.get()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Inside the `with` block every op runs on backend `name`, or raises BackendRefused.

    None takes back a request. ValueError if there is no such name.
    """
    token = _requested.set(None if name is None else _checked(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def verdicts(backends: tuple[Backend, ...], call: Hashable) -> list[tuple[Backend, list[str]]]:
    """Each backend with its reasons against `call`, in the order in which they are tried."""
    return [(backend, backend.why_not(call)) for backend in backends]


def select(backends: tuple[Backend, ...], call: Hashable) -> Backend:
    """The backend that runs `call`; memoised, so `why_not` must depend on `call` only.

    Raises BackendRefused with every reason if none accepts it, or if the requested one does not.
    """
    key = (backends, call, _requested.get())
    backend = _chosen.get(key)
    if backend is None:
        backend = _chosen[key] = _choose(backends, call, key[2])
    return backend


def _choose(backends: tuple[Backend, ...], call: Hashable, requested: str | None) -> Backend:
    opinions = verdicts(backends, call)
    for backend, reasons in opinions:
        if not reasons and requested in (None, backend.name):
            return backend
    lines = [
        f"  {backend.name}: {'; '.join(reasons) if reasons else 'accepts it'}"
        for backend, reasons in opinions
    ]
    if requested is not None and requested not in (backend.name for backend in backends):
        lines.append(f"  {requested}: this op has no such backend")
    what = "no backend" if requested is None else f"the requested backend '{requested}' does not"
    verb = "accepts" if requested is None else "accept"
    raise BackendRefused("\n".join([f"{what} {verb} this call: {call}", *lines]))
