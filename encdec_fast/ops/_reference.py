"""What the references share: a layer unrolled step by step, in plain and differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Backend
from encdec_fast.ops._call import LayerResult, RecurrentCall, State
from encdec_fast.ops._derivatives import recompute_layer
from encdec_fast.ops._torch import round_weights

# (x_t, h, c, weights of the direction) -> (h', c'); c is None but for the LSTM
Step = Callable[[Tensor, Tensor, State, list[Tensor]], tuple[Tensor, State]]


def unroll(
    step: Step,
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
    bidirectional: bool,
    batch_first: bool,
    cell_size: int | None,
) -> LayerResult:
    """One layer, in one or both directions: (output, h_n, c_n, every c_t).

    cell_size: the size of c, None where the cell has none. The rest is as in the ops; lengths that
    are bool are resets.
    """
    directions = 2 if bidirectional else 1
    half = len(weights) // directions
    resets: State = None
    if lengths is not None and lengths.dtype == torch.bool:
        resets, lengths = lengths.t() if batch_first else lengths, None
    lengths = None if lengths is None else lengths.to(input.device)
    steps = _steps(input, lengths, batch_sizes, batch_first)
    batch = steps[0].shape[0] if steps else 0
    if h0 is None:
        h0 = input.new_zeros(directions, batch, weights[1].shape[1])
    if c0 is None and cell_size is not None:
        c0 = input.new_zeros(directions, batch, cell_size)
    outputs: list[list[Tensor]] = []
    cells: list[list[Any]] = []
    final: list[tuple[Tensor, State]] = []
    for d in range(directions):
        own = weights[d * half : (d + 1) * half]
        h, c = h0[d], None if c0 is None else c0[d]
        out: list[Any] = [None] * len(steps)
        cell: list[Any] = [None] * len(steps)
        for t in range(len(steps)) if d == 0 else reversed(range(len(steps))):
            n = steps[t].shape[0]  # in packed data the first n sequences have a step t
            if resets is not None:
                begins = resets[t].unsqueeze(1)
                h = torch.where(begins, 0, h)
                c = None if c is None else torch.where(begins, 0, c)
            h_t, c_t = step(steps[t], h[:n], None if c is None else c[:n], own)
            if lengths is not None:
                real = (t < lengths).unsqueeze(1)
                out[t] = torch.where(real, h_t, 0)
                cell[t] = None if c_t is None else torch.where(real, c_t, 0)
                h_t = torch.where(real, h_t, h)
                c_t = None if c_t is None or c is None else torch.where(real, c_t, c)
            else:
                out[t], cell[t] = h_t, c_t
            h = torch.cat([h_t, h[n:]])
            c = None if c_t is None or c is None else torch.cat([c_t, c[n:]])
        outputs.append(out)
        cells.append(cell)
        final.append((h, c))
    output = _join(outputs, batch_sizes, batch_first)
    h_n = torch.stack([h for h, _ in final])
    if cell_size is None:
        return output, h_n, None, None
    c_n = torch.stack([c for _, c in final if c is not None])
    return output, h_n, c_n, _join(cells, batch_sizes, batch_first)


def _steps(input: Tensor, lengths: State, batch_sizes: State, batch_first: bool) -> list[Tensor]:
    """The input of each step, [B or fewer, I]; zero where a sequence has ended."""
    if batch_sizes is not None:
        return list(input.split(batch_sizes.tolist()))
    x = input.transpose(0, 1) if batch_first else input
    if lengths is not None:
        # Whatever stands in the padding, NaN too, must not reach a gradient.
        padding = torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(padding.unsqueeze(2), 0)
    return list(x.unbind(0))


def _join(parts: list[list[Tensor]], batch_sizes: State, batch_first: bool) -> Tensor:
    """Directions × steps × [B, size] -> output's layout, the directions side by side."""
    steps = [torch.cat(list(both), dim=-1) for both in zip(*parts, strict=True)]
    if batch_sizes is not None:
        return torch.cat(steps)
    return torch.stack(steps, dim=1 if batch_first else 0)


def reference_backend(reference: Callable[..., LayerResult], training: bool = False) -> Backend:
    """The `reference` backend of an op, for inference or for training.

    reference: (input, weights, h0, c0, lengths, batch_sizes, call) -> LayerResult
    """

    def run(call: RecurrentCall, input: Tensor, weights: list[Tensor], *rest: Any) -> LayerResult:
        rounded = round_weights(weights, call.weight_dtype)
        output, h_n, c_n, cells = reference(input, rounded, *rest, call)
        return output.contiguous(), h_n, c_n, cells if call.cell_states or training else None

    def train(call: RecurrentCall, *layer: Any) -> tuple[Tensor, Tensor, State, State, State]:
        return *run(call, *layer), None

    def backward(
        call: RecurrentCall,
        grads: Any,
        input: Tensor,
        weights: list[Tensor],
        h0: State,
        c0: State,
        lengths: State,
        batch_sizes: State,
        *_saved: Any,
    ) -> Any:
        def layer(input: Tensor, weights: list[Tensor], h0: State, c0: State) -> LayerResult:
            return reference(input, weights, h0, c0, lengths, batch_sizes, call)

        return recompute_layer(layer, grads, input, weights, h0, c0)

    def why_not(call: RecurrentCall) -> list[str]:
        return []

    if training:
        return Backend("reference", train, why_not, backward=backward)
    return Backend("reference", run, why_not)
