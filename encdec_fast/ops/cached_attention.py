"""One step of a decoder's attention to what it has written, with the cache of a beam search.

    place p = places[r]: where hypothesis r's new key and value go, and how many came before
    keys[p, r], values[p, r] = key[r], value[r]
    k_s = keys[s, rows[r, s]], v_s likewise, for s < p; k_p = key[r], v_p = value[r]
    output[r] = Σ_s softmax_s(scale query[r] · k_s + bias[:, s]) v_s,    s from 0 to p, of each head

    query, key, value  (R, H, D)     R hypotheses, H heads of D numbers
    keys, values       (P, R, H, D)  contiguous, written in place
    rows               int32 (R, P)  in which row of the cache a hypothesis' key of a position lies
    places             int64 (R)     from 0 to P - 1
    bias               (H, P) or None: added to the scores of a position, as relative positions do
    output             (R, H, D)

A beam search reorders `rows`, a few integers for each hypothesis, and never the cache. What a step
writes, none of its hypotheses may name in its rows (those of one length never do). All floating
tensors have one dtype and device. On a GPU rows and places are not read back: what is out of range
counts as the nearest, and with ENCDEC_FAST_CHECK=1 it raises IndexError, as it does on the CPU. For
inference: there are no gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.backends import Backend, Description, explained_by, select
from encdec_fast.ops import _triton
from encdec_fast.ops._attention_checks import check_shapes
from encdec_fast.ops._call import GRAPHS, State, context_of, device_type, needs_gradient
from encdec_fast.ops._checks import check_device_values

_library = torch.library.Library("encdec_fast", "FRAGMENT")
_library.define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor rows, Tensor places, Tensor? bias, float scale) -> Tensor"
)
_NAME = "cached_attention"


class CachedCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    D: int
    scale: float
    context: str  # as in ops/_call.py


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    places: Tensor,
    bias: State = None,
    scale: float | None = None,
) -> Tensor:
    """Plain PyTorch, which writes keys and values, too. The truth that backends are held to."""
    P, R, _, D = keys.shape
    own, positions = torch.arange(R, device=query.device), torch.arange(P, device=query.device)
    keys.index_put_((places, own), key)
    values.index_put_((places, own), value)
    last = positions == places.unsqueeze(1)  # (R, P)
    at = torch.where(last, own.unsqueeze(1), rows.long())
    seen = positions <= places.unsqueeze(1)
    k, v = keys[positions, at], values[positions, at]  # (R, P, H, D)
    scores = torch.einsum("rhd,rphd->rhp", query, k) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("rhp,rphd->rhd", weights, v.masked_fill(~seen[:, :, None, None], 0))


def _reference(call: CachedCall, *tensors: State) -> Tensor:
    query, key, value, keys, values, rows, places, bias = tensors
    assert query is not None and key is not None and value is not None and keys is not None
    assert values is not None and rows is not None and places is not None
    P, R = keys.shape[:2]
    places, rows = places.clamp(0, P - 1), rows.clamp(0, R - 1)
    if R == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    found = reference(query, key, value, keys, values, rows, places, bias, call.scale)
    return found.contiguous()


def _fake(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape)


def _triton_run(call: CachedCall, *tensors: State) -> Tensor:
    first = tensors[0]
    assert first is not None
    with torch.cuda.device_of(first):
        D = call.D
        new = [t if t is None or t.stride()[1:] == (D, 1) else t.contiguous() for t in tensors[:3]]
        rest = _triton.contiguous(tensors[5:], first.device)
        found: Tensor = _triton.kernels(_NAME).step(*new, *tensors[3:5], *rest, call.scale)
        return found


def _why_not_triton(call: CachedCall) -> list[str]:
    reasons = _triton.unfit(call)
    if reasons:
        return reasons
    fits = call.D <= _triton.kernels(_NAME).MOST_NUMBERS
    return [] if fits else [f"a head has {call.D} numbers, more than a program holds"]


BACKENDS = (
    Backend("triton", _triton_run, _why_not_triton),
    Backend("reference", _reference, lambda call: []),
)


def _run(*args: Any) -> Tensor:
    tensors, scale = args[:-1], args[-1]
    query = tensors[0]
    call = CachedCall(query.dtype, device_type(query), query.shape[2], scale, "")
    found: Tensor = select(BACKENDS, call).run(call, *tensors)
    return found


_library.impl("cached_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("encdec_fast::cached_attention", _fake, lib=_library)


def _check_index(what: str, index: Tensor, dtype: torch.dtype, shape: Any, like: Tensor) -> None:
    if index.dtype != dtype or tuple(index.shape) != tuple(shape) or index.device != like.device:
        raise RuntimeError(
            f"{_NAME}: {what} must be {dtype} of the shape {tuple(shape)} on {like.device}, but it "
            f"is {index.dtype} of the shape {tuple(index.shape)} on {index.device}"
        )


def _check_values(what: str, index: Tensor, most: int) -> None:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= most):
        raise IndexError(f"{_NAME}: {what} must be from 0 to {most - 1}")


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    places: Tensor,
    bias: State = None,
    *,
    scale: float | None = None,
) -> tuple[CachedCall, tuple[State, ...]]:
    """The metadata of a call of the public function, and its tensors."""
    for what, tensor, dims in (("query", query, 3), ("keys", keys, 4)):
        if tensor.dim() != dims:
            raise RuntimeError(f"{_NAME}: {what} must have {dims} dimensions, got {tensor.dim()}")
    if not query.is_floating_point():
        raise RuntimeError(f"{_NAME}: expected floating-point tensors, but query is {query.dtype}")
    (R, H, D), P = query.shape, keys.shape[0]
    if P == 0 or D == 0:
        raise RuntimeError(f"{_NAME}: keys must have a position and a number, not {keys.shape}")
    shapes: dict[str, tuple[State, tuple[int, ...]]] = {
        "key": (key, (R, H, D)),
        "value": (value, (R, H, D)),
        "keys": (keys, (P, R, H, D)),
        "values": (values, (P, R, H, D)),
    }
    if bias is not None:
        shapes["bias"] = (bias, (H, P))
    check_shapes(_NAME, "query", query, shapes)
    for what, tensor in (("keys", keys), ("values", values)):
        if not tensor.is_contiguous():
            raise RuntimeError(f"{_NAME}: {what} must be contiguous: it is written in place")
    _check_index("rows", rows, torch.int32, (R, P), query)
    _check_index("places", places, torch.int64, (R,), query)
    given = [query, key, value, keys, values]
    if needs_gradient(given):
        raise RuntimeError(f"{_NAME}: it is for inference: call it under torch.no_grad()")
    context = "compile" if torch.compiler.is_compiling() else context_of(query, given[1:])
    if context not in GRAPHS and check_device_values(places):
        _check_values("places", places, P)
        # Behind its place a hypothesis has no rows yet.
        before = torch.arange(P, device=rows.device) < places.unsqueeze(1)
        _check_values("rows", torch.where(before, rows, 0), R)
    call = CachedCall(
        query.dtype, device_type(query), D, float(D**-0.5 if scale is None else scale), context
    )
    return call, (query, key, value, keys, values, rows, places, bias)


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, (query, _, _, keys, *_) = _prepare(*args, **options)
    assert query is not None and keys is not None
    R, H, D = query.shape
    sizes = f"R={R} H={H} D={D} P={keys.shape[0]} {call.dtype} {call.device}"
    return Description(_NAME, BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    places: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """A step of attention with its cache; shapes are in this file's docstring.

    scale: None: 1 / sqrt(D). Returns the output (R, H, D), and writes to keys and values.
    RuntimeError for tensors whose shapes, dtypes or devices do not fit and where a gradient is
    needed; IndexError for rows and places that there are not.
    """
    call, tensors = _prepare(query, key, value, keys, values, rows, places, bias, scale=scale)
    if call.context in GRAPHS:
        result: Tensor = torch.ops.encdec_fast.cached_attention(*tensors, call.scale)
        return result
    found: Tensor = select(BACKENDS, call).run(call, *tensors)
    return found
