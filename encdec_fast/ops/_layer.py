"""A recurrent op inside torch.library: what runs, what it looks like to a tracer, its gradients.

The op of one layer comes as three: `name` for inference, `name_train`, which also returns what
backward needs, and `name_backward`. Their arguments, in this order:

    layer   input, weights, h0, c0, lengths, batch_sizes     (c0 only where there are cell states)
    flags   bidirectional, batch_first, the op's own, weight_dtype (of `name` only)
    saved   output, cells, gates, saved_by                   (cells likewise)

`lengths`, where they are bool, are resets: of the input's shape without its features, true where
the state before a step is zero.

`gates` belongs to the backend that made it, and `saved_by`, an int64 scalar on the CPU, tells which
that was, so that backward runs there too, whatever is asked for by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Backend, select
from encdec_fast.ops._call import LayerResult, RecurrentCall, State
from encdec_fast.ops._checks import check_length_values
from encdec_fast.ops._derivatives import double_backward_layer

# Numbers per step, sequence and hidden unit that backward reads beside output and cells.
_SAVED_GATES = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}


class LayerOp:
    """A recurrent op by name.

    cells: whether it has cell states. make_call: (layer, flags, training) -> RecurrentCall.
    own_flags: the op's own flags of a call. reference: (*layer, call) -> LayerResult.
    backends and train_backends are set once they exist.
    """

    def __init__(
        self,
        name: str,
        cells: bool,
        make_call: Callable[[Sequence[Any], Sequence[Any], bool], RecurrentCall],
        own_flags: Callable[[RecurrentCall], tuple[Any, ...]],
        reference: Callable[..., LayerResult],
    ) -> None:
        self.name = name
        self.cells = cells
        self.make_call = make_call
        self.own_flags = own_flags
        self.reference = reference
        self.backends: tuple[Backend, ...] = ()
        self.train_backends: tuple[Backend, ...] = ()

    # How arguments and results travel: with or without c0, c_n and cells.

    def _layer(self, args: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[Any]]:
        """(input, weights, h0, c0, lengths, batch_sizes) from the front of args, and the rest."""
        if self.cells:
            return tuple(args[:6]), args[6:]
        return (*args[:3], None, *args[3:5]), args[5:]

    def _tensors(self, layer: Sequence[Any]) -> tuple[Any, ...]:
        """The reverse of `_layer`."""
        return tuple(layer) if self.cells else (*layer[:3], *layer[4:])

    def _results(self, output: Tensor, h_n: Tensor, c_n: State, cells: State) -> tuple[Any, ...]:
        if not self.cells:
            return output, h_n
        return output, h_n, c_n, output.new_empty(0) if cells is None else cells

    def _grads(self, args: Sequence[Any]) -> tuple[State, State, State, State]:
        """The gradients of (output, h_n, c_n, cells) from the front of args."""
        return tuple(args[:4]) if self.cells else (args[0], args[1], None, None)

    @property
    def _count(self) -> int:
        return 4 if self.cells else 2  # of results and of their gradients

    # The bodies.

    def run(self, *args: Any) -> tuple[Any, ...]:
        layer, flags = self._layer(args)
        call = _checked(self.make_call(layer, flags, False), layer)
        return self._results(*select(self.backends, call).run(call, *layer))

    def train(self, *args: Any) -> tuple[Any, ...]:
        layer, flags = self._layer(args)
        call = _checked(self.make_call(layer, flags, True), layer)
        backend = select(self.train_backends, call)
        output, h_n, c_n, cells, gates = backend.run(call, *layer)
        if cells is None and self.cells:
            cells = output.new_zeros([*_leading(layer), call.directions * c_n.shape[2]])
        if gates is None:
            gates = output.new_zeros(_gates_count(call, layer))
        saved_by = torch.tensor(self.train_backends.index(backend))
        return *self._results(output, h_n, c_n, cells), gates, saved_by

    def backward(self, *args: Any) -> tuple[Any, ...]:
        grads = self._grads(args)
        layer, rest = self._layer(args[self._count :])
        saved = 4 if self.cells else 3
        call = self.make_call(layer, rest[:-saved], True)
        output, *cells, gates, saved_by = rest[-saved:]
        backend = self.train_backends[int(saved_by)]
        assert backend.backward is not None
        grad_input, grad_weights, grad_h0, grad_c0 = backend.backward(
            call, grads, *layer, output, cells[0] if cells else None, gates
        )
        states = [(layer[2], grad_h0), (layer[3], grad_c0)][: 2 if self.cells else 1]
        own = [output.new_empty(0) if s is None else g.contiguous() for s, g in states]
        return grad_input.contiguous(), [grad.contiguous() for grad in grad_weights], *own

    # What they look like to a tracer.

    def fake(self, *args: Any) -> tuple[Any, ...]:
        layer, flags = self._layer(args)
        return self._fake(self.make_call(layer, flags, False), layer)

    def fake_train(self, *args: Any) -> tuple[Any, ...]:
        layer, flags = self._layer(args)
        call = self.make_call(layer, flags, True)
        gates = layer[0].new_empty([_gates_count(call, layer)])
        return *self._fake(call, layer), gates, torch.empty((), dtype=torch.int64)

    def fake_backward(self, *args: Any) -> tuple[Any, ...]:
        input, weights, h0, c0, _, _ = self._layer(args[self._count :])[0]
        states = [input.new_empty([0] if s is None else s.shape) for s in (h0, c0)]
        grads = [input.new_empty(weight.shape) for weight in weights]
        return input.new_empty(input.shape), grads, *states[: 2 if self.cells else 1]

    def _fake(self, call: RecurrentCall, layer: tuple[Any, ...]) -> tuple[Any, ...]:
        input, weights, h0, _, _, batch_sizes = layer
        if batch_sizes is None:
            batch = input.shape[0 if call.batch_first else 1]
        elif h0 is not None:
            batch = h0.shape[1]
        else:  # the value of batch_sizes[0]
            batch = torch.library.get_ctx().new_dynamic_size()
        d, size, leading = call.directions, weights[1].shape[1], _leading(layer)
        output = input.new_empty([*leading, d * size])
        h_n = input.new_empty([d, batch, size])
        if not self.cells:
            return output, h_n
        hidden = weights[1].shape[0] // 4
        wanted = call.cell_states or call.training
        cells = input.new_empty([*leading, d * hidden] if wanted else [0])
        return output, h_n, input.new_empty([d, batch, hidden]), cells

    # The gradients.

    def setup_train(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (input, weights, *others), ctx.flags = self._layer(inputs)
        *results, gates, saved_by = output
        call = self.make_call(self._layer(inputs)[0], ctx.flags, True)
        # Cells that nobody asked for are there for backward only.
        hidden = results[3:] if self.cells and not call.cell_states else []
        ctx.mark_non_differentiable(gates, saved_by, *hidden)
        ctx.set_materialize_grads(False)
        saved = (results[0], *results[3:], gates, saved_by)
        ctx.count = len(saved)
        ctx.save_for_backward(input, *others, *saved, *weights)

    def backward_train(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # to be read once: checkpointing computes it
        input, *others = tensors[:5]
        saved, weights = tensors[5 : 5 + ctx.count], list(tensors[5 + ctx.count :])
        grads = grads[: self._count]
        rest = [None] * (2 + len(ctx.flags))  # lengths, batch_sizes and the flags have no gradient
        states = [s is not None for s in others[: 2 if self.cells else 1]]
        if all(grad is None for grad in grads):
            return None, [None] * len(weights), *[None for _ in states], *rest
        op = getattr(torch.ops.encdec_fast, self.name + "_backward")
        layer = self._tensors((input, weights, *others))
        grad_input, grad_weights, *found = op(*grads, *layer, *ctx.flags, *saved)
        return (
            grad_input,
            grad_weights,
            *(grad if given else None for grad, given in zip(found, states, strict=True)),
            *rest,
        )

    def setup_backward(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        (input, weights, *others), rest = self._layer(inputs[self._count :])
        saved = 4 if self.cells else 3
        ctx.flags, ctx.rest = rest[:-saved], len(rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*self._grads(inputs), input, *others, *weights)

    def backward_backward(self, ctx: Any, *outer: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        grads, weights = tensors[:4], list(tensors[9:])
        input, h0, c0, lengths, batch_sizes = tensors[4:9]
        call = self.make_call((input, weights, h0, c0, lengths, batch_sizes), ctx.flags, True)

        def layer(input: Tensor, weights: list[Tensor], h0: State, c0: State) -> LayerResult:
            return self.reference(input, weights, h0, c0, lengths, batch_sizes, call)

        outer = outer if self.cells else (*outer, None)
        of_grads, *of_layer = double_backward_layer(layer, grads, input, weights, h0, c0, outer)
        of_layer = of_layer if self.cells else of_layer[:3]
        return *of_grads[: self._count], *of_layer, *[None] * (2 + ctx.rest)

    def emit(self, call: RecurrentCall, *layer: Any) -> LayerResult:
        """Call the generic op: the one that a graph holds and that autograd differentiates."""
        flags = (call.bidirectional, call.batch_first, *self.own_flags(call))
        if call.training:
            op = getattr(torch.ops.encdec_fast, self.name + "_train")
        else:
            op = getattr(torch.ops.encdec_fast, self.name)
            flags = (*flags, call.weight_dtype)
        results = op(*self._tensors(layer), *flags)
        if not self.cells:
            return results[0], results[1], None, None
        return results[0], results[1], results[2], results[3] if call.cell_states else None

    def emit_backward(
        self,
        call: RecurrentCall,
        grads: Sequence[State],
        layer: Sequence[Any],
        output: Tensor,
        cells: State,
        gates: Tensor,
        saved_by: Tensor,
    ) -> tuple[Tensor, list[Tensor], State, State]:
        """Call the generic backward op, which autograd can differentiate."""
        op = getattr(torch.ops.encdec_fast, self.name + "_backward")
        flags = (call.bidirectional, call.batch_first, *self.own_flags(call))
        saved = (output, cells, gates, saved_by) if self.cells else (output, gates, saved_by)
        results = op(*grads[: self._count], *self._tensors(layer), *flags, *saved)
        return results[0], results[1], results[2], results[3] if self.cells else None

    def register(self, library: torch.library.Library) -> None:
        """Give the three ops their bodies, fakes and gradients."""
        bodies = (("", self.run), ("_train", self.train), ("_backward", self.backward))
        fakes = (("", self.fake), ("_train", self.fake_train), ("_backward", self.fake_backward))
        for suffix, body in bodies:
            library.impl(self.name + suffix, body, "CompositeExplicitAutograd")
        for suffix, fake in fakes:
            torch.library.register_fake(f"encdec_fast::{self.name}{suffix}", fake, lib=library)
        torch.library.register_autograd(
            f"encdec_fast::{self.name}_train",
            self.backward_train,
            setup_context=self.setup_train,
            lib=library,
        )
        torch.library.register_autograd(
            f"encdec_fast::{self.name}_backward",
            self.backward_backward,
            setup_context=self.setup_backward,
            lib=library,
        )


def _checked(call: RecurrentCall, layer: tuple[Any, ...]) -> RecurrentCall:
    input, lengths = layer[0], layer[4]
    if call.ragged == "lengths":
        check_length_values(lengths, input.shape[1 if call.batch_first else 0])
    return call if input.numel() else call._replace(empty=True)


def _leading(layer: tuple[Any, ...]) -> list[int]:
    """The output's shape without its last dimension."""
    return list(layer[0].shape[:-1])


def _gates_count(call: RecurrentCall, layer: tuple[Any, ...]) -> int:
    """The number of elements of `gates`, whichever backend makes it."""
    weights = layer[1]
    hidden = weights[1].shape[0] // 4 if call.kind == "lstm" else weights[1].shape[1]
    count: int = _SAVED_GATES[call.kind] * hidden * call.directions
    for size in _leading(layer):
        count = count * size
    return count
