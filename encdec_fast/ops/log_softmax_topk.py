"""The k best log probabilities of each row of logits, which is what a search asks for at a step.

    log p = logits - log Σ_c exp(logits_c)        V classes
    values, classes = the k largest of log p among the classes that are not forbidden, best first

    logits     (N, V)
    forbidden  bool (M, V), N a multiple of M: rows n N/M to (n + 1) N/M - 1 have row n of it, as
               the hypotheses of a sentence have
    values     float32 (N, k), -inf where no class is left
    classes    int64 (N, k); of equal values the first class comes first
    log_sums   float32 (N): of each row the logarithm of its sum of exponentials

With `renormalize` the sum is over the classes that are not forbidden, otherwise over all. logits
have a floating dtype (float64 gives float64). A row that has a NaN or +inf has a NaN log_sum, and
its values and classes mean nothing; classes are from 0 to V - 1 even there. There is no kernel for
gradients; where one is needed the reference runs.

The sum in one pass: Milakov and Gimelshein, 2018 (arXiv:1805.02867), section 4 of which joins it
with the k best.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.backends import Backend, Description, explained_by, select
from encdec_fast.ops import _triton
from encdec_fast.ops._call import GRAPHS, State, context_of, device_type, needs_gradient

_library = torch.library.Library("encdec_fast", "FRAGMENT")
_library.define(
    "log_softmax_topk(Tensor logits, int k, Tensor? forbidden, bool renormalize)"
    " -> (Tensor values, Tensor classes, Tensor log_sums)"
)


class LogSoftmaxTopkCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    V: int
    k: int
    renormalize: bool
    context: str  # as in ops/_call.py


def reference(
    logits: Tensor, k: int, forbidden: State = None, renormalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, in the logits' own precision; differentiable. The truth for the backends."""
    open_ = logits
    if forbidden is not None:
        rows = forbidden.repeat_interleave(logits.shape[0] // max(1, forbidden.shape[0]), 0)
        open_ = logits.masked_fill(rows, -torch.inf)
    log_sums = (open_ if renormalize else logits).logsumexp(1)
    log_sums = torch.where(log_sums == torch.inf, torch.nan, log_sums)
    best, classes = open_.sort(stable=True, dim=1, descending=True)
    best, classes = best[:, :k], classes[:, :k]
    values = (best - log_sums.unsqueeze(1)).masked_fill(best == -torch.inf, -torch.inf)
    return values, classes, log_sums


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reference(call: LogSoftmaxTopkCall, logits: Tensor, forbidden: State) -> tuple[Tensor, ...]:
    found = reference(logits.to(_wide(call.dtype)), call.k, forbidden, call.renormalize)
    return tuple(tensor.contiguous() for tensor in found)


def _fake(
    logits: Tensor, k: int, forbidden: State, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, dtype = logits.shape[0], _wide(logits.dtype)
    values = logits.new_empty(N, k, dtype=dtype)
    return (
        values,
        logits.new_empty(N, k, dtype=torch.int64),
        logits.new_empty(N, dtype=dtype),
    )


def _triton_run(call: LogSoftmaxTopkCall, logits: Tensor, forbidden: State) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(logits):
        own, masks = _triton.contiguous((logits, forbidden), logits.device)
        kernels = _triton.kernels("log_softmax_topk")
        return tuple(kernels.forward(own, call.k, masks, not call.renormalize))


def _why_not_triton(call: LogSoftmaxTopkCall) -> list[str]:
    reasons = _triton.unfit(call)
    if call.training:
        reasons.append("a gradient is needed: it has none")
    # Not before: the kernels import Triton.
    return reasons or _triton.kernels("log_softmax_topk").why_not(call.V, call.k)


BACKENDS = (
    Backend("triton", _triton_run, _why_not_triton),
    Backend("reference", _reference, lambda call: []),
)


def _run(logits: Tensor, k: int, forbidden: State, renormalize: bool) -> tuple[Tensor, ...]:
    V = logits.shape[1]
    call = LogSoftmaxTopkCall(logits.dtype, device_type(logits), False, V, k, renormalize, "")
    found: tuple[Tensor, ...] = select(BACKENDS, call).run(call, logits, forbidden)
    return found


_library.impl("log_softmax_topk", _run, "CompositeExplicitAutograd")
torch.library.register_fake("encdec_fast::log_softmax_topk", _fake, lib=_library)


def _prepare(
    logits: Tensor, k: int, forbidden: State = None, *, renormalize: bool = False
) -> LogSoftmaxTopkCall:
    """The metadata of a call of the public function."""
    name = "log_softmax_topk"
    if logits.dim() != 2:
        raise RuntimeError(
            f"{name}: logits must be (N, V), but their shape is {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point logits, but they are {logits.dtype}")
    N, V = logits.shape
    if not 1 <= k <= V:
        raise RuntimeError(f"{name}: k must be from 1 to the {V} classes, but it is {k}")
    if forbidden is not None:
        if forbidden.dtype != torch.bool or forbidden.device != logits.device:
            raise RuntimeError(
                f"{name}: forbidden must be bool on {logits.device}, but it is {forbidden.dtype} "
                f"on {forbidden.device}"
            )
        M = forbidden.shape[0] if forbidden.dim() == 2 else -1
        if M < 0 or forbidden.shape[1] != V or (N % M if M else N):
            raise RuntimeError(
                f"{name}: forbidden must be (M, {V}) with a part of {N} rows each, "
                f"but its shape is {tuple(forbidden.shape)}"
            )
    given = [logits] if forbidden is None else [logits, forbidden]
    context = "compile" if torch.compiler.is_compiling() else context_of(logits, given)
    training = needs_gradient([logits])
    return LogSoftmaxTopkCall(
        logits.dtype, device_type(logits), training, V, k, renormalize, context
    )


def describe(logits: Tensor, *args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call = _prepare(logits, *args, **options)
    sizes = f"N={logits.shape[0]} V={call.V} k={call.k} {call.dtype} {call.device}"
    return Description("log_softmax_topk", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def log_softmax_topk(
    logits: Tensor, k: int, forbidden: Tensor | None = None, *, renormalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, classes, log_sums) of the k best classes; shapes are in this file's docstring.

    RuntimeError for tensors whose shapes, dtypes or devices do not fit and for k outside of 1 to V.
    """
    call = _prepare(logits, k, forbidden, renormalize=renormalize)
    if call.context in GRAPHS and not call.training:
        op = torch.ops.encdec_fast.log_softmax_topk
        values, classes, log_sums = op(logits, k, forbidden, renormalize)
    else:
        values, classes, log_sums = select(BACKENDS, call).run(call, logits, forbidden)
    return values, classes, log_sums
