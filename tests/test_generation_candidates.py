"""The best tokens of a large vocabulary: what a step finds as it writes, and what edits leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from encdec_fast import use_backend
from encdec_fast.generation import GenerationConfig, engine, generate, packed_bytes
from encdec_fast.generation.engine import SHORTLISTS
from encdec_fast.models import RecurrentEncoderDecoder, TransformerEncoderDecoder

pytestmark = pytest.mark.usefixtures("native")

# More than a block of columns, and no multiple of one; a member of a team has several blocks.
TOKENS = 1307
SENTENCES = [[3, 5, 4], [9, 8, 7, 6, 5, 4], [2], [11, 12]]
MANY = list(range(2, 400))


def model(kind: str) -> Any:
    torch.manual_seed(5)
    if kind == "recurrent":
        found: Any = RecurrentEncoderDecoder(20, TOKENS, 24, 48)
    else:
        found = TransformerEncoderDecoder(20, TOKENS, 48, 4, 2, 2, 64, max_length=64)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(2.5 if parameter.dim() > 1 else 1)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    # Fewer edits than the step keeps numbers for, so that it is not read again; and more.
    "few": {"suppress_tokens": [670, 782, 872, 1053, 1131]},
    "many": {"suppress_tokens": MANY},
    "repetition": {"repetition_penalty": 1.7},
    # Lifts what was written above what the step found.
    "attraction": {"repetition_penalty": 0.4},
    "ngrams": {"no_repeat_ngram_size": 1},
    "all of them": {
        "suppress_tokens": MANY,
        "begin_suppress_tokens": [401, 402],
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[500], [501, 502]],
        "min_new_tokens": 9,
    },
    "shortlist": {"vocabulary": list(range(0, TOKENS, 3)), "eos_token_id": 3},
    "short shortlist": {"vocabulary": [1200, 7, 31, 31, 2], "eos_token_id": 2},
    "shortlist and more": {
        "vocabulary": range(0, TOKENS, 2),
        "suppress_tokens": MANY,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "eos_token_id": 402,
        "min_new_tokens": 5,
    },
    "prefix": {"prefix_bias": 0.4},
}


@pytest.mark.parametrize("beams", [1, 4, 20])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["recurrent", "transformer"])
def test_as_the_reference(kind: str, name: str, beams: int) -> None:
    config = GenerationConfig(
        decoder_start_token_id=1,
        max_new_tokens=14,
        num_beams=beams,
        num_return_sequences=min(beams, 3),
        **{"eos_token_id": 0} | OPTIONS[name],
    )
    prefixes = [[30, 31], [32], [33, 34, 35], [36]] if name == "prefix" else None
    found = {}
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            found[backend] = generate(model(kind), SENTENCES, config, prefixes=prefixes)
    ours, theirs = (
        [h for each in found[backend].hypotheses for h in each] for backend in ("cpu", "reference")
    )
    assert [h.tokens for h in ours] == [h.tokens for h in theirs]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.score, other.score, atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=2e-4, rtol=1e-5)
    if OPTIONS[name]:  # it changes something
        default = GenerationConfig()
        changes = {option: getattr(default, option) for option in OPTIONS[name]}
        plain = config.replace(**changes | {"eos_token_id": 0})
        without = [h for each in generate(model(kind), SENTENCES, plain).hypotheses for h in each]
        assert [h.tokens for h in ours] != [h.tokens for h in without]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8"])
@pytest.mark.parametrize("kind", ["recurrent", "transformer"])
def test_shortlists_are_packed(kind: str, dtype: Any) -> None:
    """Each once, the last ones kept; and no search has another's."""
    own = model(kind)
    config = GenerationConfig(decoder_start_token_id=1, eos_token_id=0, max_new_tokens=6)
    name = "int8" if dtype == "int8" else str(dtype).removeprefix("torch.")

    def found(vocabulary: Any = None, **options: Any) -> list[list[int]]:
        asked = config.replace(vocabulary=vocabulary, **options)
        output = generate(own, SENTENCES, asked, weight_dtype=dtype)
        return [each[0].tokens for each in output.hypotheses]

    plain = found()
    alone = packed_bytes(own)[name]
    some = list(range(0, TOKENS, 5))
    first = found(some)
    taken = packed_bytes(own)[name]
    assert alone < taken < 1.5 * alone
    assert all(token % 5 == 0 for tokens in first for token in tokens[1:])
    assert found() == plain != first
    assert found(some[::-1]) == first and packed_bytes(own)[name] == taken
    for k in range(SHORTLISTS + 3):
        tokens = [0, *range(300 + k, 400 + k)]
        assert all(t in tokens for written in found(tokens) for t in written[1:])
    assert len(engine._packed[own][name].shortlists) == SHORTLISTS
    assert found(some) == first
    with torch.no_grad():
        own.output.weight[some] += torch.randn(len(some), own.output.weight.shape[1])
    assert found(some) != first
    drawn = found(some, do_sample=True, seed=3)
    assert all(token % 5 == 0 for tokens in drawn for token in tokens[1:])
