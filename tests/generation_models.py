"""Tiny encoder-decoder models of transformers with random weights, and searches with them.

Weights are large enough that distributions are not flat, and the end token has a bias in the
logits, without which random models hardly ever end. Those of queries and keys are smaller: with
large ones attention looks at one position only, and which one that is hangs on the last digits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.generation import GenerationConfig, Hypothesis
from encdec_fast.generation.reference import constrain

VOCABULARY = 60
SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
}
LENGTHS = (9, 4, 7, 1, 8, 9)  # of the source sentences, all in one padded batch


@dataclass(frozen=True)
class Tiny:
    """A model, float32 and in eval mode, the arguments of its encoder, and its special tokens."""

    model: Any
    inputs: dict[str, Tensor]
    start: int
    eos: int
    pad: int

    def double(self) -> Tiny:
        """The same in float64."""
        inputs = {k: t.double() if t.is_floating_point() else t for k, t in self.inputs.items()}
        model = copy.deepcopy(self.model).double()
        return Tiny(model, inputs, self.start, self.eos, self.pad)

    def step(self) -> tuple[Callable[[Tensor, Any], Any], Any]:
        """The search's step and its first state, one row per sentence."""
        with torch.no_grad():
            encoded = self.model.get_encoder()(**self.inputs).last_hidden_state
        return as_step(self.model, encoded, self.inputs.get("attention_mask"))


def as_step(
    model: Any, encoder_outputs: Tensor, attention_mask: Tensor | None
) -> tuple[Callable[[Tensor, Any], Any], Any]:
    """(step, state) that run the whole decoder, without a cache, on all tokens so far.

    encoder_outputs (B, S, d_model), attention_mask (B, S). The state's tokens are (rows, t).
    """
    from transformers.modeling_outputs import BaseModelOutput

    def step(tokens: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        so_far = torch.cat([state["tokens"], tokens.unsqueeze(1)], dim=1)
        masked = {} if state["mask"] is None else {"attention_mask": state["mask"]}
        with torch.no_grad():
            found = model(
                encoder_outputs=BaseModelOutput(state["encoded"]),
                decoder_input_ids=so_far,
                use_cache=False,
                **masked,
            )
        return found.logits[:, -1], {**state, "tokens": so_far}

    nothing = torch.empty(encoder_outputs.shape[0], 0, dtype=torch.int64)
    return step, {"tokens": nothing, "encoded": encoder_outputs, "mask": attention_mask}


def toy(B: int, V: int = 4, S: int = 3, alike: bool = False) -> tuple[Callable[..., Any], Any]:
    """(step, state) of a recurrent decoder with attention, in float64.

    Sentence i has S - i source positions; alike: all are copies of the first. The step gives
    attention (rows, S) too.
    """
    D = 6
    recurrent, embedding, output = (torch.randn(n, m).double() for n, m in ((D, D), (V, D), (D, V)))
    memory, lengths = torch.randn(B, S, D).double(), torch.arange(S, S - B, -1)
    if alike:
        memory, lengths = memory[:1].expand(B, S, D), torch.tensor([S]).expand(B)
    padding = torch.arange(S) >= lengths.unsqueeze(1)

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        (hidden, nothing), source = state["hidden"], state["source"]
        hidden = torch.tanh(hidden @ recurrent + embedding[tokens])
        scores = torch.einsum("rd,rsd->rs", hidden, source[0]).masked_fill(source[1], -torch.inf)
        attention = scores.softmax(1)
        context = torch.einsum("rs,rsd->rd", attention, source[0])
        return (hidden + context) @ output / 2, {**state, "hidden": (hidden, nothing)}, attention

    return step, {"hidden": (torch.zeros(B, D).double(), None), "source": [memory, padding]}


def exhaustive(
    step: Any, state: Any, prompt: list[int], config: GenerationConfig, prefix: Sequence[int] = ()
) -> list[tuple[float, list[int]]]:
    """Scores and tokens of every sequence that may follow a prompt, best first."""
    found = []

    def grow(tokens: list[int], state: Any, total: float, received: Tensor) -> None:
        logits, state, attention = step(torch.tensor(tokens[-1:]), state)
        if len(tokens) < len(prompt):
            grow(prompt[: len(tokens) + 1], state, total, received)
            return
        odds = {v: math.exp(logits[0, v]) for v in config.vocabulary or range(logits.shape[1])}
        written, received = tokens[len(prompt) :], received + attention[0]
        for token in range(logits.shape[1]):
            p, bias = odds.get(token, 0.0) / sum(odds.values()), config.prefix_bias or 0
            if len(written) < len(prefix) and written == list(prefix[: len(written)]):
                p = (1 - bias) * p + bias * (token == prefix[len(written)])
            if not p:
                continue
            longer, summed = [*tokens, token], total + math.log(p)
            if token not in config.end_tokens and len(longer) < config.limit(len(prompt)):
                grow(longer, state, summed, received)
                continue
            score = summed / (len(written) + 1) ** config.length_penalty
            for each in received[attention[0] > 0].tolist():
                score += config.coverage_penalty * math.log(min(each, 1.0))
            found.append((score, longer))

    grow(prompt[:1], state, 0.0, torch.zeros(()))
    return sorted(found, reverse=True)


def without_replacement(p: Sequence[float], drawn: Sequence[int]) -> float:
    """The chance that these are drawn, in this order, where each draw has the odds p."""
    chance, left = 1.0, 1.0
    for token in drawn:
        chance *= p[token] / left
        left -= p[token]
    return chance


def of_sentence(state: Any, i: int) -> Any:
    """The toy's first state for one sentence."""
    (hidden, _), (memory, padding) = state["hidden"], state["source"]
    one = slice(i, i + 1)
    return {"hidden": (hidden[one], None), "source": [memory[one], padding[one]]}


def generate(
    tiny: Tiny, prompts: list[list[int]], config: GenerationConfig
) -> list[list[Hypothesis]]:
    """What transformers finds with the same options. Prompts are of one length."""
    from transformers import GenerationMixin

    default = GenerationConfig()
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    options = {name: value for name, value in options.items() if value != getattr(default, name)}
    if len(prompts[0]) > 1:
        options["decoder_input_ids"] = torch.tensor(prompts)
    # Whisper's own method splits recordings and writes timestamps around this general one.
    found = GenerationMixin.generate(
        tiny.model, **tiny.inputs, **options, return_dict_in_generate=True, output_scores=True
    )
    beams = config.num_beams > 1
    terms = tiny.model.compute_transition_scores(
        found.sequences, found.scores, found.beam_indices if beams else None, not beams
    )
    hypotheses = []
    for i, tokens in enumerate(found.sequences.tolist()):
        start = len(prompts[0])
        ends = [t for t in range(start, len(tokens)) if tokens[t] in config.end_tokens]
        tokens = tokens[: ends[0] + 1 if ends else config.limit(start)]
        log_probs = terms[i, : len(tokens) - start].tolist()
        score = float(found.sequences_scores[i]) if beams else sum(log_probs)
        hypotheses.append(Hypothesis(tokens, score, log_probs))
    n = config.num_return_sequences
    return [hypotheses[i * n : (i + 1) * n] for i in range(len(prompts))]


def score(tiny: Tiny, sentence: int, tokens: list[int], prompt: int, config: Any) -> float:
    """What a search with this model gives these tokens, of which the first `prompt` are given."""
    step, state = tiny.step()
    state = {name: None if t is None else t[sentence : sentence + 1] for name, t in state.items()}
    total = 0.0
    for t in range(1, len(tokens)):
        logits, state = step(torch.tensor(tokens[t - 1 : t]), state)
        if t >= prompt:
            scores = logits[0] if config.num_beams == 1 else logits[0].log_softmax(0)
            scores = constrain(scores, tokens[:t], prompt, config)
            scores = scores.log_softmax(0) if config.num_beams == 1 else scores
            total += float(scores[tokens[t]])
    if config.num_beams == 1:
        return total
    return total / float(len(tokens) - prompt) ** config.length_penalty


def _text(pad: int) -> dict[str, Tensor]:
    """A padded batch of source sentences."""
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = torch.randint(4, VOCABULARY - 4, shape)
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
    return {"input_ids": tokens.masked_fill(~mask, pad), "attention_mask": mask.long()}


def _finish(
    model: Any, gain: float, bias: float, start: int, eos: int, pad: int, **inputs: Tensor
) -> Tiny:
    """Weights larger by `gain`, but not the embeddings', queries' and keys'; the end token's bias.

    The special tokens take the place of the class's own defaults.
    """
    import transformers

    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, module in model.named_modules():
            large = module is not head and not name.endswith(("q_proj", "k_proj", ".q", ".k"))
            if isinstance(module, nn.Linear) and large:
                module.weight *= gain
    biases = torch.zeros(VOCABULARY).index_fill_(0, torch.tensor(eos), bias)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(biases)
    else:
        head.bias = nn.Parameter(biases)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=start, eos_token_id=eos, pad_token_id=pad
    )
    return Tiny(model.eval().requires_grad_(False), inputs, start, eos, pad)


def marian() -> Tiny:
    """Sinusoidal positions, scaled embeddings; starts with the padding token."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(3)
    special = {"pad_token_id": 59, "eos_token_id": 0, "decoder_start_token_id": 59}
    config = MarianConfig(
        **SIZES, **special, max_position_embeddings=64, init_std=0.3, scale_embedding=True
    )
    return _finish(MarianMTModel(config), gain=3, bias=2, start=59, eos=0, pad=59, **_text(59))


def bart() -> Tiny:
    """Post-norm, learned positions; starts with the end token."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(4)
    config = BartConfig(**SIZES, max_position_embeddings=64, init_std=0.3)
    model = BartForConditionalGeneration(config)
    return _finish(model, gain=4, bias=4, start=2, eos=2, pad=1, **_text(1))


def mbart() -> Tiny:
    """Pre-norm; starts with a language's token."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(5)
    config = MBartConfig(**SIZES, max_position_embeddings=64, init_std=0.3)
    model = MBartForConditionalGeneration(config)
    return _finish(model, gain=4, bias=4, start=57, eos=2, pad=1, **_text(1))


def _t5(seed: int, **options: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **options
    )
    return T5ForConditionalGeneration(config)


def t5() -> Tiny:
    """ReLU, an output projection that is the embeddings; starts with the padding token."""
    return _finish(_t5(6), gain=4, bias=3, start=0, eos=1, pad=0, **_text(0))


def gated_t5() -> Tiny:
    """Gated GELU, an output projection of its own."""
    model = _t5(5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 32) * 0.35)
    return _finish(model, gain=1, bias=3, start=0, eos=1, pad=0, **_text(0))


def whisper() -> Tiny:
    """From sixteen frames of six mel features, in place of 3,000; without a mask."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(3)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = WhisperConfig(
        **SIZES,
        **special,
        decoder_start_token_id=58,
        begin_suppress_tokens=None,
        num_mel_bins=6,
        max_source_positions=8,
        max_target_positions=64,
        init_std=0.3,
    )
    model = WhisperForConditionalGeneration(config)
    frames = 2 * torch.tensor(LENGTHS).clamp(max=8).view(-1, 1, 1)
    features = torch.randn(len(LENGTHS), 6, 16) * (torch.arange(16) < frames)
    return _finish(model, gain=4, bias=4.5, start=58, eos=2, pad=1, input_features=features)


BUILDERS: dict[str, Callable[[], Tiny]] = {
    "marian": marian,
    "bart": bart,
    "mbart": mbart,
    "t5": t5,
    "gated_t5": gated_t5,
    "whisper": whisper,
}


@cache
def build(name: str) -> Tiny:
    """A model of BUILDERS, the same for every caller."""
    with torch.random.fork_rng():
        return BUILDERS[name]()
