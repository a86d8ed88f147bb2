"""generation.search: C++ around a step in Python, held to the reference search."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import generation_models as models
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from encdec_fast.generation import GenerationConfig, Hypothesis, reference, search
from encdec_fast.generation.reference import warp

pytestmark = pytest.mark.usefixtures("native")


class Table:
    """A model that is a table: the logits and attention of a sentence by step and last token.

    The step is part of it, since otherwise paths of the same transitions would be equally good.
    dead: the share of tokens that may never follow; a start token may be beyond the vocabulary.
    """

    def __init__(self, seed: int, B: int, V: int, S: int = 3, dead: float = 0.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.B, self.V, self.S = B, V, S
        self.lengths = torch.randint(1, S + 1, (B,), generator=random)
        self.logits = torch.randn(B, 7, V, V, generator=random) * 2
        gone = torch.rand(B, 7, V, V, generator=random) < dead
        self.logits[gone] = -math.inf
        scores = torch.randn(B, 7, V, S, generator=random) * 2
        behind = torch.arange(S) >= self.lengths.view(-1, 1)
        self.attention = scores.masked_fill(behind.view(B, 1, 1, S), -math.inf).softmax(-1)

    def state(self) -> dict[str, Tensor]:
        return {"sentence": torch.arange(self.B), "position": torch.zeros(self.B).long()}

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        at = (state["sentence"], state["position"] % 7, tokens.clamp(max=self.V - 1))
        return self.logits[at], {**state, "position": state["position"] + 1}, self.attention[at]


@dataclass(frozen=True)
class Case:
    """A search, but for its config."""

    table: Table
    prompts: list[list[int]]
    prefixes: list[list[int]] | None = None
    need_attention: bool = False

    def given(self, config: GenerationConfig) -> tuple[Any, ...]:
        return self.table.step, self.table.state(), self.prompts, config

    def options(self) -> dict[str, Any]:
        return {
            "prefixes": self.prefixes,
            "source_lengths": self.table.lengths.tolist(),
            "need_attention": self.need_attention,
        }


Found = list[list[Hypothesis]]


def both(case: Case, config: GenerationConfig) -> tuple[Found, Found]:
    """What is found, and what the reference finds."""
    found = search(*case.given(config), **case.options())
    return found, reference.search(*case.given(config), **case.options())


def compare(case: Case, config: GenerationConfig) -> Counter[str]:
    """How many hypotheses there are, and how many differ by a tie. AssertionError otherwise."""
    count: Counter[str] = Counter()
    for mine, others in zip(*both(case, config), strict=True):
        assert len(mine) == len(others)
        for own, other in zip(mine, others, strict=True):
            count["all"] += 1
            assert own.score == pytest.approx(other.score, abs=1e-4)
            if own.tokens != other.tokens:
                assert own.score == pytest.approx(other.score, abs=1e-6), (own, other)
                count["ties"] += 1
                continue
            assert own.log_probs == pytest.approx(other.log_probs, abs=1e-4)
            assert (own.attention is None) == (other.attention is None)
            if own.attention is not None and other.attention is not None:
                torch.testing.assert_close(own.attention, other.attention)
    return count


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, GenerationConfig]:
    """A random model and random options, most of them as they are by default."""
    B, V = draw(st.integers(1, 3)), draw(st.integers(4, 9))
    token = st.integers(0, V - 1)

    def some(most: int, least: int = 1) -> st.SearchStrategy[list[int]]:
        return st.lists(token, min_size=least, max_size=most, unique=True)

    def seldom(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.none() | st.none() | st.none() | value

    beams = draw(st.integers(1, 5))
    options: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": draw(st.integers(1, beams)),
        "length_penalty": draw(st.sampled_from([1.0, -1.0, 0.0, 0.6, 2.0])),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
        "repetition_penalty": draw(seldom(st.sampled_from([1.4, 0.8]))) or 1.0,
        "no_repeat_ngram_size": draw(seldom(st.integers(1, 4))) or 0,
        "bad_words_ids": draw(seldom(st.lists(st.lists(token, min_size=1, max_size=3)))),
        "suppress_tokens": draw(seldom(some(2))),
        "begin_suppress_tokens": draw(seldom(some(2))),
        "forced_bos_token_id": draw(seldom(token)),
        "forced_eos_token_id": draw(seldom(token | some(2))),
        "vocabulary": draw(seldom(some(V, 2))),
        "coverage_penalty": draw(seldom(st.sampled_from([0.2, 1.0]))) or 0.0,
        "eos_token_id": draw(token | some(3)),
        "min_length": draw(seldom(st.integers(0, 5))) or 0,
        "min_new_tokens": draw(seldom(st.integers(0, 5))) or 0,
        "prefix_bias": draw(seldom(st.sampled_from([0.2, 0.9]))),
    }
    options[draw(st.sampled_from(["max_length", "max_new_tokens"]))] = draw(st.integers(5, 9))
    table = Table(draw(st.integers(0, 10**6)), B, V, dead=draw(st.sampled_from([0.0, 0.0, 0.6])))
    each = st.lists(st.integers(0, V), max_size=2)  # V: a token that is only read
    prompts = [[draw(st.integers(0, V)), *draw(each)] for _ in range(B)]
    prefixes = None
    if options["prefix_bias"] is not None:
        prefixes = [draw(st.lists(token, max_size=4)) for _ in range(B)]
    try:
        config = GenerationConfig(**options)
    except ValueError:
        assume(False)
    return Case(table, prompts, prefixes, draw(st.booleans())), config


def test_as_reference() -> None:
    count: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(cases())
    def check(drawn: tuple[Case, GenerationConfig]) -> None:
        count.update(compare(*drawn))

    check()
    assert count["all"] > 500
    assert count["ties"] <= 0.01 * count["all"]


LARGE = Case(Table(1, 6, 30), [[0], [1, 2], [3], [4, 5, 6], [7], [8]], need_attention=True)
PLAIN: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "three ends": {"eos_token_id": [2, 5, 9]},
    "max_length": {"max_new_tokens": None, "max_length": 7},
    "min_length": {"min_length": 7},
    "min_new_tokens": {"min_new_tokens": 6},
    "repetition": {"repetition_penalty": 1.7},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[4], [5], *([a, b] for a in range(9) for b in range(30))]},
    "suppressed": {"suppress_tokens": list(range(5, 15))},
    "suppressed first": {"begin_suppress_tokens": list(range(5, 25))},
    "forced bos": {"forced_bos_token_id": 11},
    "forced eos": {"forced_eos_token_id": 2, "max_new_tokens": 4},
    "shortlist": {"vocabulary": [2, 3, 5, 8, 13, 21]},
}
RANKING: dict[str, dict[str, Any]] = {
    "coverage": {"coverage_penalty": 2.0},
    "returned": {"num_return_sequences": 3},
} | {
    f"length {penalty}, stop {stop}": {"length_penalty": penalty, "early_stopping": stop}
    for penalty, stop in itertools.product((-1.0, 0.0, 0.6, 2.0), (False, True, "never"))
}


def written(found: Found) -> list[list[list[int]]]:
    return [[h.tokens for h in each] for each in found]


@pytest.mark.parametrize(
    ("name", "beams"), [*itertools.product(OPTIONS, (1, 4)), *itertools.product(RANKING, (4,))]
)
def test_each_option(name: str, beams: int) -> None:
    """As the reference, and not without effect."""
    config = GenerationConfig(**{**PLAIN, "num_beams": beams, **(OPTIONS | RANKING)[name]})
    assert compare(LARGE, config)["ties"] == 0
    plain = both(LARGE, GenerationConfig(**PLAIN, num_beams=beams))[0]
    assert written(both(LARGE, config)[0]) != written(plain)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("bias", [0.3, 0.95])
def test_soft_prefix(beams: int, bias: float) -> None:
    prefixes = [[], [9, 9, 9], [1, 17], [4] * 9, [20, 21, 3], [6]]
    case = Case(LARGE.table, LARGE.prompts, prefixes)
    config = GenerationConfig(**PLAIN, num_beams=beams, prefix_bias=bias)
    assert compare(case, config)["ties"] == 0
    follows = [
        h[0].tokens[len(p) :][: len(w)] == w
        for h, p, w in zip(both(case, config)[0], case.prompts, prefixes, strict=True)
    ]
    assert all(follows) == (bias > 0.9)


def test_a_vocabulary_larger_than_a_vector() -> None:
    """More candidates than are kept in order while a row is read, and rows of odd lengths."""
    for V, beams in ((130, 1), (131, 70), (301, 140)):
        case = Case(Table(V, 2, V), [[0], [1]])
        config = GenerationConfig(num_beams=beams, max_new_tokens=4, eos_token_id=[3, 4])
        assert compare(case, config)["ties"] <= 1


def test_nothing_may_follow() -> None:
    """A model that forbids everything after some tokens: hypotheses end as they are."""
    table = Table(3, 2, 6)
    table.logits[:, 2] = -math.inf
    case = Case(table, [[0], [1]])
    for options in (
        {},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 3, "repetition_penalty": 1.5},
        {"num_beams": 2, "coverage_penalty": 0.5},
    ):
        compare(case, GenerationConfig(eos_token_id=5, **options))
    biased = Case(table, [[0], [1]], [[3, 3, 3], [4]])
    for beams in (1, 3):
        compare(biased, GenerationConfig(eos_token_id=5, num_beams=beams, prefix_bias=0.5))


def chi_square(count: Counter[Any], expected: dict[Any, float]) -> float:
    """The probability that draws with these probabilities look like this, or worse."""
    assert set(count) <= {key for key, p in expected.items() if p > 0}
    n = count.total()
    kept = {key: p * n for key, p in expected.items() if p > 0}
    statistic = sum((count[key] - e) ** 2 / e for key, e in kept.items())
    freedom = torch.tensor((len(kept) - 1) / 2)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2)))


def two_tokens(table: Table, config: GenerationConfig) -> dict[tuple[int, int], float]:
    """The exact probability of each pair of tokens after token 0."""

    def after(position: int, token: int) -> list[float]:
        scores = warp(table.logits[0, position, token].double(), config)
        return scores.softmax(0).tolist()

    return {(a, b): p * q for a, p in enumerate(after(0, 0)) for b, q in enumerate(after(1, a))}


@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"temperature": 0.7, "top_k": 0}, {"top_k": 3}, {"top_k": 0, "top_p": 0.8}],
    ids=str,
)
def test_draws_have_the_exact_distribution(options: dict[str, Any]) -> None:
    """And so precisely that another temperature would not pass."""
    table, sizes = Table(5, 1, 5), {"num_return_sequences": 80_000, "max_new_tokens": 2}
    config = GenerationConfig(do_sample=True, seed=1, **sizes, **options)
    found = search(table.step, table.state(), [[0]], config)[0]
    count = Counter((h.tokens[1], h.tokens[2]) for h in found)
    exact = two_tokens(table, config)
    assert chi_square(count, exact) > 1e-3
    warmer = config.replace(temperature=1.05 * config.temperature)
    assert chi_square(count, two_tokens(table, warmer)) < 1e-3
    for h in found[:50]:
        assert h.score == pytest.approx(math.log(exact[h.tokens[1], h.tokens[2]]), abs=1e-4)


def test_tokens_as_good_as_the_last_of_top_k() -> None:
    """They may be drawn as well: of five equal ones each, and each of two that are forced."""

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]).expand(len(tokens), -1), state

    sizes = {"num_return_sequences": 300, "max_new_tokens": 1}
    for options, possible in (
        ({"top_k": 2}, {0, 1, 3, 4, 5}),
        ({"top_k": 1, "forced_eos_token_id": [2, 4]}, {2, 4}),
    ):
        config = GenerationConfig(do_sample=True, seed=1, **sizes, **options)
        found = search(step, torch.zeros(1), [[0]], config)[0]
        assert {h.tokens[1] for h in found} == possible


def test_beams_are_drawn_without_replacement() -> None:
    """Two beams and one step: four tokens are drawn, and the best two of them are the result."""
    B, table = 8000, Table(6, 1, 6)
    p = table.logits[0, 0, 0].double().softmax(0).tolist()
    exact: Counter[frozenset[int]] = Counter()
    for drawn in itertools.permutations(range(6), 4):
        pair = frozenset(sorted(drawn, key=lambda token: p[token])[2:])
        exact[pair] += models.without_replacement(p, drawn)  # type: ignore[assignment]
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 1, "top_k": 0}
    config = GenerationConfig(do_sample=True, seed=2, **options)

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return table.logits[0, 0, 0].expand(len(tokens), -1), state

    found = search(step, torch.zeros(B), [[0]] * B, config)
    count = Counter(frozenset(h.tokens[1] for h in each) for each in found)
    assert chi_square(count, dict(exact)) > 1e-3


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.9}, {"temperature": 2.0}])
def test_beam_sampling_as_the_reference(options: dict[str, Any]) -> None:
    """The distributions of the best of two beams are the same (a test of homogeneity)."""
    B, table = 800, Table(7, 1, 8)

    def step(tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return table.logits[0, position, tokens], position + 1

    sizes = {"num_beams": 2, "max_new_tokens": 3, "eos_token_id": 3}
    config = GenerationConfig(do_sample=True, seed=3, **sizes, **options)
    state, prompts = torch.zeros(B).long(), [[0]] * B
    mine, others = (
        Counter(tuple(each[0].tokens) for each in run(step, state, prompts, config))
        for run in (search, reference.search)
    )
    common = [key for key in mine | others if mine[key] + others[key] >= 10]
    assert len(common) >= 3
    statistic = sum((mine[k] - others[k]) ** 2 / (mine[k] + others[k]) for k in common)
    freedom = torch.tensor(len(common) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)) > 1e-3


@pytest.mark.parametrize("beams", [1, 3])
def test_seeds(beams: int) -> None:
    config = GenerationConfig(**PLAIN, num_beams=beams, do_sample=True, seed=5)
    found = written(search(*LARGE.given(config)))
    assert written(search(*LARGE.given(config))) == found
    assert written(search(*LARGE.given(config), seed=6)) != found
    none = config.replace(seed=None)
    assert written(search(*LARGE.given(none))) != written(search(*LARGE.given(none)))
    torch.manual_seed(1)
    drawn = written(search(*LARGE.given(none)))
    torch.manual_seed(1)
    assert written(search(*LARGE.given(none))) == drawn


def test_draws_do_not_depend_on_the_other_sentences() -> None:
    config = GenerationConfig(**PLAIN, do_sample=True, num_return_sequences=3, seed=5)
    found = search(*LARGE.given(config))
    prompts = [*LARGE.prompts[:2], [9, 9, 9, 9], [10], [11], [12]]
    others = search(LARGE.table.step, LARGE.table.state(), prompts, config)
    assert written(others)[:2] == written(found)[:2]
    assert written(others)[2] != written(found)[2]


def pieces_of(case: Case, config: GenerationConfig) -> tuple[Found, dict[int, list[list[int]]]]:
    """What is found, and what was streamed of each sentence."""
    pieces: dict[int, list[list[int]]] = {i: [] for i in range(len(case.prompts))}
    found = search(
        *case.given(config),
        prefixes=case.prefixes,
        stream=lambda sentence, tokens: pieces[sentence].append(tokens),
    )
    return found, pieces


def test_stream_of_single_tokens() -> None:
    found, pieces = pieces_of(LARGE, GenerationConfig(**PLAIN))
    for i, prompt in enumerate(LARGE.prompts):
        assert pieces[i] == [[token] for token in found[i][0].tokens[len(prompt) :]]


@pytest.mark.parametrize("dead", [0.0, 0.6])
def test_stream_of_beams(dead: float) -> None:
    """Pieces, one behind the other, are the best hypothesis; some come before the end.

    dead: where hypotheses that nothing may follow are the last resort, they may yet be the best.
    """
    early = 0
    for seed in range(70, 110):
        case = Case(Table(seed, 3, 6, dead=dead), [[0], [1], [2]])
        config = GenerationConfig(num_beams=2, max_new_tokens=15, eos_token_id=5)
        found, pieces = pieces_of(case, config)
        for i, prompt in enumerate(case.prompts):
            streamed = [token for piece in pieces[i] for token in piece]
            assert [*prompt, *streamed] == found[i][0].tokens, (seed, i)
            early += len(pieces[i]) > 1
    assert early > 20


class Stop(Exception):
    """What only these tests raise."""


def failing(table: Table, at: int, fail: Callable[[], Any]) -> Callable[..., Any]:
    """The table's step, but in step number `at` something happens."""
    calls = itertools.count()

    def step(tokens: Tensor, state: Any) -> Any:
        if next(calls) == at:
            fail()
        return table.step(tokens, state)

    return step


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_a_step_raises_comes_out(at: int, beams: int) -> None:
    def fail() -> None:
        raise Stop(at)

    config = GenerationConfig(max_new_tokens=9, num_beams=beams)
    before = written(search(*LARGE.given(config)))
    given = LARGE.given(config)[1:]
    with pytest.raises(Stop, match=str(at)):
        search(failing(LARGE.table, at, fail), *given)
    # A shell has its background jobs ignore Ctrl-C, and so would this one's.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            search(failing(LARGE.table, at, lambda: signal.raise_signal(signal.SIGINT)), *given)
    finally:
        signal.signal(signal.SIGINT, handler)
    with pytest.raises(Stop):
        search(*LARGE.given(config), stream=lambda sentence, tokens: fail())
    assert written(search(*LARGE.given(config))) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 17, 29])
@pytest.mark.parametrize("beams", [1, 3])
def test_scores_that_are_no_numbers(value: float, place: int, beams: int) -> None:
    table = Table(1, 6, 30)
    table.logits[:, 1, :, place] = value
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        search(table.step, table.state(), LARGE.prompts, GenerationConfig(num_beams=beams))


def test_time_and_timing() -> None:
    steps = itertools.count()

    def slow(tokens: Tensor, state: Any) -> Any:
        time.sleep(0.002)
        next(steps)
        return LARGE.table.step(tokens, state)

    given = slow, LARGE.table.state(), LARGE.prompts
    timing: dict[str, Any] = {}
    config = GenerationConfig(max_time=0.02, max_new_tokens=100_000, num_beams=2)
    found = search(*given, config, timing=timing)
    assert all(
        len(prompt) < len(h[0].tokens) < 100_000
        for prompt, h in zip(LARGE.prompts, found, strict=True)
    )
    assert timing["steps"] == next(steps)
    assert timing["rows"] > timing["steps"]
    assert timing["decoder_seconds"] > 0 and timing["search_seconds"] > 0
    long = [[0] * 5000] * 6  # still reading its prompt: nothing is written
    assert written(search(slow, LARGE.table.state(), long, config)) == [[p] for p in long]
