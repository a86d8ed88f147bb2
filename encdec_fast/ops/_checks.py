"""Is this input one that a recurrent network takes? If not, what torch would say of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_fast.ops._call import GATES, State

# By their number per direction.
WEIGHT_NAMES = {
    2: ("w_ih", "w_hh"),
    3: ("w_ih", "w_hh", "w_hr"),
    4: ("w_ih", "w_hh", "b_ih", "b_hh"),
    5: ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
}


def fits(
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    layers_and_directions: int,
    batch_first: bool,
    batch_sizes: Tensor | None,
    projected: bool,
) -> bool:
    """Whether input and states have the sizes, dtype and device that the first weights ask for.

    input: 3-D, or 2-D with batch_sizes. h0 and c0 are None or (layers · directions, B, size).
    """
    w_ih = weights[0]
    dtype = input.dtype
    shape = input.shape
    if batch_sizes is None:
        if len(shape) != 3 or shape[0 if not batch_first else 1] == 0:
            return False
    elif len(shape) != 2:
        return False
    if dtype is not w_ih.dtype or shape[-1] != w_ih.shape[1] or input.device != w_ih.device:
        return False
    if h0 is None:
        return c0 is None
    if batch_sizes is None:
        batch = shape[0] if batch_first else shape[1]
    elif torch.compiler.is_compiling():
        batch = h0.shape[1]  # the true one is a value, which a compiled graph does not know
    else:
        batch = int(batch_sizes[0])
    w_hh = weights[1]
    if h0.dtype is not dtype or h0.shape != (layers_and_directions, batch, w_hh.shape[1]):
        return False
    if h0.device != input.device:
        return False
    if c0 is None:
        return True
    hidden = w_hh.shape[0] // 4 if projected else w_hh.shape[1]
    return (
        c0.dtype is dtype
        and c0.shape == (layers_and_directions, batch, hidden)
        and c0.device == input.device
    )


def complain(
    name: str,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    layers_and_directions: int,
    batch_first: bool,
    batch_sizes: Tensor | None,
    projected: bool,
) -> None:
    """Raise what torch raises for arguments that do not fit; the arguments are those of `fits`."""
    w_ih, w_hh = weights[:2]
    if input.dtype != w_ih.dtype:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({input.dtype})"
        )
    expected = 3 if batch_sizes is None else 2
    if input.dim() != expected:
        raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
    if input.size(-1) != w_ih.size(1):
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {w_ih.size(1)}, got {input.size(-1)}"
        )
    if batch_sizes is not None:
        batch = int(batch_sizes[0])
    else:
        batch = input.size(0) if batch_first else input.size(1)
        if input.numel() == 0 and input.size(1 if batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if input.device != w_ih.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, "
            f"found input tensor at {input.device} and parameter tensor at {w_ih.device}"
        )
    hidden = w_hh.size(0) // 4 if projected else w_hh.size(1)
    for index, (state, size) in enumerate(((h0, w_hh.size(1)), (c0, hidden))):
        if state is None:
            continue
        wanted = (layers_and_directions, batch, size)
        if state.shape != wanted:
            which = f"hidden[{index}]" if name == "lstm" else "hidden"
            raise RuntimeError(f"Expected {which} size {wanted}, got {list(state.shape)}")
        if state.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {input.device} and hidden tensor at {state.device}"
            )
        if state.dtype != input.dtype:
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, "
                f"found input tensor with {input.dtype} and hidden tensor with {state.dtype}"
            )
    raise RuntimeError(f"{name}: h0 and c0 must both be given, or neither")


def checks_asked() -> bool:
    """Whether ENCDEC_FAST_CHECK=1 asks to look at values that lie on a GPU."""
    return os.environ.get("ENCDEC_FAST_CHECK") == "1"


def check_device_values(tensor: Tensor) -> bool:
    """Whether to look at what a tensor holds: on a GPU that waits for it, so only where asked for.

    ENCDEC_FAST_CHECK=1 asks for it.
    """
    return tensor.device.type == "cpu" or checks_asked()


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """RuntimeError unless they describe that many packed rows; as the C++ ops check them."""
    if (batch_sizes <= 0).any() or (batch_sizes.diff() > 0).any():
        raise RuntimeError("batch_sizes must be positive and must not rise")
    total = int(batch_sizes.sum())
    if total != rows:
        raise RuntimeError(f"batch_sizes add up to {total}, but there are {rows} packed rows")


def check_weights(kind: str, weights: list[Tensor]) -> None:
    """RuntimeError unless the weights of one direction agree in number, shape, dtype and device."""
    names = WEIGHT_NAMES.get(len(weights))
    if names is None:
        raise RuntimeError(f"{kind}: expected 2 to 5 weights per direction, got {len(weights)}")
    w_ih = weights[0]
    rows = w_ih.shape[0]
    hidden = rows // GATES[kind]
    size = weights[-1].shape[0] if names[-1] == "w_hr" else hidden
    shapes = {
        "w_ih": (hidden * GATES[kind], w_ih.shape[-1]),
        "w_hh": (rows, size),
        "b_ih": (rows,),
        "b_hh": (rows,),
        "w_hr": (size, hidden),
    }
    for name, weight in zip(names, weights, strict=True):
        if (
            weight.shape != shapes[name]
            or weight.dtype != w_ih.dtype
            or weight.device != w_ih.device
        ):
            raise RuntimeError(
                f"{kind}: {name} must have shape {shapes[name]}, {w_ih.dtype} on {w_ih.device}, "
                f"but it is {tuple(weight.shape)}, {weight.dtype} on {weight.device}"
            )


def check_devices(name: str, input: Tensor, weights: list[Tensor]) -> None:
    """RuntimeError unless all weights are where the input is: any of them may dispatch an op."""
    for weight in weights:
        if weight.device != input.device:
            raise RuntimeError(
                f"{name}: all weights must be on {input.device}, but one is on {weight.device}"
            )


def as_lengths(lengths: Tensor | Sequence[int], input: Tensor, batch_first: bool) -> Tensor:
    """`lengths` as an int64 CPU tensor (B,), checked against a 3-D input.

    Raises RuntimeError, as pack_padded_sequence does, for what is not a 1-D CPU tensor of integers,
    one per sequence, each from 1 to T. Under torch.compile the values are checked when it runs.
    """
    if isinstance(lengths, Tensor):
        integer = not (lengths.is_floating_point() or lengths.is_complex())
        if (
            lengths.dim() != 1
            or lengths.device.type != "cpu"
            or not integer
            or lengths.dtype == torch.bool
        ):
            raise RuntimeError(
                "'lengths' argument should be a 1D CPU int64 tensor, but got "
                f"{lengths.dim()}D {lengths.device} {lengths.dtype} tensor"
            )
        result = lengths.detach().to(torch.int64)
    else:
        if not isinstance(lengths, Sequence):
            raise RuntimeError(
                f"'lengths' must be a tensor or a sequence of int, but got {lengths!r}"
            )
        if not all(isinstance(length, int) for length in lengths):
            raise TypeError(f"'lengths' must be a tensor or a sequence of int, but got {lengths!r}")
        result = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    batch = input.shape[0] if batch_first else input.shape[1]
    if result.shape[0] != batch:
        raise RuntimeError(
            "Expected `len(lengths)` to be equal to batch_size, but got "
            f"{result.shape[0]} (batch_size={batch})"
        )
    return result


def as_resets(resets: Tensor, input: Tensor) -> Tensor:
    """`resets`, checked against an input: bool, its shape without the features, on its device."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"'resets' must be a tensor, but got {type(resets).__name__}")
    wanted = tuple(input.shape[:-1])
    if resets.dtype != torch.bool or tuple(resets.shape) != wanted:
        raise RuntimeError(
            f"'resets' must be a bool tensor of shape {wanted}, but got {tuple(resets.shape)} of "
            f"{resets.dtype}"
        )
    if resets.device != input.device:
        raise RuntimeError(
            f"'resets' must be on the input's device {input.device}, but it is on {resets.device}"
        )
    return resets


def check_length_values(lengths: Tensor, steps: int) -> None:
    """RuntimeError unless every length is from 1 to `steps`; reads the values, on the CPU."""
    values: list[int] = lengths.tolist()
    if not values:
        return
    if min(values) <= 0:
        raise RuntimeError(
            "Length of all samples has to be greater than 0, "
            "but found an element in 'lengths' that is <= 0"
        )
    if max(values) > steps:
        raise RuntimeError(
            f"Length of all samples has to be at most the number of steps, {steps}, "
            f"but found {max(values)} in 'lengths'"
        )


def split_states(name: str, hx: Any) -> tuple[State, State]:
    """(h0, c0) of a network's or a cell's `hx`: a pair for the LSTM, one tensor for the others."""
    if hx is None:
        return None, None
    if name != "lstm":
        if not isinstance(hx, Tensor):
            raise TypeError(f"{name}: hx must be a tensor, but it is {type(hx).__name__}")
        return hx, None
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    if len(states) != 2 or not all(isinstance(state, Tensor) for state in states):
        kinds = ", ".join(type(state).__name__ for state in states)
        # As torch has it: tensors, but not two of them, are another error than no tensors.
        error = RuntimeError if isinstance(hx, (tuple, list)) and len(hx) > 2 else TypeError
        raise error(f"lstm: hx must be a pair of tensors (h_0, c_0), but it is ({kinds})")
    return states[0], states[1]
