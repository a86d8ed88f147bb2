"""Cases of the ops beside the recurrent ones: what is called, with what, and what it costs.

Each case makes its contenders itself: they share tensors, dtype and threads. A contender is a call
and the results by which it is judged before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import encdec_fast
from benchmarks import generation_cases, network_cases
from benchmarks.op_case import Contender, Op, OpCase, Results, Work, gradients, inference, training
from encdec_fast.ops import additive_attention, attention, linear
from encdec_fast.ops._cpu import FORMATS
from encdec_fast.ops._packing import kept
from encdec_fast.ops.additive_attention import reference as additive_reference
from encdec_fast.ops.linear import make_pack

ADDITIVE_SHAPES = ((32, 1, 50, 512), (32, 50, 50, 512), (8, 128, 512, 512))  # B, Tq, S, A
# B, H, Tq, S, D
ATTENTION_SHAPES = (
    (1, 8, 1024, 1024, 64),
    (8, 8, 128, 128, 64),
    (8, 16, 512, 512, 64),
    (32, 8, 1, 64, 64),
)
LINEAR_ROWS = (1, 8, 32, 128, 640)
LINEAR_SIZES = (512, 2048)


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
            contenders.append(Contender(name, training(function, own, grad), gradients))
        else:
            contenders.append(Contender(name, inference(function, leaves), lambda y: {"output": y}))
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
        right = gradients((right["output"], exact))
    return Work(contenders, right)


def _attention(case: OpCase) -> Work:
    b, h, tq, s, d = case.shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    # Heads side by side in the features, as a projection leaves them.
    q, k, v = (torch.randn(b, n, h, d).to(dtype).transpose(1, 2) for n in (tq, s, s))
    lengths: Tensor | None = None
    mask: Tensor | None = None
    if case.variant == "padded":
        lengths = torch.randint(s // 4, s + 1, (b,))
        mask = (torch.arange(s) < lengths.unsqueeze(1))[:, None, None, :]
    exact = [t.double() for t in (q, k, v)]
    right: Results = {"output": F.scaled_dot_product_attention(*exact, attn_mask=mask)}
    calls: dict[str, Callable[[], Any]]
    if case.variant == "backward":
        return _attention_backward([q, k, v])
    if case.variant == "weights":
        # torch returns weights from its module only.
        module = nn.MultiheadAttention(h * d, h, batch_first=True).to(dtype).requires_grad_(False)
        ours = encdec_fast.optimize(copy.deepcopy(module))
        x = torch.randn(b, tq, h * d).to(dtype)
        calls = {"torch": lambda: module(x, x, x), "encdec_fast": lambda: ours(x, x, x)}
        output, weights = copy.deepcopy(module).double()(*[x.double()] * 3)
        contenders = [
            Contender(
                name,
                torch.inference_mode()(call),
                lambda found: {"output": found[0], "weights": found[1]},
            )
            for name, call in calls.items()
        ]
        return Work(contenders, {"output": output, "weights": weights})
    calls = {
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "encdec_fast": lambda: attention(q, k, v, memory_lengths=lengths),
    }
    contenders = [
        Contender(name, torch.inference_mode()(call), lambda y: {"output": y})
        for name, call in calls.items()
    ]
    return Work(contenders, right)


def _attention_backward(tensors: list[Tensor]) -> Work:
    """Backward alone, again and again on the same forward."""
    grad = torch.randn_like(tensors[0])

    def contender(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], Results]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in tensors]
        output, outer = function(*leaves), grad.to(dtype)

        def call() -> Results:
            found = torch.autograd.grad(output, leaves, outer, retain_graph=True)
            return {f"grad_{i}": t for i, t in enumerate(found)}

        return call

    own = tensors[0].dtype
    functions = {"torch": F.scaled_dot_product_attention, "encdec_fast": attention}
    contenders = [
        Contender(name, contender(function, own), lambda found: found)
        for name, function in functions.items()
    ]
    return Work(contenders, contender(F.scaled_dot_product_attention, torch.float64)())


def _linear(case: OpCase) -> Work:
    m, n, k = case.shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    x = torch.randn(m, k).to(dtype)
    if case.training:
        return _linear_training(x, nn.Linear(k, n).to(dtype))
    module = nn.Linear(k, n).to(dtype).requires_grad_(False)
    ours = encdec_fast.nn.Linear(k, n).to(dtype).requires_grad_(False)
    ours.load_state_dict(module.state_dict())
    theirs: Any = module
    number = FORMATS["int8" if case.dtype == "int8" else dtype]
    if case.dtype == "int8":
        ours.weight_dtype = "int8"
        root = nn.Sequential(module)
        theirs = torch.ao.quantization.quantize_dynamic(root, {nn.Linear}, dtype=torch.qint8)

    block = kept("linear", [ours.weight], number, make_pack)
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


def _linear_training(x: Tensor, module: nn.Linear) -> Work:
    leaves = [x, module.weight.detach(), module.bias.detach()]
    grad = torch.randn(x.shape[0], module.out_features).to(x.dtype)
    functions: dict[str, Callable[..., Tensor]] = {"torch": F.linear, "encdec_fast": linear}
    contenders = []
    for name, function in functions.items():
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        contenders.append(Contender(name, training(function, own, grad), gradients))
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    return Work(contenders, gradients(training(F.linear, exact, grad.double())()))


MAKERS: dict[Op, Callable[[OpCase], Work]] = {
    "additive_attention": _additive,
    "attention": _attention,
    "linear": _linear,
    **network_cases.MAKERS,
    **generation_cases.MAKERS,
}

SUITES: dict[str, list[OpCase]] = {
    "attention": [
        OpCase("additive_attention", "float32", shape, training)
        for training in (False, True)
        for shape in ADDITIVE_SHAPES
    ]
    + [
        OpCase("attention", dtype, shape, variant=variant)
        for dtype in ("float32", "bfloat16")
        for variant in ("", "padded")
        for shape in ATTENTION_SHAPES
    ]
    + [
        OpCase("attention", dtype, (8, 8, 128, 128, 64), variant="weights")
        for dtype in ("float32", "bfloat16")
    ]
    + [
        OpCase("attention", dtype, shape, variant="backward")
        for dtype in ("float32", "bfloat16")
        for shape in ATTENTION_SHAPES[:3]
    ],
    "linear": [
        OpCase("linear", dtype, (m, n, k))
        for dtype in ("float32", "bfloat16", "int8")
        for m in LINEAR_ROWS
        for n in LINEAR_SIZES
        for k in LINEAR_SIZES
    ]
    + [
        OpCase("linear", "float32", shape, training=True)
        for shape in ((640, 512, 512), (640, 2048, 512), (4096, 512, 2048))
    ],
    **network_cases.SUITES,
    **generation_cases.SUITES,
}
