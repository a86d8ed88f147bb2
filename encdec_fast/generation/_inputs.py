"""What generate() is given: sentences, prefixes, and what they must fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.decoders import Decoder
from encdec_fast.generation.engine import Request, check_vocabulary


class Sources(NamedTuple):
    """Sentences, padded: tokens int64 (B, S), lengths int64 (B), and these as a list."""

    tokens: Tensor
    lengths: Tensor
    sizes: list[int]


def sources_of(source: Any, source_lengths: Any, padding: int) -> Sources:
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.dtype != torch.int64:
            raise RuntimeError(
                "generate: source must be int64 of the shape (B, S), or a list of lists, but it is "
                f"{source.dtype} of the shape {tuple(source.shape)}"
            )
        if source_lengths is None:
            lengths = (source != padding).sum(1).cpu()
        else:
            lengths = torch.as_tensor(source_lengths, dtype=torch.int64).cpu()
        tokens = source
    else:
        if source_lengths is not None:
            raise RuntimeError("generate: source_lengths are those of a tensor; a list has its own")
        rows = [torch.as_tensor(row, dtype=torch.int64) for row in source]
        lengths = torch.tensor([row.numel() for row in rows], dtype=torch.int64)
        if not rows:
            return Sources(torch.empty(0, 0, dtype=torch.int64), lengths, [])
        tokens = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=float(padding)
        )
    B, S = tokens.shape
    if lengths.shape != (B,):
        raise RuntimeError(
            f"generate: source_lengths must be {B} integers, one for each sentence, but they are "
            f"of the shape {tuple(lengths.shape)}"
        )
    sizes: list[int] = lengths.tolist()
    if B and (min(sizes) < 1 or max(sizes) > S):
        raise RuntimeError(
            f"generate: each sentence must have from 1 to {S} tokens, but the lengths are {sizes}"
        )
    return Sources(tokens, lengths, sizes)


def batches_of(lengths: list[int], most: int | None) -> Iterator[list[int]]:
    """Sentences that are decoded together: of similar lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        width = lengths[order[0]]
        count = len(order) if most is None else max(1, most // max(1, width))
        yield order[:count]
        order = order[count:]


def requests_of(
    prefixes: Sequence[Sequence[int]] | None, count: int, config: GenerationConfig
) -> list[Request]:
    start = config.decoder_start_token_id
    if start is None:
        raise ValueError("generate: the config needs a decoder_start_token_id")
    if prefixes is None:
        return [Request([start], [], i) for i in range(count)]
    given = [torch.as_tensor(row, dtype=torch.int64).tolist() for row in prefixes]
    if len(given) != count:
        raise RuntimeError(f"generate: there are {count} sentences, but {len(given)} prefixes")
    if config.prefix_bias is not None:
        return [Request([start], row, i) for i, row in enumerate(given)]
    return [Request([start, *row], [], i) for i, row in enumerate(given)]


def check_lengths(
    decoder: Decoder | None,
    sources: Sources,
    requests: list[Request],
    config: GenerationConfig,
) -> None:
    sizes = dict.fromkeys(len(prompt) for prompt, _, _ in requests)  # in their order
    limits = {size: config.limit(size) for size in sizes}
    for size, limit in limits.items():
        if limit <= size:
            raise ValueError(
                f"generate: a prefix of {size} tokens with the start token leaves none to "
                f"write, max_length is {config.max_length}"
            )
    if decoder is None or not requests:
        return
    limit = max(limits.values())
    most = decoder.max_target_length
    # The last token is written, but not read.
    if most is not None and limit - 1 > most:
        raise ValueError(
            f"generate: targets may have {limit} tokens, but the decoder has {most} positions: "
            "set max_length or max_new_tokens"
        )
    most = decoder.max_source_length
    if most is not None and sources.tokens.shape[1] > most:
        raise RuntimeError(
            f"generate: a source has {sources.tokens.shape[1]} tokens, but the attention has "
            f"{most} positions"
        )
    written = decoder.output.weight.shape[0]
    check_vocabulary(config, requests, written)
    rows = decoder.embedding.shape[0]
    if written > rows and (config.vocabulary is None or max(config.vocabulary, default=0) >= rows):
        raise IndexError(
            f"generate: the model writes tokens 0 to {written - 1}, but its embedding has {rows} "
            "rows: a vocabulary may leave out the others"
        )
    for prompt, _, _ in requests:
        if min(prompt) < 0 or max(prompt) >= rows:
            raise IndexError(f"generate: a prompt has a token outside of the embedding's {rows}")
