"""The search as tensors on the device: every step is the same launches, and nothing is read back.

Each of B sentences has K rows, of which those that are open hold its hypotheses, best first. A
token, its log probability and the row that it continues are written once, at their place in the
target; `ancestors` says for each row where the tokens before it lie, and a decoder's cache is read
by it. `generation/reference.py` says what is searched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.device.results import NOTHING, Found
from encdec_fast.generation.device.scores import Candidates, Rows, Scores
from encdec_fast.generation.engine import Request
from encdec_fast.generation.reference import spare
from encdec_fast.ops import _triton


class Sizes(NamedTuple):
    """What shapes a search's tensors, each with room for at least so many.

    B: sentences; with several draws each is one of its own. L: the longest target. P: the longest
    prompt. X: the longest soft prefix, 0: there is none. S: of the attention that is looked at, or
    0. kept: whether that is returned.
    """

    B: int
    K: int
    L: int
    P: int
    X: int
    S: int
    V: int
    kept: bool


class Ended(NamedTuple):
    """(B, K) each, best first: hypotheses that are finished, or that no token may follow.

    scores float64: -inf where there is none. lengths: tokens. rows: at the place before the last
    token. tokens, log_probs: the last token's.
    """

    scores: Tensor
    lengths: Tensor
    rows: Tensor
    tokens: Tensor
    log_probs: Tensor


class Search:
    """A search's tensors, and one step of it."""

    def __init__(self, config: GenerationConfig, sizes: Sizes, device: torch.device) -> None:
        self.config, self.sizes, self.device = config, sizes, device
        B, K, L, P, X, S, V, keeps = sizes
        R = B * K
        self.scores = Scores(config, V, L, X > 0, device)
        self.covers = config.coverage_penalty > 0 and K > 1

        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.places = torch.arange(R, device=device)
        self.settings = torch.tensor(
            [config.length_penalty, config.coverage_penalty], dtype=torch.float64, device=device
        )
        self.position = numbers(B)  # the same for all: that of the last tokens
        self.late, self.failed = numbers(1, dtype=torch.bool), numbers(1)
        self.prompts, self.lengths, self.limits = numbers(B, P), numbers(B), numbers(B)
        self.numbers, self.seed, self.sources = numbers(B), numbers(1), numbers(B)
        self.prefix = numbers(B, X) if X else None
        self.follows = numbers(R, dtype=torch.bool) if X else None
        self.open = numbers(B, K, dtype=torch.bool)
        self.sums = numbers(B, K, dtype=torch.float64)
        self.next_tokens, self.parents = numbers(R), numbers(R)
        self.tokens, self.rows = numbers(L, R), numbers(L, R)
        self.log_probs = numbers(L, R, dtype=torch.float32)
        self.attention = numbers(L, R, S, dtype=torch.float32) if keeps else None
        self.received = numbers(R, S, dtype=torch.float32) if self.covers else None
        self.ancestors = numbers(R, L, dtype=torch.int32)
        self.history = numbers(R, L) if self.scores.reads else None
        self.ended, self.stuck = self._none(), self._none()
        # How many of the best continuations of a sentence are looked at.
        self.kept = min(K * self.scores.kept, spare(config) * K if K > 1 else 1)
        self.fused = not _triton.unfit_device(device.type)
        if self.fused:
            self.kernels = _triton.kernels("beam_search")
            self.fused = K * self.scores.kept <= self.kernels.MOST

    def _none(self) -> Ended:
        shape = (self.sizes.B, self.sizes.K)
        scores = torch.full(shape, -math.inf, dtype=torch.float64, device=self.device)
        lengths, rows, tokens = (
            torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(3)
        )
        return Ended(scores, lengths, rows, tokens, torch.zeros(shape, device=self.device))

    def begin(self, requests: Sequence[Request], lengths: Sequence[int], seed: int) -> None:
        """Start anew; requests and lengths (of the sources) have one entry for each sentence.

        Where there is room for more of them, these have ended before they begin.
        """
        _, K, _, P, X, *_ = self.sizes
        B = len(requests)
        for name, tensor in vars(self).items():
            # Of the attention nothing is read that was not written; it may be large.
            if isinstance(tensor, Tensor) and name not in ("places", "settings", "attention"):
                tensor.zero_()
        for kept in (self.ended, self.stuck):
            for field in kept:
                field.zero_()
            kept.scores.fill_(-math.inf)

        def padded(rows: list[list[int]], width: int) -> Tensor:
            return torch.tensor([row + [NOTHING] * (width - len(row)) for row in rows])

        prompts = padded([request.prompt for request in requests], P)
        self.prompts[:B] = prompts
        sizes = [len(request.prompt) for request in requests]
        self.lengths[:B] = torch.tensor(sizes)
        self.limits[:B] = torch.tensor([self.config.limit(size) for size in sizes])
        self.numbers[:B] = torch.tensor([request.number for request in requests])
        self.sources[:B] = torch.tensor(list(lengths))
        self.seed.fill_(seed if seed < 2**63 else seed - 2**64)
        if self.prefix is not None and self.follows is not None:
            self.prefix.fill_(NOTHING)
            self.prefix[:B] = padded([request.prefix for request in requests], X)
            self.follows.fill_(True)
        self.sums.fill_(-math.inf)
        self.sums[:B, 0] = 0
        self.open[:B, 0] = True
        first = self.prompts[:, 0].repeat_interleave(K)
        self.next_tokens.copy_(first)
        self.tokens[0] = first
        self.parents.copy_(self.places)
        self.ancestors[:, 0] = self.places
        if self.history is not None:
            self.history[:, 0] = first

    def advance(self, logits: Tensor, attention: Tensor | None) -> None:
        """Take the logits (R, V) and attention (R, S) of the rows' last tokens."""
        found = self.scores.find(logits, self._rows(self.position[0] + 1))
        attention = None if attention is None else attention.float()
        if self.fused:
            self._launch(found, attention)
        else:
            self._advance(found, attention)

    def _launch(self, found: Candidates, attention: Tensor | None) -> None:
        """`_advance` in one kernel."""
        B, K, L, P, X, S, *_ = self.sizes
        tensors = [
            *(self.position, self.late, self.failed, self.settings),
            *(self.prompts, self.lengths, self.limits, self.sources, self.scores.ends),
            *(self.open, self.sums, self.next_tokens, self.parents),
            *(self.tokens, self.rows, self.log_probs, self.ancestors),
            *(self.history, self.prefix, self.follows, self.attention, self.received),
            *(*self.ended, *self.stuck),
        ]
        sizes = (B, P, X, L, S, self.scores.ends.numel())
        options = (self.config.do_sample, self.config.early_stopping)
        contiguous = [tensor.contiguous() for tensor in found]
        seen = None if attention is None else attention.contiguous()
        self.kernels.advance(contiguous, seen, tensors, sizes, K, self.kept, *options)

    def _advance(self, found: Candidates, attention: Tensor | None) -> None:
        B, K, *_ = self.sizes
        length = self.position[0] + 1
        alive = self.open.any(1)
        reading = length < self.lengths
        searching = alive & ~reading
        if self.attention is not None:
            assert attention is not None
            self.attention.index_copy_(0, self.position[:1], attention.unsqueeze(0))
        here = (self.open & searching.unsqueeze(1)).flatten()
        failed = (here & ~found.healthy).any() & (self.failed == 0)
        self.failed.copy_(torch.where(failed, length, self.failed))
        received = None
        if self.received is not None:
            assert attention is not None
            received = self.received + torch.where(here.unsqueeze(1), attention, 0)
        self._keep_stuck(found, length, searching)
        sums, beams, tokens, log_probs = self._best(found, searching)
        possible = sums > -math.inf
        # Not isin, which sorts where there are many of them, and waits for the result.
        ends = (tokens.unsqueeze(2) == self.scores.ends).any(2) | self.late
        ends = ends | (length + 1 >= self.limits).unsqueeze(1)
        parents = beams + self.places.view(B, K)[:, :1]  # (B, kept)
        n = self.sums.shape[1]
        own = self._ranked(sums[:, :n], length + 1 - self.lengths, parents[:, :n], received)
        new = Ended(
            own.masked_fill(~(possible & ends)[:, :n], -math.inf),
            (length + 1).expand(B, n),
            parents[:, :n],
            tokens[:, :n],
            log_probs[:, :n],
        )
        self._keep(self.ended, new)
        # A sentence that is still reading when the time is over has written nothing.
        given_up = alive & reading & self.late
        nothing = Ended(
            torch.where(given_up, 0.0, -math.inf).double().unsqueeze(1),
            self.lengths.unsqueeze(1),
            torch.full((B, 1), NOTHING, device=self.device),
            torch.full((B, 1), NOTHING, device=self.device),
            torch.zeros(B, 1, device=self.device),
        )
        self._keep(self.ended, nothing)
        self._go_on(sums, parents, tokens, log_probs, possible & ~ends, length, reading, received)

    def _rows(self, length: Tensor) -> Rows:
        return Rows(
            length,
            self.lengths,
            self.limits,
            self.history,
            self.prefix,
            self.follows,
            self.seed[0],
            self.numbers,
        )

    def _best(self, found: Candidates, searching: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, kept) of a sentence's best continuations: sums, beams, tokens, log probabilities."""
        B, K = self.sums.shape
        k = found.tokens.shape[1]
        log_probs = found.log_probs.view(B, K, k)
        before = self.sums.masked_fill(~(self.open & searching.unsqueeze(1)), -math.inf)
        sums = before.unsqueeze(2) + log_probs
        ranks = before.unsqueeze(2) + found.ranks.view(B, K, k)
        order = ranks.flatten(1).sort(stable=True, dim=1, descending=True).indices[:, : self.kept]
        if self.config.do_sample:  # what was drawn is in the order of its scores from here on
            drawn = sums.flatten(1).gather(1, order)
            order = order.gather(1, drawn.sort(stable=True, dim=1, descending=True).indices)
        chosen = [
            t.flatten(1).gather(1, order) for t in (sums, found.tokens.view(B, K, k), log_probs)
        ]
        return chosen[0], order // k, chosen[1], chosen[2]

    def _ranked(
        self, sums: Tensor, written: Tensor, rows: Tensor, received: Tensor | None
    ) -> Tensor:
        """(B, n) float64: what finished hypotheses are ranked by; written (B): their tokens."""
        if self.sizes.K == 1:
            return sums
        scores = sums / self._factor(written).unsqueeze(1)
        if received is None:
            return scores
        least = torch.finfo(torch.float32).tiny  # a position that got nothing, by underflow
        logs = received.double().clamp(least, 1.0).log()  # (R, S)
        real = torch.arange(logs.shape[1], device=self.device) < self.sources.unsqueeze(1)
        logs = torch.where(real.repeat_interleave(self.sizes.K, 0), logs, 0).sum(1)
        return scores + self.config.coverage_penalty * logs[rows]

    def _factor(self, written: Tensor) -> Tensor:
        return written.clamp(1).double().pow(self.config.length_penalty)

    def _keep(self, kept: Ended, new: Ended) -> None:
        """Of what was kept and what is new the K best; equal ones in the order they came."""
        K = self.sizes.K
        scores = torch.cat([kept.scores, new.scores], 1)
        order = scores.sort(stable=True, dim=1, descending=True).indices[:, :K]
        for old, own in zip(kept, new, strict=True):
            old.copy_(torch.cat([old, own.to(old.dtype)], 1).gather(1, order))

    def _keep_stuck(self, found: Candidates, length: Tensor, searching: Tensor) -> None:
        """Open hypotheses that no token may follow."""
        B, K = self.sums.shape
        none = (found.log_probs[:, 0] == -math.inf).view(B, K) & self.open & searching.unsqueeze(1)
        rows = self.places.view(B, K)
        written = length - self.lengths
        scores = self._ranked(self.sums, written, rows, self.received)
        scores = torch.where((written == 0).unsqueeze(1), self.sums, scores)
        tokens = torch.full_like(rows, NOTHING)
        new = Ended(
            scores.masked_fill(~none, -math.inf),
            length.expand(B, K),
            rows,
            tokens,
            torch.zeros(B, K, device=self.device),
        )
        self._keep(self.stuck, new)

    def _go_on(
        self,
        sums: Tensor,
        parents: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
        going: Tensor,
        length: Tensor,
        reading: Tensor,
        received: Tensor | None,
    ) -> None:
        """Open the best hypotheses that go on, feed the next token of prompts, and count on."""
        B, K, L, P, X, *_ = self.sizes
        first = (~going).to(torch.int8).sort(stable=True, dim=1).indices[:, :K]
        open_, sums, parents, tokens, log_probs = (
            t.gather(1, first) for t in (going, sums, parents, tokens, log_probs)
        )
        open_ = open_ & self._may_improve(sums[:, :1], length)
        fed = self.prompts.gather(1, length.clamp(max=P - 1).expand(B, 1))
        read_on = reading & self.open.any(1) & ~self.late
        is_first = torch.arange(K, device=self.device) == 0
        prompt = read_on.unsqueeze(1) & is_first  # (B, K)
        own = self.places.view(B, K)
        new_open = open_ | prompt
        parents = torch.where(open_, parents, own).flatten()
        tokens = torch.where(prompt, fed, torch.where(open_, tokens, 0)).flatten()
        self.sums.copy_(torch.where(prompt, 0.0, sums.masked_fill(~open_, -math.inf)))
        self.open.copy_(new_open)
        self.next_tokens.copy_(tokens)
        self.parents.copy_(parents)
        place = length.clamp(max=L - 1).view(1)
        self.tokens.index_copy_(0, place, tokens.unsqueeze(0))
        self.rows.index_copy_(0, place, parents.unsqueeze(0))
        self.log_probs.index_copy_(0, place, log_probs.float().flatten().unsqueeze(0))
        self.ancestors.copy_(self.ancestors.index_select(0, parents))
        self.ancestors.index_copy_(1, place, self.places.to(torch.int32).unsqueeze(1))
        if self.history is not None:
            self.history.copy_(self.history.index_select(0, parents))
            self.history.index_copy_(1, place, tokens.unsqueeze(1))
        if self.received is not None and received is not None:
            self.received.copy_(received.index_select(0, parents))
        if self.prefix is not None and self.follows is not None:
            written = (length - self.lengths).clamp(0, X - 1).unsqueeze(1)
            asked = self.prefix.gather(1, written).repeat_interleave(K, 1).flatten()
            same = (asked == tokens) | ~open_.flatten()
            self.follows.copy_(self.follows.index_select(0, parents) & same)
        self.position.copy_((self.position + 1).clamp(max=L - 1))

    def _may_improve(self, best: Tensor, length: Tensor) -> Tensor:
        """(B, 1): whether the best open hypothesis, (B, 1), may yet be one of the best."""
        config = self.config
        worst = self.ended.scores[:, -1:]
        missing = worst == -math.inf
        if config.early_stopping is True or self.sizes.K == 1:
            return missing
        if config.early_stopping == "never" and config.length_penalty > 0:
            written = self.limits - self.lengths
        else:
            written = length + 1 - self.lengths
        return missing | (best / self._factor(written).unsqueeze(1) > worst)

    def state(self, count: int) -> tuple[int, list[list[bool]]]:
        """(the token whose scores are no numbers, or 0; which rows are open) of `count` sentences.

        In one transfer, which waits for the device.
        """
        both = torch.cat([self.failed, self.open[:count].flatten().long()]).tolist()
        K = self.sizes.K
        return both[0], [[bool(n) for n in both[1 + b * K : 1 + (b + 1) * K]] for b in range(count)]

    def read(self, with_attention: bool = True) -> Found:
        """What results are made of, on the host."""

        def listed(ended: Ended) -> list[list[list[float]]]:
            return [field.tolist() for field in ended]

        attention = None
        if with_attention and self.attention is not None:
            attention = self.attention.cpu()
        return Found(
            self.sizes.K,
            listed(self.ended),
            listed(self.stuck),
            self.tokens.tolist(),
            self.rows.tolist(),
            self.log_probs.tolist(),
            attention,
        )
