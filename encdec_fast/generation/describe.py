"""Modules of torch.nn and of this package, described for the engine.

A part that does more than the engine would do for it (a hook, another class, a parametrization) is
`NotDescribed`: a search then calls the modules themselves, step by step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from encdec_fast import nn as fast
from encdec_fast.generation.decoders import (
    Affine,
    Norm,
    RecurrentDecoder,
    RecurrentLayer,
    TransformerDecoder,
    TransformerLayer,
)
from encdec_fast.nn._parts import LISTENERS

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear, fast.Linear)
_LSTM, _GRU, _RNN = (nn.LSTM, fast.LSTM), (nn.GRU, fast.GRU), (nn.RNN, fast.RNN)
_LSTM_CELL, _GRU_CELL = (nn.LSTMCell, fast.LSTMCell), (nn.GRUCell, fast.GRUCell)


class NotDescribed(Exception):
    """The engine cannot run this module; the message says why."""


def check_plain(root: nn.Module, *kinds: type[nn.Module]) -> None:
    """NotDescribed unless root is of one of these classes and nobody listens to it or its parts."""
    if type(root) not in kinds:
        raise NotDescribed(f"{type(root).__name__} is none of {_names(kinds)}")
    if torch_module._has_any_global_hook():
        raise NotDescribed("a hook listens to all modules")
    for name, module in root.named_modules():
        where = f"{type(root).__name__}{'.' if name else ''}{name}"
        if "forward" in module.__dict__ or any(getattr(module, hook) for hook in LISTENERS):
            raise NotDescribed(f"{where} has a hook or a forward of its own")
        if parametrize.is_parametrized(module):
            raise NotDescribed(f"{where} is parametrized")


def _names(kinds: tuple[type, ...]) -> str:
    return ", ".join(dict.fromkeys(kind.__name__ for kind in kinds))


def affine(linear: Any) -> Affine:
    """Of a Linear. NotDescribed for any other module."""
    if type(linear) not in _LINEAR:
        raise NotDescribed(f"{type(linear).__name__} stands where a Linear is expected")
    check_plain(linear, *_LINEAR)
    return Affine.of(linear)


def norm(module: Any) -> Norm:
    """Of a LayerNorm or RMSNorm. NotDescribed for any other module."""
    if type(module) in (nn.LayerNorm, fast.LayerNorm) and module.weight is not None:
        return Norm.of(module)
    if type(module) is nn.RMSNorm and module.weight is not None:
        eps = module.eps if module.eps is not None else 1.1920929e-07  # float32's, as torch's
        return Norm(module.weight, None, eps, "rms")
    raise NotDescribed(f"{type(module).__name__} is no norm with weights")


def recurrent_layers(module: Any) -> list[RecurrentLayer]:
    """Of an LSTM, GRU or RNN of one direction, or of an LSTMCell or GRUCell."""
    kind = type(module)
    check_plain(module, *_LSTM, *_GRU, *_RNN, *_LSTM_CELL, *_GRU_CELL)
    if kind in _LSTM_CELL + _GRU_CELL:
        cell = "lstm" if kind in _LSTM_CELL else "gru"
        return [_layer(module, ["ih", "hh"], cell)]
    if module.bidirectional or getattr(module, "proj_size", 0):
        raise NotDescribed("a decoder has one direction and no projections of its states")
    cell = "lstm" if kind in _LSTM else "gru" if kind in _GRU else f"rnn_{module.nonlinearity}"
    names = [[f"ih_l{i}", f"hh_l{i}"] for i in range(module.num_layers)]
    return [_layer(module, own, cell) for own in names]


def _layer(module: Any, names: list[str], cell: str) -> RecurrentLayer:
    """The layer whose weights and biases have these names."""
    parts = [
        Affine(
            getattr(module, f"weight_{name}"),
            getattr(module, f"bias_{name}") if module.bias else None,
        )
        for name in names
    ]
    return RecurrentLayer(parts[0], parts[1], cell)


def attention_decoder(
    decoder: fast.AttentionDecoder, embedding: Tensor, output: Affine, upper: Any = None
) -> RecurrentDecoder:
    """An AttentionDecoder with the embedding before it and the output behind it.

    upper: an LSTM, GRU or RNN over the decoder's [h; context], whose own h then goes to output.
    """
    check_plain(decoder, fast.AttentionDecoder)
    cell: Any = decoder.cell
    attention: Any = cell.attention
    options: dict[str, Any] = {}
    if type(attention) is fast.AdditiveAttention:
        options = {
            "attention": "additive",
            "query": affine(attention.query_proj),
            "keys": affine(attention.memory_proj),
            "score": attention.score.weight[0],
        }
        if attention.coverage:
            options["coverage"] = attention.coverage_proj.weight[:, 0]
    elif type(attention) is fast.LuongAttention:
        options = {"attention": "dot"}
        if attention.score == "concat":
            options = {
                "attention": "additive",
                "query": affine(attention.query_proj),
                "keys": affine(attention.memory_proj),
                "score": attention.score_proj.weight[0],
            }
        elif attention.score == "general":
            options["keys"] = affine(attention.memory_proj)
        if attention.output_size is not None:
            options["attentional"] = affine(attention.output_proj)
    elif type(attention) is fast.LocationAttention:
        options = {"attention": "location", "location": affine(attention.attn)}
    else:
        raise NotDescribed(f"attention of the class {type(attention).__name__}")
    layers = recurrent_layers(cell.cell)
    if upper is not None:
        layers += recurrent_layers(upper)
    # A cell's memory_size is what it is fed, an attentional vector's where there is one.
    size = attention.memory_size if "attentional" in options else cell.memory_size
    return RecurrentDecoder(embedding, layers, output, size, **options)


_ACTIVATIONS: dict[Any, str] = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


def _activation(function: Any) -> str:
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    for kind, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu")):
        if type(function) is kind:
            return name
    if function in _ACTIVATIONS:
        return _ACTIVATIONS[function]
    raise NotDescribed(f"the activation {getattr(function, '__name__', function)!r}")


def _projections(attention: Any) -> list[Affine]:
    """Of query, key and value, and of the output, of a MultiheadAttention."""
    if type(attention) not in (nn.MultiheadAttention, fast.MultiheadAttention):
        raise NotDescribed(f"{type(attention).__name__} stands where attention is expected")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise NotDescribed("attention with add_bias_kv or add_zero_attn")
    if attention._qkv_same_embed_dim:
        weights = list(attention.in_proj_weight.chunk(3))
    else:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    bias = attention.in_proj_bias
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    found = [Affine(w, b) for w, b in zip(weights, biases, strict=True)]
    return [*found, affine(attention.out_proj)]


def _transformer_layer(layer: Any) -> TransformerLayer:
    check_plain(layer, nn.TransformerDecoderLayer, fast.TransformerDecoderLayer)
    names = ("query", "key", "value", "out")
    own = zip(names, _projections(layer.self_attn), strict=True)
    cross = zip(names, _projections(layer.multihead_attn), strict=True)
    return TransformerLayer(
        **{f"self_{name}": part for name, part in own},
        **{f"cross_{name}": part for name, part in cross},
        up=affine(layer.linear1),
        down=affine(layer.linear2),
        self_norm=norm(layer.norm1),
        cross_norm=norm(layer.norm2),
        feed_norm=norm(layer.norm3),
    )


def transformer_decoder(
    decoder: Any, embedding: Tensor, output: Affine, **options: Any
) -> TransformerDecoder:
    """A torch.nn.TransformerDecoder (or this package's), its weights as they are.

    embedding (V, D), output: as in `TransformerDecoder`, and so are the options: embedding_scale,
    positions, position_offset, embedding_norm, output_scale. Positions are added to the embeddings.
    """
    check_plain(decoder, nn.TransformerDecoder, fast.TransformerDecoder)
    first = decoder.layers[0]
    kinds = {(layer.norm_first, _activation(layer.activation)) for layer in decoder.layers}
    if len(kinds) > 1:
        raise NotDescribed("layers that differ in norm_first or activation")
    return TransformerDecoder(
        embedding,
        [_transformer_layer(layer) for layer in decoder.layers],
        output,
        first.self_attn.num_heads,
        norm_first=first.norm_first,
        activation=_activation(first.activation),
        final_norm=None if decoder.norm is None else norm(decoder.norm),
        **options,
    )
