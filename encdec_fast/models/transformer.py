"""The Transformer as a whole model, with embeddings, positions and scores."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.generation import Encoded, TransformerDecoder, transformer_decoder
from encdec_fast.generation.describe import affine, check_plain
from encdec_fast.models._inputs import Lengths, check_same_rows, check_tokens, lengths_of
from encdec_fast.nn import Linear, Transformer

_NAME = "TransformerEncoderDecoder"


def sinusoidal_positions(length: int, size: int) -> Tensor:
    """(length, size): sin(t / 10000^(i / size)) at the even features i, cos of it at the odd ones.

    ValueError for an odd size. Vaswani et al., 2017 (arXiv:1706.03762), section 3.5.
    """
    if size % 2:
        raise ValueError(f"{_NAME}: d_model must be even, but it is {size}")
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class TransformerEncoderDecoder(nn.Module):
    """Tokens in, scores of tokens out: `encdec_fast.nn.Transformer` with all that it needs around.

    source_vocabulary, target_vocabulary: numbers of tokens. d_model, nhead, num_encoder_layers,
        num_decoder_layers, dim_feedforward, dropout, activation, norm_first: of the Transformer;
        dropout is on the embeddings, too.
    max_length: of a source and of a target.
    tied_output: output has the weight of target_embedding.
    source_padding: the token that fills up a source.

    Submodules: source_embedding, target_embedding; transformer; output, Linear from d_model to the
    target_vocabulary scores. Embeddings are scaled by sqrt(d_model), and sinusoidal positions,
    which are no part of the state_dict, are added.

    Vaswani et al., 2017 (arXiv:1706.03762); norm_first: Xiong et al., 2020 (arXiv:2002.04745); tied
    weights: Press and Wolf, 2017 (arXiv:1608.05859).
    """

    positions: Tensor

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        dim_feedforward: int,
        *,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = True,
        max_length: int = 512,
        tied_output: bool = False,
        source_padding: int = 0,
    ) -> None:
        super().__init__()
        self.source_padding, self.scale = source_padding, math.sqrt(d_model)
        self.source_embedding = nn.Embedding(source_vocabulary, d_model, source_padding)
        self.target_embedding = nn.Embedding(target_vocabulary, d_model)
        positions = sinusoidal_positions(max_length, d_model)
        self.register_buffer("positions", positions, persistent=False)
        with warnings.catch_warnings():
            # That there is no nested path with norm_first, and nobody asked for one.
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
            self.transformer = Transformer(
                d_model,
                nhead,
                num_encoder_layers,
                num_decoder_layers,
                dim_feedforward,
                dropout,
                activation,
                batch_first=True,
                norm_first=norm_first,
            )
        self.output = Linear(d_model, target_vocabulary)
        self.dropout = nn.Dropout(dropout)
        self._reset_embeddings()
        if tied_output:
            self.output.weight = self.target_embedding.weight

    def _reset_embeddings(self) -> None:
        """Of variance 1 / d_model: scaled they have that of the positions."""
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=1 / self.scale)
        with torch.no_grad():
            self.source_embedding.weight[self.source_padding].zero_()

    def _embed(self, what: str, tokens: Tensor) -> Tensor:
        check_tokens(_NAME, what, tokens)
        length, most = tokens.shape[1], self.positions.shape[0]
        if length > most:
            raise RuntimeError(
                f"{_NAME}: {what} must have at most max_length = {most} tokens, but it has {length}"
            )
        embedding = self.source_embedding if what == "source" else self.target_embedding
        embedded: Tensor = self.dropout(embedding(tokens) * self.scale + self.positions[:length])
        return embedded

    def padding_mask(self, source: Tensor, source_lengths: Lengths = None) -> Tensor | None:
        """(B, S) bool, True where there is no token; None if there is one everywhere."""
        S = source.shape[1]
        lengths = lengths_of(_NAME, source, source_lengths, self.source_padding)
        if bool((lengths == S).all()):
            return None
        return (torch.arange(S) >= lengths.unsqueeze(1)).to(source.device)

    def encode(self, source: Tensor, source_lengths: Lengths = None) -> Tensor:
        """The memory (B, S, d_model); it is of no use past a sentence's end.

        source: int64 (B, S). source_lengths: int64 (B) on the CPU, or a list, each from 1 to S;
        None: source_padding, at the end only, is not counted. RuntimeError for other shapes and
        lengths and for a source longer than max_length, IndexError for tokens outside of the
        vocabulary.
        """
        embedded = self._embed("source", source)
        padding = self.padding_mask(source, source_lengths)
        memory: Tensor = self.transformer.encoder(embedded, src_key_padding_mask=padding)
        return memory

    def forward(self, source: Tensor, source_lengths: Lengths, target: Tensor) -> Tensor:
        """Scores (B, T, target_vocabulary) of the token after each of a known target's.

        source, source_lengths: as for `encode`. target: int64 (B, T), with the start token first.
        Errors are those of `encode`, for the target as well.
        """
        embedded, asked = self._embed("source", source), self._embed("target", target)
        check_same_rows(_NAME, source, target)
        padding = self.padding_mask(source, source_lengths)
        causal = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], target.device, asked.dtype
        )
        output = self.transformer(
            embedded,
            asked,
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        scores: Tensor = self.output(output)
        return scores

    def generation_encode(self, source: Tensor, source_lengths: Tensor) -> Encoded:
        """What `encdec_fast.generation.generate` asks of a model."""
        return Encoded(self.encode(source, source_lengths), source_lengths.tolist())

    def generation_decoder(self) -> TransformerDecoder:
        """The decoder for the engine; NotDescribed where a part is not as it was made."""
        check_plain(self.target_embedding, nn.Embedding)
        return transformer_decoder(
            self.transformer.decoder,
            self.target_embedding.weight,
            affine(self.output),
            embedding_scale=self.scale,
            positions=self.positions,
        )

    def generation_step(self, encoded: Encoded) -> tuple[Any, Any]:
        """A step that runs the whole decoder anew on what was written, and its first state."""
        memory = encoded.memory
        assert memory is not None
        where = memory.device
        S, lengths = memory.shape[1], torch.tensor(encoded.lengths, device=where)
        padding = torch.arange(S, device=where) >= lengths.unsqueeze(1)
        written = torch.zeros(memory.shape[0], 0, dtype=torch.int64, device=where)
        return self._rerun, (written, memory, padding)

    def _rerun(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        written, memory, padding = state
        written = torch.cat([written, tokens.unsqueeze(1)], dim=1)
        embedded = self._embed("target", written)
        causal = nn.Transformer.generate_square_subsequent_mask(written.shape[1], memory.device)
        output = self.transformer.decoder(
            embedded,
            memory,
            tgt_mask=causal,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.output(output[:, -1]), (written, memory, padding)
