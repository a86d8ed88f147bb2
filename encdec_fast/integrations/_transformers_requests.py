"""What transformers' generate has prepared, in the engine's terms, or why it has no such terms.

transformers (5.24, generation/utils.py) merges configs and arguments, runs the encoder, makes the
first tokens, logits processors and stopping criteria, and hands all that to a decoding method.
Options are taken from its config, and from those processors that a model's own generate makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.generation import GenerationConfig, Hypothesis, TransformerDecoder
from encdec_fast.generation.engine import check_vocabulary

# Not by an import statement: type checkers would follow it through all of that library.
hf: Any = importlib.import_module("transformers")

# Fields of transformers' config that become an option of the engine.
MAPPED = {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "max_time",
    "num_beams",
    "do_sample",
    "length_penalty",
    "early_stopping",
    "num_return_sequences",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "renormalize_logits",
    "return_dict_in_generate",
    "eos_token_id",
}
# Tokens that transformers has made tensors of, and how it computes, which changes no result.
MARGINAL = {
    "decoder_start_token_id",
    "bos_token_id",
    "pad_token_id",
    "use_cache",
    "disable_compile",
    "compile_config",
    "transformers_version",
    "_from_model_config",
}
# Read only with do_sample.
_OF_SAMPLING = {"min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
_PROCESSORS = {
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "LogitNormalization",
}
_CRITERIA = {"MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria"}
_ARGUMENTS = {
    "attention_mask",
    "encoder_outputs",
    "cache",  # of its own decoder; before 5.24 past_key_values
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


class Prepared(NamedTuple):
    """The arguments of a decoding method of transformers.

    first (B * expanded, T) int64: each sentence's first tokens, repeated for its beams or returned
    sequences. processors, criteria, config, arguments: as transformers names them.
    """

    first: Tensor
    processors: Any
    criteria: Any
    config: Any
    arguments: dict[str, Any]

    @property
    def expanded(self) -> int:
        return max(int(self.config.num_beams), int(self.config.num_return_sequences))

    @property
    def memory(self) -> Tensor:
        """(B, S, M), once for each sentence."""
        found: Tensor = self.arguments["encoder_outputs"][0]
        return found[:: self.expanded]

    @property
    def prompts(self) -> list[list[int]]:
        found: list[list[int]] = self.first[:: self.expanded].tolist()
        return found


def is_given(value: Any) -> bool:
    """Whether an argument or a field asks for something."""
    return value is not None and value is not False and not (isinstance(value, list) and not value)


def why_not(prepared: Prepared, masked: bool) -> Iterator[str]:
    """Reasons against the engine. masked: whether the model's decoder reads the attention mask."""
    config = prepared.config
    fields = list(asked_for(config))
    yield from fields
    for name, value in prepared.arguments.items():
        if name not in _ARGUMENTS and is_given(value):
            yield f"the argument {name}"
    for kind, found, known in (
        ("logits processor", prepared.processors, _PROCESSORS),
        ("stopping criterion", prepared.criteria, _CRITERIA),
    ):
        for item in found:
            if not fields and type(item).__name__ not in known:
                yield f"the {kind} {type(item).__name__}"
    mask = prepared.arguments.get("attention_mask")
    if masked and mask is not None:
        yield from _unlike_lengths(mask)


@cache
def _fields() -> tuple[str, ...]:
    return tuple(vars(hf.GenerationConfig()))


def asked_for(config: Any) -> Iterator[str]:
    """Fields that ask for what the engine does not do."""
    defaults = config._get_default_generation_params()
    for name in _fields():
        value = getattr(config, name, None)
        if name in MAPPED | MARGINAL or (name in _OF_SAMPLING and not config.do_sample):
            continue
        if is_given(value) and value != defaults.get(name):
            yield f"{name}={value!r}"


def _unlike_lengths(mask: Tensor) -> Iterator[str]:
    counted = mask != 0
    lengths = counted.sum(1, keepdim=True)
    if not torch.equal(counted, torch.arange(mask.shape[1], device=mask.device) < lengths):
        yield "the attention mask has padding on the left, or holes"
    elif not bool((lengths > 0).all()):
        yield "a sentence has no token that the attention mask lets count"


def lengths(prepared: Prepared, masked: bool) -> list[int]:
    """How many positions of each sentence's memory count."""
    mask = prepared.arguments.get("attention_mask")
    if mask is None or not masked:
        return [prepared.memory.shape[1]] * prepared.memory.shape[0]
    found: list[int] = (mask[:: prepared.expanded] != 0).sum(1).tolist()
    return found


def options(prepared: Prepared, decoder: TransformerDecoder) -> GenerationConfig:
    """The engine's options. ValueError for what it does not do with this decoder."""
    config, V = prepared.config, decoder.output.weight.shape[0]
    prompt = prepared.first.shape[1]
    bos = _tokens(config.forced_bos_token_id)
    begins = prompt + (1 if bos and prompt == 1 else 0)
    suppressed: set[int] = set()
    begin_suppressed: set[int] = set()
    for processor in prepared.processors:
        # Tokens that there are not are in transformers' lists without consequence.
        if type(processor).__name__ == "SuppressTokensLogitsProcessor":
            suppressed.update(t for t in _tokens(processor.suppress_tokens) if 0 <= t < V)
        elif type(processor).__name__ == "SuppressTokensAtBeginLogitsProcessor":
            if processor.begin_index != begins:
                raise ValueError("begin_suppress_tokens at another place than the first free one")
            found = _tokens(processor.begin_suppress_tokens)
            begin_suppressed.update(t for t in found if 0 <= t < V)
    chosen: dict[str, Any] = {
        "max_length": config.max_length,
        "min_length": config.min_length or 0,
        "max_time": config.max_time,
        "num_beams": config.num_beams,
        "do_sample": config.do_sample,
        "length_penalty": float(config.length_penalty),
        "early_stopping": config.early_stopping,
        "num_return_sequences": config.num_return_sequences,
        "repetition_penalty": float(config.repetition_penalty),
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "bad_words_ids": tuple(_tokens(word) for word in config.bad_words_ids or ()),
        "suppress_tokens": tuple(sorted(suppressed)),
        "begin_suppress_tokens": tuple(sorted(begin_suppressed)),
        "forced_bos_token_id": bos[0] if len(bos) == 1 else None,
        "forced_eos_token_id": _tokens(config.forced_eos_token_id) or None,
        "eos_token_id": _tokens(config._eos_token_tensor),
    }
    if len(bos) > 1:
        raise ValueError("several forced_bos_token_id")
    if config.do_sample:
        chosen["temperature"] = float(config.temperature)
        chosen["top_k"] = config.top_k
        chosen["top_p"] = float(config.top_p)
    # A single row is a distribution anyway.
    renormalised = bool(config.renormalize_logits) and config.num_beams > 1
    ours = _options(tuple(chosen.items()), prompt if renormalised else 0, V)
    # An IndexError for a token without an embedding is transformers' to raise.
    check_vocabulary(ours, [], V)
    rows = decoder.embedding.shape[0]
    if not all(0 <= token < rows for tokens in prepared.prompts for token in tokens):
        raise ValueError(f"a first token is none of the {rows} that have an embedding")
    most = decoder.max_target_length
    if most is not None and ours.limit(prompt) - 1 > most:
        raise ValueError(
            f"max_length is {ours.limit(prompt)}, but the decoder has {most} positions"
        )
    return ours


def _tokens(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    found = value.tolist() if isinstance(value, Tensor) else value
    return tuple(int(t) for t in found) if isinstance(found, (list, tuple)) else (int(found),)


@lru_cache(maxsize=64)
def _options(chosen: tuple[tuple[str, Any], ...], renormalised: int, V: int) -> GenerationConfig:
    """Made once: the engine keeps what it makes of a config with the config.

    renormalised: the prompt's length where scores are normalised once more after all constraints,
    else 0. Where these forbid the same tokens at every step, that is what a search with a
    vocabulary without them does.
    """
    changes = dict(chosen)
    if renormalised:
        words, eos = changes.pop("bad_words_ids"), changes["eos_token_id"]
        by_step = {
            "do_sample": changes["do_sample"],
            "repetition_penalty": changes["repetition_penalty"] != 1.0,
            "no_repeat_ngram_size": changes["no_repeat_ngram_size"] > 0,
            "bad_words_ids": any(len(word) > 1 for word in words),
            "min_length": changes["min_length"] > renormalised,
            "begin_suppress_tokens": changes["begin_suppress_tokens"],
            "forced_eos_token_id": len(changes["forced_eos_token_id"] or ()) > 1,
        }
        for name, given in by_step.items():
            if given:
                raise ValueError(f"renormalize_logits with beams and {name}")
        # To forbid the end is not what bad words are for.
        never = {word[0] for word in words} - set(eos) | set(changes.pop("suppress_tokens"))
        if never:
            changes["vocabulary"] = tuple(token for token in range(V) if token not in never)
    return GenerationConfig(**changes)


def result(prepared: Prepared, found: list[list[Hypothesis]]) -> Any:
    """What transformers' generate returns: sequences (B * returned, T) int64, or an output object.

    Filled up as there: a beam search takes an end token where the padding token is 0.
    """
    config = prepared.config
    eos, pad = _tokens(config._eos_token_tensor), _tokens(config._pad_token_tensor)
    fill = pad[0] if pad else -1
    if config.num_beams > 1:
        fill = (fill if pad and fill != 0 else eos[0]) if eos else -1
    hypotheses = [hypothesis for sentence in found for hypothesis in sentence]
    sequences = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(hypothesis.tokens) for hypothesis in hypotheses],
        batch_first=True,
        padding_value=float(fill),
    ).to(prepared.first.device)
    if not config.return_dict_in_generate:
        return sequences
    outputs = importlib.import_module("transformers.generation.utils")
    if config.num_beams == 1:
        return outputs.GenerateEncoderDecoderOutput(sequences=sequences)
    scores = torch.tensor([hypothesis.score for hypothesis in hypotheses], device=sequences.device)
    return outputs.GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=scores)
