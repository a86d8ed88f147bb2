"""From a search's tables to what is returned: hypotheses are followed back from their ends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from encdec_fast.generation.result import Hypothesis

NOTHING = -1  # in place of a row: nothing was written; in place of a token: none is behind the row


class Found(NamedTuple):
    """A search's state in numbers that Python reads."""

    K: int
    ended: list[list[list[float]]]  # of each field of Ended: [B][K]
    stuck: list[list[list[float]]]
    tokens: list[list[int]]
    rows: list[list[int]]
    log_probs: list[list[float]]
    attention: Tensor | None

    def hypotheses(self, b: int, prompt: list[int], count: int, shown: int) -> list[Hypothesis]:
        """The best of sentence b; shown: the size of the attention that is returned, or 0."""
        results: list[Hypothesis] = []
        for kept in (self.ended, self.stuck):
            for j in range(self.K):
                scores, lengths, rows, tokens, log_probs = (field[b][j] for field in kept)
                if scores == -math.inf or len(results) == count:
                    break
                path = _Path(self, int(lengths), int(rows), int(tokens), log_probs, len(prompt))
                weights = path.attention(shown) if shown and path.tokens else None
                results.append(Hypothesis([*prompt, *path.tokens], scores, path.log_probs, weights))
        return results

    def paths(self, b: int, prompt: int, last: int, open_: list[bool]) -> list[list[int]]:
        """What every hypothesis of sentence b has written, those that are open up to `last`."""
        first = b * self.K
        paths = [
            _Path(self, last + 1, first + j, NOTHING, 0.0, prompt).tokens
            for j, one in enumerate(open_)
            if one
        ]
        for kept in (self.ended, self.stuck):
            for scores, lengths, rows, tokens, log_probs in zip(
                *(field[b] for field in kept), strict=True
            ):
                if scores > -math.inf:
                    path = _Path(self, int(lengths), int(rows), int(tokens), log_probs, prompt)
                    paths.append(path.tokens)
        return paths


class _Path:
    """What a hypothesis wrote, found from its end."""

    def __init__(
        self, found: Found, length: int, row: int, token: int, log_prob: float, prompt: int
    ) -> None:
        self.found = found
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.at: list[tuple[int, int]] = []  # (place, row) of the step that wrote each
        if row == NOTHING:
            return
        place = length - 1
        if token != NOTHING:
            self.tokens.append(token)
            self.log_probs.append(log_prob)
            self.at.append((place - 1, row))
            place -= 1
        while place >= prompt:
            self.tokens.append(found.tokens[place][row])
            self.log_probs.append(found.log_probs[place][row])
            row = found.rows[place][row]
            place -= 1
            self.at.append((place, row))
        for found_list in (self.tokens, self.log_probs, self.at):
            found_list.reverse()

    def attention(self, S: int) -> Tensor:
        """(tokens, S)."""
        assert self.found.attention is not None
        places, rows = zip(*self.at, strict=True)
        with torch.inference_mode(False):  # an ordinary tensor, wherever this is called
            return self.found.attention[list(places), list(rows), :S].clone()
