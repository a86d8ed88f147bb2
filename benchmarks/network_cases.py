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


class _Attention(nn.ModuleDict):
    """An attention in torch's own functions; its submodules have our modules' names."""

    def __init__(self, kind: str, size: int, positions: int) -> None:
        linears = {
            "": ("query_proj", "memory_proj", "score"),
            "coverage": ("query_proj", "memory_proj", "score", "coverage_proj"),
            "luong": ("memory_proj", "output_proj"),
            "location": ("attn",),
        }[kind]
        sizes = {
            "score": (size, 1),
            "coverage_proj": (1, size),
            "output_proj": (2 * size, size),
            "attn": (2 * size, positions),
        }
        super().__init__(
            {n: nn.Linear(*sizes.get(n, (size, size)), bias=n == "attn") for n in linears}
        )
        self.kind = kind

    def forward(
        self, x: Tensor, h: Tensor, memory: Tensor, keys: Tensor | None, coverage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is fed to the next step, or by location to this one, and the weights."""
        if self.kind == "location":
            scores = self["attn"](torch.cat([x, h], dim=1)).unsqueeze(1)
        elif self.kind == "luong":
            assert keys is not None
            scores = h.unsqueeze(1) @ keys.transpose(1, 2)
        else:
            hidden = self["query_proj"](h).unsqueeze(1) + keys
            if self.kind == "coverage":
                hidden = hidden + self["coverage_proj"](coverage.unsqueeze(-1))
            scores = self["score"](torch.tanh(hidden)).transpose(1, 2)
        weights = torch.softmax(scores, dim=-1)
        context = (weights @ memory).squeeze(1)
        if self.kind == "luong":
            context = torch.tanh(self["output_proj"](torch.cat([context, h], dim=1)))
        return context, weights.squeeze(1)


class _Loop(nn.Module):
    """An attention decoder in torch: LSTMCell and attention, keys projected once."""

    def __init__(self, kind: str, size: int, positions: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2 * size, size)
        self.attention = _Attention(kind, size, positions)

    def forward(self, input: Tensor, memory: Tensor) -> Tensor:
        attention = self.attention
        keys = attention["memory_proj"](memory) if "memory_proj" in attention else None
        h = c = context = input.new_zeros(input.shape[0], memory.shape[2])
        coverage = input.new_zeros(memory.shape[:2])
        outputs = []
        for x in input.unbind(1):
            if attention.kind == "location":
                context, _ = attention(x, h, memory, keys, coverage)
            h, c = self.cell(torch.cat([x, context], dim=1), (h, c))
            if attention.kind != "location":
                context, weights = attention(x, h, memory, keys, coverage)
                coverage = coverage + weights
            outputs.append(torch.cat([h, context], dim=1))
        return torch.stack(outputs, dim=1)


def _our_attention(kind: str, size: int, positions: int) -> nn.Module:
    if kind == "luong":
        return encdec_fast.nn.LuongAttention(size, size, output_size=size)
    if kind == "location":
        return encdec_fast.nn.LocationAttention(size, size, positions)
    return encdec_fast.nn.AdditiveAttention(size, size, size, coverage=kind == "coverage")


def _decoder(case: OpCase) -> Work:
    """Teacher-forced, with input feeding: forward and backward, gradients of everything."""
    b, tq, s, size = case.shape
    torch.manual_seed(0)
    loop = _Loop(case.variant, size, s).to(TORCH_DTYPES[case.dtype])
    attention = _our_attention(case.variant, size, s)
    ours = encdec_fast.nn.AttentionDecoder(size, size, size, attention)
    ours.to(TORCH_DTYPES[case.dtype])
    ours.cell.load_state_dict(loop.state_dict())
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
            grads = {name.replace("cell.", ""): t.grad for name, t in named.items()}
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
            OpCase("attention_decoder", "float32", (32, 30, 50, 512), True, variant)
            for variant in ("coverage", "luong", "location")
        ),
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
