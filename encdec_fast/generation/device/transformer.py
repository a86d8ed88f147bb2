"""A step of a Transformer decoder with its caches; `TransformerDecoder` says what is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from encdec_fast.generation.decoders import Affine, TransformerDecoder, TransformerLayer
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
        layers = range(len(decoder.layers))
        self.cross = [[weights.zeros(B, H, S, D) for _ in range(2)] for _ in layers]
        self.cache = [[weights.zeros(L, B * K, H, D) for _ in range(2)] for _ in layers]

    def begin(self, encoded: Encoded) -> None:
        """Take what the encoder left: keys and values of a sentence, once for all its rows."""
        self.weights.refresh()
        assert encoded.memory is not None
        put(encoded.memory, self.memory)
        self.lengths.copy_(torch.tensor(list(encoded.lengths)))
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
        for i, layer in enumerate(decoder.layers):
            x = self._attend_self(i, layer, x, ancestors, places, bias)
            last = i + 1 == len(decoder.layers)
            x, weights = self._attend_memory(i, layer, x, self.needs and last)
            shown = weights if last else shown
            x = self._feed_forward(layer, x)
        if decoder.final_norm is not None:
            x = own.norm(decoder.final_norm, x)
        if decoder.output_scale != 1:
            x = x * decoder.output_scale
        return own.affine(decoder.output, x), shown

    def _bias(self, position: Tensor) -> Tensor | None:
        """(H, L): of the scores of each place, by how far it lies behind."""
        bias = self.decoder.position_bias
        if bias is None:
            return None
        back = (position - torch.arange(self.L, device=position.device)).clamp(0, bias.shape[1] - 1)
        return self.weights(bias).index_select(1, back)

    def _block(self, layer: TransformerLayer, name: str, x: Tensor) -> Tensor:
        """What a block reads: the stream, with norm_first behind its norm."""
        first = self.decoder.norm_first
        return self.weights.norm(getattr(layer, f"{name}_norm"), x) if first else x

    def _added(
        self, layer: TransformerLayer, name: str, out: Affine, y: Tensor, x: Tensor
    ) -> Tensor:
        """The stream behind a block that ends with a product."""
        norm = None if self.decoder.norm_first else getattr(layer, f"{name}_norm")
        return self.weights.affine(out, y, residual=x, norm=norm)

    def _attend_self(
        self,
        i: int,
        layer: TransformerLayer,
        x: Tensor,
        ancestors: Tensor,
        places: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        y = self._block(layer, "self", x)
        heads = (self.decoder.heads, self.decoder.head_size)
        new = [
            self.weights.affine(affine, y).unflatten(1, heads)
            for affine in (layer.self_query, layer.self_key, layer.self_value)
        ]
        found = cached_attention(
            *(new[0], new[1], new[2], *self.cache[i], ancestors, places, bias), scale=self.scale
        )
        return self._added(layer, "self", layer.self_out, found.flatten(1), x)

    def _attend_memory(
        self, i: int, layer: TransformerLayer, x: Tensor, needs: bool
    ) -> tuple[Tensor, Tensor | None]:
        query = self.weights.affine(layer.cross_query, self._block(layer, "cross", x))
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
        y = output.transpose(1, 2).reshape(self.B * self.K, -1)
        shown = None if weights is None else weights.flatten(0, 1)
        return self._added(layer, "cross", layer.cross_out, y, x), shown

    def _feed_forward(self, layer: TransformerLayer, x: Tensor) -> Tensor:
        y, activation = self._block(layer, "feed", x), self.decoder.activation
        if layer.gate is None:
            hidden = self.weights.affine(layer.up, y, activation)
        else:
            gate = self.weights.affine(layer.gate, y, activation)
            hidden = gate * self.weights.affine(layer.up, y)
        return self._added(layer, "feed", layer.down, hidden, x)
