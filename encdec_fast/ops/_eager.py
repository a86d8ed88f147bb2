"""Training in eager mode past the dispatcher: what the generic op does, at half its fixed cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Backend
from encdec_fast.ops._call import LayerResult, RecurrentCall, State
from encdec_fast.ops._derivatives import recompute_layer
from encdec_fast.ops._layer import LayerOp


class _Trained(torch.autograd.Function):
    """One layer under autograd. Where its backward must be differentiated, that is the op's."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        op, call, backend, input, h0, c0, lengths, batch_sizes, *weights = args
        layer = (input, weights, h0, c0, lengths, batch_sizes)
        output, h_n, c_n, cells, gates = backend.run(call, *layer)
        ctx.op, ctx.call, ctx.backend = op, call, backend
        ctx.set_materialize_grads(False)
        others = (h0, c0, lengths, batch_sizes)
        ctx.save_for_backward(input, *others, output, cells, gates, *weights)
        return output, h_n, c_n, cells if call.cell_states else None

    @staticmethod
    def backward(ctx: Any, *grads: State) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # to be read once: checkpointing computes it
        input, h0, c0, lengths, batch_sizes, output, cells, gates = tensors[:8]
        weights = list(tensors[8:])
        if all(grad is None for grad in grads):
            return (None,) * (8 + len(weights))
        layer = (input, weights, h0, c0, lengths, batch_sizes)
        batched = torch._C._functorch.is_legacy_batchedtensor
        if any(grad is not None and batched(grad) for grad in grads):
            # A batch of gradients at once (`is_grads_batched`): kernels see one at a time only.
            def again(input: Tensor, weights: list[Tensor], h0: State, c0: State) -> LayerResult:
                one: LayerResult = ctx.op.reference(
                    input, weights, h0, c0, lengths, batch_sizes, ctx.call
                )
                return one

            result = recompute_layer(again, grads, input, weights, h0, c0)
        elif torch.is_grad_enabled():
            saved_by = torch.tensor(ctx.op.train_backends.index(ctx.backend))
            gates = output.new_empty(0) if gates is None else gates
            result = ctx.op.emit_backward(ctx.call, grads, layer, output, cells, gates, saved_by)
        else:
            result = ctx.backend.backward(ctx.call, grads, *layer, output, cells, gates)
        grad_input, grad_weights, grad_h0, grad_c0 = result
        states = (None if h0 is None else grad_h0, None if c0 is None else grad_c0)
        return None, None, None, grad_input, *states, None, None, *grad_weights


def train(
    op: LayerOp,
    backend: Backend,
    call: RecurrentCall,
    input: Tensor,
    weights: list[Tensor],
    h0: State,
    c0: State,
    lengths: State,
    batch_sizes: State,
) -> LayerResult:
    """One layer on `backend`, recorded by autograd."""
    result: LayerResult = _Trained.apply(
        op, call, backend, input, h0, c0, lengths, batch_sizes, *weights
    )
    return result
