"""Recurrent layers on a GPU: torch's products, and a kernel for what depends on the step before.

The products with the input are made for all steps at once, and so are backward's of the input and
of the weights. What is between them, the recurrence, is one of `Kernels`: _recurrent_cuda.py's
keeps the weights on the chip, _recurrent_triton.py's reads them again in each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from encdec_fast.backends import requested_backend
from encdec_fast.ops import _triton
from encdec_fast.ops._call import LayerResult, RecurrentCall, State, without_autocast
from encdec_fast.ops._checks import check_batch_sizes, check_weights
from encdec_fast.ops._torch import why_not as torch_why_not

# Numbers of a row of gates' gradients, in hidden sizes: the GRU's new gate has two, one for the
# product with x and one, times r, for that with h.
_SEGMENTS = {"lstm": 4, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}


class Sequences(NamedTuple):
    """How a call's sequences lie: for the kernels, and in the order of their lengths.

    Sequences are numbered longest first. A row is one step of one sequence: number starts[t] + r of
    those that there are, or, without `starts`, where it lies in the input: t * step + r * sequence.
    rows: that there is room for, of padded sequences T * B, so that what is made is as large for
    all lengths. lengths: int32 (B); starts: int64 (T). Of padded input with lengths only: places,
    int64 (rows), where a row lies in the input; real, those of the rows that there are; order,
    back: int64 (B), sequence numbers sorted and sorted back. resets: bool (rows), whether the state
    before a row is zero.
    """

    T: int
    B: int
    rows: int
    step: int
    sequence: int
    lengths: State = None
    starts: State = None
    places: State = None
    real: State = None
    order: State = None
    back: State = None
    resets: State = None

    def sorted(self, state: State) -> State:
        """(D, B, size) in the kernels' order, contiguous."""
        if state is None or self.order is None:
            return None if state is None else state.contiguous()
        return state.index_select(1, self.order)

    def unsorted(self, state: Tensor) -> Tensor:
        return state if self.back is None else state.index_select(1, self.back)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The real rows of a tensor that is laid out as the input, (rows, size)."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        return rows if self.real is None else rows.index_select(0, self.real)


class Kernels(Protocol):
    """The recurrence of a layer; tensors as in triton_kernels/recurrent_kernels.py.

    weight: (D, gates * H, H). h0: (D, B, H) or None. c: float32 (D, B, H), before and after. With
    layers above (`input_weight` (layers - 1, gates * H, H) and float32 `input_bias` of the same
    gates, or None) these are of all layers in place of directions, and output is the last one's.
    """

    def forward(
        self,
        call: RecurrentCall,
        products: Tensor,
        weight: Tensor,
        bias: State,
        h0: State,
        c: State,
        output: Tensor,
        cells: State,
        gates: State,
        h_n: Tensor,
        sequences: Sequences,
        above: tuple[Tensor, State] | None,
    ) -> None: ...

    def backward(
        self,
        call: RecurrentCall,
        grad_output: State,
        grad_h_n: State,
        grad_cells: State,
        weight: Tensor,
        gates: State,
        output: Tensor,
        cells: State,
        h0: State,
        c0: State,
        grads: Tensor,
        previous: Tensor,
        carry: State,
        grad_h0: State,
        sequences: Sequences,
    ) -> None: ...


def unsuited(call: RecurrentCall, backend: str) -> list[str]:
    """What speaks against either kind of kernels; backend: its name."""
    reasons = []
    if call.weight_dtype:
        reasons.append(f"it has no weights held in {call.weight_dtype}")
    if call.projected:
        reasons.append("it has no proj_size")
    if call.training and call.ragged == "step":
        reasons.append("where a gradient is needed a single step is torch's")
    if call.empty:
        reasons.append("the batch is empty")
    # Nothing has been measured: what vendors wrote for this very call goes first.
    if call.device == "cuda" and not torch_why_not(call) and requested_backend() != backend:
        reasons.append("torch's own kernel for this device goes first")
    return reasons


def _sequences(call: RecurrentCall, input: Tensor, lengths: State, batch_sizes: State) -> Sequences:
    device = input.device
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, input.shape[0])
        T, B = batch_sizes.numel(), int(batch_sizes[0])
        counts = (batch_sizes.unsqueeze(1) > torch.arange(B, device="cpu")).sum(0).int()
        starts = batch_sizes.cumsum(0) - batch_sizes
        return Sequences(T, B, input.shape[0], 0, 0, counts.to(device), starts.to(device))
    B, T = input.shape[:2] if call.batch_first else (input.shape[1], input.shape[0])
    step, sequence = (1, T) if call.batch_first else (B, 1)
    if lengths is None:
        return Sequences(T, B, T * B, step, sequence)
    if lengths.dtype == torch.bool:
        return Sequences(T, B, T * B, step, sequence, resets=lengths.flatten().contiguous())
    longest_first, order = lengths.sort(descending=True, stable=True)
    steps = torch.arange(T, device="cpu").unsqueeze(1)
    there = steps < longest_first  # [T, B]
    real = (steps * step + order * sequence)[there]
    places = real.new_zeros(T * B)
    places[: real.numel()] = real
    sizes = there.sum(1)
    own, starts, places, order, back = (
        t.to(device)
        for t in (longest_first.int(), sizes.cumsum(0) - sizes, places, order, order.argsort())
    )
    ragged = (own, starts, places, places[: real.numel()], order, back)
    return Sequences(T, B, T * B, step, sequence, *ragged)


def _products(x: Tensor, weight: Tensor, bias: State, rows: int) -> Tensor:
    """x weight' + bias in float32, with room for `rows`: (rows, features)."""
    found = x.new_empty(rows, weight.shape[0], dtype=torch.float32)
    real = found[: x.shape[0]]
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=real)
    else:
        torch.mm(x.float(), weight.t().float(), out=real)
    if bias is not None:
        real += bias
    return found


def _split(call: RecurrentCall, weights: list[Tensor]) -> list[list[Tensor]]:
    """w_ih, w_hh and the biases, each with those of all directions."""
    own = [weights[d * call.weights : (d + 1) * call.weights] for d in range(call.directions)]
    for one in own:
        check_weights(call.kind, one)
        if one[0].shape != own[0][0].shape or one[1].shape != own[0][1].shape:
            raise RuntimeError(f"{call.kind}: both directions must have weights of the same shapes")
    return [list(kind) for kind in zip(*own, strict=True)]


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].contiguous().unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _biases(call: RecurrentCall, kinds: list[list[Tensor]]) -> tuple[State, State]:
    """(what the input's products start from, what the GRU's new gate adds to its product of h)."""
    if not call.bias:
        return None, None
    of_x, of_h = (torch.stack(kind).float() for kind in kinds[2:])
    if call.kind != "gru":
        return (of_x + of_h).flatten(), None
    hidden = of_h.shape[1] // 3
    inner = of_h[:, 2 * hidden :].contiguous()
    of_x[:, : 2 * hidden] += of_h[:, : 2 * hidden]
    return of_x.flatten(), inner


def _forward(
    kernels: Kernels,
    call: RecurrentCall,
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
    layers_above: Sequence[list[Tensor]] = (),
) -> tuple[Tensor, Tensor, State, State, State]:
    sequences = _sequences(call, input, lengths, batch_sizes)
    kinds = _split(call, weights)
    lstm, D, H = call.kind == "lstm", call.directions, kinds[1][0].shape[1]
    start, inner = _biases(call, kinds)
    products = _products(sequences.rows_of(input), _joined(kinds[0]), start, sequences.rows)
    hidden, above = kinds[1], None
    if layers_above:
        rest = [_biases(call, _split(call, own)) for own in layers_above]
        bias = torch.stack([own for own, _ in rest if own is not None]) if call.bias else None
        above = _stacked([own[0] for own in layers_above]), bias
        hidden = [*hidden, *(own[1] for own in layers_above)]
        if inner is not None:
            inner = torch.cat([inner, *(own for _, own in rest if own is not None)])
    groups = len(hidden)
    new = input.new_empty if lengths is None else input.new_zeros
    output = new(*input.shape[:-1], D * H)
    cells = torch.zeros_like(output) if lstm and (call.cell_states or call.training) else None
    gates = None
    if call.training and call.kind in ("lstm", "gru"):
        gates = input.new_empty(output.numel() * 4)
    c = None
    if lstm:
        first = sequences.sorted(c0)
        c = input.new_zeros(groups, sequences.B, H, dtype=torch.float32)
        if first is not None:
            c.copy_(first)
    h_n = input.new_empty(groups, sequences.B, H)
    tensors = (products, _stacked(hidden), inner, sequences.sorted(h0), c, output, cells, gates)
    kernels.forward(call, *tensors, h_n, sequences, above)
    c_n = None if c is None else sequences.unsorted(c).to(input.dtype)
    return output, sequences.unsorted(h_n), c_n, cells, gates


def run(kernels: Kernels, call: RecurrentCall, input: Tensor, *layer: Any) -> LayerResult:
    """layer: weights, h0, c0, lengths, batch_sizes, and where they share a launch those above."""
    with torch.cuda.device_of(input):
        return _forward(kernels, call, input, *layer)[:4]


def train(
    kernels: Kernels, call: RecurrentCall, input: Tensor, *layer: Any
) -> tuple[Tensor, Tensor, State, State, State]:
    with torch.cuda.device_of(input):
        return _forward(kernels, call, input, *layer)


def _grads_of_weights(
    call: RecurrentCall, grads: Tensor, x: Tensor, previous: Tensor
) -> list[Tensor]:
    """Of w_ih, w_hh and the biases; grads (rows, segments · H) and previous of one direction."""
    H = previous.shape[1]
    if call.kind == "gru":
        of_x, of_h = grads[:, : 3 * H], torch.cat([grads[:, : 2 * H], grads[:, 3 * H :]], 1)
    else:
        of_x = of_h = grads
    found = [of_x.t() @ x, of_h.t() @ previous]
    if call.bias:
        found += [of_x.sum(0), of_h.sum(0)]
    return found


def _backward(
    kernels: Kernels,
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
    gates: State,
) -> tuple[Tensor, list[Tensor], State, State]:
    sequences = _sequences(call, input, lengths, batch_sizes)
    grad_output, grad_h_n, grad_c_n, grad_cells = _triton.contiguous(grads, input.device)
    kinds = _split(call, weights)
    lstm, D, H = call.kind == "lstm", call.directions, kinds[1][0].shape[1]
    segments = _SEGMENTS[call.kind]
    of_gates = input.new_empty(sequences.rows, D * segments * H)
    previous = input.new_empty(sequences.rows, D * H)
    carry, saved = None, call.kind in ("lstm", "gru")
    if saved:
        carry = input.new_zeros(D, sequences.B, H, dtype=torch.float32)
    if carry is not None and lstm and grad_c_n is not None:
        carry.copy_(sequences.sorted(grad_c_n))  # type: ignore[arg-type]
    grad_h0 = None if h0 is None else input.new_empty(D, sequences.B, H)
    kernels.backward(
        call,
        grad_output,
        sequences.sorted(grad_h_n),
        grad_cells,
        _stacked(kinds[1]),
        gates if saved else None,
        output,
        cells,
        sequences.sorted(h0),
        sequences.sorted(c0),
        of_gates,
        previous,
        carry,
        grad_h0,
        sequences,
    )
    x = sequences.rows_of(input)
    previous = previous[: x.shape[0]]
    by_direction = of_gates[: x.shape[0]].view(-1, D, segments * H)
    read_by_x = by_direction[:, :, : kinds[0][0].shape[0]].flatten(1)
    grad_rows = read_by_x @ _joined(kinds[0])
    if sequences.real is None:
        grad_input = grad_rows.view(input.shape)
    else:
        grad_input = torch.zeros_like(input, memory_format=torch.contiguous_format)
        grad_input.view(-1, input.shape[-1]).index_copy_(0, sequences.real, grad_rows)
    grad_weights = [
        grad
        for d in range(D)
        for grad in _grads_of_weights(call, by_direction[:, d], x, previous[:, d * H : (d + 1) * H])
    ]
    grad_c0 = None
    if lstm and c0 is not None and carry is not None:
        grad_c0 = sequences.unsorted(carry).to(input.dtype)
    return (
        grad_input,
        grad_weights,
        None if grad_h0 is None else sequences.unsorted(grad_h0),
        grad_c0,
    )


def backward(
    kernels: Kernels,
    call: RecurrentCall,
    grads: tuple[State, State, State, State],
    input: Tensor,
    *rest: Any,
) -> tuple[Tensor, list[Tensor], State, State]:
    with torch.cuda.device_of(input), without_autocast(call.device):
        return _backward(kernels, call, grads, input, *rest)
