"""The reference search against small direct computations."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import generation_models as models
import pytest
import torch
from torch import Tensor

from encdec_fast.generation import GenerationConfig, Hypothesis, reference
from encdec_fast.generation.reference import search

WIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "length_penalty": {"length_penalty": -0.5},
    "coverage_penalty": {"coverage_penalty": 0.7},
    "vocabulary": {"vocabulary": [0, 2, 3]},
    "prefix_bias": {"prefix_bias": 0.6},
    "all": {
        "length_penalty": 0.6,
        "coverage_penalty": 0.3,
        "vocabulary": [3, 0, 1],
        "prefix_bias": 0.2,
    },
}


@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
def test_wide_beams_find_everything(options: dict[str, Any]) -> None:
    """Of 4 tokens: all sequences, in order, with prompts of several lengths in one batch."""
    step, state = models.toy(3)
    prompts, prefixes, lengths = [[3], [3, 1, 0], [2, 2]], [[1, 3, 1], [], [2, 0, 1]], [3, 2, 1]
    config = GenerationConfig(
        max_new_tokens=4, num_beams=128, num_return_sequences=128, eos_token_id=0, **options
    )
    given = prefixes if config.prefix_bias else None
    found = search(step, state, prompts, config, prefixes=given, source_lengths=lengths)
    changed = False
    for i, hyps in enumerate(found):
        prefix = prefixes[i] if given else ()
        expected = models.exhaustive(step, models.of_sentence(state, i), prompts[i], config, prefix)
        assert [h.tokens for h in hyps] == [tokens for _, tokens in expected]
        assert [h.score for h in hyps] == pytest.approx([score for score, _ in expected])
        assert all(len(h.log_probs) == len(h.tokens) - len(prompts[i]) for h in hyps)
        without = config.replace(**{name: getattr(GenerationConfig(), name) for name in options})
        usual = models.exhaustive(step, models.of_sentence(state, i), prompts[i], without)
        changed |= [tokens for _, tokens in usual] != [h.tokens for h in hyps]
    assert changed == bool(options)


@pytest.mark.parametrize("bias", [0.02, 0.6])
def test_greedy_follows_a_soft_prefix_that_weighs_enough(bias: float) -> None:
    step, state = models.toy(2)
    config = GenerationConfig(max_new_tokens=4, eos_token_id=0, prefix_bias=bias)
    hard = config.replace(prefix_bias=None)
    usual = [hyps[0].tokens for hyps in search(step, state, [[3], [2]], hard)]
    prefixes = [[tokens[1] % 3 + 1, 2] for tokens in usual]  # something else
    found = search(step, state, [[3], [2]], config, prefixes=prefixes)
    for i, (hyp,) in enumerate(found):
        assert (hyp.tokens[1:3] == prefixes[i]) == (bias > 0.5)
        assert (hyp.tokens == usual[i]) == (bias < 0.5)
        every = models.exhaustive(
            step,
            models.of_sentence(state, i),
            usual[i][:1],
            config.replace(length_penalty=0),
            prefixes[i],
        )
        assert hyp.score == pytest.approx({tuple(t): x for x, t in every}[tuple(hyp.tokens)])


def test_a_soft_prefix_outweighs_constraints() -> None:
    """Where they forbid every token, the prefix is written, and nothing after it."""
    step, state = models.toy(2)
    config = GenerationConfig(prefix_bias=0.1, suppress_tokens=[0, 1, 2, 3])
    for beams in (1, 2):
        prefixes = [[1, 1, 2], [3]]
        found = search(step, state, [[3], [2]], config.replace(num_beams=beams), prefixes=prefixes)
        assert [hyps[0].tokens for hyps in found] == [[3, 1, 1, 2], [2, 3]]


@pytest.mark.parametrize("coverage", [0.0, 0.2])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.3, 0.6])
def test_never_stops_too_early(
    penalty: float, coverage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To go on until the limit finds the same, in more steps."""
    step, state = models.toy(2, V=6)
    config = GenerationConfig(
        max_new_tokens=15,
        num_beams=3,
        num_return_sequences=3,
        eos_token_id=[0, 1],
        early_stopping="never",
        length_penalty=penalty,
        coverage_penalty=coverage,
    )
    steps = [0]

    def counted(tokens: Tensor, state: Any) -> Any:
        steps[-1] += 1
        return step(tokens, state)

    def hypotheses() -> list[list[int]]:
        found = search(counted, state, [[2], [3]], config, source_lengths=[3, 2])
        return [h.tokens for hyps in found for h in hyps]

    found = hypotheses()
    steps.append(0)
    monkeypatch.setattr(reference._Sentence, "_may_improve", lambda sentence: True)
    assert hypotheses() == found
    assert steps[0] < steps[1] == 15


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3}], ids=str)
def test_sentences_do_not_depend_on_others(options: dict[str, Any]) -> None:
    step, state = models.toy(3)
    prompts, config = [[3, 1, 2], [3], [2, 2]], GenerationConfig(eos_token_id=0, **options)
    together = search(step, state, prompts, config)
    count = 1 if config.do_sample else 3  # sentences draw by their place in the batch
    for i in range(count):
        alone = search(step, models.of_sentence(state, i), prompts[i : i + 1], config)
        assert together[i][0].tokens == alone[0][0].tokens
        assert together[i][0].score == pytest.approx(alone[0][0].score, rel=1e-12)


@pytest.mark.parametrize("beams", [1, 3])
def test_attention(beams: int) -> None:
    """That of the step which wrote each token, along the hypothesis."""
    step, state = models.toy(2)
    config = GenerationConfig(
        max_new_tokens=6, num_beams=beams, num_return_sequences=beams, length_penalty=0.3
    )
    prompts = [[3, 1], [2]]
    for i, hyps in enumerate(search(step, state, prompts, config, need_attention=True)):
        for hyp in hyps:
            own, expected = models.of_sentence(state, i), []
            for token in hyp.tokens[:-1]:
                _, own, attention = step(torch.tensor([token]), own)
                expected.append(attention[0])
            assert hyp.attention is not None
            torch.testing.assert_close(hyp.attention, torch.stack(expected[len(prompts[i]) - 1 :]))
            score = hyp.score * len(hyp.log_probs) ** (0.3 if beams > 1 else 0)
            assert sum(hyp.log_probs) == pytest.approx(score)
    assert search(step, state, prompts, config)[0][0].attention is None


@pytest.mark.parametrize("beams", [1, 3])
def test_max_time(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the third second, or step, all ends as if that were the limit."""
    step, state = models.toy(3)
    now = 0.0

    def slow(tokens: Tensor, state: Any) -> Any:
        nonlocal now
        now += 1
        return step(tokens, state)

    monkeypatch.setattr(reference, "time", SimpleNamespace(monotonic=lambda: now))
    prompts = [[3], [1, 2], [2, 2, 1, 3, 0, 1]]
    config = GenerationConfig(num_beams=beams, num_return_sequences=beams, max_time=2.5)
    found = search(slow, state, prompts, config)
    for i, written in enumerate((3, 2)):
        limited = config.replace(max_time=None, max_new_tokens=written)
        expected = search(step, models.of_sentence(state, i), prompts[i : i + 1], limited)[0]
        assert [h.tokens for h in found[i]] == [h.tokens for h in expected]
        assert [h.score for h in found[i]] == pytest.approx([h.score for h in expected])
    assert found[2] == [Hypothesis(prompts[2], 0.0, [])]


def test_dead_ends() -> None:
    """Where no token may follow: greedy search ends, and beams return what they can."""
    step, state = models.toy(1)
    config = GenerationConfig(no_repeat_ngram_size=1, max_new_tokens=10)
    assert len(search(step, state, [[0]], config)[0][0].tokens) == 4
    found = search(step, state, [[0]], config.replace(num_beams=9, num_return_sequences=9))[0]
    assert {tuple(h.tokens) for h in found} == {(0, *p) for p in itertools.permutations((1, 2, 3))}
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    # Two sequences end before that, and come first, whatever their scores are.
    ending = config.replace(num_beams=4, num_return_sequences=4, eos_token_id=3, vocabulary=[2, 3])
    found = search(step, state, [[0]], ending.replace(bad_words_ids=[[2, 3]]))[0]
    assert [h.tokens for h in found] == [[0, 3], [0, 2]]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.3, 0.6])
def test_when_a_search_stops(penalty: float, early_stopping: bool | str) -> None:
    """With two tokens, of which 0 ends, one hypothesis of every length ends, and one is open."""
    end, go, steps, prompt, limit = math.log(0.2), math.log(0.8), 0, [1] * 6, 24

    def constant(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        nonlocal steps
        steps += 1
        return torch.tensor([end, go]).double().expand(len(tokens), -1), state

    config = GenerationConfig(num_beams=2, num_return_sequences=2, eos_token_id=0).replace(
        max_length=limit, length_penalty=penalty, early_stopping=early_stopping
    )
    found = search(constant, None, [prompt], config)[0]
    ended: list[float] = []
    for length in range(1, limit - len(prompt) + 1):
        ended = sorted([*ended, ((length - 1) * go + end) / length**penalty], reverse=True)[:2]
        whole = early_stopping == "never" and penalty > 0
        possible = length * go / (limit - len(prompt) if whole else length) ** penalty
        if len(ended) == 2 and (early_stopping is True or possible <= ended[1]):
            break
    assert steps == len(prompt) - 1 + length
    if length < limit - len(prompt):  # at the limit the open one ends too
        assert [h.score for h in found] == pytest.approx(ended)


def test_enough_stays_open() -> None:
    """Though the three end tokens are the best ones: with two beams there are eight candidates."""
    rows = []

    def ending(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        rows.append(len(tokens))
        return torch.tensor([4.0, 3.0, 2.0, 1.0, -1.0]).expand(len(tokens), -1), state

    config = GenerationConfig(
        max_new_tokens=3,
        num_beams=2,
        eos_token_id=[0, 1, 2],
        length_penalty=4.0,
        early_stopping="never",
    )
    assert search(ending, None, [[3]], config)[0][0].tokens == [3, 3, 3, 0]
    assert rows == [1, 2, 2]


def test_forced_tokens_outside_the_vocabulary() -> None:
    step, state = models.toy(1)
    config = GenerationConfig(max_new_tokens=3, forced_eos_token_id=[0, 2], vocabulary=[1, 2])
    assert search(step, state, [[3]], config)[0][0].tokens[-1] == 2


@pytest.mark.parametrize("beams", [1, 2])
def test_nan_and_unknown_tokens(beams: int) -> None:
    """NaN is a dead end of its own sentence; a prompt may have a token that cannot be written."""

    def broken(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.zeros(len(tokens), 4).masked_fill((tokens == 2).unsqueeze(1), torch.nan), state

    config = GenerationConfig(max_new_tokens=2, num_beams=beams, repetition_penalty=1.5)
    found = search(broken, None, [[2], [9]], config)
    assert [hyps[0].tokens[:2] for hyps in found] == [[2], [9, 0]]


def test_ties() -> None:
    """The lower token, and the better beam, come first."""

    def flat(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.zeros(len(tokens), 4), state

    assert search(flat, None, [[3]], GenerationConfig(max_new_tokens=3))[0][0].tokens == [
        3,
        0,
        0,
        0,
    ]
    config = GenerationConfig(max_new_tokens=2, num_beams=3, num_return_sequences=3)
    found = [h.tokens for h in search(flat, None, [[3]], config)[0]]
    assert found == [[3, 0, 0], [3, 0, 1], [3, 0, 2]]


BAD: dict[str, tuple[list[list[int]], dict[str, Any], dict[str, Any], str]] = {
    "empty": ([[1], []], {}, {}, "begins with the start token"),
    "long": ([[1], [1, 2, 3]], {"max_length": 3}, {}, "3 tokens leaves none to write"),
    "prefixes": ([[1], [1]], {}, {"prefixes": [[1], [2]]}, "prefixes bias the search"),
    "few prefixes": (
        [[1], [1]],
        {"prefix_bias": 0.1},
        {"prefixes": [[1]]},
        "2 prompts, but 1 pref",
    ),
    "lengths": ([[1], [1]], {}, {"source_lengths": [1]}, "2 prompts, but 1 source_lengths"),
    "coverage": ([[1], [1]], {"coverage_penalty": 1.0}, {}, "need a step with attention"),
    "attention": ([[1], [1]], {}, {"need_attention": True}, "need a step with attention"),
}


@pytest.mark.parametrize(("prompts", "options", "more", "text"), BAD.values(), ids=BAD)
def test_bad_input(
    prompts: list[list[int]], options: dict[str, Any], more: dict[str, Any], text: str
) -> None:
    step, state = models.toy(2)
    with pytest.raises(ValueError, match=text):
        search(lambda *given: step(*given)[:2], state, prompts, GenerationConfig(**options), **more)


def test_no_sentences() -> None:
    step, state = models.toy(2)
    assert search(step, state, [], GenerationConfig()) == []
    with pytest.raises(TypeError, match="tensors, tuples, lists and dicts"):
        search(step, "state", [[1]], GenerationConfig())
