"""An op over tensors inside torch.library: what runs, how a tracer sees it, its gradients.

An op comes as three: `name` for inference, `name_train`, which also returns what backward needs,
and `name_backward`. Their arguments, in this order:

    grads    of the results                  (`name_backward` only, each optional)
    tensors  the differentiable ones first
    flags    numbers and booleans
    results, saved, saved_by                 (`name_backward` only)

`saved_by`, an int64 scalar on the CPU, tells which backend ran, so that backward runs there too,
whatever is asked for by then. Recurrent layers have lists of weights, and their own `LayerOp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Backend, select
from encdec_fast.ops._call import GRAPHS, State, without_autocast
from encdec_fast.ops._derivatives import Function, double_backward, recompute

# The tensors of a call and its metadata -> every result and every saved tensor.
Reference = Callable[..., tuple[Tensor, ...]]


def _names(schema: str) -> list[str]:
    """The names in a piece of a schema such as "Tensor query, Tensor? lengths"."""
    return [part.split()[-1] for part in schema.split(", ")] if schema else []


class TensorOp:
    """An op by name.

    tensors, flags, results, saved: pieces of its schema. differentiable: how many of the tensors
    are. make_call: (tensors, flags, training) -> metadata with `device`, `training`, `context`.
    reference and fake: (call, *tensors) -> (*results, *saved), where a result that the call does
    not want is an empty tensor; `saved` is left out unless call.training.
    layout: gives a gradient the strides in which the op returns it.
    backends is set once they exist. Each has run(call, *tensors), which returns the same, and
    backward(call, grads, tensors, results and saved) -> the differentiable tensors' gradients.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: str,
        differentiable: int,
        flags: str,
        results: str,
        saved: str,
        make_call: Callable[[Sequence[State], Sequence[Any], bool], Any],
        reference: Reference,
        fake: Reference,
        layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
    ) -> None:
        self.name = name
        self.make_call = make_call
        self.reference = reference
        self.fake = fake
        self.layout = layout
        self.differentiable = differentiable
        self.tensor_count = len(_names(tensors))
        self.flag_names = _names(flags)
        self.result_count = len(_names(results))
        self.backends: tuple[Backend, ...] = ()
        inputs = f"{tensors}, {flags}" if flags else tensors
        grads = ", ".join(f"Tensor? grad_{result}" for result in _names(results))
        kept = ", ".join(filter(None, (results, saved, "Tensor saved_by")))
        found = ", ".join(f"Tensor grad_{t}" for t in _names(tensors)[:differentiable])
        self.schemas = (
            f"{name}({inputs}) -> ({results})",
            f"{name}_train({inputs}) -> ({kept})",
            f"{name}_backward({grads}, {inputs}, {kept}) -> ({found})",
        )

    # The bodies.

    def _split(self, args: Sequence[Any]) -> tuple[list[State], tuple[Any, ...], list[Any]]:
        """(tensors, flags, what comes behind them)."""
        n, m = self.tensor_count, self.tensor_count + len(self.flag_names)
        return list(args[:n]), tuple(args[n:m]), list(args[m:])

    def _run(self, *args: Any) -> Any:
        tensors, flags, _ = self._split(args)
        call = self.make_call(tensors, flags, False)
        return self._returned(select(self.backends, call).run(call, *tensors))

    def _train(self, *args: Any) -> tuple[Tensor, ...]:
        tensors, flags, _ = self._split(args)
        call = self.make_call(tensors, flags, True)
        backend = select(self.backends, call)
        return *backend.run(call, *tensors), torch.tensor(self.backends.index(backend))

    def _backward(self, *args: Any) -> Any:
        grads = args[: self.result_count]
        tensors, flags, kept = self._split(args[self.result_count :])
        call = self.make_call(tensors, flags, True)
        backend = self.backends[int(kept[-1])]
        assert backend.backward is not None
        with without_autocast(call.device):
            found = backend.backward(call, grads, tensors, kept[:-1])
        return self._returned(self._gradients(found, tensors))

    def _returned(self, results: Sequence[Any]) -> Any:
        """A tuple, or what torch wants of an op with one result."""
        return results[0] if len(results) == 1 else tuple(results)

    def _gradients(self, found: Sequence[State], tensors: Sequence[State]) -> list[Tensor]:
        """Gradients as an op returns them: laid out, and empty where there is no tensor."""
        like: Any = tensors[0]
        return [
            like.new_empty(0) if grad is None or tensor is None else self.layout(grad)
            for grad, tensor in zip(found, tensors[: self.differentiable], strict=True)
        ]

    # What they look like to a tracer.

    def _fake(self, *args: Any) -> Any:
        tensors, flags, _ = self._split(args)
        return self._returned(self.fake(self.make_call(tensors, flags, False), *tensors))

    def _fake_train(self, *args: Any) -> tuple[Tensor, ...]:
        tensors, flags, _ = self._split(args)
        results = self.fake(self.make_call(tensors, flags, True), *tensors)
        return *results, torch.empty((), dtype=torch.int64)

    def _fake_backward(self, *args: Any) -> Any:
        tensors, _, _ = self._split(args[self.result_count :])
        own = tensors[: self.differentiable]
        shapes = [None if t is None else t.new_empty(t.shape) for t in own]
        return self._returned(self._gradients(shapes, tensors))

    # The gradients.

    def _setup_train(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.flags, _ = self._split(inputs)
        ctx.mark_non_differentiable(*output[self.result_count :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    def _backward_train(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # to be read once: checkpointing computes it
        tensors, kept = saved[: self.tensor_count], saved[self.tensor_count :]
        none = (None,) * (self.tensor_count - self.differentiable + len(ctx.flags))
        grads = grads[: self.result_count]
        if all(grad is None for grad in grads):
            return *(None,) * self.differentiable, *none
        op = getattr(torch.ops.encdec_fast, self.name + "_backward")
        found = op(*grads, *tensors, *ctx.flags, *kept)
        found = (found,) if isinstance(found, Tensor) else found
        own = zip(found, tensors[: self.differentiable], strict=True)
        return *(None if t is None else grad for grad, t in own), *none

    def _setup_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.flags, kept = self._split(inputs[self.result_count :])
        ctx.count = len(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: self.result_count], *tensors)

    def _backward_backward(self, ctx: Any, *outer: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        grads, tensors = saved[: self.result_count], saved[self.result_count :]
        function = self._function(self.make_call(tensors, ctx.flags, False), tensors)
        own = tensors[: self.differentiable]
        of_grads, of_own = double_backward(function, grads, own, outer)
        others = self.tensor_count - self.differentiable + len(ctx.flags) + ctx.count
        return *of_grads, *of_own, *(None,) * others

    def _function(self, call: Any, tensors: Sequence[State]) -> Function:
        """The reference as a function of the differentiable tensors, giving the results."""
        rest = tensors[self.differentiable :]
        return lambda *own: self.reference(call, *own, *rest)[: self.result_count]

    def recompute(self, call: Any, grads: Sequence[State], tensors: Sequence[State]) -> list[State]:
        """The gradients of the differentiable tensors by running the reference under autograd."""
        own = tensors[: self.differentiable]
        return recompute(self._function(call, tensors), grads, own)

    def emit(self, call: Any, tensors: Sequence[State], flags: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run a call: on its backend where nothing watches, else through the generic op."""
        watched = call.context in GRAPHS
        if not watched and (not call.training or call.context):
            plain = call._replace(training=False) if call.training else call
            results = select(self.backends, plain).run(plain, *tensors)
        else:
            op = getattr(torch.ops.encdec_fast, self.name + ("_train" if call.training else ""))
            results = op(*tensors, *flags)
        results = (results,) if isinstance(results, Tensor) else results
        return tuple(results[: self.result_count])

    def register(self, library: torch.library.Library) -> None:
        """Define the three ops, with their bodies, fakes and gradients."""
        for schema in self.schemas:
            library.define(schema)
        bodies = (self._run, self._train, self._backward)
        fakes = (self._fake, self._fake_train, self._fake_backward)
        for suffix, body, fake in zip(("", "_train", "_backward"), bodies, fakes, strict=True):
            name = self.name + suffix
            library.impl(name, body, "CompositeExplicitAutograd")
            torch.library.register_fake(f"encdec_fast::{name}", fake, lib=library)
        gradients = (
            ("_train", self._backward_train, self._setup_train),
            ("_backward", self._backward_backward, self._setup_backward),
        )
        for suffix, backward, setup in gradients:
            torch.library.register_autograd(
                f"encdec_fast::{self.name}{suffix}", backward, setup_context=setup, lib=library
            )


def reference_backend(op: TensorOp) -> Backend:
    """The `reference` backend of an op."""

    def run(call: Any, *tensors: State) -> tuple[Tensor, ...]:
        return tuple(result.contiguous() for result in op.reference(call, *tensors))

    def backward(call: Any, grads: Any, tensors: Any, kept: Any) -> list[State]:
        return op.recompute(call, grads, tensors)

    return Backend("reference", run, lambda call: [], backward=backward)
