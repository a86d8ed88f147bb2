"""Trained models whose distributions another one learns: Hinton et al., 2015, arXiv:1503.02531.

Several of them teach their mean, as an ensemble would answer: Sun et al., 2019, "Token-level
ensemble distillation for grapheme-to-phoneme conversion".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from encdec_fast import optimize
from examples.g2p_model import checkpoint
from examples.g2p_model.data import PADDING, Batch, Pair
from examples.g2p_model.pronounce import pronounce


class Teacher:
    """What checkpoints say of every phoneme that follows: the mean of their probabilities.

    Their weights do not change, so they are asked once for a pair. The answers are kept: some
    1.4 kB, 42 probabilities for each of 8 phonemes.
    """

    def __init__(self, paths: Sequence[Path], weight_dtype: torch.dtype | None = None) -> None:
        """Trouble if one of the checkpoints is missing. weight_dtype: as for `optimize`."""
        loaded = [checkpoint.load_model(path)[0].requires_grad_(False) for path in paths]
        self.models = [optimize(model, weight_dtype) for model in loaded]
        self.answers: dict[Pair, Tensor] = {}

    def pronounce(self, words: Sequence[str]) -> list[Pair]:
        """Each word as the first of the models says it; none where it says nothing."""
        return [
            (word, sounds) for word, sounds in pronounce(self.models[0], words).items() if sounds
        ]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Probabilities (N, V) of the batch's N phonemes: row after row, without the padding."""
        if any(pair not in self.answers for pair in batch.pairs):
            inputs = (batch.source, batch.lengths, batch.target[:, :-1])
            each = torch.stack([model(*inputs).softmax(-1) for model in self.models])
            for pair, row, target in zip(
                batch.pairs, each.mean(0), batch.target[:, 1:], strict=True
            ):
                self.answers[pair] = row[target != PADDING]
        return torch.cat([self.answers[pair] for pair in batch.pairs])
