"""Put the fast modules into a model that already exists, and take them out again.

A module is swapped by giving it another class: the object, its parameters, hooks, training flag,
device and place in the model stay what they are, so whatever else refers to them still does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from encdec_fast.nn._parts import why_called
from encdec_fast.nn._transformer import Whole
from encdec_fast.nn.bridge import GatedBridge
from encdec_fast.nn.cells import GRUCell, LSTMCell, RNNCell
from encdec_fast.nn.gru import GRU
from encdec_fast.nn.layer_norm import LayerNorm
from encdec_fast.nn.linear import Linear
from encdec_fast.nn.lstm import LSTM
from encdec_fast.nn.multihead_attention import MultiheadAttention
from encdec_fast.nn.rnn import RNN
from encdec_fast.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from encdec_fast.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer
from encdec_fast.ops._call import WEIGHT_DTYPES

_M = TypeVar("_M", bound=torch.nn.Module)

_SWAPS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNN: RNN,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
    torch.nn.RNNCell: RNNCell,
    torch.nn.Linear: Linear,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
    torch.nn.Transformer: Transformer,
}
_OURS = frozenset(_SWAPS.values()) | {GatedBridge}
_BEFORE = "_before_optimize"  # on a module that `optimize` changed: (its class, its weight_dtype)


@dataclass(frozen=True)
class ReportLine:
    """What became of one module.

    name: its path, "" for the root. kind: its class. fast: whether it is a module of this package.
    weight_dtype: in which inference holds its weights, None for that of the parameters. reason: why
    it was left alone, if it was.
    """

    name: str
    kind: str
    fast: bool
    weight_dtype: torch.dtype | str | None
    reason: str


class OptimizationReport(list[ReportLine]):
    """Every module of a model that this package has a fast form of; `print` it.

    A Linear of a bridge or an attention of this package whose weight the op of that module reads is
    left alone: it is never called.
    """

    def __str__(self) -> str:
        if not self:
            return "no module that encdec_fast has a fast form of"
        lines = []
        for line in self:
            what = "fast" if line.fast else f"left alone: {line.reason}"
            if line.weight_dtype is not None:
                what += f", weights in {line.weight_dtype}"
            lines.append(f"{line.name or '(root)'}: {line.kind}: {what}")
        return "\n".join(lines)


def _read(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The parts whose weights the op of the module around them reads, and that module's class."""
    found: dict[torch.nn.Module, str] = {}
    for module in model.modules():
        reads = getattr(module, "_reads", None)
        if (
            reads
            and type(module).__module__.startswith("encdec_fast.")
            and not why_called(module, reads)
        ):
            for name in reads:
                found[module.get_submodule(name)] = type(module).__name__
    return found


def _why_left(module: torch.nn.Module, read: dict[torch.nn.Module, str]) -> str | None:
    """Why `optimize` leaves a module alone, "" if it swaps it, None if it does not know it."""
    kind = type(module)
    if module in read and kind in _SWAPS:
        return f"the op of {read[module]} reads its weight, and never calls it"
    if kind is NonDynamicallyQuantizableLinear:  # the attention that it belongs to computes it
        return None
    if kind not in _SWAPS and kind not in _OURS:
        base = next((base for base in _SWAPS if isinstance(module, base)), None)
        if base is None:
            return None
        if parametrize.is_parametrized(module):
            return "it is parametrized, so its weights are computed anew in every call"
        return f"it is a subclass of torch.nn.{base.__name__}, and may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return ""


def _has_weights(module: torch.nn.Module) -> bool:
    """Whether a module of this package has a weight_dtype, and not merely parts that do."""
    return not isinstance(module, Whole) and hasattr(type(module), "weight_dtype")


def optimize(model: _M, weight_dtype: torch.dtype | str | None = None) -> _M:
    """Swap the parts of `model` that this package has a fast form of, in place; return `model`.

    Exactly torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell, Linear, LayerNorm,
    MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder,
    TransformerDecoder and Transformer are swapped; subclasses and parametrized modules are left
    alone, and `optimization_report(model)` says so; so are the parts of this package's own modules
    that their ops compute. Of those modules GatedBridge has a weight_dtype, and it is set.
    Parameters, state_dict, hooks and weight tying stay as they are. Doing it again changes nothing
    but weight_dtype; `restore` undoes it.

    weight_dtype: None, torch.bfloat16, or "int8" (symmetric, one scale per row): the dtype in which
    inference holds the weights. The parameters keep theirs. Where a gradient is needed, a module
    with a weight_dtype raises RuntimeError. ValueError for any other weight_dtype.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype must be None, torch.bfloat16 or 'int8', but it is {weight_dtype!r}"
        )
    read = _read(model)
    for module in model.modules():
        if _why_left(module, read) == "":
            changed: Any = module
            kind = type(module)
            if _BEFORE not in module.__dict__:
                before = getattr(module, "weight_dtype", None) if _has_weights(module) else None
                changed._before_optimize = (kind, before)
            if kind in _SWAPS:
                changed.__class__ = _SWAPS[kind]
            if _has_weights(module):
                changed.weight_dtype = weight_dtype
    return model


def restore(model: _M) -> _M:
    """Undo `optimize`, in place; return `model`. What it did not change stays as it is.

    So does a module whose class is no longer the one that `optimize` gave it, as that of one which
    was parametrized since: remove the parametrization first, or do it again after that.
    """
    for module in model.modules():
        before = module.__dict__.get(_BEFORE)
        if before is not None and type(module) is _SWAPS.get(before[0], before[0]):
            changed: Any = module
            del changed.__dict__[_BEFORE]
            changed.__class__ = before[0]
            if before[0] in _SWAPS:
                changed.__dict__.pop("weight_dtype", None)
            elif _has_weights(module):
                changed.weight_dtype = before[1]
    return model


def optimization_report(model: torch.nn.Module) -> OptimizationReport:
    """What `optimize` did with the parts of `model`, or would do: one line per module it knows."""
    report = OptimizationReport()
    read = _read(model)
    for name, module in model.named_modules():
        reason = _why_left(module, read)
        if reason is not None:
            kind = type(module)
            fast = kind in _OURS
            if not fast and not reason:
                reason = "optimize has not been called"
            title = f"{kind.__module__.split('.')[0]}.nn.{kind.__name__}"
            if kind not in _OURS and kind not in _SWAPS:
                title = f"{kind.__module__}.{kind.__qualname__}"
            dtype = getattr(module, "weight_dtype", None)
            report.append(ReportLine(name, title, fast, dtype, "" if fast else reason))
    return report
