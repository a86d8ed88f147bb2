"""The `cpu` backend: the C++ kernels of csrc/rnn, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Backend, library, requested_backend
from encdec_fast.ops._call import CELLS, GATES, LayerResult, RecurrentCall, State, watched
from encdec_fast.ops._checks import check_weights
from encdec_fast.ops._packing import found, kept, settled, with_rows

# As rnn_pack numbers them: the dtype of a call, or its weight_dtype.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, "bfloat16": 1, "int8": 3}
CONTEXTS = {
    "autocast": "torch.autocast is on",
    "grad": "torch.func transforms it",
    "transform": "torch.func or forward-mode autograd transforms it",
    "subclass": "a tensor is of a type that is not torch's own",
}


def unfit(call: Any) -> list[str]:
    """Reasons against every kernel for the CPU; call: metadata with device, dtype and context."""
    reasons = []
    if library.ops_reason():
        reasons.append(library.ops_reason())
    if call.device != "cpu":
        reasons.append(f"the tensors are on {call.device}")
    return reasons + unsuited(call)


def unsuited(call: Any) -> list[str]:
    """Reasons against every kernel of this package, wherever it runs."""
    reasons = []
    if call.dtype not in FORMATS:
        reasons.append(f"dtype {call.dtype} is none of float32, bfloat16, float16")
    if call.context in CONTEXTS:
        reasons.append(CONTEXTS[call.context])
    return reasons


def why_not(call: RecurrentCall) -> list[str]:
    reasons = unfit(call)
    if call.training and call.dtype == torch.float16:
        reasons.append("it trains in float32 and bfloat16, not in float16")
    if call.training and call.projected:
        reasons.append("it has no gradients for proj_size")
    if call.training and call.ragged == "step":
        reasons.append("where a gradient is needed a single step is torch's")
    if call.ragged == "resets":
        reasons.append("it has no resets")
    if call.empty:
        reasons.append("the batch is empty")
    return reasons


def make_pack(kind: str, weights: list[Tensor], weight_format: int) -> Tensor:
    """One direction's weights, w_ih, w_hh, b_ih, b_hh, w_hr without those that are not there."""
    check_weights(kind, weights)
    packed: Tensor = torch.ops.encdec_fast_cpu.rnn_pack(CELLS[kind], weights, weight_format)
    return packed


def _pack(call: RecurrentCall, weights: list[Tensor], again: bool = False) -> list[Tensor]:
    kind = call.kind
    weight_format = FORMATS[call.weight_dtype or call.dtype]
    if not call.bidirectional:
        return [kept(kind, weights, weight_format, make_pack, again=again)]
    half = len(weights) // 2
    if weights[0].shape != weights[half].shape or weights[1].shape != weights[half + 1].shape:
        raise RuntimeError(f"{kind}: both directions must have weights of the same shapes")
    return [
        kept(kind, weights[:half], weight_format, make_pack, again=again),
        kept(kind, weights[half:], weight_format, make_pack, again=again),
    ]


def _rows(tensor: State) -> State:
    return None if tensor is None else with_rows(tensor)


def _whole(tensor: State) -> State:
    return None if tensor is None else tensor.contiguous()


@functools.cache
def _rnn_forward() -> Any:
    return torch.ops.encdec_fast_cpu.rnn_forward.default


def _results(kind: str, cell_states: bool, result: list[Tensor]) -> LayerResult:
    if kind != "lstm":
        return result[0], result[1], None, None
    return result[0], result[1], result[2], result[3] if cell_states else None


def run(
    call: RecurrentCall,
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
) -> LayerResult:
    kind, cell_states, forward = call.kind, call.cell_states, _rnn_forward()
    states = (None, None) if h0 is None else (h0.contiguous(), _whole(c0))
    lengths = None if lengths is None else lengths.contiguous()
    rest = (*states, lengths, batch_sizes, call.batch_first, cell_states, False)
    input = with_rows(input)

    def result_of(weights: list[Tensor], again: bool) -> list[Tensor]:
        # Nothing comes back where the values are not those that were packed.
        result: list[Tensor] = forward(
            CELLS[kind], input, weights, _pack(call, weights, again), *rest
        )
        return result

    return _results(kind, cell_states, settled(weights, result_of))


def run_again(
    kind: str,
    input: Tensor,
    weights: list[Tensor],
    weight_dtype: str,
    batch_first: bool,
    cell_states: bool,
) -> LayerResult | None:
    """What `run` gives for one layer and direction from zero states, in half the time of asking.

    input: 3-D, a torch.Tensor and no subclass. None wherever there is anything to ask or to
    complain of: a gradient, a transform, a tracer, another backend, weights that are not packed.
    """
    w_ih = weights[0]
    dtype = input.dtype
    if (
        watched()
        or requested_backend() not in (None, "cpu")
        or not input.is_cpu
        or dtype is not w_ih.dtype
        or dtype not in FORMATS
        or input.shape[2] != w_ih.shape[1]
        or input.stride(2) != 1
        or input.numel() == 0
    ):
        return None
    packed = found(kind, weights, FORMATS[weight_dtype or dtype])
    if packed is None:
        return None
    rest = (None, None, None, None, batch_first, cell_states, False)
    result = _rnn_forward()(CELLS[kind], input, weights, [packed], *rest)
    if not result:  # other values than those that were packed
        return None
    return _results(kind, cell_states, result)


def train(
    call: RecurrentCall,
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
) -> tuple[Tensor, Tensor, State, State, Tensor]:
    # The weights are about to change: they are packed for this call only.
    for d in range(call.directions):
        check_weights(call.kind, weights[d * call.weights : (d + 1) * call.weights])
    result = _rnn_forward()(
        CELLS[call.kind],
        with_rows(input),
        [with_rows(weight) for weight in weights],
        [],
        _whole(h0),
        _whole(c0),
        _whole(lengths),
        batch_sizes,
        call.batch_first,
        call.cell_states,
        True,
    )
    if call.kind != "lstm":
        return result[0], result[1], None, None, result[2]
    return result[0], result[1], result[2], result[3], result[4]


def backward(
    call: RecurrentCall,
    grads: tuple[State, State, State, State],
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
    output: Tensor,
    cells: State,
    gates: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor, State]:
    grad_output, grad_h_n, grad_c_n, grad_cells = grads
    directions, saved = call.directions, 4 if call.kind in ("lstm", "gru") else 0
    # Real steps come first; behind them there is room for as many steps as the shapes allow.
    rows = output.shape[0] if batch_sizes is not None else output.shape[0] * output.shape[1]
    if lengths is not None:
        rows = int(lengths.sum())
    hidden = output.shape[-1] // directions
    used = gates[: directions * rows * saved * hidden].view(directions, rows, saved, hidden)
    result: list[Any] = torch.ops.encdec_fast_cpu.rnn_backward.default(
        CELLS[call.kind],
        with_rows(input),
        [with_rows(weight) for weight in weights],
        _whole(h0),
        _whole(c0),
        _whole(lengths),
        batch_sizes,
        call.batch_first,
        output,
        cells,
        used,
        _rows(grad_output),
        _whole(grad_h_n),
        _whole(grad_c_n),
        _rows(grad_cells),
    )
    if call.kind != "lstm":
        return result[0], result[2:], result[1], None
    return result[0], result[3:], result[1], result[2]


def plan(call: RecurrentCall, steps: int, rows: int, batch: int, weights: list[Tensor]) -> str:
    """How the kernels would cut a layer of a call, in words; empty without the compiled module.

    rows: the number of real steps over all sequences.
    """
    if library.extension is None:
        return ""
    hidden = weights[1].shape[0] // GATES[call.kind]
    number = FORMATS[call.weight_dtype or call.dtype]
    text: str = library.extension.rnn_plan(
        CELLS[call.kind],
        steps,
        rows,
        batch,
        weights[0].shape[1],
        hidden,
        weights[1].shape[1],
        call.directions,
        ("float32", "bfloat16", "float16", "int8")[number],
        torch.get_num_threads(),
    )
    return text


INFERENCE = Backend("cpu", run, why_not)
TRAINING = Backend("cpu", train, why_not, backward=backward)
