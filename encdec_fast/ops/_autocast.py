"""Recurrent networks under torch.autocast on the CPU.

Products run in bfloat16 and the results have the dtypes that torch's modules give there: bfloat16
for the Elman RNN and the padded LSTM; the dtype of the state for the GRU and the packed LSTM, and
for the cell state of an LSTM with a projection. Without gradients float32 parameters are packed in
bfloat16 once, instead of being cast in every call, and states and sums stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encdec_fast.ops._call import LayerResult, State, needs_grad

if TYPE_CHECKING:
    from encdec_fast.ops._recurrent import Network

_CASTABLE = (torch.float32, torch.bfloat16)


def _as(tensor: State, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


def run(
    runner: Callable[..., LayerResult | None],
    net: Network,
    input: Tensor,
    h0: State,
    c0: State,
    weights: list[Tensor],
    dropout: float,
    lengths: State,
    batch_sizes: State,
    cell_states: bool,
) -> LayerResult | None:
    """`runner` with its arguments cast; None where torch's own kernel must see them as they are."""
    low = torch.bfloat16
    tensors = [t for t in (input, h0, c0, *weights) if t is not None]
    if (
        input.device.type != "cpu"
        or torch.get_autocast_dtype("cpu") != low
        or any(tensor.dtype not in _CASTABLE for tensor in tensors)
    ):
        return None
    state = torch.promote_types((input if h0 is None else h0).dtype, low)
    full = weights[0].dtype == torch.float32 and not needs_grad(input, h0, c0, weights)
    if full:
        work = torch.float32
        if not net.weight_dtype:
            net = net._replace(weight_dtype="bfloat16")
    else:
        work = low
        weights = [weight.to(low) for weight in weights]
    states = (_as(h0, work), _as(c0, work))
    with torch.autocast("cpu", enabled=False):
        result = runner(
            net, input.to(work), *states, weights, dropout, lengths, batch_sizes, cell_states
        )
    if result is None:
        return None
    kept = net.kind == "gru" or (net.kind == "lstm" and batch_sizes is not None)
    out = state if kept else low
    cell = state if net.projected else out
    output, h_n, c_n, cells = result
    return output.to(out), h_n.to(out), _as(c_n, cell), _as(cells, cell)
