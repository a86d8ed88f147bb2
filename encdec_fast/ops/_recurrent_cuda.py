"""The `cuda` backend of lstm and gru: csrc/rnn/recurrence.cuh, all steps in one launch."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from encdec_fast.backends import Backend, library, requested_backend
from encdec_fast.ops import _recurrent_gpu
from encdec_fast.ops._call import CELLS, GATES, RecurrentCall, State
from encdec_fast.ops._cpu import unsuited
from encdec_fast.ops._recurrent_gpu import Sequences

_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Limits(NamedTuple):
    """What a device has for one kernel.

    capability: 10 * major + minor. shared_bytes: that a block may ask for. clusters: of 1, 2, ...
    blocks, how many run at the same time; empty where there are none.
    """

    capability: int
    processors: int
    shared_bytes: int
    clusters: tuple[int, ...]


# What the kernels' tests on a CPU pretend: small, so that small layers are cut.
ON_CPU = Limits(90, 12, 96 << 10, (12, 6, 4, 3))


@cache
def limits(device: int) -> Limits:
    """Of the CUDA device of that number; -1: of the CPU that runs the kernels' tests."""
    if device < 0:
        return ON_CPU
    has = torch.cuda.get_device_properties(device)
    capability = 10 * has.major + has.minor
    clusters: tuple[int, ...] = ()
    if has.major >= 9:
        # Clusters stay within a group of multiprocessors, and these differ from part to part.
        like = torch.empty(0, device=torch.device("cuda", device))
        with torch.cuda.device(device):
            clusters = tuple(torch.ops.encdec_fast_cuda.rnn_max_clusters(like))
    shared: int = has.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Limits(capability, has.multi_processor_count, shared, clusters)


class Plan(NamedTuple):
    """How a recurrence is cut; csrc/rnn/rnn_gpu.h.

    numbers: empty where there is no plan. microseconds: of a step, predicted. text: the plan, or
    why there is none. slower: why something else should be faster; empty where nothing should.
    """

    numbers: list[int]
    exchange_bytes: int
    microseconds: float
    text: str
    slower: str


@cache
def plan_of(
    kind: str,
    dtype: torch.dtype,
    backward: bool,
    B: int,
    H: int,
    D: int,
    device: Limits,
    layers: int = 1,
) -> Plan:
    """layers: more than one, of one direction, share a launch."""
    sizes = (CELLS[kind], _FORMATS[dtype], backward, B, H, D, layers)
    assert library.extension is not None
    return Plan(*library.extension.rnn_gpu_plan(*sizes, *device))


def why_not(call: RecurrentCall) -> list[str]:
    reasons = library.cuda_reasons(call.device, requested_backend() == "cuda")
    reasons += unsuited(call) + _recurrent_gpu.unsuited(call, "cuda")
    if call.ragged == "step":
        reasons.append("a single step leaves nothing to keep")
    if not reasons and call.recurrence is not None:
        B, H, device = call.recurrence
        for backward in (False, True) if call.training else (False,):
            sizes = (call.kind, call.dtype, backward, B, H, call.directions)
            found = plan_of(*sizes, limits(device))
            against = found.text if not found.numbers else found.slower
            if against and (not found.numbers or requested_backend() != "cuda"):
                reasons.append(("in backward " if backward else "") + against)
    return reasons


def share_a_launch(call: RecurrentCall, layers: int) -> Plan | None:
    """The plan of a launch of all layers, where it should beat one launch after the other.

    A layer is a step behind the one below it, so that long sequences take hardly more steps than
    with one layer; a step takes longer than it would by itself.
    """
    if layers == 1 or call.training or call.bidirectional or call.recurrence is None:
        return None
    B, H, device = call.recurrence
    sizes = (call.kind, call.dtype, False, B, H, 1, limits(device))
    together, alone = plan_of(*sizes, layers), plan_of(*sizes)
    faster = together.numbers and together.microseconds < layers * alone.microseconds
    return together if faster else None


def plan(call: RecurrentCall, layers: int) -> str:
    """How the kernels would be cut, in words."""
    if call.recurrence is None:
        return ""
    together = share_a_launch(call, layers)
    if together is not None:
        return f"{layers} layers at once:\n{together.text}"
    B, H, device = call.recurrence
    lines = []
    for backward in (False, True) if call.training else (False,):
        sizes = (call.kind, call.dtype, backward, B, H, call.directions)
        lines.append("backward:" if backward else "forward:")
        lines += ["  " + line for line in plan_of(*sizes, limits(device)).text.splitlines()]
    return "\n".join(lines)


def _cut(
    call: RecurrentCall, backward: bool, weight: Tensor, sequences: Sequences, above: Any = None
) -> tuple[Any, ...]:
    """What both ops take at their end: the layout, how sequences lie, the plan, the exchange."""
    groups, H = weight.shape[0], weight.shape[2]
    D, layers = (groups, 1) if above is None else (1, groups)
    sizes = (call.kind, weight.dtype, backward, sequences.B, H, D)
    found = plan_of(*sizes, limits(weight.get_device()), layers)
    if not found.numbers:
        raise RuntimeError(f"{call.kind}: {found.text}")
    T, B, rows, step, sequence, lengths, starts, *_, resets = sequences
    exchange = torch.zeros(found.exchange_bytes, dtype=torch.uint8, device=weight.device)
    layout = [T, B, rows, step, sequence]
    return layout, lengths, starts, sequences.order, resets, found.numbers, exchange


def _whole_quads(weight: Tensor) -> Tensor:
    """Rows of a multiple of 8 numbers, with zeros at their ends: what the kernel reads at once."""
    missing = -weight.shape[2] % 8
    if missing:
        return functional.pad(weight, (0, missing))
    # A view may begin anywhere.
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


class _Kernels:
    """`_recurrent_gpu.Kernels` in CUDA C++."""

    @staticmethod
    def forward(
        call: RecurrentCall, products: Tensor, weight: Tensor, bias: State, *rest: Any
    ) -> None:
        *tensors, sequences, above = rest
        cut = _cut(call, False, weight, sequences, above)
        weight = _whole_quads(weight)
        layers: tuple[Any, ...] = ()
        if above is not None:
            input_weight, input_bias = above
            handed_up = weight.new_empty(len(input_weight), sequences.rows, weight.shape[2])
            layers = _whole_quads(input_weight), input_bias, handed_up
        forward = torch.ops.encdec_fast_cuda.rnn_forward
        forward(CELLS[call.kind], products, weight, bias, *tensors, *cut, *layers)

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
        cut = _cut(call, True, weight, sequences)
        D, H = weight.shape[0], weight.shape[2]
        # The kernel reads rows: those of a unit are its columns in each gate's matrix.
        turned = weight.view(D, GATES[call.kind], H, H).transpose(2, 3).contiguous()
        grads = (grad_output, grad_h_n, grad_cells)
        backward = torch.ops.encdec_fast_cuda.rnn_backward
        turned = _whole_quads(turned.view_as(weight))
        backward(CELLS[call.kind], *grads, turned, *tensors, *cut)


# With the weights of the layers above as one more argument: all of them in one launch.
run = partial(_recurrent_gpu.run, _Kernels)
INFERENCE = Backend("cuda", run, why_not)
TRAINING = Backend(
    "cuda",
    partial(_recurrent_gpu.train, _Kernels),
    why_not,
    backward=partial(_recurrent_gpu.backward, _Kernels),
)
