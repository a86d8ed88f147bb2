"""The search in plain Python, a hypothesis at a time: obvious, slow, and what engines are held to.

Meanings are those of transformers' `generate`, decided for each sentence on its own: what else is
in the batch changes nothing, and a finished sentence leaves it. Everything is computed in float64.
With R hypotheses of a sentence open, one step of the model gives logits (R, V), and then:

    1. logits of tokens outside config.vocabulary become -inf
    2. with beams: s = log_softmax(logits); without: s = logits
    3. constraints change s, in the order of `constrain`, and draws change it further: `warp`
    4. without beams: s = log_softmax(s)
    5. where a hypothesis follows its soft prefix: s = log((1 - bias) exp(s) + bias [prefix token])

s is what a token adds to its hypothesis; -inf, and NaN, are never written. Without beams the best
token is taken, or one is drawn from exp(s). With n beams and E end tokens:

    6. candidates are the best max(2, 1 + E) * n of the R * V sums of log probabilities, or, with
       do_sample, so many drawn without replacement from the softmax over all of these sums; best
       first
    7. a candidate ends if its token is an end token, its length the limit, or the time is over.
       Of the first n candidates those that end are finished hypotheses, of which the n best remain;
       an end further back is forgotten. Of the others the n best stay open.
    8. a sentence ends when n hypotheses are finished and none that is open could be better, by
       config.early_stopping, or none is open

Equal scores: the lower flat index beam * V + token comes first, and what was found earlier.

A hypothesis that no token may follow ends as it is. With beams it is a last resort: it is returned
after those that finished, where these are fewer than num_return_sequences. Where constraints leave
even fewer sequences than that, fewer are returned. (transformers fills such gaps with sequences
whose scores are near -1e9, and writes token 0 where none is possible.)

Sutskever et al., 2014 (arXiv:1409.3215): beam search; Wu et al., 2016 (arXiv:1609.08144), section
7: the length and coverage penalties; Fan et al., 2018 (arXiv:1805.04833): top_k; Holtzman et al.,
2020 (arXiv:1904.09751): top_p; Keskar et al., 2019 (arXiv:1909.05858), section 4.1: the repetition
penalty; Arivazhagan et al., 2020 (arXiv:2004.03643), section 4: the soft prefix.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.result import Hypothesis

# (tokens int64 (rows), state) -> (logits (rows, V), state), and attention (rows, S) where asked for
Step = Callable[[Tensor, Any], tuple[Any, ...]]


def spare(config: GenerationConfig) -> int:
    """How many candidates there are per beam: enough that n can stay open though others end."""
    return max(2, 1 + len(config.end_tokens))


def _forbid(scores: Tensor, tokens: Iterable[int]) -> None:
    """-inf for tokens, of which those that the model does not have do not matter."""
    scores[[token for token in tokens if token < scores.shape[0]]] = -math.inf


def _keep_vocabulary(scores: Tensor, config: GenerationConfig) -> None:
    if config.vocabulary is not None:
        _forbid(scores, set(range(scores.shape[0])) - set(config.vocabulary))


def _force(scores: Tensor, tokens: int | Sequence[int]) -> None:
    """These tokens are certain: their log probability is 0, however many they are."""
    scores[:] = -math.inf
    scores[[tokens] if isinstance(tokens, int) else list(tokens)] = 0.0


def _repeating(tokens: list[int], n: int) -> set[int]:
    """Tokens that would complete an n-gram a second time."""
    start = tokens[len(tokens) - n + 1 :]
    grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
    return {gram[-1] for gram in grams if gram[:-1] == start}


def _bad(tokens: list[int], config: GenerationConfig) -> list[int]:
    """Tokens that would complete a bad word. An end token alone is none."""
    return [
        last
        for *start, last in config.bad_words_ids or ()
        if start == tokens[len(tokens) - len(start) :] and (start or last not in config.end_tokens)
    ]


def constrain(scores: Tensor, tokens: list[int], prompt: int, config: GenerationConfig) -> Tensor:
    """Scores (V) of what follows `tokens`, the first `prompt` of which were given, constrained.

    min_new_tokens takes the place of min_length where both are given, as in transformers.
    """
    scores = scores.clone()
    length, limit = len(tokens), config.limit(prompt)
    if config.repetition_penalty != 1:
        seen = sorted({token for token in tokens if token < scores.shape[0]})
        old, penalty = scores[seen], config.repetition_penalty
        scores[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if config.no_repeat_ngram_size > 0:
        _forbid(scores, _repeating(tokens, config.no_repeat_ngram_size))
    _forbid(scores, _bad(tokens, config))
    if length < (prompt + config.min_new_tokens if config.min_new_tokens else config.min_length):
        _forbid(scores, config.end_tokens)
    if config.forced_bos_token_id is not None and length == 1:
        _force(scores, config.forced_bos_token_id)
    if config.forced_eos_token_id is not None and length == limit - 1:
        _force(scores, config.forced_eos_token_id)
    _forbid(scores, config.suppress_tokens or ())
    # The first free place: behind a forced first token.
    begin = 2 if prompt == 1 and config.forced_bos_token_id is not None else prompt
    if length == begin:
        _forbid(scores, config.begin_suppress_tokens or ())
    _keep_vocabulary(scores, config)  # once more: one of several forced tokens may be outside
    return scores


def warp(scores: Tensor, config: GenerationConfig) -> Tensor:
    """Scores (V) that tokens are drawn by: temperature, then the top_k best, then top_p of them.

    Tokens as good as the k-th best stay. top_p keeps the fewest best tokens that together hold at
    least top_p. With beams both keep enough tokens for one that is no end token.
    """
    scores = scores / config.temperature
    least = 1 if config.num_beams == 1 else spare(config)
    if config.top_k > 0:
        k = min(max(config.top_k, least), scores.shape[0])
        scores = scores.masked_fill(scores < scores.topk(k).values[-1], -math.inf)
    if config.top_p < 1:
        ordered, places = scores.sort(descending=True, stable=True)
        tail = ordered.softmax(0).flip(0).cumsum(0).flip(0)  # a token and all that are worse
        gone = tail <= 1 - config.top_p
        gone[:least] = False
        scores[places[gone]] = -math.inf
    return scores


@dataclass(frozen=True)
class _Path:
    """A hypothesis while it is written."""

    parent: int  # the row of the last step that it continues
    draw: int  # without beams: which of the draws it is
    tokens: list[int]
    log_probs: list[float]
    attention: list[Tensor]  # (S) for each token written
    ends: bool

    @property
    def log_prob(self) -> float:
        return sum(self.log_probs)


class _Sentence:
    """The search for one sentence: its open hypotheses, best first, and those that ended."""

    def __init__(
        self,
        row: int,
        prompt: Sequence[int],
        prefix: Sequence[int],
        source: int | None,
        seed: int,
        config: GenerationConfig,
    ) -> None:
        self.prompt, self.prefix, self.source = list(prompt), list(prefix), source
        self.config, self.limit = config, config.limit(len(prompt))
        self.random = torch.Generator().manual_seed(seed)
        self.open = [_Path(row, 0, self.prompt[:1], [], [], False)]
        self.ended: list[_Path] = []  # with beams: the num_beams best, best first
        self.stuck: list[_Path] = []  # with beams: those that no token may follow

    def advance(self, row: int, logits: Tensor, attention: Tensor | None, late: bool) -> None:
        """Take the logits (R, V) and attention (R, S) of the open hypotheses, rows `row` and on."""
        fed = len(self.open[0].tokens)
        if fed < len(self.prompt):
            upto = len(self.prompt) if late else fed + 1
            path = _Path(row, 0, self.prompt[:upto], [], [], late)
            self.open, self.ended = ([], [path]) if late else ([path], [])
            return
        log_probs = torch.stack(
            [self._log_probs(own, path) for own, path in zip(logits, self.open, strict=True)]
        )

        def write(beam: int, token: int, draw: int = 0) -> _Path:
            """An open hypothesis with one token more."""
            old = self.open[beam]
            tokens = [*old.tokens, token]
            terms = [*old.log_probs, float(log_probs[beam, token])]
            seen = [] if attention is None else [*old.attention, attention[beam]]
            ends = token in self.config.end_tokens or len(tokens) >= self.limit or late
            return _Path(row + beam, draw, tokens, terms, seen, ends)

        extend = self._extend_beams if self.config.num_beams > 1 else self._extend_each
        extend(log_probs, write)

    def _log_probs(self, logits: Tensor, path: _Path) -> Tensor:
        """(V): what each token would add to a hypothesis; -inf for what may not follow."""
        config, prompt = self.config, len(self.prompt)
        beams = config.num_beams > 1
        scores = logits.clone()
        _keep_vocabulary(scores, config)
        if beams:
            scores = scores.log_softmax(0)
        scores = constrain(scores, path.tokens, prompt, config)
        if config.do_sample:
            scores = warp(scores, config)
        if not beams:
            scores = scores.log_softmax(0)
        scores = scores.masked_fill(scores.isnan(), -math.inf)
        written = path.tokens[prompt:]
        follows = len(written) < len(self.prefix) and written == self.prefix[: len(written)]
        if config.prefix_bias is not None and follows:
            probs = (1 - config.prefix_bias) * scores.exp()
            probs[self.prefix[len(written)]] += config.prefix_bias
            scores = probs.log()
        return scores

    def _extend_each(self, log_probs: Tensor, write: Callable[..., _Path]) -> None:
        """Greedy search, and draws without beams: each hypothesis goes its own way."""
        config, new = self.config, []
        for beam, path in enumerate(self.open):
            own = log_probs[beam]
            if not (own > -math.inf).any():
                self.ended.append(path)
                continue
            split = config.draws and not path.log_probs  # one row so far: here the draws part
            for draw in range(config.num_return_sequences) if split else [path.draw]:
                if config.do_sample:
                    token = int(torch.multinomial(own.exp(), 1, generator=self.random))
                else:
                    token = int(own.argmax())
                new.append(write(beam, token, draw))
        self.ended += [path for path in new if path.ends]
        self.open = [path for path in new if not path.ends]

    def _extend_beams(self, log_probs: Tensor, write: Callable[..., _Path]) -> None:
        """Beam search and beam sampling: steps 6 to 8 of this file's docstring."""
        config, n = self.config, self.config.num_beams
        possible = log_probs > -math.inf
        self.stuck += [self.open[i] for i, some in enumerate(possible.any(1).tolist()) if not some]
        so_far = torch.tensor([path.log_prob for path in self.open], dtype=torch.float64)
        sums = (so_far.unsqueeze(1) + log_probs).flatten()
        count = spare(config) * n
        if not possible.any():
            places = []
        elif config.do_sample:
            probs = sums.softmax(0)
            count = min(count, int((probs > 0).sum()))
            drawn = torch.multinomial(probs, count, generator=self.random)
            places = drawn[sums[drawn].sort(descending=True, stable=True).indices].tolist()
        else:
            count = min(count, int(possible.sum()))
            places = sums.sort(descending=True, stable=True).indices[:count].tolist()
        candidates = [write(*divmod(place, log_probs.shape[1])) for place in places]
        self.ended += [path for path in candidates[:n] if path.ends]
        self.ended = sorted(self.ended, key=self._score, reverse=True)[:n]
        going_on = [path for path in candidates if not path.ends]
        self.open = sorted(going_on, key=lambda path: path.log_prob, reverse=True)[:n]
        if self.open and not self._may_improve():
            self.open = []

    def _may_improve(self) -> bool:
        """Whether an open hypothesis could become one of the num_beams best, as far as is asked.

        The coverage penalty is at most 0, and an open hypothesis is taken to reach that.
        """
        config, best = self.config, self.open[0]
        if len(self.ended) < config.num_beams:
            return True
        if config.early_stopping is True:
            return False
        length = len(best.log_probs)
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = self.limit - len(self.prompt)
        possible = best.log_prob / math.pow(length, config.length_penalty)
        return possible > self._score(self.ended[-1])

    def _score(self, path: _Path) -> float:
        """What ended hypotheses are ranked by."""
        config, length = self.config, len(path.log_probs)
        if config.num_beams == 1 or not length:
            return path.log_prob
        score = path.log_prob / math.pow(length, config.length_penalty)
        if config.coverage_penalty > 0:
            received = torch.stack(path.attention).double().sum(0)[: self.source]
            # A position that received nothing at all, by underflow: a number in place of -inf.
            received = received.clamp(torch.finfo(torch.float32).tiny, 1.0)
            score += config.coverage_penalty * float(received.log().sum())
        return score

    def hypotheses(self, need_attention: bool) -> list[Hypothesis]:
        """What is returned: the best ones, or the draws in order."""
        paths = sorted(self.ended, key=lambda path: path.draw)  # with beams: no draws, as they are
        paths += sorted(self.stuck, key=self._score, reverse=True)
        found = []
        for path in paths[: self.config.num_return_sequences]:
            seen = torch.stack(path.attention) if need_attention and path.attention else None
            found.append(Hypothesis(path.tokens, self._score(path), path.log_probs, seen))
        return found


def _reordered(state: Any, rows: Tensor) -> Any:
    """Each tensor of a nesting of tuples, lists and dicts with `rows` of its dim 0."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.index_select(0, rows.to(state.device))
    if isinstance(state, dict):
        return {name: _reordered(part, rows) for name, part in state.items()}
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"a state is made of tensors, tuples, lists and dicts, not {type(state)}")
    parts = [_reordered(part, rows) for part in state]
    # A named tuple takes its parts one by one.
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def _check(
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]] | None,
    source_lengths: Sequence[int] | None,
    config: GenerationConfig,
) -> None:
    for name, given in (("prefixes", prefixes), ("source_lengths", source_lengths)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts, but {len(given)} {name}")
    if prefixes is not None and config.prefix_bias is None:
        raise ValueError("prefixes bias the search by prefix_bias; forced ones belong to prompts")
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt is empty, but it begins with the start token")
        if (limit := config.limit(len(prompt))) <= len(prompt):
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves none to write, up to {limit}"
            )


def _seeds(count: int, config: GenerationConfig, generator: torch.Generator | None) -> list[int]:
    """A seed for each sentence, so that its draws do not depend on the others' lengths."""
    if not config.do_sample:
        return [0] * count
    if generator is None and config.seed is not None:
        generator = torch.Generator().manual_seed(config.seed)
    return torch.randint(2**63 - 1, (count,), generator=generator).tolist()


def search(
    step: Step,
    state: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    prefixes: Sequence[Sequence[int]] | None = None,
    source_lengths: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    need_attention: bool = False,
) -> list[list[Hypothesis]]:
    """The best hypotheses of each sentence, at most num_return_sequences, best first.

    step: called with the last token of every open hypothesis, int64 (rows), and the state; gives
        logits (rows, V), the new state and, where it is needed, attention (rows, S). The rows of a
        sentence lie one behind the other.
    state: any nesting of tuples, lists and dicts of tensors and None, whose dim 0 are the rows: at
        first one per sentence. Before every step its rows are gathered by those they continue.
    prompts: the start token and a forced prefix. They are fed one token after the other, by one row
        per sentence, and neither scored nor counted, but by max_length and min_length. Lengths may
        differ. An end token in a prompt ends nothing.
    prefixes: soft ones, for config.prefix_bias, without the start token; they outweigh constraints.
    source_lengths: for the coverage penalty, which leaves out what lies behind; None: S.
    generator: of the draws, in place of config.seed.

    A sentence that is still being fed when config.max_time is over gives its prompt, with nothing
    written. ValueError for prompts, prefixes and lengths that do not fit, and for a step without
    attention where that is needed.
    """
    _check(prompts, prefixes, source_lengths, config)
    seeds = _seeds(len(prompts), config, generator)
    soft: Sequence[Sequence[int]] = prefixes if prefixes is not None else [()] * len(prompts)
    lengths = source_lengths if source_lengths is not None else [None] * len(prompts)
    sentences = [
        _Sentence(row, *given, config)
        for row, given in enumerate(zip(prompts, soft, lengths, seeds, strict=True))
    ]
    attentive = need_attention or config.coverage_penalty > 0
    tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    where = tensors[0].device if tensors else torch.device("cpu")
    began = time.monotonic()
    while live := [sentence for sentence in sentences if sentence.open]:
        rows = [path for sentence in live for path in sentence.open]
        state = _reordered(state, torch.tensor([path.parent for path in rows]))
        last = torch.tensor([path.tokens[-1] for path in rows], device=where)
        logits, state, *more = step(last, state)
        if attentive and (not more or more[0] is None):
            raise ValueError("need_attention and coverage_penalty need a step with attention")
        late = config.max_time is not None and time.monotonic() - began > config.max_time
        logits, row = logits.detach().double().cpu(), 0
        for sentence in live:
            own = slice(row, row + len(sentence.open))
            seen = more[0][own].detach().cpu() if attentive else None
            sentence.advance(row, logits[own], seen, late)
            row = own.stop
    return [sentence.hypotheses(need_attention) for sentence in sentences]
