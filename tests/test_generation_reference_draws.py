"""What the reference search draws, against exact chances and against transformers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import generation_models as models
import pytest
import torch

from encdec_fast.generation import GenerationConfig, Hypothesis, reference
from encdec_fast.generation.reference import search


def p_value(observed: Counter[Any], expected: dict[Any, float], factor: float = 1.0) -> float:
    """Pearson's chi-square test of counts against probabilities, rare outcomes taken together.

    factor: 2 where `expected` is not known, but the mean of the counts and of another sample.
    """
    if set(observed) - set(expected):
        return 0.0
    total = sum(observed.values())
    pairs = [(observed[outcome], p * total) for outcome, p in expected.items()]
    groups = [pair for pair in pairs if pair[1] >= 5]
    rare = [pair for pair in pairs if pair[1] < 5]
    if rare:
        groups.append((sum(seen for seen, _ in rare), sum(due for _, due in rare)))
    statistic = factor * sum((seen - due) ** 2 / due for seen, due in groups)
    half = torch.tensor([len(groups) - 1, statistic]) / 2
    return float(torch.special.gammaincc(half[0], half[1]))


def truncated(logits: list[float], temperature: float, k: int, p: float) -> dict[int, float]:
    """What a token is drawn by with temperature, top_k and top_p."""
    best = sorted(range(len(logits)), key=lambda v: -logits[v])[: k or None]
    odds = {v: math.exp(logits[v] / temperature) for v in best}
    kept: dict[int, float] = {}
    for v in best:
        if sum(kept.values()) < p * sum(odds.values()):
            kept[v] = odds[v]
    return {v: odd / sum(kept.values()) for v, odd in kept.items()}


@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (7, 1.0), (9, 0.9)])
def test_draws(k: int, p: float) -> None:
    """Of first tokens: as they should be, and the test would notice a temperature 5 % too high."""
    step, state = models.toy(1, V=12)
    expected = truncated(step(torch.tensor([1]), state)[0][0].tolist(), 0.8, k, p)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=1, num_return_sequences=20_000, top_k=k, top_p=p, seed=1
    )
    for temperature in (0.8, 0.8 * 1.05):
        found = search(step, state, [[1]], config.replace(temperature=temperature))[0]
        chance = p_value(Counter(h.tokens[1] for h in found), expected)
        assert chance > 0.01 if temperature == 0.8 else chance < 0.001


def test_draws_of_sequences() -> None:
    step, state = models.toy(1)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=3, num_return_sequences=4000, eos_token_id=0, seed=1
    )
    every = models.exhaustive(step, state, [3], config.replace(length_penalty=0))
    expected = {tuple(tokens): math.exp(score) for score, tokens in every}
    for temperature in (1.0, 1.2):
        found = search(step, state, [[3]], config.replace(temperature=temperature))[0]
        chance = p_value(Counter(tuple(h.tokens) for h in found), expected)
        assert chance > 0.01 if temperature == 1 else chance < 0.001


@pytest.mark.parametrize(("beams", "ends", "kept"), [(1, [0, 1], 1), (2, [0, 1], 3), (2, None, 2)])
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 0, "top_p": 0.01}], ids=str)
def test_draws_keep_a_token_that_is_no_end(
    beams: int, ends: list[int] | None, kept: int, options: dict[str, Any]
) -> None:
    config = GenerationConfig(do_sample=True, num_beams=beams, eos_token_id=ends, **options)
    scores = reference.warp(torch.randn(9), config)
    assert int(scores.isfinite().sum()) == kept


def test_draws_stay_in_order() -> None:
    """Not in that of their ends: the first would be a short one more often than it should."""
    step, state = models.toy(1)
    config = GenerationConfig(do_sample=True, num_return_sequences=20, eos_token_id=0, seed=1)
    found = search(step, state, [[3]], config)[0]
    first = search(step, state, [[3]], config.replace(max_new_tokens=1))[0]
    assert [h.tokens[1] for h in found] == [h.tokens[1] for h in first]
    assert len({len(h.tokens) for h in found}) > 1


def test_seeds() -> None:
    step, state = models.toy(2)
    for beams in (1, 2):
        config = GenerationConfig(do_sample=True, num_beams=beams, num_return_sequences=2, seed=5)

        def drawn(config: GenerationConfig = config, **more: Any) -> list[list[int]]:
            found = search(step, state, [[1], [2]], config, **more)
            return [h.tokens for hyps in found for h in hyps]

        assert drawn() == drawn() != drawn(config.replace(seed=6))
        given = {"generator": torch.Generator().manual_seed(6)}
        assert drawn(**given) == drawn(config.replace(seed=6)) != drawn(**given)
        free = config.replace(seed=None)
        torch.manual_seed(6)
        assert drawn(free) == drawn(config.replace(seed=6)) != drawn(free)


def test_beam_sampling_of_one_token() -> None:
    """The best of the four candidates that are drawn without replacement is returned."""
    n = 4000
    step, state = models.toy(n, V=16, alike=True)
    config = GenerationConfig(do_sample=True, num_beams=2, top_k=0, max_new_tokens=1, seed=1)
    p = step(torch.tensor([1]), models.of_sentence(state, 0))[0][0].softmax(0).tolist()
    expected: dict[int, float] = dict.fromkeys(range(16), 0.0)
    for drawn in itertools.permutations(range(16), 4):
        expected[max(drawn, key=lambda token: p[token])] += models.without_replacement(p, drawn)
    expected = {token: chance for token, chance in expected.items() if chance}
    found = search(step, state, [[1]] * n, config)
    assert p_value(Counter(hyps[0].tokens[1] for hyps in found), expected) > 0.01
    best = max(range(16), key=lambda token: p[token])
    assert p_value(Counter({best: n}), expected) < 0.001


def test_beam_sampling_as_transformers() -> None:
    """What is returned, of three tokens at most, has the distribution that is found there."""
    pytest.importorskip("transformers")
    n, tiny = 2000, models.build("mbart")
    inputs = {name: tensor[:1].expand(n, -1) for name, tensor in tiny.inputs.items()}
    tiny, prompts = replace(tiny, inputs=inputs), [[tiny.start]] * n
    config = GenerationConfig(
        do_sample=True, num_beams=2, top_k=6, max_new_tokens=3, eos_token_id=tiny.eos, seed=1
    )

    def counted(found: list[list[Hypothesis]]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(hyps[0].tokens) for hyps in found)

    theirs = counted(models.generate(tiny, prompts, config.replace(seed=None)))
    for temperature in (1.0, 1.3):
        mine = counted(search(*tiny.step(), prompts, config.replace(temperature=temperature)))
        mean = {outcome: count / (2 * n) for outcome, count in (mine + theirs).items()}
        chance = p_value(mine, mean, factor=2)
        assert chance > 0.01 if temperature == 1 else chance < 0.001
