"""What `gpu_check` asks of generation: the engine on the GPU beside the one on the CPU, and
transformers.

parity  Models whose distributions are not flat, greedy and with beams, in float32: the scores of
        the CPU's engine to 1e-3, and its tokens, but for one hypothesis in twenty, where two are as
        good as each other by rounding.
speed   Transformer-base with forced lengths. A step is the time on the device over the steps; the
        whole call, encoder and preparation included, stands beside transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.generation_cases import TARGET, VOCABULARY, marian
from encdec_fast import use_backend
from encdec_fast.backends import library
from encdec_fast.generation import GenerationConfig, generate
from encdec_fast.generation.device import run as on_device
from encdec_fast.generation.engine import Encoded, Request
from encdec_fast.models import RecurrentEncoderDecoder, TransformerEncoderDecoder

TOKENS = 23  # of the models of parity
STEPS_A_SECOND = 4000.0  # at batch 1, one beam: 0.25 ms a step
OVER_TRANSFORMERS = 10.0


@dataclass(frozen=True)
class Parity:
    """A model and a search for some sentences. make: the model, with weights from a seed."""

    name: str
    make: Callable[[], nn.Module]
    options: dict[str, Any]
    backend: str = "triton"
    sentences: int = 5

    def check(self, device: torch.device) -> float:
        """The worst of what differs, over what is allowed."""
        torch.manual_seed(0)
        model = self.make().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.mul_(2.5 if parameter.dim() > 1 else 1)
        sentences = [torch.randint(1, TOKENS, (n,)).tolist() for n in (5, 1, 9, 3, 7)]
        sentences = sentences[: self.sentences]
        config = GenerationConfig(
            decoder_start_token_id=1, eos_token_id=2, max_new_tokens=12, **self.options
        )
        expected = generate(model, sentences, config)
        with use_backend(self.backend):
            found = generate(_Model(copy.deepcopy(model).to(device)), sentences, config)
        pairs = [
            (own, other)
            for mine, others in zip(found.hypotheses, expected.hypotheses, strict=True)
            for own, other in zip(mine, others, strict=True)
        ]
        apart = max(abs(own.score - other.score) for own, other in pairs) / 1e-3
        unlike = sum(own.tokens != other.tokens for own, other in pairs) / (len(pairs) / 20)
        return max(apart, unlike)


class _Model:
    """A model whose encoder runs on whatever it would, when the search is asked of Triton."""

    def __init__(self, model: Any) -> None:
        self.model, self.source_padding = model, model.source_padding

    def generation_encode(self, source: Tensor, source_lengths: Tensor) -> Encoded:
        with use_backend(None):
            found: Encoded = self.model.generation_encode(source, source_lengths)
        return found

    def generation_decoder(self) -> Any:
        return self.model.generation_decoder()

    def generation_step(self, encoded: Encoded) -> Any:
        return self.model.generation_step(encoded)


def _recurrent(cell: str, attention: str | None, H: int = 18) -> Callable[[], nn.Module]:
    return lambda: RecurrentEncoderDecoder(
        TOKENS,
        TOKENS,
        embedding_size=7 if H % 8 else 8,
        hidden_size=H,
        encoder_hidden_size=H // 2,
        cell=cell,
        attention=attention,
        decoder_layers=2,
        max_source_length=9,
    )


def parity_cases() -> Iterator[Parity]:
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.6}
    models: dict[str, Callable[[], nn.Module]] = {
        f"{cell}, {attention}": _recurrent(cell, attention)
        for cell, attention in (("lstm", "additive"), ("gru", "dot"), ("lstm", "location"))
    }
    for first in (False, True):
        models[f"Transformer, norm_first={first}"] = lambda first=first: TransformerEncoderDecoder(  # type: ignore[misc]
            TOKENS, TOKENS, 32, 4, 2, 2, 45, norm_first=first, max_length=30
        )
    for name, make in models.items():
        yield Parity(f"{name}, greedy", make, {})
        yield Parity(f"{name}, 4 beams", make, beams)
    make = models["lstm, additive"]
    if torch.cuda.is_available() or not library.cuda_reasons("cpu", True):
        # The step in one launch has at most eight rows.
        for cell, attention in (("lstm", "additive"), ("gru", "dot"), ("lstm", None)):
            one = _recurrent(cell, attention, 48)
            name = f"{cell}, {attention}, a step in one launch"
            yield Parity(f"{name}, greedy", one, {}, "cuda")
            yield Parity(f"{name}, 4 beams", one, beams, "cuda", 2)
    every = {"coverage_penalty": 0.3, "no_repeat_ngram_size": 2, "min_length": 4}
    yield Parity("lstm, additive, constraints", make, {**beams, **every})


@dataclass(frozen=True)
class Speed:
    """Transformer-base, so many sentences of 20 tokens, so many beams, 32 tokens written."""

    batch: int
    beams: int

    @property
    def name(self) -> str:
        return f"Transformer-base, B={self.batch} beams={self.beams}"

    def calls(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[dict[str, Callable[[], Any]], Callable[[], float]]:
        """Whole calls by contender, and one that gives the seconds of a step on the device."""
        from encdec_fast.integrations import transformers as integration

        model = copy.deepcopy(marian()).to(device, dtype)
        ours = integration.optimize(copy.deepcopy(model))
        torch.manual_seed(1)
        source = torch.randint(1, VOCABULARY - 1, (self.batch, 20)).to(device)
        given = {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "num_beams": self.beams,
            "do_sample": False,
            "min_new_tokens": TARGET,
            "max_new_tokens": TARGET,
            "suppress_tokens": [VOCABULARY - 1],
        }
        config = GenerationConfig(
            num_beams=self.beams, min_new_tokens=TARGET, max_new_tokens=TARGET, eos_token_id=0
        )
        decoder = ours.generate.describe(1)
        memory = torch.randn(self.batch, 20, 512, device=device, dtype=dtype)
        requests = [Request([VOCABULARY - 1], [], i) for i in range(self.batch)]
        encoded = Encoded(memory, [20] * self.batch)
        held = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]

        def step() -> float:
            timing: dict[str, Any] = {}
            more = {"weight_dtype": held, "seed": 0, "timing": timing}
            with torch.inference_mode():
                on_device(ours.generate, decoder, encoded, requests, config, **more)
            return float(timing["device_seconds"]) / int(timing["steps"])

        whole = {
            "encdec_fast": lambda: ours.generate(**given),
            "transformers": lambda: model.generate(**given),
        }
        return whole, step


def speed_cases() -> Iterator[Speed]:
    for batch, beams in ((1, 1), (1, 4), (32, 1), (32, 4)):
        yield Speed(batch, beams)


def recurrent_steps(device: torch.device, dtype: torch.dtype, rows: int) -> dict[str, float]:
    """Seconds of a step of a recurrent decoder on the device: in one launch, and as a graph.

    Two LSTM layers of 512 with additive attention over 30 positions, and 32,000 tokens.
    """
    torch.manual_seed(0)
    sizes = {"embedding_size": 512, "hidden_size": 512, "encoder_hidden_size": 256}
    model = RecurrentEncoderDecoder(
        *(100, 32000), **sizes, attention="additive", decoder_layers=2, max_source_length=30
    )
    model = model.to(device, dtype).eval().requires_grad_(False)
    decoder = model.generation_decoder()
    source = torch.randint(1, 100, (rows, 30), device=device)
    config = GenerationConfig(min_new_tokens=TARGET, max_new_tokens=TARGET, eos_token_id=2)
    requests = [Request([1], [], i) for i in range(rows)]
    held = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    found = {}
    with torch.inference_mode():
        encoded = model.generation_encode(source, torch.full((rows,), 30))
        for name, one_launch in (("encdec_fast", True), ("as a graph of launches", False)):
            samples = []
            for _ in range(7):
                timing: dict[str, Any] = {}
                more = {"weight_dtype": held, "seed": 0, "timing": timing}
                on_device(model, decoder, encoded, requests, config, **more, one_launch=one_launch)
                samples.append(float(timing["device_seconds"]) / int(timing["steps"]))
            found[name] = sorted(samples)[len(samples) // 2]
    return found
