"""The GPU's search on tensors of the CPU: it passes the tests of the compiled search."""

# ruff: noqa: F401 (tests run where they are imported)

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import test_generation_search as shared
import torch
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

from encdec_fast.generation import GenerationConfig, Hypothesis
from encdec_fast.generation.device.search import Search
from encdec_fast.generation.engine import Encoded, Request

run: Any = importlib.import_module("encdec_fast.generation.device.run")


class Steps:
    """Any step as the decoder of a session; rows that are not open are fed, too."""

    def __init__(self, step: Any, state: Any, rows: int, needs: bool) -> None:
        self.call, self.state, self.needs = step, state, needs
        many = rows // len(pytree.tree_leaves(state)[0])
        self.state = pytree.tree_map(lambda t: t.repeat_interleave(many, 0), state)

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
    sizes = run.sizes_of(requests, config, S, first[0].shape[1])
    steps = Steps(step, state, sizes.B * sizes.K, S > 0)
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
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests of the compiled search find this one in its place."""
    monkeypatch.setattr(shared, "search", search)
    yield
