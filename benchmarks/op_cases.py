"""Cases of the ops beside the recurrent ones: what is called, with what, and what it costs.

Each case makes its contenders itself: they share tensors, dtype and threads. A contender is a call
and the results by which it is judged before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import encdec_fast
from benchmarks.cases import WEIGHT_BYTES, DType
from encdec_fast.ops import additive_attention
from encdec_fast.ops._packing import kept
from encdec_fast.ops.additive_attention import reference as additive_reference

Op = Literal["additive_attention", "linear"]
Results = dict[str, Tensor]

ADDITIVE_SHAPES = ((32, 1, 50, 512), (32, 50, 50, 512), (8, 128, 512, 512))  # B, Tq, S, A
LINEAR_ROWS = (1, 8, 32, 128, 640)
LINEAR_SIZES = (512, 2048)


@dataclass(frozen=True)
class OpCase:
    """shape: B, Tq, S, A of additive attention; M, N, K of linear."""

    op: Op
    dtype: DType
    shape: tuple[int, ...]
    training: bool = False

    @property
    def id(self) -> str:
        """A name that is unique and safe in a pytest id."""
        shape = "-".join(map(str, self.shape))
        return f"{self.op}-{self.dtype}-{shape}" + ("-training" if self.training else "")

    @property
    def flops(self) -> int:
        """Operations of the products; additive attention: six for each of its (Tq, S, A) elements.

        Those six are what an element cannot be had for less than with both exponentials given: a
        multiply-add, a reciprocal (two with its correction) and a multiply-add. Backward: 14.
        """
        if self.op == "linear":
            m, n, k = self.shape
            return 2 * m * n * k
        b, tq, s, a = self.shape
        context = 2 * b * tq * s * a
        elements = b * tq * s * a
        return (20 if self.training else 6) * elements + (3 if self.training else 1) * context

    @property
    def weight_bytes(self) -> int:
        """Bytes of a linear layer's weight as it is held."""
        return self.shape[1] * self.shape[2] * WEIGHT_BYTES[self.dtype]


@dataclass
class Contender:
    """name: "encdec_fast" is ours, "encdec_fast C++ call" the op without Python's part of it."""

    name: str
    call: Callable[[], Any]
    results: Callable[[Any], Results]


@dataclass
class Work:
    """The contenders of a case and the right answer, in float64."""

    contenders: list[Contender]
    right: Results
    keep: list[Any] = field(default_factory=list)


def _additive(case: OpCase) -> Work:
    b, tq, s, a = case.shape
    torch.manual_seed(0)
    shapes = ((b, tq, a), (b, s, a), (b, s, a), (a,))
    leaves = [torch.randn(shape) / (a**0.5 if shape == (a,) else 1) for shape in shapes]
    grad = torch.randn(b, tq, a)

    def plain(*tensors: Tensor) -> Tensor:
        return additive_reference(*tensors)[0]

    compiled = torch.compile(plain)
    functions: dict[str, Callable[..., Tensor]] = {
        "torch": plain,
        "torch.compile": compiled,
        "encdec_fast": additive_attention,
    }
    contenders = []
    for name, function in functions.items():
        if case.training:
            own = [leaf.clone().requires_grad_() for leaf in leaves]
            contenders.append(Contender(name, _training(function, own, grad), _gradients))
        else:
            contenders.append(
                Contender(name, _inference(function, leaves), lambda y: {"output": y})
            )
    right: Results = {}
    exact = [leaf.double().requires_grad_(case.training) for leaf in leaves]
    for row in range(b):  # a sentence at a time: the whole would not fit
        part = [t[row : row + 1] for t in exact[:3]]
        output = plain(*part, exact[3])
        if case.training:
            output.backward(grad[row : row + 1].double())
        right.setdefault("output", torch.empty(b, tq, a, dtype=torch.float64))
        right["output"][row] = output.detach()[0]
    if case.training:
        right = _gradients((right["output"], exact))
    return Work(contenders, right)


def _inference(function: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    return call


def _training(
    function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor
) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    def call() -> tuple[Tensor, list[Tensor]]:
        for leaf in leaves:
            leaf.grad = None
        output = function(*leaves)
        output.backward(grad)
        return output.detach(), leaves

    return call


def _gradients(found: tuple[Tensor, list[Tensor]]) -> Results:
    output, leaves = found
    grads = {f"grad_{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    return {"output": output, **grads}


def _linear(case: OpCase) -> Work:
    m, n, k = case.shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    x = torch.randn(m, k).to(dtype)
    module = nn.Linear(k, n).to(dtype).requires_grad_(False)
    ours = encdec_fast.nn.Linear(k, n).to(dtype).requires_grad_(False)
    ours.load_state_dict(module.state_dict())
    theirs: Any = module
    number = {"float32": 0, "bfloat16": 1, "int8": 3}[case.dtype]
    if case.dtype == "int8":
        ours.weight_dtype = "int8"
        root = nn.Sequential(module)
        theirs = torch.ao.quantization.quantize_dynamic(root, {nn.Linear}, dtype=torch.qint8)

    def make(kind: str, weights: list[Tensor], weight_format: int) -> Tensor:
        block: Tensor = torch.ops.encdec_fast_cpu.linear_pack(weights[0], weight_format)
        return block

    block = kept("linear", [ours.weight], number, make)
    run = torch.ops.encdec_fast_cpu.linear_forward.default
    after = (ours.bias, 0, None, 0, None, None, 0.0)
    calls: dict[str, Callable[[], Any]] = {
        "torch": lambda: theirs(x),
        "encdec_fast": lambda: ours(x),
        "encdec_fast C++ call": lambda: run(x, ours.weight, block, *after)[0],
    }
    contenders = [
        Contender(name, torch.inference_mode()(call), lambda y: {"output": y})
        for name, call in calls.items()
    ]
    right = F.linear(x.double(), module.weight.double(), module.bias.double())
    return Work(contenders, {"output": right})


MAKERS: dict[Op, Callable[[OpCase], Work]] = {"additive_attention": _additive, "linear": _linear}

SUITES: dict[str, list[OpCase]] = {
    "attention": [
        OpCase("additive_attention", "float32", shape, training)
        for training in (False, True)
        for shape in ADDITIVE_SHAPES
    ],
    "linear": [
        OpCase("linear", dtype, (m, n, k))
        for dtype in ("float32", "bfloat16", "int8")
        for m in LINEAR_ROWS
        for n in LINEAR_SIZES
        for k in LINEAR_SIZES
    ],
}
