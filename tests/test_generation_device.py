"""The GPU's search on tensors of the CPU: it passes the tests of the compiled search."""

# ruff: noqa: F401 (tests run where they are imported)

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import test_generation_search as shared
import torch
from hypothesis import given, settings
from test_generation_search import (
    test_a_vocabulary_larger_than_a_vector,
    test_as_reference,
    test_beam_sampling_as_the_reference,
    test_beams_are_drawn_without_replacement,
    test_draws_do_not_depend_on_the_other_sentences,
    test_draws_have_the_exact_distribution,
    test_each_option,
    test_nothing_may_follow,
    test_scores_that_are_no_numbers,
    test_seeds,
    test_soft_prefix,
    test_stream_of_beams,
    test_stream_of_single_tokens,
    test_tokens_as_good_as_the_last_of_top_k,
    test_what_a_step_raises_comes_out,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from encdec_fast import use_backend
from encdec_fast.generation import GenerationConfig, Hypothesis
from encdec_fast.generation.device.search import Search
from encdec_fast.generation.engine import Encoded, Request

run: Any = importlib.import_module("encdec_fast.generation.device.run")


class Steps:
    """Any step as the decoder of a session; rows that are not open are fed, too."""

    def __init__(
        self, step: Any, state: Any, rows: int, beams: int, draws: int, needs: bool
    ) -> None:
        self.call, self.state, self.needs = step, state, needs
        # There may be room for more sentences: they are fed something, too.
        count = len(pytree.tree_leaves(state)[0]) * draws
        at = torch.arange(rows // beams).clamp(max=count - 1) // draws
        self.state = pytree.tree_map(lambda t: t[at].repeat_interleave(beams, 0), state)

    def begin(self, encoded: Encoded) -> None:
        """Its state is there."""

    def step(
        self, tokens: Tensor, parents: Tensor, position: Tensor, ancestors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        state = pytree.tree_map(lambda t: t.index_select(0, parents), self.state)
        logits, self.state, *attention = self.call(tokens, state)
        return logits, attention[0] if self.needs else None


def search(
    step: Any,
    state: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    source_lengths: Sequence[int] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    seed: int | None = None,
    need_attention: bool = False,
    stream: Any = None,
) -> list[list[Hypothesis]]:
    """`generation.search` on the engine of the GPU."""
    soft = prefixes if prefixes is not None else [[] for _ in prompts]
    requests = [
        Request(list(p), list(x), i) for i, (p, x) in enumerate(zip(prompts, soft, strict=True))
    ]
    first = step(torch.tensor([p[0] for p in prompts]), state)
    S = first[2].shape[1] if need_attention or config.coverage_penalty > 0 else 0
    sizes = run.sizes_of(requests, config, S, first[0].shape[1], kept=need_attention)
    draws = config.num_return_sequences if config.draws else 1
    steps = Steps(step, state, sizes.B * sizes.K, sizes.K, draws, S > 0)
    session = run.Session(Search(config, sizes, torch.device("cpu")), steps)
    drawn = config.seed if config.seed is not None else int(torch.randint(2**63 - 1, ()))
    lengths = [S] * len(prompts) if source_lengths is None else source_lengths
    return run.drive(
        session,
        Encoded(None, lengths),
        requests,
        config,
        (drawn if seed is None else seed) % 2**64,
        shown=S if need_attention else 0,
        written=stream,
    )


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of the compiled search find this one in its place."""
    monkeypatch.setattr(shared, "search", search)


SMALL = shared.Case(shared.Table(4, 3, 11), [[0], [1, 2], [3]], need_attention=True)
BEAMS = {"num_beams": 3, "num_return_sequences": 3}
FUSED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": BEAMS,
    "two ends": {**BEAMS, "eos_token_id": [2, 5]},
    "stop at once": {**BEAMS, "early_stopping": True, "length_penalty": 2.0},
    "stop never": {**BEAMS, "early_stopping": "never", "length_penalty": 0.4},
    "never, long ones better": {**BEAMS, "early_stopping": "never", "length_penalty": -1.0},
    "history": {**BEAMS, "no_repeat_ngram_size": 2, "bad_words_ids": [[4, 3]]},
    "coverage": {**BEAMS, "coverage_penalty": 1.5},
    "soft prefix": {**BEAMS, "prefix_bias": 0.6},
    "hardly anything may follow": {**BEAMS, "vocabulary": [2, 3], "no_repeat_ngram_size": 1},
    "draws": {"do_sample": True, "seed": 3, "num_return_sequences": 2, "temperature": 1.6},
    "beam sampling": {"do_sample": True, "seed": 3, "top_k": 4, **BEAMS},
    "beam sampling, covered": {"do_sample": True, "top_p": 0.7, "coverage_penalty": 0.4, **BEAMS},
}


@pytest.mark.parametrize("name", FUSED)
def test_a_step_in_one_kernel(name: str, interpreter: None) -> None:
    """It finds what torch's ops find, draws and all, and so what the reference does."""
    options = {"max_new_tokens": 5, "eos_token_id": 2, "seed": 1, **FUSED[name]}
    config = GenerationConfig(**options)
    prefixes = [[3, 3], [4], []] if config.prefix_bias else None
    more = {**SMALL.options(), "prefixes": prefixes}
    expected = search(*SMALL.given(config), **more)
    with use_backend("triton"):
        found = search(*SMALL.given(config), **more)
    assert shared.written(found) == shared.written(expected)
    for mine, others in zip(found, expected, strict=True):
        for own, other in zip(mine, others, strict=True):
            assert own.score == pytest.approx(other.score, abs=2e-6)
            assert own.log_probs == pytest.approx(other.log_probs, abs=1e-6)
            assert own.attention is not None and other.attention is not None
            assert torch.equal(own.attention, other.attention)


def test_coverage_that_is_not_returned(interpreter: None) -> None:
    """The penalty looks at the attention, which is then not kept."""
    options = {**FUSED["coverage"], "max_new_tokens": 4, "eos_token_id": 2}
    case = shared.Case(SMALL.table, SMALL.prompts)
    shared.compare(case, GenerationConfig(**options))
    with use_backend("triton"):
        shared.compare(case, GenerationConfig(**options))


def test_a_step_in_one_kernel_as_the_reference(interpreter: None) -> None:
    """With random models and options, as the compiled search is tested."""

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(shared.cases())
    def check(drawn: tuple[shared.Case, GenerationConfig]) -> None:
        with use_backend("triton"):
            shared.compare(*drawn)

    check()


def test_time_is_over_while_prompts_are_read(interpreter: None) -> None:
    """Sentences that have written nothing give their prompts, the others what they have."""
    config = GenerationConfig(eos_token_id=2, max_new_tokens=5, max_time=1e-9, **BEAMS)
    case = shared.Case(SMALL.table, [[0], [1, 2, 3], [4]])
    for name in (None, "triton"):
        with use_backend(name):
            found = search(*case.given(config))
        assert [h.tokens for h in found[1]] == [[1, 2, 3]]
        assert [len(h.tokens) for h in found[0]] == [2, 2, 2]


@pytest.mark.parametrize("beams", [1, 3])
def test_streams_and_numbers_of_the_kernel(beams: int, interpreter: None) -> None:
    config = GenerationConfig(max_new_tokens=4, eos_token_id=2, num_beams=beams)
    pieces: dict[int, list[int]] = {i: [] for i in range(3)}
    with use_backend("triton"):
        found = search(*SMALL.given(config), stream=lambda i, tokens: pieces[i].extend(tokens))
        table = shared.Table(4, 3, 11)
        table.logits[1, 2] = torch.nan
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            search(table.step, table.state(), SMALL.prompts, config)
    for i, prompt in enumerate(SMALL.prompts):
        assert [*prompt, *pieces[i]] == found[i][0].tokens
