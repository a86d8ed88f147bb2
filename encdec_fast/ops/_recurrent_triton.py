"""The `triton` backend of lstm, gru and rnn: triton_kernels/recurrent.py and torch's products."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from encdec_fast.backends import Backend
from encdec_fast.ops import _recurrent_gpu, _triton
from encdec_fast.ops._call import RecurrentCall, State
from encdec_fast.ops._recurrent_gpu import Sequences


def why_not(call: RecurrentCall) -> list[str]:
    reasons = _triton.unfit(call)
    if call.ragged == "resets":
        reasons.append("it has no resets")
    return reasons if _triton.missing() else reasons + _recurrent_gpu.unsuited(call, "triton")


def _walk(sequences: Sequences) -> Any:
    """The same for the kernels, which find padded rows by their places only."""
    T, B, rows, step, sequence, lengths, starts, places = sequences[:8]
    if places is not None:
        step = sequence = 0
    return _triton.kernels("recurrent").Walk(T, B, rows, step, sequence, lengths, starts, places)


def _in_one(call: RecurrentCall, weight: Tensor, B: int) -> bool:
    sizes = (B, weight.shape[2], weight.shape[0], weight.dtype)
    whole: bool = _triton.kernels("recurrent").whole(call.kind, *sizes)
    return whole


class _Kernels:
    """`_recurrent_gpu.Kernels` in Triton."""

    @staticmethod
    def forward(
        call: RecurrentCall,
        products: Tensor,
        weight: Tensor,
        bias: State,
        h0: State,
        *rest: Any,
    ) -> None:
        *tensors, sequences, _ = rest
        D, _, H = weight.shape
        states = weight.new_zeros(2, D, sequences.B, H)
        if h0 is not None:
            states[:] = h0
        _triton.kernels("recurrent").forward(
            call.kind,
            products,
            weight,
            bias,
            states,
            *tensors,
            _walk(sequences),
            _in_one(call, weight, sequences.B),
        )

    @staticmethod
    def backward(
        call: RecurrentCall,
        grad_output: State,
        grad_h_n: State,
        grad_cells: State,
        weight: Tensor,
        *rest: Any,
    ) -> None:
        *tensors, sequences = rest
        _triton.kernels("recurrent").backward(
            call.kind,
            grad_output,
            grad_h_n,
            grad_cells,
            weight,
            *tensors,
            _walk(sequences),
            _in_one(call, weight, sequences.B),
        )


def plan(call: RecurrentCall, batch: int, hidden: int) -> str:
    """How the kernels would go through the steps, in words."""
    sizes = (call.kind, batch, hidden, call.directions, call.dtype)
    in_one = _triton.kernels("recurrent").whole(*sizes)
    return "all steps in one launch" if in_one else "a launch for each step"


INFERENCE = Backend("triton", partial(_recurrent_gpu.run, _Kernels), why_not)
TRAINING = Backend(
    "triton",
    partial(_recurrent_gpu.train, _Kernels),
    why_not,
    backward=partial(_recurrent_gpu.backward, _Kernels),
)
