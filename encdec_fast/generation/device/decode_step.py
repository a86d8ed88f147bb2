"""A step of a recurrent decoder as one launch: csrc/generation/decode_step_cuda.cu.

For at most eight rows, where a step costs its launches and the reading of its weights; it runs
where the backend `cuda` is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_fast.generation.decoders import Affine, RecurrentDecoder
from encdec_fast.generation.device.weights import Weights
from encdec_fast.ops._call import CELLS
from encdec_fast.ops._recurrent_cuda import limits

MOST_ROWS = 8
_ATTENTIONS = {None: 0, "additive": 1, "dot": 2}
_MULTIPLE = 8  # of all sizes: rows of weights are read sixteen bytes at a time


def why_not(decoder: Any) -> str:
    """Why a decoder's step cannot be one launch; empty where it can, for few rows."""
    if not isinstance(decoder, RecurrentDecoder):
        return "its decode step is of recurrent decoders"
    cells = {layer.cell for layer in decoder.layers}
    if len(cells) > 1 or not cells <= {"lstm", "gru"}:
        return "its decode step has LSTM and GRU, one of them for all layers"
    if len(decoder.layers) > 8:
        return "its decode step has at most 8 layers"
    if decoder.attentional is not None or decoder.coverage is not None:
        return "its decode step has no attentional vectors and no coverage"
    if decoder.attention not in _ATTENTIONS:
        return f"its decode step has no {decoder.attention} attention"
    sizes = [decoder.embedding.shape[1], decoder.hidden_size, decoder.context_size]
    if decoder.query is not None:
        sizes.append(decoder.query.weight.shape[0])
    elif decoder.keys is not None:
        sizes.append(decoder.keys.weight.shape[0])
    if any(size % _MULTIPLE for size in sizes):
        return f"its decode step needs sizes that are multiples of {_MULTIPLE}, not {sizes}"
    return ""


def shared_bytes(decoder: RecurrentDecoder, rows: int, S: int) -> int:
    """Bytes of shared memory that a block needs; as csrc/generation/decode_step_gpu.cpp has it."""
    H, M, E = decoder.hidden_size, decoder.context_size, decoder.embedding.shape[1]
    padded = 1 if rows == 1 else 4 if rows <= 4 else MOST_ROWS
    above = 0 if len(decoder.layers) == 1 else H + M if decoder.attends else H
    return 4 * max(padded * (max(E + M, above) + H), S + _attention_size(decoder))


def _attention_size(decoder: RecurrentDecoder) -> int:
    if decoder.attention is None:
        return 0
    keys = decoder.keys or decoder.query
    return decoder.hidden_size if keys is None else keys.weight.shape[0]


def _whole(tensor: Tensor) -> Tensor:
    """As the kernel reads it: contiguous, from a multiple of sixteen bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _bias(weights: Weights, affine: Affine | None) -> Tensor | None:
    return None if affine is None or affine.bias is None else weights(affine.bias)


class DecodeStep:
    """What the launches of a session leave behind, and their arguments that stay."""

    def __init__(self, decoder: RecurrentDecoder, weights: Weights, R: int, S: int) -> None:
        H, M = decoder.hidden_size, decoder.context_size
        attends, A = decoder.attention is not None, _attention_size(decoder)
        layers, device = len(decoder.layers), weights.device
        self.logits = weights.zeros(R, decoder.output.weight.shape[0])
        self.shown = weights.zeros(R, S) if attends else None
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)
        between = 2 * layers * R * H + R * A + R * M
        self.between = torch.zeros(between, dtype=torch.float32, device=device)
        self.limits = limits(-1 if device.type == "cpu" else torch.cuda.current_device())

    def __call__(
        self,
        decoder: RecurrentDecoder,
        weights: Weights,
        tokens: Tensor,
        parents: Tensor,
        states: list[Tensor],
        context: Tensor,
        memory: tuple[Tensor, Tensor, Tensor] | None,
        K: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (R, V) and attention (R, S); states and context become those after the step.

        memory: keys, values and lengths of the sentences, which have K rows each.
        """
        none = weights.zeros(0)
        layers: list[Tensor] = []
        for layer in decoder.layers:
            for affine in (layer.input, layer.hidden):
                layers.append(weights(affine.weight))
            for affine in (layer.input, layer.hidden):
                bias = _bias(weights, affine)
                layers.append(none if bias is None else bias)
        keys, values, lengths = memory or (None, None, None)
        query = None if decoder.query is None or memory is None else decoder.query
        score = None if decoder.score is None else weights(decoder.score)
        self.arrived.zero_()
        torch.ops.encdec_fast_cuda.decode_step(
            CELLS[decoder.layers[0].cell],
            _ATTENTIONS[decoder.attention],
            decoder.context_in_output,
            K,
            tokens,
            parents,
            _whole(weights(decoder.embedding)),
            [_whole(tensor) for tensor in layers],
            None if query is None else _whole(weights(query.weight)),
            _bias(weights, query),
            score,
            keys,
            values,
            lengths,
            _whole(weights(decoder.output.weight)),
            _bias(weights, decoder.output),
            states[0],
            states[1] if len(states) > 1 else None,
            context,
            self.logits,
            self.shown,
            self.arrived,
            self.between,
            self.limits.processors,
            self.limits.shared_bytes,
        )
        return self.logits, self.shown
