"""A picture of what a recurrent model's decoder looked at for each phoneme that it wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from encdec_fast import generate
from encdec_fast.models import RecurrentEncoderDecoder
from examples.g2p import Trouble
from examples.g2p_model.data import Sounds, encode_words
from examples.g2p_model.pronounce import CONFIG, sounds_of

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise Trouble(f"{error.name} is not installed: pip install matplotlib") from None

END = "·"  # of a word, and of what was written


def attention_weights(model: nn.Module, word: str, beams: int = 1) -> tuple[Sounds, Tensor]:
    """The phonemes of a word, and the weights (T, S) of its letters at each, end marks included.

    Trouble for a model that has no such weights.
    """
    if not isinstance(model, RecurrentEncoderDecoder) or model.bridge.feed:
        raise Trouble("only a recurrent model with attention has a picture of it")
    source, lengths = encode_words([word])
    config = CONFIG.replace(num_beams=beams)
    found = generate(model, source, config, source_lengths=lengths, need_attention=True)
    best = found.hypotheses[0][0]
    assert best.attention is not None
    return sounds_of(best.tokens[1:]), best.attention


def draw(model: nn.Module, words: Sequence[str], path: Path, beams: int = 1) -> None:
    """Heat maps of some words, letters from left to right and phonemes from top to bottom.

    The kind of the file is what its name ends with. Trouble if it cannot be written.
    """
    columns = min(3, len(words))
    rows = math.ceil(len(words) / columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis, word in zip(axes.flat, words, strict=False):
        sounds, weights = attention_weights(model, word, beams)
        axis.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_title(word)
        axis.set_xticks(range(weights.shape[1]), [*word, END])
        steps = weights.shape[0]  # without the end mark where the search stopped before it
        axis.set_yticks(range(steps), [*sounds, END][:steps])
        axis.tick_params(length=0)
    for axis in axes.flat[len(words) :]:
        axis.set_axis_off()
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise Trouble(f"{path} cannot be written ({error}): choose another --picture") from None
