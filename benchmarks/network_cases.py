"""Cases of whole parts of a network: a Transformer's encoder, a decoder with attention, bridges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import encdec_fast
from benchmarks.op_case import Contender, Op, OpCase, Results, Work
from benchmarks.workload import TORCH_DTYPES

ENCODER_SHAPES = ((1, 20), (8, 64), (32, 128))  # B, T


def _encoder(case: OpCase) -> Work:
    """6 layers, d 512, ffn 2048, 8 heads. int8: beside torch in bfloat16, its faster form."""
    b, t = case.shape
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6).eval().requires_grad_(False)
    x = torch.randn(b, t, 512)
    padding: Tensor | None = None
    if case.variant == "padded":
        padding = torch.arange(t) >= torch.randint(t // 8, t * 7 // 8 + 1, (b,)).unsqueeze(1)
    dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16
    given = x.to(dtype)
    theirs = copy.deepcopy(encoder).to(dtype)
    ours = encdec_fast.optimize(copy.deepcopy(theirs), "int8" if case.dtype == "int8" else None)

    def results(y: Tensor) -> Results:
        # What stands in the padding is not compared: nobody reads it.
        kept = y if padding is None else y.masked_fill(padding.unsqueeze(2), 0)
        return {"output": kept}

    def contender(name: str, module: nn.Module) -> Contender:
        def call() -> Any:
            return module(given, src_key_padding_mask=padding)

        return Contender(name, torch.inference_mode()(call), results)

    exact = copy.deepcopy(encoder).double()
    with torch.no_grad():
        right = results(exact(x.double(), src_key_padding_mask=padding))
    return Work([contender("torch", theirs), contender("encdec_fast", ours)], right)


class _Loop(nn.Module):
    """An attention decoder in torch: LSTMCell and additive attention, keys projected once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2 * size, size)
        self.query_proj = nn.Linear(size, size, bias=False)
        self.memory_proj = nn.Linear(size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)

    def forward(self, input: Tensor, memory: Tensor) -> Tensor:
        keys = self.memory_proj(memory)
        h = c = context = input.new_zeros(input.shape[0], memory.shape[2])
        outputs = []
        for x in input.unbind(1):
            h, c = self.cell(torch.cat([x, context], dim=1), (h, c))
            hidden = torch.tanh(self.query_proj(h).unsqueeze(1) + keys)
            weights = torch.softmax(self.score(hidden).transpose(1, 2), dim=-1)
            context = (weights @ memory).squeeze(1)
            outputs.append(torch.cat([h, context], dim=1))
        return torch.stack(outputs, dim=1)


def _decoder(case: OpCase) -> Work:
    """Teacher-forced, with input feeding: forward and backward, gradients of everything."""
    b, tq, s, size = case.shape
    torch.manual_seed(0)
    loop = _Loop(size).to(TORCH_DTYPES[case.dtype])
    attention = encdec_fast.nn.AdditiveAttention(size, size, size)
    ours = encdec_fast.nn.AttentionDecoder(size, size, size, attention)
    ours.to(TORCH_DTYPES[case.dtype])
    ours.cell.cell.load_state_dict(loop.cell.state_dict())
    parts = ("query_proj", "memory_proj", "score")
    own = {name: t for name, t in loop.state_dict().items() if name.startswith(parts)}
    ours.cell.attention.load_state_dict(own)
    encdec_fast.optimize(ours)  # its projection of the memory, too
    input, memory = torch.randn(b, tq, size), torch.randn(b, s, size)
    grad = torch.randn(b, tq, 2 * size)

    def contender(module: nn.Module, dtype: torch.dtype) -> Callable[[], Results]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in (input, memory)]
        outer = grad.to(dtype)
        named = dict(module.named_parameters())

        def call() -> Results:
            for tensor in (*leaves, *named.values()):
                tensor.grad = None
            found = module(*leaves)
            output = found if isinstance(found, Tensor) else found[0]
            output.backward(outer)
            grads = {name.rsplit("cell.", 1)[-1]: t.grad for name, t in named.items()}
            grads = {name.removeprefix("attention."): g for name, g in grads.items()}
            both = {f"grad_{i}": t.grad for i, t in enumerate(leaves)}
            return {"output": output.detach(), **both, **grads}

        return call

    dtype = TORCH_DTYPES[case.dtype]
    contenders = [
        Contender(name, contender(module, dtype), lambda found: found)
        for name, module in (("torch", loop), ("encdec_fast", ours))
    ]
    right = contender(copy.deepcopy(loop).double(), torch.float64)()
    return Work(contenders, right)


def _gated_bridge(case: OpCase) -> Work:
    b, size = case.shape
    torch.manual_seed(0)
    dtype = TORCH_DTYPES[case.dtype]
    state, context = torch.randn(b, size).to(dtype), torch.randn(b, size).to(dtype)
    bridge = encdec_fast.nn.GatedBridge(size, size).to(dtype).requires_grad_(False)
    gate, fresh = bridge.gate, bridge.context_proj

    def plain(s: Tensor, c: Tensor, double: bool = False) -> Tensor:
        own = [t.double() if double else t for t in (gate.weight, gate.bias, fresh.weight)]
        g = torch.sigmoid(nn.functional.linear(torch.cat([s, c], dim=1), own[0], own[1]))
        return g * s + (1 - g) * torch.tanh(nn.functional.linear(c, own[2]))

    calls: dict[str, Callable[[], Any]] = {
        "torch": lambda: plain(state, context),
        "encdec_fast": lambda: bridge(state, context),
    }
    contenders = [
        Contender(name, torch.inference_mode()(call), lambda y: {"output": y})
        for name, call in calls.items()
    ]
    return Work(contenders, {"output": plain(state.double(), context.double(), True)})


MAKERS: dict[Op, Callable[[OpCase], Work]] = {
    "transformer_encoder": _encoder,
    "attention_decoder": _decoder,
    "gated_bridge": _gated_bridge,
}

SUITES: dict[str, list[OpCase]] = {
    "bridge": [
        OpCase("attention_decoder", "float32", (32, 30, 50, 512), training=True),
        OpCase("attention_decoder", "bfloat16", (32, 30, 50, 512), training=True),
        *(
            OpCase("gated_bridge", dtype, (b, 512))
            for dtype in ("float32", "bfloat16")
            for b in (1, 32)
        ),
    ],
    "transformer": [
        OpCase("transformer_encoder", dtype, shape, variant=variant)
        for dtype in ("float32", "bfloat16", "int8")
        for variant in ("", "padded")
        for shape in ENCODER_SHAPES[variant == "padded" :]
    ],
}
