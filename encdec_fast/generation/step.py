"""The engine's search around a step in Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from encdec_fast.backends import library
from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.engine import (
    Request,
    Stream,
    check_vocabulary,
    count_rows,
    hypothesis,
    options_of,
)
from encdec_fast.generation.result import Hypothesis

Step = Callable[[Tensor, Any], tuple[Any, ...]]


def _floats(address: int, count: int) -> Tensor:
    """`count` floats of the engine's, as a tensor."""
    memory = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32)


def search(
    step: Step,
    state: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    source_lengths: Sequence[int] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    seed: int | None = None,
    numbers: Sequence[int] | None = None,
    need_attention: bool = False,
    stream: Stream | None = None,
    timing: dict[str, Any] | None = None,
) -> list[list[Hypothesis]]:
    """Search with any decoder that can take a step.

    step: (tokens int64 (rows), state) -> (logits (rows, V), state), and where attention is wanted
        (logits, state, attention (rows, S)). It is called with the last token of every open
        hypothesis. What it raises comes out of here, and the next search is not affected.
    state: tuples, lists and dicts of tensors (None is allowed) whose first dimension is the rows;
        at first one row for each sentence. Between steps its rows are chosen and reordered. Tokens
        are given on its device.
    prompts: for each sentence the start token and a forced prefix. prefixes: soft prefixes, for
        config.prefix_bias. source_lengths: of the sentences, for the coverage
        penalty, which leaves out what lies behind; None: S.
    numbers: by which the draws of sentences differ; None: their places. stream: called with
        (sentence, tokens) when these are certain to follow.

    Returns for each sentence its hypotheses, the best first. RuntimeError for logits of another
    shape, and where one is NaN; ValueError and IndexError for tokens that there are not.
    """
    if library.extension is None:
        raise RuntimeError("generation.search needs the compiled module encdec_fast._C")
    soft = prefixes if prefixes is not None else [[] for _ in prompts]
    pairs = zip(prompts, soft, strict=True)
    places = range(len(prompts)) if numbers is None else numbers
    requests = [Request(list(p), list(s), i) for (p, s), i in zip(pairs, places, strict=True)]
    if not all(prompts):
        raise ValueError("search: each prompt must have a token at least, the start token")
    if not prompts:
        return []
    count_rows(len(prompts), config)
    wants_attention = need_attention or config.coverage_penalty > 0
    # The first step tells how large the vocabulary is.
    steps = _Steps(step, state, [prompt[0] for prompt in prompts], wants_attention)
    check_vocabulary(config, requests, steps.vocabulary)
    S = steps.source_length
    lengths = [S] * len(prompts) if source_lengths is None else list(source_lengths)
    # Without attention nobody reads them, and S is not known.
    bad = wants_attention and any(not 0 <= length <= S for length in lengths)
    if len(lengths) != len(prompts) or bad:
        raise ValueError(
            f"search: source_lengths must be {len(prompts)} integers from 0 to {S}, the size of "
            f"the attention, but they are {lengths}"
        )
    decoder = library.extension.PythonDecoder(steps.take, steps.vocabulary, S, lengths)
    drawn = config.seed if config.seed is not None else int(torch.randint(2**63 - 1, ()))
    found = library.extension.search(
        decoder,
        requests,
        options_of(config),
        (drawn if seed is None else seed) % 2**64,
        need_attention,
        1,
        None,
        stream,
        timing,
    )
    return [[hypothesis(item, S) for item in sentence] for sentence in found]


class _Steps:
    """Steps as the engine asks for them: rows by number, results to addresses."""

    def __init__(self, step: Step, state: Any, tokens: list[int], wants_attention: bool) -> None:
        self.step, self.wants_attention = step, wants_attention
        tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        first = self._call(tokens, state)
        scores, self.state, *rest = first
        self.first: list[Tensor] | None = [scores, *rest]
        self.vocabulary: int = scores.shape[1]
        self.source_length: int = rest[0].shape[1] if rest else 0

    def _call(self, tokens: list[int], state: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            scores, state, *rest = self.step(torch.tensor(tokens, device=self.device), state)
        expected = (len(tokens), getattr(self, "vocabulary", scores.shape[-1]))
        if tuple(scores.shape) != expected:
            raise RuntimeError(
                f"search: step must return logits of the shape {expected}, "
                f"but they are {tuple(scores.shape)}"
            )
        if not self.wants_attention:
            return scores, state
        if not rest or rest[0] is None:
            raise ValueError(
                "search: need_attention and coverage_penalty need a step that returns attention "
                "(rows, S) too"
            )
        expected = (len(tokens), getattr(self, "source_length", rest[0].shape[-1]))
        if tuple(rest[0].shape) != expected:
            raise RuntimeError(
                f"search: step must return attention of the shape {expected}, "
                f"but it is {tuple(rest[0].shape)}"
            )
        return scores, state, rest[0]

    def take(
        self,
        tokens: list[int],
        parents: list[int],
        sentences: list[int],
        position: int,
        logits: int,
        stride: int,
        attention: int,
    ) -> None:
        """One step for the rows that continue `parents`; at position 0 those of the sentences."""
        rows = torch.tensor(sentences if position == 0 else parents, device=self.device)
        if position == 1:
            self.first = None
        if self.first is None:
            chosen = pytree.tree_map_only(Tensor, lambda t: t.index_select(0, rows), self.state)
            scores, self.state, *rest = self._call(tokens, chosen)
        else:
            scores, *rest = (result.index_select(0, rows) for result in self.first)
            self.state = pytree.tree_map_only(Tensor, lambda t: t.index_select(0, rows), self.state)
        V = self.vocabulary
        _floats(logits, len(tokens) * stride).view(-1, stride)[:, :V].copy_(scores)
        if attention:
            _floats(attention, rest[0].numel()).view_as(rest[0]).copy_(rest[0])
