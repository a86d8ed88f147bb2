"""explain(): what each backend says of a call, and which one runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from encdec_fast.backends.selection import (
    Backend,
    BackendRefused,
    requested_backend,
    select,
    verdicts,
)

_F = TypeVar("_F", bound=Callable[..., Any])
_ATTRIBUTE = "_encdec_fast_describe"


class Description(NamedTuple):
    """What an op makes of its arguments, before it runs.

    op: its name. backends: in order. call: the metadata that they judge. sizes: for the reader.
    plan: how the backend of a name would cut the call, in words; empty if there is nothing to say.
    """

    op: str
    backends: tuple[Backend, ...]
    call: Any
    sizes: str
    plan: Callable[[str], str]


@dataclass(frozen=True)
class Explanation:
    """The verdict of every backend of an op on one call; `print` it.

    backend: the name of the one that runs, None where none may (`refusal` then says why).
    reasons: for each backend its reasons against the call; an empty list means that it accepts.
    """

    op: str
    call: Any
    sizes: str
    backend: str | None
    reasons: dict[str, list[str]]
    deterministic: bool
    requested: str | None = None
    plan: str = ""
    refusal: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.sizes}"]
        if self.requested is not None:
            lines.append(f"  requested: {self.requested}")
        for name, reasons in self.reasons.items():
            runs = " <- runs" if name == self.backend else ""
            lines.append(f"  {name}: {'no: ' + '; '.join(reasons) if reasons else 'yes'}{runs}")
        if self.backend is None:
            lines.append("  this call raises BackendRefused")
        if self.plan:
            lines.extend("  plan: " + line for line in self.plan.splitlines())
        return "\n".join(lines)


def explained_by(describe: Callable[..., Description]) -> Callable[[_F], _F]:
    """Decorate an op's public function with the function that describes its calls."""

    def attach(function: _F) -> _F:
        setattr(function, _ATTRIBUTE, describe)
        return function

    return attach


def explain(op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Say how `op(*args, **kwargs)` would run here and now, without running it.

    op: a function of `encdec_fast.ops` or a module of `encdec_fast.nn`. Grad mode, autocast,
    `use_backend` and the arguments count as they would in the call itself, and bad arguments raise
    the same errors. TypeError for anything else.
    """
    describe = getattr(op, _ATTRIBUTE, None)
    if describe is None:
        raise TypeError(f"explain: {op!r} is neither an op nor a module of encdec_fast")
    found: Description = describe(*args, **kwargs)
    backend: Backend | None = None
    refusal = None
    try:
        backend = select(found.backends, found.call)
    except BackendRefused as error:
        refusal = str(error)
    return Explanation(
        op=found.op,
        call=found.call,
        sizes=found.sizes,
        backend=backend.name if backend else None,
        reasons={b.name: reasons for b, reasons in verdicts(found.backends, found.call)},
        deterministic=backend.deterministic if backend else True,
        requested=requested_backend(),
        plan=found.plan(backend.name) if backend else "",
        refusal=refusal,
    )
