"""What a search finds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Hypothesis:
    """One target sequence.

    tokens: all of it: the start token, a forced prefix, what was written, the end token if it was
        reached. score: what the search ranks by: the sum of log_probs / length ** length_penalty,
        and the coverage penalty; without beams the sum of log_probs. log_probs: of each token that
        was written, in the distribution that it was chosen from (all constraints applied; without
        beams normalised after them, as transformers' compute_transition_scores can). attention:
        (tokens written, S), the weights of the step that wrote each, where it was asked for.
    """

    tokens: list[int]
    score: float
    log_probs: list[float]
    attention: Tensor | None = None
