"""Softmax cross-entropy of logits and classes, with label smoothing.

    p = softmax(logits of a row),   V classes,   y its class,   ε the label smoothing
    loss of the row = -(1 - ε) log p_y - ε / V Σ_c log p_c

    logits   (N, V), or (V) for one row
    target   int64 (N), or () for one row: classes from 0 to V - 1, or `ignore_index`
    result   "none": (N), 0 where the target is ignored; "sum": (); "mean": (), over the rows that
             count, NaN if there are none

logits have a floating dtype, and the result has it too, under torch.autocast float32; sums are kept
in float32 or wider. Training keeps two numbers per row, and backward writes the gradient of the
logits: beside the logits themselves nothing of their size is in memory. On a GPU targets are not
read back: one that is no class counts as the nearest, and with ENCDEC_FAST_CHECK=1 it raises
IndexError, as it always does on the CPU.

Label smoothing: Szegedy et al., 2016 (arXiv:1512.00567). The running maximum and sum: Milakov and
Gimelshein, 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import Backend, Description, explained_by, select
from encdec_fast.ops import _triton
from encdec_fast.ops._call import (
    GRAPHS,
    State,
    autocasting,
    context_of,
    device_type,
    needs_gradient,
)
from encdec_fast.ops._checks import check_device_values
from encdec_fast.ops._derivatives import recompute
from encdec_fast.ops._tensor_op import TensorOp, reference_backend

_library = torch.library.Library("encdec_fast", "FRAGMENT")
REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    ignore_index: int
    label_smoothing: float
    context: str  # as in ops/_call.py


def _call(tensors: Sequence[Any], flags: Sequence[Any], training: bool) -> CrossEntropyCall:
    logits, (ignore_index, smoothing) = tensors[0], flags
    where = (logits.dtype, device_type(logits), training)
    return CrossEntropyCall(*where, ignore_index, smoothing, "")


def reference(
    logits: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of each row in plain PyTorch. The truth that backends are held to.

    Any dtype and device; differentiable any number of times; not fast.
    """
    counts = target != ignore_index
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, torch.where(counts, target, 0).unsqueeze(1)).squeeze(1)
    loss = -own
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    return torch.where(counts, loss, 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_sums(call: CrossEntropyCall, losses: Tensor) -> tuple[Tensor, ...]:
    """The losses, and in training room for the sums, which only Triton's backward reads."""
    if not call.training:
        return (losses,)
    return losses, torch.zeros_like(losses), torch.zeros_like(losses)


def _reference(call: CrossEntropyCall, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    wide = logits.to(_wide(call.dtype))
    return _with_sums(call, reference(wide, target, call.ignore_index, call.label_smoothing))


def _fake(call: CrossEntropyCall, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    rows = [logits.new_empty(logits.shape[:1], dtype=_wide(call.dtype)) for _ in range(3)]
    return tuple(rows) if call.training else (rows[0],)


OP = TensorOp(
    "cross_entropy",
    tensors="Tensor logits, Tensor target",
    differentiable=1,
    flags="int ignore_index, float label_smoothing",
    results="Tensor losses",
    saved="Tensor maxima, Tensor log_sums",
    make_call=_call,
    reference=_reference,
    fake=_fake,
)
OP.register(_library)


def _check_target(call: CrossEntropyCall, target: Tensor, classes: int) -> None:
    """IndexError, as torch's, for a target that is no class."""
    wrong = ((target < 0) | (target >= classes)) & (target != call.ignore_index)
    if wrong.any():
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")


def _triton_run(call: CrossEntropyCall, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    if check_device_values(target):
        _check_target(call, target, logits.shape[1])
    with torch.cuda.device_of(logits):
        own = _triton.contiguous((logits, target), logits.device)
        flags = (call.ignore_index, call.label_smoothing)
        found: tuple[Tensor, ...] = _triton.kernels("cross_entropy").forward(*own, *flags)
        return found if call.training else found[:1]


def _triton_backward(
    call: CrossEntropyCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    logits, target = tensors
    with torch.cuda.device_of(logits):
        own = _triton.contiguous((grads[0], logits, target, *kept[1:3]), logits.device)
        flags = (call.ignore_index, call.label_smoothing)
        return [_triton.kernels("cross_entropy").backward(*own, *flags)]


def _torch(call: CrossEntropyCall, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    wide = logits.to(_wide(call.dtype))
    flags: dict[str, Any] = {
        "ignore_index": call.ignore_index,
        "label_smoothing": call.label_smoothing,
    }
    return _with_sums(call, F.cross_entropy(wide, target, reduction="none", **flags))


def _torch_backward(
    call: CrossEntropyCall, grads: Sequence[State], tensors: Sequence[Any], kept: Sequence[Tensor]
) -> list[State]:
    plain = call._replace(training=False)
    return recompute(lambda logits: _torch(plain, logits, tensors[1]), grads, tensors[:1])


BACKENDS = (
    Backend("triton", _triton_run, _triton.unfit, backward=_triton_backward),
    Backend("torch", _torch, lambda call: [], backward=_torch_backward),
    reference_backend(OP),
)
OP.backends = BACKENDS


def _prepare(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[CrossEntropyCall, Tensor, Tensor]:
    """The metadata of a call of the public function, and its tensors with rows."""
    name = "cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be none, mean or sum, but it is {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(
            f"{name}: label_smoothing must be between 0.0 and 1.0, but it is {label_smoothing}"
        )
    if logits.dim() not in (1, 2) or logits.shape[-1] == 0:
        raise RuntimeError(
            f"{name}: logits must be (N, V) or (V) with at least one class, "
            f"but their shape is {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point logits, but they are {logits.dtype}")
    if target.dtype != torch.int64:
        raise RuntimeError(f"{name}: expected target of int64, but it is {target.dtype}")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: target must have the shape {tuple(logits.shape[:-1])}, "
            f"but it has {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise RuntimeError(
            f"{name}: logits and target must be on one device, "
            f"but they are on {logits.device} and {target.device}"
        )
    context = "compile" if torch.compiler.is_compiling() else context_of(logits, [target])
    training = needs_gradient([logits])
    device = device_type(logits)
    call = CrossEntropyCall(
        logits.dtype, device, training, ignore_index, float(label_smoothing), context
    )
    if logits.dim() == 1:
        return call, logits.unsqueeze(0), target.unsqueeze(0)
    return call, logits, target


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, logits, _ = _prepare(*args, **options)
    sizes = f"N={logits.shape[0]} V={logits.shape[1]} {call.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    return Description("cross_entropy", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of classes given logits; shapes are in this file's docstring.

    RuntimeError or ValueError, as torch's, for tensors whose shapes, dtypes or devices do not fit
    and for a label_smoothing outside of [0, 1]; IndexError for a target that is no class.
    """
    call, rows, own = _prepare(logits, target, ignore_index, reduction, label_smoothing)
    flags = (ignore_index, call.label_smoothing)
    if call.context not in GRAPHS and select(BACKENDS, call).name == "torch":
        smoothing = call.label_smoothing
        return F.cross_entropy(
            logits,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )
    (losses,) = OP.emit(call, (rows, own), flags)
    dtype = torch.float32 if autocasting(call.device) else logits.dtype
    if reduction == "none":  # a copy, which may be changed: the op keeps its own for backward
        return losses.to(dtype, copy=True).view(target.shape)
    total = losses.sum()
    if reduction == "mean":
        total = total / (target != ignore_index).sum()
    return total.to(dtype)
