"""What may follow each hypothesis, and how likely: constraints and draws, with sizes that stay.

`generation/reference.py` says what is computed. Here all hypotheses are rows of tensors on the
device, and nothing is read back: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.engine import listed
from encdec_fast.generation.reference import spare
from encdec_fast.ops._dropout import philox
from encdec_fast.ops.log_softmax_topk import log_softmax_topk

_WORD = 0xFFFFFFFF


class Rows(NamedTuple):
    """Where the hypotheses of a step are; B sentences of K rows each.

    length (): tokens so far, the same for all. prompts, limits int64 (B): as of a request. history
    int64 (R, L): the tokens of each row, where a constraint reads them. prefix int64 (B, P): soft
    prefixes, -1 behind their ends; follows (R): whether all that was written is the prefix's.
    seed (), numbers int64 (B): of the draws.
    """

    length: Tensor
    prompts: Tensor
    limits: Tensor
    history: Tensor | None
    prefix: Tensor | None
    follows: Tensor | None
    seed: Tensor
    numbers: Tensor


class Candidates(NamedTuple):
    """(R, k) each, best first: log probabilities, what they are chosen by (without the
    hypothesis' own), tokens. healthy (R): whether the row's scores are numbers."""

    log_probs: Tensor
    ranks: Tensor
    tokens: Tensor
    healthy: Tensor


class Forced(NamedTuple):
    """Tokens that are certain: as candidates (k), their log probabilities, and the scores (V)."""

    tokens: Tensor
    log_probs: Tensor
    row: Tensor


class Scores:
    """From logits to candidates, for one config and vocabulary.

    With `edits` the scores of whole rows are computed and changed; without, forbidden tokens are
    all that a config asks for, and the logits are read once.
    """

    def __init__(
        self, config: GenerationConfig, V: int, L: int, soft: bool, device: torch.device
    ) -> None:
        self.config, self.V, self.device = config, V, device
        self.beams = config.num_beams > 1
        self.kept = min(V, spare(config) * config.num_beams if self.beams else 1)
        self.ends = self._tokens(t for t in config.end_tokens if t < V)
        self.words = [
            word
            for word in map(list, config.bad_words_ids or ())
            # An end token alone is none; a word longer than any target is never written.
            if (len(word) > 1 or word[0] not in config.end_tokens) and len(word) <= L
        ]
        # Made once: a step only says where they count.
        self.suppressed = self._mask(config.suppress_tokens or ())
        self.begin_suppressed = self._mask(config.begin_suppress_tokens or ())
        early = config.min_length or config.min_new_tokens
        self.early_ends = self._mask(config.end_tokens if early else ())
        self.outside: Tensor | None = None
        if config.vocabulary is not None:
            self.outside = self._mask(set(range(V)) - set(config.vocabulary))
        self.soft = soft
        self.reads = bool(
            config.repetition_penalty != 1 or config.no_repeat_ngram_size or self.words
        )
        self.edits = config.do_sample or self.soft or config.repetition_penalty != 1
        self.word_tokens = [self._tokens(word) for word in self.words]
        self._forced = {
            (name, at_begin): self._certain(listed(getattr(config, name)), at_begin)
            for name in ("forced_bos_token_id", "forced_eos_token_id")
            for at_begin in (False, True)
            if getattr(config, name) is not None
        }

    def _tokens(self, tokens: Iterable[int]) -> Tensor:
        found = [token for token in tokens if token < self.V]
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def _mask(self, tokens: Iterable[int]) -> Tensor | None:
        """(1, V): True at these; None where there are none."""
        places = self._tokens(tokens)
        if not places.numel():
            return None
        return torch.zeros(1, self.V, dtype=torch.bool, device=self.device).index_fill(
            1, places, True
        )

    def _certain(self, forced: list[int], at_begin: bool) -> Forced:
        """Of forced tokens those that nothing forbids."""
        config = self.config
        forbidden = set(config.suppress_tokens or ())
        if at_begin:
            forbidden |= set(config.begin_suppress_tokens or ())
        left = [t for t in forced if t not in forbidden]
        if config.vocabulary is not None:
            left = [t for t in left if t in set(config.vocabulary)]
        certain = self._tokens(sorted(set(left)))
        k = min(self.kept, certain.numel())
        each = 0.0 if self.beams else -math.log(max(1, certain.numel()))
        log_probs = torch.full((self.kept,), -math.inf, device=self.device)
        log_probs[:k] = each
        tokens = torch.zeros(self.kept, dtype=torch.int64, device=self.device)
        tokens[:k] = certain[:k]
        row = torch.full((self.V,), -math.inf, device=self.device)
        return Forced(tokens, log_probs, row.index_fill(0, certain, 0.0))

    def begin(self, rows: Rows) -> Tensor:
        """(B): the length at which begin_suppress_tokens applies, behind a forced first token."""
        if self.config.forced_bos_token_id is None:
            return rows.prompts
        return torch.where(rows.prompts == 1, 2, rows.prompts)

    def _forbidden(self, rows: Rows) -> Tensor | None:
        """(1, V), (B, V) or (R, V): tokens that may not follow; None where all may."""
        config = self.config
        masks = [] if self.suppressed is None else [self.suppressed]
        if self.early_ends is not None:
            least = rows.prompts + config.min_new_tokens
            if not config.min_new_tokens:
                least = torch.full_like(rows.prompts, config.min_length)
            masks.append(self.early_ends & (rows.length < least).unsqueeze(1))  # (B, V)
        if self.begin_suppressed is not None:
            now = rows.length == self.begin(rows)
            masks.append(self.begin_suppressed & now.unsqueeze(1))
        mask = functools.reduce(torch.logical_or, masks) if masks else None
        if rows.history is None or not (config.no_repeat_ngram_size or self.words):
            return mask
        R = rows.history.shape[0]
        whole = torch.zeros(R, self.V + 1, dtype=torch.bool, device=self.device)
        if mask is not None:
            whole[:, : self.V].copy_(mask.repeat_interleave(R // mask.shape[0], 0))
        if config.no_repeat_ngram_size:
            tokens = self._repeated(rows.history, rows.length)
            whole.scatter_(1, tokens, torch.ones_like(tokens, dtype=torch.bool))
        for word in self.word_tokens:
            tokens = torch.where(self._written(rows, word[:-1]), word[-1], self.V).unsqueeze(1)
            whole.scatter_(1, tokens, torch.ones_like(tokens, dtype=torch.bool))
        return whole[:, : self.V]

    def _repeated(self, history: Tensor, length: Tensor) -> Tensor:
        """(R, L): tokens that would complete an n-gram a second time; V in the other places."""
        n, (R, L) = self.config.no_repeat_ngram_size, history.shape
        starts = torch.arange(L, device=self.device)
        same = (starts + n <= length).expand(R, L)
        for i in range(n - 1):
            last = history.gather(1, (length - (n - 1) + i).clamp(0).expand(R, 1))
            same = same & (history.roll(-i, 1) == last)
        after = history.roll(-(n - 1), 1)
        return torch.where(same & (after < self.V), after, self.V)

    def _written(self, rows: Rows, start: Tensor) -> Tensor:
        """(R): whether a row's last tokens are these."""
        assert rows.history is not None
        R, n = rows.history.shape[0], start.numel()
        found = (rows.length >= n).expand(R)
        if n:
            places = (rows.length - n + torch.arange(n, device=self.device)).clamp(0)
            found = found & (rows.history.index_select(1, places) == start).all(1)
        return found

    def _forced_now(self, rows: Rows, K: int) -> list[tuple[Forced, Tensor]]:
        """(what is certain at this step, where (R, 1)); a later one goes before."""
        if not self._forced:
            return []
        at_begin = rows.length == self.begin(rows)
        when = {
            "forced_bos_token_id": (rows.length == 1).expand_as(at_begin),
            "forced_eos_token_id": rows.length == rows.limits - 1,
        }
        return [
            (certain, (when[name] & (at_begin == begin)).repeat_interleave(K).unsqueeze(1))
            for (name, begin), certain in self._forced.items()
        ]

    def find(self, logits: Tensor, rows: Rows) -> Candidates:
        """The candidates of logits (R, V)."""
        if self.outside is not None:
            logits = logits.masked_fill(self.outside, -math.inf)
        return self._edited(logits, rows) if self.edits else self._plain(logits, rows)

    def _plain(self, logits: Tensor, rows: Rows) -> Candidates:
        K = logits.shape[0] // rows.prompts.shape[0]
        # Beams rank by the model's own distribution; a single row is normalised last.
        found = log_softmax_topk(
            logits, self.kept, self._forbidden(rows), renormalize=not self.beams
        )
        values, tokens, log_sums = found
        healthy = ~log_sums.isnan()
        for certain, here in self._forced_now(rows, K):
            values = torch.where(here, certain.log_probs, values)
            tokens = torch.where(here, certain.tokens, tokens)
            healthy = healthy | here.squeeze(1)
        values = values.masked_fill(values.isnan(), -math.inf)
        return Candidates(values, values, tokens, healthy)

    def _edited(self, logits: Tensor, rows: Rows) -> Candidates:
        config = self.config
        R, K = logits.shape[0], logits.shape[0] // rows.prompts.shape[0]
        scores = logits.float()
        total = scores.logsumexp(1)
        healthy = ~(total.isnan() | (total == math.inf))
        if self.beams:
            scores = scores.log_softmax(1)
        if config.repetition_penalty != 1:
            scores = self._penalised(scores, rows)
        mask = self._forbidden(rows)
        if mask is not None:
            many = mask.repeat_interleave(R // mask.shape[0], 0)
            scores = scores.masked_fill(many, -math.inf)
        for certain, here in self._forced_now(rows, K):
            scores = torch.where(here, certain.row, scores)
            healthy = healthy | here.squeeze(1)
        if config.do_sample:
            scores = self._warped(scores)
        if not self.beams:
            scores = scores.log_softmax(1)
        scores = scores.masked_fill(scores.isnan(), -math.inf)
        if self.soft:
            scores = self._biased(scores, rows)
        ranks = scores + self._gumbel(rows, K) if config.do_sample else scores
        _, tokens, _ = log_softmax_topk(ranks, self.kept)
        return Candidates(scores.gather(1, tokens), ranks.gather(1, tokens), tokens, healthy)

    def _penalised(self, scores: Tensor, rows: Rows) -> Tensor:
        assert rows.history is not None
        R, L = rows.history.shape
        places = torch.arange(L, device=self.device)
        counts = (places < rows.length) & (rows.history < self.V)
        tokens = torch.where(counts, rows.history, self.V)
        seen = torch.zeros(R, self.V + 1, dtype=torch.bool, device=self.device)
        seen.scatter_(1, tokens, torch.ones_like(tokens, dtype=torch.bool))
        penalty = self.config.repetition_penalty
        changed = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(seen[:, : self.V], changed, scores)

    def _warped(self, scores: Tensor) -> Tensor:
        """As `reference.warp`."""
        config = self.config
        scores = scores / config.temperature
        least = spare(config) if self.beams else 1
        if config.top_k > 0:
            k = min(max(config.top_k, least), self.V)
            worst = scores.topk(k, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < worst, -math.inf)
        if config.top_p < 1:
            ordered, places = scores.sort(stable=True, dim=1, descending=True)
            tail = ordered.softmax(1).flip(1).cumsum(1).flip(1)
            gone = tail <= 1 - config.top_p
            gone[:, :least].fill_(False)
            scores = scores.masked_fill(torch.zeros_like(gone).scatter(1, places, gone), -math.inf)
        return scores

    def _biased(self, scores: Tensor, rows: Rows) -> Tensor:
        assert rows.prefix is not None and rows.follows is not None
        bias, B = self.config.prefix_bias, rows.prompts.shape[0]
        assert bias is not None
        P, R = rows.prefix.shape[1], scores.shape[0]
        written = rows.length - rows.prompts  # (B)
        inside = (written >= 0) & (written < P)
        token = rows.prefix.gather(1, written.clamp(0, P - 1).unsqueeze(1))  # (B, 1)
        inside = inside & (token.squeeze(1) >= 0)
        token = token.clamp(0).repeat_interleave(R // B, 0, output_size=R)
        mixed = (1 - bias) * scores.exp()
        mixed = mixed.scatter_add(1, token, torch.full_like(token, bias, dtype=mixed.dtype))
        here = inside.repeat_interleave(R // B, output_size=R) & rows.follows
        return torch.where(here.unsqueeze(1), mixed.log(), scores)

    def _gumbel(self, rows: Rows, K: int) -> Tensor:
        """(R, V): noise by which the best of `score + noise` is a draw from exp(score), and the k
        best k draws without replacement (Kool et al., 2019, arXiv:1903.06059).

        It depends on the seed, the sentence's number, its row, the length and the token alone.
        """
        B = rows.numbers.shape[0]
        fours = torch.arange(-(-self.V // 4), device=self.device)
        row = torch.arange(K, device=self.device)
        numbers = rows.numbers.view(B, 1, 1)
        places = fours.expand(B, K, -1)
        second = (rows.length * K + row.view(1, K, 1)).expand_as(places)
        counter = [
            places,
            second,
            numbers.expand_as(places) & _WORD,
            numbers.expand_as(places) >> 32,
        ]
        bits = torch.stack(philox(counter, rows.seed), dim=-1).view(B * K, -1)[:, : self.V]
        uniform = (bits.double() + 0.5) * 2.0**-32
        return -(-uniform.log()).log().float()
