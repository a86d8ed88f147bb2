"""A step of a Transformer decoder with its caches; `TransformerDecoder` says what is computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.generation.decoders import Affine, Norm, TransformerDecoder, TransformerLayer
from encdec_fast.generation.device.weights import Weights, put
from encdec_fast.generation.engine import Encoded
from encdec_fast.ops.attention import attention
from encdec_fast.ops.cached_attention import cached_attention


class TransformerSteps:
    """The caches of B sentences of K rows and L places; their memory has S positions at most."""

    def __init__(
        self,
        decoder: TransformerDecoder,
        weights: Weights,
        B: int,
        K: int,
        S: int,
        L: int,
        needs: bool,
    ) -> None:
        self.decoder, self.weights, self.needs = decoder, weights, needs
        self.B, self.K, self.L = B, K, L
        H, D = decoder.heads, decoder.head_size
        scale = decoder.attention_scale
        self.scale = D**-0.5 if scale is None else scale
        self.memory = weights.zeros(B, S, decoder.layers[0].cross_key.weight.shape[1])
        self.lengths = torch.zeros(B, dtype=torch.int64, device=weights.device)
        self.self_projections = [
            weights.join((layer.self_query, layer.self_key, layer.self_value))
            for layer in decoder.layers
        ]
        layers = range(len(decoder.layers))
        self.cross = [[weights.zeros(B, H, S, D) for _ in range(2)] for _ in layers]
        self.cache = [[weights.zeros(L, B * K, H, D) for _ in range(2)] for _ in layers]

    def begin(self, encoded: Encoded) -> None:
        """Take what the encoder left: keys and values of a sentence, once for all its rows."""
        assert encoded.memory is not None
        put(encoded.memory, self.memory)
        self.lengths.zero_()
        self.lengths[: len(encoded.lengths)] = torch.tensor(list(encoded.lengths))
        for layer, own in zip(self.decoder.layers, self.cross, strict=True):
            for to, affine in zip(own, (layer.cross_key, layer.cross_value), strict=True):
                made = self.weights.affine(affine, self.memory)
                to.copy_(made.unflatten(2, (self.decoder.heads, -1)).transpose(1, 2))

    def step(
        self, tokens: Tensor, parents: Tensor, position: Tensor, ancestors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (R, V) and attention (R, S) of the rows' last `tokens`; position (1): theirs."""
        decoder, own = self.decoder, self.weights
        x = own.rows(decoder.embedding, tokens) * decoder.embedding_scale
        if decoder.positions is not None:
            x = x + own.rows(decoder.positions, position + decoder.position_offset)
        if decoder.embedding_norm is not None:
            x = own.norm(decoder.embedding_norm, x)
        places = position.expand(tokens.shape[0]).contiguous()
        bias = self._bias(position)
        shown: Tensor | None = None
        # y is what the next block reads: the stream x itself, or with norm_first its norm.
        y = own.norm(decoder.layers[0].self_norm, x) if decoder.norm_first else x
        for i, layer in enumerate(decoder.layers):
            last = i + 1 == len(decoder.layers)
            written = self._attend_self(i, y, ancestors, places, bias)
            y, x = self._end(layer.self_out, written, x, layer.self_norm, layer.cross_norm)
            seen, shown = self._attend_memory(i, layer, y, self.needs and last)
            y, x = self._end(layer.cross_out, seen, x, layer.cross_norm, layer.feed_norm)
            after = decoder.final_norm if last else decoder.layers[i + 1].self_norm
            y, x = self._end(layer.down, self._hidden(layer, y), x, layer.feed_norm, after)
        if decoder.final_norm is not None and not decoder.norm_first:
            y = own.norm(decoder.final_norm, y)
        if decoder.output_scale != 1:
            y = y * decoder.output_scale
        return own.affine(decoder.output, y), shown

    def _end(
        self, out: Affine, inner: Tensor, x: Tensor, norm: Norm, after: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """(what the next block reads, the stream) behind a block that ends with the product `out`.

        norm: of this block; after: of the next one, or the last of all.
        """
        if not self.decoder.norm_first:
            x = self.weights.affine(out, inner, residual=x, norm=norm)
            return x, x
        product = self.weights.affine(out, inner)
        if after is None:
            return x + product, x + product
        found: tuple[Tensor, Tensor] = self.weights.norm(after, product, x)
        return found

    def _bias(self, position: Tensor) -> Tensor | None:
        """(H, L): of the scores of each place, by how far it lies behind."""
        bias = self.decoder.position_bias
        if bias is None:
            return None
        back = (position - torch.arange(self.L, device=position.device)).clamp(0, bias.shape[1] - 1)
        return self.weights(bias).index_select(1, back)

    def _attend_self(
        self,
        i: int,
        y: Tensor,
        ancestors: Tensor,
        places: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        new = F.linear(y, *self.self_projections[i])
        query, key, value = new.view(-1, 3, self.decoder.heads, self.decoder.head_size).unbind(1)
        keys, values = self.cache[i]
        tensors = (query, key, value, keys, values, ancestors, places)
        found = cached_attention(*tensors, bias, scale=self.scale)
        return found.flatten(1)

    def _attend_memory(
        self, i: int, layer: TransformerLayer, y: Tensor, needs: bool
    ) -> tuple[Tensor, Tensor | None]:
        query = self.weights.affine(layer.cross_query, y)
        rows = query.view(self.B, self.K, self.decoder.heads, -1).transpose(1, 2)
        keys, values = self.cross[i]
        found = attention(
            *(rows, keys, values),
            memory_lengths=self.lengths,
            scale=self.scale,
            need_weights=needs,
            average_weights=needs,
        )
        output, weights = found if needs else (found, None)
        whole = output.transpose(1, 2).reshape(self.B * self.K, -1)
        return whole, None if weights is None else weights.flatten(0, 1)

    def _hidden(self, layer: TransformerLayer, y: Tensor) -> Tensor:
        """The inner features of the feed-forward block."""
        activation = self.decoder.activation
        if layer.gate is None:
            return self.weights.affine(layer.up, y, activation)
        return self.weights.affine(layer.gate, y, activation) * self.weights.affine(layer.up, y)
