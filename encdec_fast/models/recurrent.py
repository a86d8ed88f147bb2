"""An LSTM or GRU encoder-decoder with attention, or with one vector between the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.generation import (
    Encoded,
    RecurrentDecoder,
    attention_decoder,
    recurrent_layers,
)
from encdec_fast.generation.describe import affine, check_plain
from encdec_fast.models._inputs import Lengths, check_same_rows, check_tokens, lengths_of
from encdec_fast.nn import (
    GRU,
    LSTM,
    AdditiveAttention,
    AttentionDecoder,
    DirectBridge,
    Linear,
    LocationAttention,
    LuongAttention,
)

_NAME = "RecurrentEncoderDecoder"
_LAYERS: dict[str, Any] = {"lstm": LSTM, "gru": GRU}
_ATTENTIONS = ("additive", "dot", "general", "concat", "location", None)


class RecurrentEncoderDecoder(nn.Module):
    """Tokens in, scores of tokens out: a bidirectional encoder, a bridge, a decoder with attention.

    source_vocabulary, target_vocabulary: numbers of tokens. embedding_size: of both embeddings.
    hidden_size: of the decoder. encoder_hidden_size: of each direction of the encoder; None:
        hidden_size. A memory position has M = 2 encoder_hidden_size features.
    cell: "lstm" or "gru", for the encoder and the decoder.
    encoder_layers, decoder_layers: where the decoder has fewer, its layers start from the encoder's
        last ones; where it has more, those on top start from zeros.
    attention: "additive"; "dot", "general" or "concat" (`encdec_fast.nn.LuongAttention`); or
        "location", for sources of at most max_source_length tokens. None: no attention; the decoder
        is fed one vector of the bridge at each step, beside the embedding.
    attention_size: for "additive" and "concat"; None: hidden_size.
    dropout: on the embeddings, between layers, and on what the scores are computed from.
    source_padding: the token that fills up a source.

    Submodules: source_embedding, target_embedding; encoder (LSTM or GRU); bridge (DirectBridge);
    decoder (AttentionDecoder, or without attention an LSTM or GRU of all decoder_layers); upper
    (LSTM or GRU of the layers above the first, over [h; context]), only with attention and
    decoder_layers > 1; output, Linear from [h of the last layer; context] to the target_vocabulary
    scores. The first layer of the decoder attends and all above it read its context. In plain
    torch, without dropout:

        memory, state = encoder(source_embedding(source))
        output, state = decoder(target_embedding(target), memory, bridge(state))  # [h; context]
        scores = self.output(output)

    ValueError for options that do not fit together.

    Bahdanau, Cho and Bengio, 2015 (arXiv:1409.0473); upper: Wu et al., 2016 (arXiv:1609.08144),
    section 3; without attention: Cho et al., 2014 (arXiv:1406.1078).
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding_size: int,
        hidden_size: int,
        *,
        cell: str = "lstm",
        encoder_layers: int = 1,
        decoder_layers: int = 1,
        encoder_hidden_size: int | None = None,
        attention: str | None = "additive",
        attention_size: int | None = None,
        max_source_length: int | None = None,
        dropout: float = 0.0,
        source_padding: int = 0,
    ) -> None:
        super().__init__()
        if cell not in _LAYERS:
            raise ValueError(f"{_NAME}: cell must be 'lstm' or 'gru', but it is {cell!r}")
        if attention not in _ATTENTIONS:
            names = ", ".join(repr(name) for name in _ATTENTIONS)
            raise ValueError(f"{_NAME}: attention must be one of {names}, not {attention!r}")
        if encoder_layers < 1 or decoder_layers < 1:
            raise ValueError(
                f"{_NAME}: encoder_layers and decoder_layers must be at least 1, "
                f"but they are {encoder_layers} and {decoder_layers}"
            )
        H, I = hidden_size, embedding_size
        encoder_size = H if encoder_hidden_size is None else encoder_hidden_size
        M = 2 * encoder_size
        self.kind, self.decoder_layers, self.source_padding = cell, decoder_layers, source_padding
        self.source_embedding = nn.Embedding(source_vocabulary, I, padding_idx=source_padding)
        self.target_embedding = nn.Embedding(target_vocabulary, I)
        layers = _LAYERS[cell]
        self.encoder = layers(
            I,
            encoder_size,
            encoder_layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if encoder_layers > 1 else 0.0,
        )
        self.bridge = DirectBridge(
            min(encoder_layers, decoder_layers),
            bidirectional=True,
            merge="projection",
            hidden_size=encoder_size,
            output_size=H,
            lstm=cell == "lstm",
            last_layers=True,
            feed=attention is None,
        )
        self.decoder: Any
        self.upper: Any = None
        above = decoder_layers if attention is None else decoder_layers - 1
        options = {"batch_first": True, "dropout": dropout if above > 1 else 0.0}
        if attention is None:
            self.decoder = layers(I + H, H, above, **options)
            features = H
        else:
            scores = _attention(attention, I, H, M, attention_size, max_source_length)
            self.decoder = AttentionDecoder(I, H, M, scores, cell)
            features = H + M
            if above:
                self.upper = layers(features, H, above, **options)
        self.output = Linear(features, target_vocabulary)
        self.dropout = nn.Dropout(dropout)

    def encode(self, source: Tensor, source_lengths: Lengths = None) -> tuple[Tensor, Any]:
        """The memory (B, S, M) and the decoder's first state.

        source: int64 (B, S). source_lengths: int64 (B) on the CPU, or a list, each from 1 to S;
        None: source_padding, at the end only, is not counted. The state is in torch's form: h
        (decoder_layers, B, H), for an LSTM the pair (h, c); without attention the pair of that and
        the vector (B, H) that is fed. RuntimeError for other shapes and lengths, IndexError for
        tokens outside of the vocabulary.
        """
        check_tokens(_NAME, "source", source)
        lengths = lengths_of(_NAME, source, source_lengths, self.source_padding)
        return self._encode(source, lengths)

    def _encode(self, source: Tensor, lengths: Tensor | None) -> tuple[Tensor, Any]:
        embedded = self.dropout(self.source_embedding(source))
        memory, final = self.encoder(embedded, lengths=lengths)
        if self.bridge.feed:
            state, fed = self.bridge(final)
            return memory, (self._all_layers(state), fed)
        return memory, self._all_layers(self.bridge(final))

    def _all_layers(self, state: Any) -> Any:
        """A state of all the decoder's layers: zeros where the encoder has none for them."""
        if isinstance(state, tuple):
            return tuple(self._all_layers(part) for part in state)
        missing = self.decoder_layers - state.shape[0]
        zeros = state.new_zeros(missing, *state.shape[1:])
        return torch.cat([state, zeros]) if missing else state

    def forward(self, source: Tensor, source_lengths: Lengths, target: Tensor) -> Tensor:
        """Scores (B, T, target_vocabulary) of the token after each of a known target's.

        source, source_lengths: as for `encode`. target: int64 (B, T), with the start token first.
        Errors are those of `encode`; a source longer than max_source_length is a RuntimeError.
        """
        check_tokens(_NAME, "source", source)
        check_tokens(_NAME, "target", target)
        check_same_rows(_NAME, source, target)
        lengths = lengths_of(_NAME, source, source_lengths, self.source_padding)
        memory, state = self._encode(source, lengths)
        embedded = self.dropout(self.target_embedding(target))
        if self.bridge.feed:
            state, fed = state
            beside = fed.unsqueeze(1).expand(-1, target.shape[1], -1)
            output = self.decoder(torch.cat([embedded, beside], dim=-1), state)[0]
        else:
            parts = state if isinstance(state, tuple) else (state,)
            first = tuple(part[0] for part in parts)
            output = self.decoder(embedded, memory, first, lengths)[0]
            if self.upper is not None:
                above = tuple(part[1:] for part in parts)
                context = output[..., -memory.shape[-1] :]
                given = above if self.kind == "lstm" else above[0]
                top = self.upper(self.dropout(output), given)[0]
                output = torch.cat([top, context], dim=-1)
        scores: Tensor = self.output(self.dropout(output))
        return scores

    def generation_encode(self, source: Tensor, source_lengths: Tensor) -> Encoded:
        """What `encdec_fast.generation.generate` asks of a model."""
        check_tokens(_NAME, "source", source)
        lengths = source_lengths.tolist()
        equal = min(lengths) == source.shape[1]  # nothing is padded: a shorter way
        memory, state = self._encode(source, None if equal else source_lengths)
        if self.bridge.feed:
            state, fed = state
            return Encoded(None, lengths, state, fed)
        return Encoded(memory, lengths, state)

    def generation_decoder(self) -> RecurrentDecoder:
        """The decoder for the engine; NotDescribed where a part is not as it was made."""
        check_plain(self.target_embedding, nn.Embedding)
        weight, output = self.target_embedding.weight, affine(self.output)
        if self.bridge.feed:
            H = self.decoder.hidden_size
            layers = recurrent_layers(self.decoder)
            return RecurrentDecoder(weight, layers, output, H, context_in_output=False)
        return attention_decoder(self.decoder, weight, output, self.upper)

    def generation_step(self, encoded: Encoded) -> tuple[Any, Any]:
        """A step of the decoder's modules, and its first state."""
        states = encoded.states if isinstance(encoded.states, tuple) else (encoded.states,)
        rows = tuple(part.transpose(0, 1) for part in states)  # rows first, as a search needs them
        if encoded.memory is None:
            return self._fed_step, (rows, encoded.context)
        memory, lengths = encoded.memory, torch.tensor(encoded.lengths)
        B, S, M = memory.shape
        sizes = [M, S] if self.decoder.cell.covers else [M]
        fed = tuple(memory.new_zeros(B, size) for size in sizes)
        return self._attending_step, (rows, fed, memory, lengths)

    def _fed_step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        rows, fed = state
        parts = tuple(part.transpose(0, 1).contiguous() for part in rows)
        given = torch.cat([self.target_embedding(tokens), fed], dim=-1).unsqueeze(1)
        output, new = self.decoder(given, parts if self.kind == "lstm" else parts[0])
        new = new if self.kind == "lstm" else (new,)
        return self.output(output[:, 0]), (tuple(part.transpose(0, 1) for part in new), fed)

    def _attending_step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        rows, fed, memory, lengths = state  # fed: the context, and a coverage where there is one
        first = tuple(part[:, 0] for part in rows)
        embedded = self.target_embedding(tokens)
        given = (embedded, memory, (*first, *fed), lengths)
        output, new, weights = self.decoder.cell(*given, need_weights=True)
        new, fed = new[: len(first)], new[len(first) :]
        parts = [part.unsqueeze(1) for part in new]
        if self.upper is not None:
            above = tuple(part[:, 1:].transpose(0, 1).contiguous() for part in rows)
            top, above = self.upper(output.unsqueeze(1), above if len(above) > 1 else above[0])
            above = above if isinstance(above, tuple) else (above,)
            parts = [
                torch.cat([part, other.transpose(0, 1)], dim=1)
                for part, other in zip(parts, above, strict=True)
            ]
            output = torch.cat([top[:, 0], fed[0]], dim=-1)
        return self.output(output), (tuple(parts), fed, memory, lengths), weights


def _attention(
    name: str, I: int, H: int, M: int, attention_size: int | None, max_source_length: int | None
) -> nn.Module:
    if name == "additive":
        return AdditiveAttention(H, M, H if attention_size is None else attention_size)
    if name != "location":
        return LuongAttention(H, M, name, attention_size)
    if max_source_length is None:
        raise ValueError(f"{_NAME}: attention='location' needs max_source_length")
    return LocationAttention(I, H, max_source_length)
