"""A trained model whose distributions another one learns: Hinton et al., 2015, arXiv:1503.02531."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from encdec_fast import optimize
from examples.g2p_model import checkpoint
from examples.g2p_model.data import PADDING, Batch, Pair


class Teacher:
    """What a checkpoint says of every phoneme that follows.

    Its weights do not change, so it is asked once for a pair. The answers are kept: some 1.4 kB, 42
    probabilities for each of 8 phonemes.
    """

    def __init__(self, path: Path, weight_dtype: torch.dtype | None = None) -> None:
        """Trouble if there is no such checkpoint. weight_dtype: as for `optimize`."""
        self.model = optimize(checkpoint.load_model(path)[0].requires_grad_(False), weight_dtype)
        self.answers: dict[Pair, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Probabilities (N, V) of the batch's N phonemes: row after row, without the padding."""
        if any(pair not in self.answers for pair in batch.pairs):
            scores = self.model(batch.source, batch.lengths, batch.target[:, :-1]).softmax(-1)
            for pair, row, target in zip(batch.pairs, scores, batch.target[:, 1:], strict=True):
                self.answers[pair] = row[target != PADDING]
        return torch.cat([self.answers[pair] for pair in batch.pairs])
