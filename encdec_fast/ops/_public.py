"""The public functions' way in: from a user's arguments to a network, and what `explain` says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import BackendRefused, Description
from encdec_fast.ops import _checks, _cpu, _recurrent, _recurrent_cuda, _recurrent_triton
from encdec_fast.ops._call import GATES, WEIGHT_DTYPES, LayerResult, State
from encdec_fast.ops._layer import LayerOp
from encdec_fast.ops._recurrent import Arguments, Network


def arguments(
    op: LayerOp,
    kind: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bias: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    batch_sizes: State,
    weight_dtype: torch.dtype | str | None,
    proj_size: int = 0,
    return_cell_states: bool = False,
    resets: State = None,
) -> tuple[Arguments, bool]:
    """Check a public function's arguments. Returns them for `run`, and whether they are a batch."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype must be None, torch.bfloat16 or 'int8', but it is {weight_dtype!r}"
        )
    name = WEIGHT_DTYPES[weight_dtype]
    net = Network(op, kind, num_layers, bidirectional, batch_first, proj_size > 0, name)
    weights = list(weights)
    expected = num_layers * net.directions * (2 + 2 * bias + net.projected)
    if len(weights) != expected:
        raise RuntimeError(f"{op.name}: expected {expected} weights, but got {len(weights)}")
    h0, c0 = _checks.split_states(op.name, hx)
    batched = batch_sizes is not None or input.dim() != 2
    if batch_sizes is None and input.dim() not in (2, 3):
        raise ValueError(
            f"{op.name.upper()}: Expected input to be 2D or 3D, got {input.dim()}D instead"
        )
    if lengths is not None and (batch_sizes is not None or not batched):
        raise ValueError(
            f"{op.name}: lengths needs a padded 3-D input, not "
            + ("a packed one" if batched else "a single 2-D sequence")
        )
    if resets is not None:
        if lengths is not None or batch_sizes is not None:
            raise ValueError(f"{op.name}: resets come with neither lengths nor batch_sizes")
        resets = _checks.as_resets(resets, input)
    if not batched:
        resets = None if resets is None else resets.unsqueeze(0 if batch_first else 1)
        input = input.unsqueeze(0 if batch_first else 1)
        h0 = None if h0 is None else h0.unsqueeze(1)
        c0 = None if c0 is None else c0.unsqueeze(1)
    checked = resets if lengths is None else _checks.as_lengths(lengths, input, batch_first)
    p = dropout if training else 0.0
    states = (h0, c0)
    return (
        Arguments(net, input, *states, weights, p, checked, batch_sizes, return_cell_states),
        batched,
    )


def run(
    op: LayerOp, kind: str, input: Tensor, hx: Any, weights: Any, **options: Any
) -> LayerResult:
    """Check, run, and take off what an unbatched input was given."""
    given, batched = arguments(op, kind, input, hx, weights, **options)
    result = _recurrent.run(*given)
    if result is None:
        if not given.fit():
            given.complain()
        if given.lengths is not None and given.lengths.dtype == torch.bool:
            raise BackendRefused(f"{op.name}: torch's kernel has no resets")
        if given.cell_states:
            raise BackendRefused(f"{op.name}: torch's kernel does not return the cell states")
        result = *_recurrent.torch_network(*given[:-1]), None
    return result if batched else _recurrent.unbatched(result, given.net.batch_first)


def describe(
    op: LayerOp, kind: str, function: Callable[..., Any], *args: Any, **options: Any
) -> Description:
    """What `explain` asks of a public function; the arguments are the function's own."""
    call = inspect.signature(function).bind(*args, **options)
    call.apply_defaults()
    known = inspect.signature(arguments).parameters
    chosen = {name: value for name, value in call.arguments.items() if name in known}
    given, _ = arguments(op, kind, **chosen)
    if not given.fit():
        given.complain()
    return describe_network(given)


def describe_network(given: Arguments) -> Description:
    """What `explain` needs of a call."""
    net, input, h0, c0, weights, _, lengths, batch_sizes, cell_states = given
    backends, call = _recurrent.describe(
        net, input, h0, c0, weights, lengths, batch_sizes, cell_states
    )
    steps: Any = input.shape[1 if net.batch_first else 0]
    batch: Any = input.shape[0 if net.batch_first else 1]
    if batch_sizes is not None:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
    hidden = weights[1].shape[0] // GATES[net.kind]
    sizes = f"T={steps} B={batch} I={input.shape[-1]} H={hidden} layers={net.num_layers}"
    sizes += f" D={net.directions} {input.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    rows = input.shape[0] if batch_sizes is not None else steps * batch
    if call.ragged == "lengths":
        rows = int(lengths.sum())  # type: ignore[union-attr]

    def plan(backend: str) -> str:
        if backend == "cuda":
            return _recurrent_cuda.plan(call, net.num_layers)
        if backend == "triton":
            return _recurrent_triton.plan(call, batch, hidden)
        return _cpu.plan(call, steps, rows, batch, weights) if backend == "cpu" else ""

    return Description(net.kind, backends, call, sizes, plan)
