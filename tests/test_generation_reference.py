"""The reference search against transformers' generate."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import generation_models as models
import pytest

from encdec_fast.generation import GenerationConfig, Hypothesis
from encdec_fast.generation.reference import search

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}} | {
    f"{n} beams": {"num_beams": n, "num_return_sequences": n} for n in range(2, 9)
}
# In place of tokens: "eos", "a" to "d", which a model writes often, and "x y", a frequent pair.
BAD_WORDS = [["a"], ["x", "y"], ["eos"], ["b", "c", "d"]]
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "rewarded repetition": {"repetition_penalty": 0.8},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bigrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": BAD_WORDS},
    "min_length": {"min_length": 7},
    "min_new_tokens": {"min_new_tokens": 6},
    "both minima": {"min_length": 10, "min_new_tokens": 3},
    "max_length": {"max_length": 6, "max_new_tokens": None},
    "both maxima": {"max_length": 5, "max_new_tokens": 7},
    "no maximum": {"max_new_tokens": None},
    "forced bos": {"forced_bos_token_id": "d"},
    "forced eos": {"forced_eos_token_id": "eos", "max_new_tokens": 5},
    "suppressed": {"suppress_tokens": ["a", "c"]},
    "suppressed first": {"begin_suppress_tokens": ["a", "b", "eos"]},
    "suppressed second": {"begin_suppress_tokens": ["a", "eos"], "forced_bos_token_id": "b"},
    "two ends": {"eos_token_id": ["eos", "a"]},
    "three ends": {"eos_token_id": ["c", "eos", "b"], "min_length": 4},
    "prefix": {"prefix": ["a", "eos", "b"]},
    "prefix, max_length": {"prefix": ["c", "d"], "max_length": 9, "max_new_tokens": None},
    "prefix, lengths": {"prefix": ["b", "c"], "min_length": 6, "length_penalty": 2.0},
    "prefix, first": {
        "prefix": ["a"],
        "begin_suppress_tokens": ["x", "eos"],
        "forced_bos_token_id": "b",
    },
    "everything": {
        "prefix": ["a", "b"],
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": BAD_WORDS,
        "min_new_tokens": 4,
        "forced_eos_token_id": "eos",
        "suppress_tokens": ["d"],
        "begin_suppress_tokens": ["c"],
        "eos_token_id": ["eos", "x"],
    },
}
CASES = dict(SEARCHES)
for number, (name, options) in enumerate(CONSTRAINTS.items()):
    CASES[f"greedy, {name}"] = options
    CASES[f"beams, {name}"] = {"num_beams": 2 + number % 4, "num_return_sequences": 2} | options
# With beams the two would be equally good, and it would be open which of them is taken.
CASES["greedy, forced eos of two"] = {"forced_eos_token_id": ["eos", "b"], "max_new_tokens": 5}
for penalty, stopping in itertools.product((-1.0, 0.0, 0.6, 1.0, 2.0), (False, True, "never")):
    CASES[f"length_penalty {penalty}, early_stopping {stopping}"] = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "length_penalty": penalty,
        "early_stopping": stopping,
    }
del CASES["length_penalty 1.0, early_stopping False"]  # that is "3 beams"
ALL_MODELS = pytest.mark.parametrize("model", models.BUILDERS)


@pytest.fixture
def transformers() -> None:
    """For tests that need it."""
    pytest.importorskip("transformers").logging.set_verbosity_error()


def found_by(model: str, prompts: list[list[int]], config: GenerationConfig) -> Any:
    return search(*models.build(model).step(), prompts, config)


@cache
def plain(model: str, beams: int, count: int) -> list[list[Hypothesis]]:
    """What is found without any other option."""
    tiny = models.build(model)
    config = GenerationConfig(
        max_new_tokens=10, num_beams=beams, num_return_sequences=count, eos_token_id=tiny.eos
    )
    return found_by(model, [[tiny.start]] * len(models.LENGTHS), config)


@cache
def names(model: str) -> dict[str, int]:
    """The tokens that stand behind the names in CASES."""
    eos = models.build(model).eos
    written = [h.tokens[1:] for hyps in plain(model, 3, 3) for h in hyps]
    tokens = Counter(token for each in written for token in each)
    pairs = Counter(pair for each in written for pair in itertools.pairwise(each))
    common = [token for token, _ in tokens.most_common() if token != eos][:4]
    x, y = next(p for p, _ in pairs.most_common() if p[0] != p[1] and eos not in p)
    return dict(zip("abcdxy", [*common, x, y], strict=True)) | {"eos": eos}


def resolved(value: Any, tokens: dict[str, int]) -> Any:
    """A value of CASES with tokens in place of their names."""
    if isinstance(value, list):
        return [resolved(part, tokens) for part in value]
    return tokens.get(value, value) if isinstance(value, str) else value


class Run(NamedTuple):
    """A case of a model, and what the reference finds."""

    prompts: list[list[int]]
    config: GenerationConfig
    found: list[list[Hypothesis]]


@cache
def run(model: str, case: str) -> Run:
    options = {"max_new_tokens": 10, "eos_token_id": "eos", **CASES[case]}
    options = {name: resolved(value, names(model)) for name, value in options.items()}
    start, prefix = [models.build(model).start], options.pop("prefix", [])
    # Another prefix for every other sentence, but of one length.
    prefixes = [prefix[i % 2 :] + prefix[: i % 2] for i in range(len(models.LENGTHS))]
    prompts, config = [start + given for given in prefixes], GenerationConfig(**options)
    return Run(prompts, config, found_by(model, prompts, config))


@cache
def ties(model: str, case: str) -> tuple[int, int]:
    """Of how many hypotheses how many differ from transformers', by no more than rounding.

    AssertionError for any other difference.
    """
    prompts, config, found = run(model, case)
    tiny = models.build(model)
    expected = models.generate(tiny, prompts, config)
    count = 0
    for i, (mine, others) in enumerate(zip(found, expected, strict=True)):
        for hyp, other in zip(mine, others, strict=True):
            assert hyp.score == pytest.approx(other.score, abs=1e-4)
            if hyp.tokens == other.tokens:
                # Both round, and these models magnify it: each is within 1e-4 of float64.
                assert hyp.log_probs == pytest.approx(other.log_probs, abs=2e-4)
                continue
            exact = [
                models.score(tiny.double(), i, h.tokens, len(prompts[i]), config)
                for h in (hyp, other)
            ]
            assert abs(exact[0] - exact[1]) < 1e-5, (hyp, other)
            count += 1
    return sum(map(len, found)), count


@ALL_MODELS
@pytest.mark.parametrize("case", CASES)
def test_as_transformers(model: str, case: str, transformers: None) -> None:
    ties(model, case)


def test_ties_are_rare(transformers: None) -> None:
    every = [ties(model, case) for model in models.BUILDERS for case in CASES]
    assert sum(count for _, count in every) <= 0.01 * sum(total for total, _ in every)


@ALL_MODELS
def test_ends_are_early_and_vary(model: str, transformers: None) -> None:
    """Otherwise the comparisons would say little of when a search stops."""
    found = [h for case in SEARCHES for hyps in run(model, case).found for h in hyps]
    ended = [len(h.tokens) for h in found if h.tokens[-1] == names(model)["eos"]]
    early = [length for length in ended if length < 11]
    assert 0.3 <= len(early) / len(found) <= 0.8
    assert len(set(early)) >= 6


@pytest.mark.parametrize("case", [case for case in CASES if case not in SEARCHES])
def test_options_matter(case: str, transformers: None) -> None:
    """With some model each changes what is found."""
    changes = False
    for model in models.BUILDERS:
        _, config, found = run(model, case)
        without = plain(model, config.num_beams, config.num_return_sequences)
        for one, other in zip(found, without, strict=True):
            changes |= [h.tokens for h in one] != [h.tokens for h in other]
    assert changes


@ALL_MODELS
def test_scores_in_float64(model: str, transformers: None) -> None:
    tiny = models.build(model).double()
    for case in ("greedy", "beams, everything"):
        prompts, config, found = run(model, case)
        for i in (0, 3):
            exact = models.score(tiny, i, found[i][0].tokens, len(prompts[i]), config)
            assert found[i][0].score == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_unequal_prompts_as_transformers(beams: int, transformers: None) -> None:
    """A batch of them is what generate finds with each of them."""
    tiny, token = models.build("mbart"), names("mbart")
    prefixes: list[str] = ["", "ab", "x", "cbadx", "y", "dd"]
    prompts = [[tiny.start, *(token[name] for name in prefix)] for prefix in prefixes]
    for limits in ({"max_new_tokens": 7}, {"max_length": 8, "min_length": 6}):
        config = GenerationConfig(num_beams=beams, eos_token_id=tiny.eos, **limits)
        found = found_by("mbart", prompts, config)
        for i, prompt in enumerate(prompts):
            expected = models.generate(tiny, [prompt] * len(prompts), config)[i]
            assert [h.tokens for h in found[i]] == [h.tokens for h in expected]
