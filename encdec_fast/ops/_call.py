"""What a backend needs to know of a call of a recurrent layer: its metadata, never its values."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from encdec_fast.backends import requested_backend

State: TypeAlias = Tensor | None
# output, h_n, c_n (LSTM only), every c_t (LSTM only, where asked for)
LayerResult: TypeAlias = tuple[Tensor, Tensor, State, State]

_NOTHING = contextlib.nullcontext()
PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # as the C++ ops number them
GRAPHS = ("compile", "dispatch")  # contexts in which sizes may be symbols, and the op is called
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
WEIGHT_DTYPES = {None: "", torch.bfloat16: "bfloat16", "bfloat16": "bfloat16", "int8": "int8"}


class RecurrentCall(NamedTuple):
    """One layer of a recurrent network, as its backends see it.

    kind: lstm, gru, rnn_tanh or rnn_relu. weights: tensors per direction, 2 to 5.
    weight_dtype: "" (that of the parameters), "bfloat16" or "int8".
    ragged: "" (all sequences have T steps), "lengths" (padded), "packed" (PackedSequence), "resets"
        (T steps, and before some of them the state is zero) or "step" (a cell: one step).
    context: "" for plain tensors, or what stands between the call and its values; see `context_of`.
    recurrence: (sequences, hidden size, device number) where a GPU's kernels must say whether they
        hold it; None elsewhere.
    """

    kind: str
    dtype: torch.dtype
    device: str
    training: bool
    weights: int
    bidirectional: bool
    batch_first: bool
    cell_states: bool
    weight_dtype: str
    ragged: str
    context: str
    empty: bool
    recurrence: tuple[int, int, int] | None = None

    @property
    def bias(self) -> bool:
        return self.weights >= 4

    @property
    def projected(self) -> bool:
        return self.weights in (3, 5)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def make_call(
    kind: str,
    layer: Sequence[Any],
    bidirectional: bool,
    batch_first: bool,
    cell_states: bool = False,
    weight_dtype: str = "",
    training: bool = False,
) -> RecurrentCall:
    """The metadata of a call of an op; layer: input, weights, h0, c0, lengths, batch_sizes."""
    input, weights, _, _, lengths, batch_sizes = layer
    return RecurrentCall(
        kind,
        input.dtype,
        device_type(input),
        training,
        len(weights) // 2 if bidirectional else len(weights),
        bidirectional,
        batch_first,
        cell_states,
        weight_dtype,
        ragged_by(lengths, batch_sizes),
        "",
        False,
        recurrence_of(kind, input, weights, batch_sizes, batch_first),
    )


def device_type(tensor: Tensor) -> str:
    """`tensor.device.type`, without making a string of it where that is not needed."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def ragged_by(lengths: State, batch_sizes: State) -> str:
    """`RecurrentCall.ragged`. What ops name lengths are resets where they are bool."""
    if lengths is None:
        return "" if batch_sizes is None else "packed"
    return "resets" if lengths.dtype == torch.bool else "lengths"


def recurrence_of(
    kind: str, input: Tensor, weights: Sequence[Tensor], batch_sizes: State, batch_first: bool
) -> tuple[int, int, int] | None:
    """`RecurrentCall.recurrence`; the sizes must not be symbols."""
    if not (input.is_cuda or requested_backend() == "cuda") or input.is_meta:
        return None
    if batch_sizes is not None:
        B = int(batch_sizes[0]) if batch_sizes.numel() else 0
    else:
        B = input.shape[0 if batch_first else 1]
    return B, weights[1].shape[0] // GATES[kind], input.get_device()


def context_of(input: Tensor, weights: list[Tensor]) -> str:
    """What stands between this call and the values of its tensors.

    "": nothing. "dispatch": a dispatch mode or a tracer watches, so the generic op must be called.
    "grad": torch.func's grad or vjp only. "transform": vmap, jvp and the like, or forward-mode
    gradients. "subclass": a tensor type that is not torch's own.
    """
    if torch._C._are_functorch_transforms_active():
        return _transform()
    if forward_ad._current_level >= 0:
        return "transform"
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return "dispatch"
    if type(input) not in PLAIN_TYPES:
        return "subclass"
    for weight in weights:
        if type(weight) not in PLAIN_TYPES:
            return "subclass"
    return ""


def watched() -> bool:
    """Whether anything may stand between a call and the values of its tensors, a gradient wanted.

    Asks less than `context_of` and knows less: where it says no, plain tensors are all there is.
    """
    c = torch._C
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or c._is_any_autocast_enabled()
        or c._are_functorch_transforms_active()
        or c._len_torch_dispatch_stack() > 0
        or c._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _transform() -> str:
    stack: Any = torch._C._functorch.get_interpreter_stack()
    grad = torch._C._functorch.TransformType.Grad
    return "grad" if all(level.key() == grad for level in stack) else "transform"


def autocasting(device: str) -> bool:
    """Whether torch.autocast is on for tensors of this device."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """For gradients: torch.autocast off, which may be on around backward and not around forward."""
    return torch.autocast(device, enabled=False) if autocasting(device) else _NOTHING


def needs_grad(input: Tensor, h0: State, c0: State, weights: list[Tensor]) -> bool:
    """Whether autograd will want the gradient of something in this call."""
    if not torch.is_grad_enabled():
        return False
    if input.requires_grad:
        return True
    for weight in weights:
        if weight.requires_grad:
            return True
    return (h0 is not None and h0.requires_grad) or (c0 is not None and c0.requires_grad)


def needs_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd will want the gradient of one of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def weight_dtype_name(weight_dtype: torch.dtype | str | None, training: bool) -> str:
    """As a call holds it. ValueError for none that there is; RuntimeError for one in training."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype must be None, torch.bfloat16 or 'int8', but it is {weight_dtype!r}"
        )
    name = WEIGHT_DTYPES[weight_dtype]
    if name and training:
        raise RuntimeError(
            f"weight_dtype={name!r} is for inference, and a gradient is needed here: "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    return name
