"""Decoders of transformers' models, described for the engine with the model's own tensors.

Read from the classes as transformers 5.24 has them (transformers/models/*/modeling_*.py). A part of
another class than the file of the model gives it is `NotDescribed`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from encdec_fast.generation import Affine, Norm, NotDescribed, TransformerDecoder, TransformerLayer
from encdec_fast.generation.decoders import parts_of
from encdec_fast.generation.describe import affine, norm
from encdec_fast.nn._parts import LISTENERS

# Once a call has asked for attentions, these hooks stay; they do nothing unless a call asks again.
_CAPTURE = "transformers.utils.output_capturing"

ACTIVATIONS = {
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
}


class Kept:
    """A tensor that is computed from a model's: the same object for as long as its numbers stay."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def __call__(self, computed: Tensor) -> Tensor:
        """What was kept if it equals `computed`, else that from now on."""
        if self._tensor is None or not torch.equal(self._tensor, computed):
            self._tensor = computed
        return self._tensor


@dataclass(frozen=True)
class _LikeBart:
    """What tells apart the decoders that are built as Bart's.

    name: what the names of its classes begin with. positions: how the name of the class of its
    positions ends. scaled: the decoder, not its embedding, multiplies by embed_scale.
    """

    name: str
    norm_first: bool
    positions: str = "LearnedPositionalEmbedding"
    output: str = "lm_head"
    scaled: bool = False


_LIKE_BART = {
    "MarianMTModel": _LikeBart("Marian", False, "SinusoidalPositionalEmbedding", scaled=True),
    "BartForConditionalGeneration": _LikeBart("Bart", False),
    "MBartForConditionalGeneration": _LikeBart("MBart", True),
    "WhisperForConditionalGeneration": _LikeBart(
        "Whisper", True, "PositionalEmbedding", output="proj_out"
    ),
}
SUPPORTED = (*_LIKE_BART, "T5ForConditionalGeneration")


def describe(model: Any, kept: Kept, length: int) -> TransformerDecoder:
    """The decoder of a model of a class in SUPPORTED.

    kept: of this model, for the table that is made of T5's relative positions, of `length`
    distances. NotDescribed where the engine would compute something else, or not at all.
    """
    _check_untouched(model)
    kind = _LIKE_BART.get(type(model).__name__)
    decoder = _t5(model, kept, length) if kind is None else _like_bart(model, kind)
    _check_evaluates(model)
    rows, outputs = decoder.embedding.shape[0], decoder.output.weight.shape[0]
    if outputs > rows:
        raise NotDescribed(f"{outputs} tokens can be written, but only {rows} have an embedding")
    if decoder.output.bias is not None and decoder.output.bias.numel() != outputs:
        raise NotDescribed(f"the output has {outputs} rows, its bias another number")
    for tensor in parts_of(decoder).tensors:
        if tensor.device != decoder.embedding.device:
            raise NotDescribed(f"it is on {decoder.embedding.device} and on {tensor.device}")
        if tensor.dtype == torch.float64:
            raise NotDescribed("the model is in torch.float64")
    return decoder


def _decoding(model: Any) -> Iterator[tuple[str, Any]]:
    """All modules but the encoder's, which are called as ever, and what they are called."""
    for name, module in model.named_modules(memo=set(model.get_encoder().modules())):
        yield f"{type(model).__name__}{'.' if name else ''}{name}", module


def _check_evaluates(model: Any) -> None:
    for where, module in _decoding(model):
        # Whoever computes something alone, other than dropout, does so in training too.
        if module.training and (isinstance(module, nn.Dropout) or list(module.children())):
            raise NotDescribed(f"{where} is in training mode")


def _check_untouched(model: Any) -> None:
    """NotDescribed if somebody listens to a part that the engine would never call."""
    if torch_module._has_any_global_hook():
        raise NotDescribed("a hook listens to all modules")
    for where, module in _decoding(model):
        if "forward" in module.__dict__ or "prepare_inputs_for_generation" in module.__dict__:
            raise NotDescribed(f"{where} has a method of its own")
        hooks = (hook for kind in LISTENERS for hook in getattr(module, kind).values())
        if any(getattr(hook, "__module__", "") != _CAPTURE for hook in hooks):
            raise NotDescribed(f"{where} has a hook")
        if parametrize.is_parametrized(module):
            raise NotDescribed(f"{where} is parametrized")


def _check_class(module: Any, *kinds: type) -> None:
    if type(module) not in kinds:
        raise NotDescribed(f"{type(module).__name__} stands where {kinds[0].__name__} is expected")


def _only(values: Iterable[Any], what: str) -> Any:
    """What all layers have in common."""
    found = set(values)
    if len(found) != 1:
        raise NotDescribed(f"layers differ in {what}")
    return found.pop()


def _activation(function: Any) -> str:
    kind = type(function)
    if kind.__name__ not in ACTIVATIONS or kind.__module__.split(".")[0] not in (
        "torch",
        "transformers",
    ):
        raise NotDescribed(f"the activation {getattr(function, '__name__', kind.__name__)}")
    if getattr(function, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS[kind.__name__]


def _embedding(module: Any, *kinds: type) -> Tensor:
    # Other vocabularies' embeddings, as resize_token_embeddings puts in place, are torch's own.
    _check_class(module, *kinds, nn.Embedding)
    if module.max_norm is not None:
        raise NotDescribed("an embedding with max_norm changes its weights as it is read")
    weight: Tensor = module.weight
    return weight


def _output(model: Any, head: Any) -> Affine:
    found = affine(head)
    bias: Tensor | None = getattr(model, "final_logits_bias", None)
    if bias is None:
        return found
    if found.bias is not None:
        raise NotDescribed("the output has a bias beside final_logits_bias")
    return Affine(found.weight, bias[0])


def _like_bart(model: Any, kind: _LikeBart) -> TransformerDecoder:
    home = sys.modules[type(model).__module__]

    def own(part: str) -> type:
        found: type = getattr(home, kind.name + part)
        return found

    decoder = model.model.decoder
    _check_class(model.model, own("Model"))
    _check_class(decoder, own("Decoder"))
    tokens, positions = decoder.embed_tokens, decoder.embed_positions
    _check_class(positions, own(kind.positions))
    scaling = getattr(home, f"{kind.name}ScaledWordEmbedding", nn.Embedding)
    layers = decoder.layers
    described = [_bart_layer(layer, own("DecoderLayer"), own("Attention")) for layer in layers]
    attentions = [block for layer in layers for block in (layer.self_attn, layer.encoder_attn)]
    norms = [getattr(decoder, name, None) for name in ("layernorm_embedding", "layer_norm")]
    return TransformerDecoder(
        _embedding(tokens, scaling),
        described,
        _output(model, getattr(model, kind.output)),
        _only((block.num_heads for block in attentions), "their number of heads"),
        norm_first=kind.norm_first,
        activation=_only((_activation(layer.activation_fn) for layer in layers), "activation"),
        embedding_scale=decoder.embed_scale if kind.scaled else getattr(tokens, "embed_scale", 1.0),
        positions=positions.weight,
        position_offset=getattr(positions, "offset", 0),
        embedding_norm=None if norms[0] is None else norm(norms[0]),
        final_norm=None if norms[1] is None else norm(norms[1]),
    )


def _projections(own: Any, cross: Any, names: str, kind: type) -> dict[str, Any]:
    """Of both attentions of a layer, as fields of TransformerLayer. names: those in the model."""
    found = {}
    for which, attention in (("self", own), ("cross", cross)):
        _check_class(attention, kind)
        for part, name in zip(("query", "key", "value", "out"), names.split(), strict=True):
            found[f"{which}_{part}"] = affine(getattr(attention, name))
    return found


def _bart_layer(layer: Any, kind: type, attention: type) -> TransformerLayer:
    _check_class(layer, kind)
    names = "q_proj k_proj v_proj out_proj"
    return TransformerLayer(
        **_projections(layer.self_attn, layer.encoder_attn, names, attention),
        up=affine(layer.fc1),
        down=affine(layer.fc2),
        self_norm=norm(layer.self_attn_layer_norm),
        cross_norm=norm(layer.encoder_attn_layer_norm),
        feed_norm=norm(layer.final_layer_norm),
    )


def _t5(model: Any, kept: Kept, length: int) -> TransformerDecoder:
    home: Any = sys.modules[type(model).__module__]
    decoder = model.decoder
    _check_class(decoder, home.T5Stack)
    layers = [_t5_layer(block, home) for block in decoder.block]
    attentions = [
        attention
        for block in decoder.block
        for attention in (block.layer[0].SelfAttention, block.layer[1].EncDecAttention)
    ]
    activations = (_activation(block.layer[2].DenseReluDense.act) for block in decoder.block)
    return TransformerDecoder(
        _embedding(decoder.embed_tokens),
        layers,
        _output(model, model.lm_head),
        _only((attention.n_heads for attention in attentions), "their number of heads"),
        norm_first=True,
        activation=_only(activations, "activation"),
        final_norm=_rms(decoder.final_layer_norm, home),
        attention_scale=1.0,
        # Those of the first layer are added in all of them.
        position_bias=by_distance(model, kept, length),
        output_scale=model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0,
    )


def _t5_layer(block: Any, home: Any) -> TransformerLayer:
    _check_class(block, home.T5Block)
    own, cross, feed = block.layer
    _check_class(own, home.T5LayerSelfAttention)
    _check_class(cross, home.T5LayerCrossAttention)
    _check_class(feed, home.T5LayerFF)
    dense = feed.DenseReluDense
    _check_class(dense, home.T5DenseActDense, home.T5DenseGatedActDense)
    gated = type(dense) is home.T5DenseGatedActDense
    return TransformerLayer(
        **_projections(own.SelfAttention, cross.EncDecAttention, "q k v o", home.T5Attention),
        up=affine(dense.wi_1 if gated else dense.wi),
        gate=affine(dense.wi_0) if gated else None,
        down=affine(dense.wo),
        self_norm=_rms(own.layer_norm, home),
        cross_norm=_rms(cross.layer_norm, home),
        feed_norm=_rms(feed.layer_norm, home),
    )


def _rms(module: Any, home: Any) -> Norm:
    _check_class(module, home.T5LayerNorm)
    return Norm(module.weight, None, module.variance_epsilon, "rms")


def by_distance(model: Any, kept: Kept, length: int) -> Tensor:
    """(heads, length): what a key that lies so many positions back adds to its score, in T5."""
    attention = model.decoder.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(
        -torch.arange(length),
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    values: Tensor = attention.relative_attention_bias.weight.detach()
    return kept(values[buckets.to(values.device)].t().float().contiguous())
