"""Words to phonemes with a trained model, and how often they are wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from encdec_fast import GenerationConfig, generate
from examples.g2p import END, PHONEMES, START
from examples.g2p_model.data import MAX_LENGTH, PADDING, Sounds, encode_words

# Batches small enough that what a step works on stays in cache.
CONFIG = GenerationConfig(
    decoder_start_token_id=START,
    eos_token_id=END,
    pad_token_id=PADDING,
    suppress_tokens=(PADDING, START),
    max_length=MAX_LENGTH,
    max_batch_tokens=4096,
)


def pronounce(
    model: nn.Module, words: Sequence[str], beams: int = 1, weight_dtype: Any = None
) -> dict[str, Sounds]:
    """The phonemes of each word, by greedy search or with beams."""
    distinct = list(dict.fromkeys(words))
    if not distinct:
        return {}
    config = CONFIG.replace(num_beams=beams)
    source, lengths = encode_words(distinct)
    found = generate(model, source, config, source_lengths=lengths, weight_dtype=weight_dtype)
    best = [sentence[0].tokens[1:] for sentence in found.hypotheses]
    return {word: sounds_of(tokens) for word, tokens in zip(distinct, best, strict=True)}


def sounds_of(tokens: Sequence[int]) -> Sounds:
    """Phonemes up to the end mark."""
    return tuple(PHONEMES[token] for token in tokens if token != END)


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions from one to the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


@dataclass(frozen=True)
class ErrorRates:
    """words: the part that equals no listed pronunciation. sounds: edits per listed phoneme."""

    words: float
    sounds: float


def error_rates(
    found: Mapping[str, Sounds], dictionary: Mapping[str, Iterable[Sounds]]
) -> ErrorRates:
    """Each word beside that of its listed pronunciations that is nearest."""
    wrong = edits = count = 0
    for word, sounds in found.items():
        right = [(distance(sounds, listed), len(listed)) for listed in dictionary[word]]
        nearest, length = min(right, key=lambda one: (one[0] / one[1], one))
        wrong += nearest > 0
        edits += nearest
        count += length
    return ErrorRates(wrong / len(found), edits / count)
