"""Encoder layers of transformers' models on fused calls: six for each layer, five once packed.

Read from the classes as transformers 5.24 has them (transformers/models/*/modeling_*.py). A layer
is swapped by giving it another class, a subclass of its own: its parameters and hooks stay, and so
does the encoder around it, with its embeddings and masks.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.integrations._transformers_decoders import ACTIVATIONS
from encdec_fast.integrations._transformers_requests import is_given
from encdec_fast.nn import LayerNorm, Linear
from encdec_fast.nn._transformer import (
    BACKENDS,
    ModuleCall,
    feed_forward,
    part_of,
    plain,
    product,
    why_torch,
)
from encdec_fast.ops._call import State, needs_gradient
from encdec_fast.ops.attention import attention
from encdec_fast.ops.linear import describe as describe_linear

_LINEAR: frozenset[type[nn.Module]] = frozenset({Linear})
_NORM: frozenset[type[nn.Module]] = frozenset({LayerNorm})
_MASKS = ("sdpa", "eager", None)  # whose masks are tensors over (B, 1, T, S)


class _Fused:
    """What the layers have in common; without the parts that it knows, transformers' forward runs.

    hidden_states: (B, T, E). attention_mask: (B, 1 or H, T, T), bool, True where a position may be
    looked at, or added to the scores.
    """

    norm_first = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if self._why_apart(hidden_states, attention_mask, kwargs):
            found: Tensor = super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore
            return found
        x, parts = hidden_states, self._parts()
        first, second = parts["self_attn_layer_norm"], parts["final_layer_norm"]
        activation = ACTIVATIONS[type(parts["activation_fn"]).__name__]
        if self.norm_first:
            x = self._attend(first(x), attention_mask, x, None)
            return feed_forward(parts["fc1"], parts["fc2"], second(x), activation, x)
        x = self._attend(x, attention_mask, x, first)
        return feed_forward(parts["fc1"], parts["fc2"], x, activation, x, second)

    def _parts(self) -> Any:
        return self.__dict__["_modules"]

    def _attend(self, x: Tensor, masking: State, residual: Tensor, norm: Any) -> Tensor:
        """norm(residual + self-attention of x)."""
        own: Any = self._parts()["self_attn"]
        parts = own._modules
        q, k, v = (
            product(parts[name], x).unflatten(2, (own.num_heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        allowed = masking if masking is not None and masking.dtype == torch.bool else None
        bias = masking if allowed is None else None
        context = attention(q, k, v, mask=allowed, bias=bias, scale=own.scaling)
        return product(parts["out_proj"], context.transpose(1, 2).flatten(2), "", residual, norm)

    def _why_apart(self, x: Tensor, masking: State, kwargs: dict[str, Any]) -> str:
        """Why the layer is called part by part; "" if it is fused."""
        module: Any = self
        parts = self._parts()
        own = parts.get("self_attn")
        if module.training:
            return "it is in training mode"
        # An encoder is given use_cache too, and nobody reads it.
        asked = [n for n, value in kwargs.items() if n != "use_cache" and is_given(value)]
        if asked:
            return f"the arguments {', '.join(asked)}"
        if torch.compiler.is_compiling():
            return "torch.compile fuses by itself"
        if (
            type(own) not in _ATTENTIONS
            or not plain(own, frozenset({type(own)}))
            or own.config._attn_implementation not in _MASKS
        ):
            return "self_attn is of another class or implementation, or has a hook"
        for name, part, kinds in (
            *((f"self_attn.{n}", own._modules.get(n), _LINEAR) for n in _PROJECTIONS),
            *((n, parts.get(n), _LINEAR) for n in ("fc1", "fc2")),
            *((n, parts.get(n), _NORM) for n in ("self_attn_layer_norm", "final_layer_norm")),
        ):
            if not plain(part, kinds) or part._parameters.get("weight") is None:
                return f"{name} is of another class, is parametrized, or has a hook"
        activation = parts.get("activation_fn")
        if type(activation).__name__ not in ACTIVATIONS or activation._forward_hooks:
            return "activation_fn is of another class, or has a hook"
        if x.dim() != 3 or x.dtype not in (torch.float32, torch.bfloat16):
            return f"the input is of {x.dtype}"  # of float16 transformers cuts off what is infinite
        if masking is not None and (
            masking.dim() != 4 or masking.dtype not in (torch.bool, x.dtype)
        ):
            return "the mask is of another form"
        if torch.is_grad_enabled() and needs_gradient([x, *module.parameters()]):
            return "a gradient is needed"
        return why_torch([x])

    def _encdec_fast_describe(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Description:
        """What `explain` asks of a module."""
        x, reason = hidden_states, self._why_apart(hidden_states, attention_mask, kwargs)
        sizes = f"{tuple(x.shape)} {x.dtype} {x.device.type}"
        call = ModuleCall((reason,), ())
        if not reason:
            first = self._parts()["fc1"]
            linear = describe_linear(x, first.weight, first.bias, weight_dtype=first.weight_dtype)
            call = ModuleCall((), (part_of(linear, "fc1"),))
        plan = "part by part" if reason else "fused: activation, residual and norm"
        return Description("transformer_encoder_layer", BACKENDS, call, sizes, lambda backend: plan)


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


# Of each model: the class of its layers, and ours; the class of its attention.
_FUSED: dict[type[nn.Module], type[nn.Module]] = {}
_ATTENTIONS: set[type[nn.Module]] = set()


def _fused(model: str, norm_first: bool) -> Any:
    name = f"transformers.models.{model.lower()}.modeling_{model.lower()}"
    own = importlib.import_module(name)
    layer: Any = getattr(own, f"{model}EncoderLayer")
    members = {"norm_first": norm_first, "__module__": __name__, "__doc__": _Fused.__doc__}
    _FUSED[layer] = type(layer.__name__, (_Fused, layer), members)
    _ATTENTIONS.add(getattr(own, f"{model}Attention"))
    return _FUSED[layer]


# By these names pickles find them.
MarianEncoderLayer = _fused("Marian", norm_first=False)
BartEncoderLayer = _fused("Bart", norm_first=False)
MBartEncoderLayer = _fused("MBart", norm_first=True)
WhisperEncoderLayer = _fused("Whisper", norm_first=True)


def fuse(encoder: nn.Module) -> None:
    """Give the layers that this package knows its own classes, in place."""
    for module in encoder.modules():
        module.__class__ = _FUSED.get(type(module), type(module))


def restore(encoder: nn.Module) -> None:
    """Undo `fuse`."""
    before = {fused: own for own, fused in _FUSED.items()}
    for module in encoder.modules():
        module.__class__ = before.get(type(module), type(module))
