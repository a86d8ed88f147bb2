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

from encdec_fast.ops._call import LayerResult, State, needs_grad

if TYPE_CHECKING:
    from encdec_fast.ops._recurrent import Arguments

_CASTABLE = (torch.float32, torch.bfloat16)


def _as(tensor: State, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


def run(runner: Callable[..., LayerResult | None], given: Arguments) -> LayerResult | None:
    """`runner` with its arguments cast; None where torch's own kernel must see them as they are."""
    net, input, h0, c0, weights = given[:5]
    low = torch.bfloat16
    tensors = [t for t in (input, h0, c0, *weights) if t is not None]
    if (
        input.device.type != "cpu"
        or torch.get_autocast_dtype("cpu") != low
        or any(tensor.dtype not in _CASTABLE for tensor in tensors)
    ):
        return None
    state = torch.promote_types((input if h0 is None else h0).dtype, low)
    if weights[0].dtype == torch.float32 and not needs_grad(input, h0, c0, weights):
        work = torch.float32
        if not net.weight_dtype:
            net = net._replace(weight_dtype="bfloat16")
    else:
        work = low
        weights = [weight.to(low) for weight in weights]
    cast = given._replace(
        net=net, input=input.to(work), h0=_as(h0, work), c0=_as(c0, work), weights=weights
    )
    with torch.autocast("cpu", enabled=False):
        result = runner(*cast)
    if result is None:
        return None
    packed_lstm = net.kind == "lstm" and given.batch_sizes is not None and not net.projected
    kept = net.kind == "gru" or packed_lstm
    out = state if kept else low
    cell = state if net.projected else out
    output, h_n, c_n, cells = result
    return output.to(out), h_n.to(out), _as(c_n, cell), _as(cells, cell)
