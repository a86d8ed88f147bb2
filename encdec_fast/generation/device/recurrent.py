"""A step of a recurrent decoder with its states; `RecurrentDecoder` says what is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_fast.generation.decoders import Affine, RecurrentDecoder, RecurrentLayer
from encdec_fast.generation.device.decode_step import DecodeStep
from encdec_fast.generation.device.weights import Weights, put
from encdec_fast.generation.engine import Encoded
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.attention import attention
from encdec_fast.ops.gru import gru_cell
from encdec_fast.ops.lstm import lstm_cell
from encdec_fast.ops.rnn import rnn_cell


class RecurrentSteps:
    """The states of B sentences of K rows; their memory has S positions at most."""

    def __init__(
        self,
        decoder: RecurrentDecoder,
        weights: Weights,
        B: int,
        K: int,
        S: int,
        needs: bool,
        one_launch: bool = False,
    ) -> None:
        self.decoder, self.weights, self.needs = decoder, weights, needs
        self.B, self.K, self.S = B, K, S
        H, M, layers = decoder.hidden_size, decoder.context_size, len(decoder.layers)
        parts = 2 if decoder.layers[0].cell == "lstm" else 1
        self.states = [weights.zeros(layers, B * K, H) for _ in range(parts)]
        self.context = weights.zeros(B * K, decoder.fed_size)
        self.values = self.keys = self.coverage = None
        if decoder.attends:
            self.values = weights.zeros(B, S, M)
            self.lengths = torch.zeros(B, dtype=torch.int64, device=weights.device)
            if decoder.keys is not None:
                self.keys = weights.zeros(B, S, decoder.keys.weight.shape[0])
            if decoder.coverage is not None:  # each row has looked elsewhere: a memory of its own
                self.coverage = weights.zeros(B * K, S)
                self.memory = [t.repeat_interleave(K, 0) for t in self._memory()]
        self.launch = DecodeStep(decoder, weights, B * K, S) if one_launch else None

    def begin(self, encoded: Encoded) -> None:
        """Take what the encoder left."""
        states = encoded.states if isinstance(encoded.states, tuple) else (encoded.states,)
        for own, given in zip(self.states, states, strict=True):
            own.zero_()
            own[:, : given.shape[1] * self.K] = given.repeat_interleave(self.K, 1)
        self.context.zero_()
        if encoded.context is not None:
            rows = encoded.context.shape[0] * self.K
            self.context[:rows] = encoded.context.repeat_interleave(self.K, 0)
        if self.values is None:
            return
        assert encoded.memory is not None
        put(encoded.memory, self.values)
        self.lengths.zero_()
        self.lengths[: len(encoded.lengths)] = torch.tensor(list(encoded.lengths))
        if self.keys is not None and self.decoder.keys is not None:
            self.keys.copy_(self.weights.affine(self.decoder.keys, self.values))
        if self.coverage is not None:
            self.coverage.zero_()
            for own, given in zip(self.memory, self._memory(), strict=True):
                own.copy_(given.repeat_interleave(self.K, 0))

    def _memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and lengths of the sentences."""
        assert self.values is not None
        return self.values if self.keys is None else self.keys, self.values, self.lengths

    def step(
        self, tokens: Tensor, parents: Tensor, position: Tensor, ancestors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (R, V) and attention (R, S) of the rows that continue `parents` by `tokens`."""
        decoder = self.decoder
        if self.launch is not None:
            memory = None
            if self.values is not None:
                keys = self.values if self.keys is None else self.keys
                memory = keys, self.values, self.lengths
            given = (tokens, parents, self.states, self.context, memory, self.K)
            logits, weights = self.launch(decoder, self.weights, *given)
            return logits, weights if self.needs else None
        before = [state.index_select(1, parents) for state in self.states]
        context = self.context.index_select(0, parents)
        embedded = self.weights.rows(decoder.embedding, tokens)
        shown: Tensor | None = None
        if decoder.attention == "location":
            context, shown = self._locate(torch.cat([embedded, before[0][0]], 1))
        x = torch.cat([embedded, context], 1)
        for i, layer in enumerate(decoder.layers):
            new = self._cell(layer, x, [state[i] for state in before])
            for state, own in zip(self.states, new, strict=True):
                state[i] = own
            if i == 0 and decoder.attention in ("additive", "dot"):
                context, shown = (
                    self._attend(new[0])
                    if self.coverage is None
                    else self._attend_covered(new[0], self.coverage.index_select(0, parents))
                )
                if decoder.attentional is not None:
                    both = torch.cat([context, new[0]], 1)
                    context = torch.tanh(self.weights.affine(decoder.attentional, both))
            x = torch.cat([new[0], context], 1) if i == 0 and decoder.attends else new[0]
        self.context.copy_(context)
        if decoder.context_in_output and not (len(decoder.layers) == 1 and decoder.attends):
            x = torch.cat([new[0], context], 1)
        elif not decoder.context_in_output:
            x = new[0]
        return self.weights.affine(decoder.output, x), shown

    def _cell(self, layer: RecurrentLayer, x: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        own = self.weights
        weights = [own(layer.input.weight), own(layer.hidden.weight)]
        biases = [own(b) for b in (layer.input.bias, layer.hidden.bias) if b is not None]
        given: list[Any] = [*weights, *biases]
        if layer.cell == "lstm":
            found: tuple[Tensor, ...] = lstm_cell(x, (state[0], state[1]), *given)
            return found
        if layer.cell == "gru":
            return (gru_cell(x, state[0], *given),)
        return (rnn_cell(x, state[0], *given, nonlinearity=layer.cell.removeprefix("rnn_")),)

    def _attend(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        decoder, values = self.decoder, self.values
        assert values is not None
        keys = values if self.keys is None else self.keys
        query = state if decoder.query is None else self.weights.affine(decoder.query, state)
        query = query.view(self.B, self.K, -1)
        if decoder.attention == "additive":
            assert decoder.score is not None
            score = self.weights(decoder.score)
            found = additive_attention(query, keys, values, score, self.lengths, self.needs)
        else:
            heads = [t.unsqueeze(1) for t in (query, keys, values)]
            options: dict[str, Any] = {"memory_lengths": self.lengths, "scale": 1.0}
            found = attention(*heads, **options, need_weights=self.needs)
        context, weights = found if self.needs else (found, None)
        return context.reshape(self.B * self.K, -1), None if weights is None else weights.reshape(
            self.B * self.K, -1
        )

    def _attend_covered(self, state: Tensor, coverage: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows that have a coverage, and a memory, each for itself."""
        decoder, own = self.decoder, self.weights
        assert decoder.query is not None and decoder.score is not None
        assert decoder.coverage is not None and self.coverage is not None
        keys, values, lengths = self.memory
        context, weights = additive_attention(
            own.affine(decoder.query, state).unsqueeze(1),
            keys,
            values,
            own(decoder.score),
            lengths,
            need_weights=True,
            coverage=coverage,
            coverage_weight=own(decoder.coverage),
        )
        self.coverage.copy_(coverage + weights[:, 0])
        return context[:, 0], weights[:, 0]

    def _locate(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Weights that depend on the place alone, over the first positions."""
        assert self.decoder.location is not None and self.values is not None
        affine: Affine = self.decoder.location
        scores = self.weights.affine(affine, input)[:, : self.S].view(self.B, self.K, -1)
        places = torch.arange(self.S, device=scores.device)
        real = (places < self.lengths.unsqueeze(1)).unsqueeze(1)  # (B, 1, S)
        weights = scores.float().masked_fill(~real, -torch.inf).softmax(-1).nan_to_num(0.0)
        context = weights.to(self.values.dtype) @ self.values
        return context.flatten(0, 1), weights.flatten(0, 1)
