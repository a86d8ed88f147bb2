"""A case of an op or a network beside the recurrent ones, and how its contenders are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.cases import WEIGHT_BYTES, DType

Op = Literal[
    "additive_attention",
    "attention",
    "linear",
    "transformer_encoder",
    "attention_decoder",
    "gated_bridge",
    "translation",
    "recurrent_translation",
    "pronunciation",
]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class OpCase:
    """shape: B, Tq, S, A of additive attention; B, H, Tq, S, D of attention; M, N, K of linear;
    B, T of a Transformer's encoder; B, Tq, S, H of the attention decoder; B, H of the gated bridge;
    B, beams of what generates.

    variant: of attention: "" all keys, "padded" lengths from a quarter of S to S, as a mask for
    torch; "weights" returned too; "backward" alone, the forward's results at hand. Of the encoder:
    "padded" to about half real tokens, as a mask. Of the attention decoder, whose attention is
    additive: "coverage" with it; "luong" general scores and an output layer; "location".
    """

    op: Op
    dtype: DType
    shape: tuple[int, ...]
    training: bool = False
    variant: str = ""

    @property
    def id(self) -> str:
        """A name that is unique and safe in a pytest id."""
        shape = "-".join(map(str, self.shape))
        name = f"{self.op}-{self.dtype}-{shape}" + ("-training" if self.training else "")
        return name + (f"-{self.variant}" if self.variant else "")

    @property
    def flops(self) -> int:
        """Operations of the products; additive attention: six for each of its (Tq, S, A) elements.

        Those six are what an element cannot be had for less than with both exponentials given: a
        multiply-add, a reciprocal (two with its correction) and a multiply-add. Backward: 14.
        """
        if self.op == "linear":
            m, n, k = self.shape
            return (6 if self.training else 2) * m * n * k
        if self.op == "transformer_encoder":
            b, t = self.shape
            return 6 * 2 * b * t * (4 * 512 * 512 + 2 * 512 * 2048 + 2 * 512 * t)
        if self.op == "attention_decoder":
            b, tq, s, h = self.shape
            # Of the query, of [context; h], of [x; h]; keys of the memory.
            query = {"luong": 2 * h * h, "location": 2 * h * s}.get(self.variant, h * h)
            keys = 0 if self.variant == "location" else b * s * h * h
            return 3 * 2 * ((4 * h * 3 * h + query) * b * tq + keys)
        if self.op in ("translation", "recurrent_translation", "pronunciation"):
            from benchmarks import generation_cases

            return generation_cases.flops(self)
        if self.op == "gated_bridge":
            b, h = self.shape
            return 2 * b * 3 * h * h
        if self.op == "attention":
            b, h, tq, s, d = self.shape
            projections = 8 * b * tq * (h * d) ** 2 if self.variant == "weights" else 0
            if self.variant == "backward":  # five products, the scores' again among them
                return 10 * b * h * tq * s * d
            return 4 * b * h * tq * s * d + projections
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


def inference(function: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    return call


def training(
    function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor
) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    def call() -> tuple[Tensor, list[Tensor]]:
        for leaf in leaves:
            leaf.grad = None
        output = function(*leaves)
        output.backward(grad)
        return output.detach(), leaves

    return call


def gradients(found: tuple[Tensor, list[Tensor]]) -> Results:
    output, leaves = found
    grads = {f"grad_{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    return {"output": output, **grads}
