"""What every contender of a case computes on: one set of weights, one input, one right answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Cell, DType, RnnCase

MODULES: dict[Cell, Callable[[int, int], nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}
TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
    "float64": torch.float64,
}

# The root mean square of the error, relative to that of the right answer. Wrong gates, a missing
# bias or a stale state give 0.1 and more; rounding gives what the dtype's mantissa (8 bits in
# bfloat16, 7 bits and a sign in int8) leaves after many steps.
TOLERANCE: dict[DType, float] = {
    "float64": 1e-10,
    "float32": 1e-4,
    "bfloat16": 2e-2,
    "int8": 6e-2,
}
# One row may be this many times worse than the mean of all: a single wrong row must not hide.
ROW_FACTOR = 8.0


@dataclass
class Workload:
    """The weights and input of a case, exactly representable in the case's dtype.

    `module` and `x` `(T, B, I)` hold float32 (float64 in a float64 case) on the CPU; a contender
    converts its own copy. `grad` is the gradient at the output of a training case.
    """

    case: RnnCase
    module: nn.RNNBase
    x: Tensor
    grad: Tensor | None

    @property
    def lengths(self) -> Tensor | None:
        """Lengths `(B,)` of an unequal-length case."""
        return torch.tensor(self.case.lengths) if self.case.lengths else None

    def module_in(self, dtype: DType) -> nn.RNNBase:
        """A private copy of the module, in training mode for a training case only."""
        module = copy.deepcopy(self.module).to(TORCH_DTYPES[dtype])
        return module.train(self.case.training)

    def x_in(self, dtype: DType) -> Tensor:
        """A private copy of the input."""
        return self.x.to(TORCH_DTYPES[dtype], copy=True)


def make(case: RnnCase, seed: int = 0) -> Workload:
    """Build a case's weights (torch's own initial values) and a normal input from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MODULES[case.cell](case.input, case.hidden)
        x = torch.randn(case.time, case.batch, case.input)
        grad = torch.randn(case.time, case.batch, case.hidden) if case.training else None
    if case.dtype == "float64":
        return Workload(case, module.double().eval(), x.double(), grad)
    exact = TORCH_DTYPES[case.dtype]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(exact))
    grad = grad.to(exact).float() if grad is not None else None
    return Workload(case, module.eval(), x.to(exact).float(), grad)


def named_outputs(output: Tensor, state: object) -> dict[str, Tensor]:
    """Name what a torch recurrent module returns."""
    if isinstance(state, tuple):
        return {"output": output, "h_n": state[0], "c_n": state[1]}
    assert isinstance(state, Tensor)
    return {"output": output, "h_n": state}


def named_gradients(module: nn.Module, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    """Name what a training call leaves behind."""
    found = {"output": output.detach()}
    leaves = {"x": x, **dict(module.named_parameters())}
    for name, leaf in leaves.items():
        if leaf.grad is None:
            raise RuntimeError(f"the backward pass left no gradient at {name}")
        found[f"grad_{name}"] = leaf.grad
    return found


def reference(work: Workload, full: bool = False) -> dict[str, Tensor]:
    """The right answer, from torch's module in float64 (float32 where the dtype is coarse).

    float32 errs by 1e-6 where bfloat16 and int8 err by 1e-2, and is much faster to compute.
    `full` computes every padded step of an unequal-length case.
    """
    precise = torch.float64 if work.case.dtype in ("float32", "float64") else torch.float32
    module = copy.deepcopy(work.module).to(precise)
    x = work.x.to(precise, copy=True)  # its requires_grad must not leak into the workload
    if work.case.training:
        assert work.grad is not None
        x.requires_grad_()
        output, _ = module(x)
        output.backward(work.grad.to(precise))
        return named_gradients(module, x, output)
    with torch.inference_mode():
        lengths = work.lengths
        if lengths is None or full:
            return named_outputs(*module(x))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, state = module(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(output, total_length=work.case.time)
        return named_outputs(padded, state)


def relative_error(found: Tensor, right: Tensor) -> tuple[float, float]:
    """Root mean square error of all elements and of the worst row, relative to all of `right`."""
    right = right.double()
    square = (found.double().reshape(right.shape) - right).square()
    scale = right.square().mean().sqrt().clamp_min(1e-12)
    rows = square.reshape(-1, square.shape[-1]).mean(-1)
    return (square.mean().sqrt() / scale).item(), (rows.max().sqrt() / scale).item()


def judge(
    found: dict[str, Tensor], right: dict[str, Tensor], dtype: DType
) -> tuple[float, str | None]:
    """The largest relative error of a contender and, if it is wrong, in which result and how."""
    worst = 0.0
    for name, expected in right.items():
        if name not in found:
            return float("inf"), f"{name} is missing"
        if found[name].numel() != expected.numel():
            return float("inf"), f"{name} has {found[name].numel()} elements"
        error, row_error = relative_error(found[name], expected)
        limit = TOLERANCE[dtype]
        # NaN compares false, so the test asks whether the error is small, not whether it is large.
        if not (error <= limit and row_error <= ROW_FACTOR * limit):
            problem = f"{name}: error {error:.1e}, worst row {row_error:.1e}, allowed {limit:.0e}"
            return max(error, row_error), problem
        worst = max(worst, error)
    return worst, None
