"""What the layers of a Transformer share: which of their parts may be fused, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from encdec_fast.backends import Description
from encdec_fast.nn._transformer import (
    BACKENDS,
    COMPUTED,
    PROJECTIONS,
    Masks,
    ModuleCall,
    Whole,
    activation_name,
    can_fuse,
    feed_forward,
    masks_of,
    part_of,
    why_torch,
)
from encdec_fast.nn.layer_norm import LayerNorm
from encdec_fast.nn.linear import Linear
from encdec_fast.nn.multihead_attention import MultiheadAttention
from encdec_fast.ops._call import State, needs_gradient
from encdec_fast.ops.linear import describe as describe_linear

_F = TypeVar("_F", bound=Callable[..., None])
Kinds = frozenset[type[nn.Module]]
ATTENTIONS: Kinds = frozenset({nn.MultiheadAttention, MultiheadAttention})
NORMS: Kinds = frozenset({nn.LayerNorm, LayerNorm})
DROPOUTS: Kinds = frozenset({nn.Dropout})
# By the names of parts: which classes may be fused, and the parameter that each has.
_KNOWN: dict[str, tuple[Kinds, str]] = {
    "self_attn": (ATTENTIONS, "in_proj_weight"),
    "multihead_attn": (ATTENTIONS, "in_proj_weight"),
    "linear1": (PROJECTIONS, "weight"),
    "linear2": (PROJECTIONS, "weight"),
    "norm1": (NORMS, "weight"),
    "norm2": (NORMS, "weight"),
    "norm3": (NORMS, "weight"),
    "dropout": (DROPOUTS, ""),
    "dropout1": (DROPOUTS, ""),
    "dropout2": (DROPOUTS, ""),
    "dropout3": (DROPOUTS, ""),
}
# The methods that torch's forward is made of: one set on an instance is to be called.
_BLOCKS = ("_sa_block", "_mha_block", "_ff_block")
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.Linear: Linear,
    nn.LayerNorm: LayerNorm,
}


def signed_as(original: Callable[..., None]) -> Callable[[_F], _F]:
    """Show the signature of torch's constructor for ours, which hands its arguments on."""
    wrap: Any = functools.wraps(original)
    decorate: Callable[[_F], _F] = wrap
    return decorate


def known(*names: str) -> tuple[tuple[str, Kinds, str], ...]:
    """(name, classes, parameter) of these parts."""
    return tuple((name, *_KNOWN[name]) for name in names)


def adopt(layer: nn.Module) -> None:
    """Make the parts that torch's constructor has just made ours."""
    for name, part in layer.named_children():
        if name in _KNOWN and type(part) in _OURS:
            changed: Any = part
            changed.__class__ = _OURS[type(part)]


class Layer(Whole):
    """What both layers share."""

    _parts: tuple[tuple[str, Kinds, str], ...]
    norm_first: bool
    activation: Any

    def why_parts(self) -> str:
        """What is odd about the parts; "" if nothing is."""
        parts: Any = self._modules
        for name, kinds, weight in self._parts:
            part = parts.get(name)
            if type(part) not in kinds:
                return f"{name} was replaced or is parametrized"
            if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
                return f"{name} has a hook or a forward of its own"
            if weight and weight not in part._parameters:
                return f"{name}: {COMPUTED}"
        for name in _BLOCKS:
            if name in self.__dict__:
                return f"{name} was replaced on the instance"
        return "a hook listens to all modules" if torch_module._has_any_global_hook() else ""

    def why_torch(self, inputs: list[Tensor]) -> str:
        """Why torch's own forward runs, over whatever the parts are; "" if it does not."""
        return self.why_parts() or why_torch(inputs)

    def why_apart(self, inputs: list[Tensor]) -> str:
        """Why the parts run one after the other; "" if they are fused. After `why_torch`."""
        parts: Any = self._modules
        own = parts["self_attn"]
        for name, kinds, _ in self._parts:
            part = parts[name]
            if kinds is DROPOUTS:
                if part.training and part.p > 0:
                    return "dropout is on"
            elif kinds is NORMS:
                if part.normalized_shape != (own.embed_dim,):
                    return f"{name} is not over the features of one token"
            elif kinds is ATTENTIONS:
                if part.training and part.dropout > 0:
                    return "dropout is on"
                if not can_fuse(part):
                    return f"{name} is not one that can be fused"
                if part.batch_first != own.batch_first:
                    return "batch_first is not the same in both attentions"
        if not activation_name(self.activation):
            return "the activation is a function of its own"
        if torch.is_grad_enabled() and needs_gradient([*inputs, *self.parameters()]):
            return "a gradient is needed"
        return ""

    def batch_first(self) -> bool:
        own: Any = self._modules["self_attn"]
        return bool(own.batch_first)

    def heads(self) -> list[tuple[int, int]]:
        """What the masks of this layer's attentions depend on, beside the arguments."""
        parts: Any = self._modules
        own = [parts[name] for name, kinds, _ in self._parts if kinds is ATTENTIONS]
        return [(part.num_heads, part.embed_dim) for part in own]

    def masks(
        self, name: str, query: Tensor, memory: Tensor, mask: State, padding: State, causal: bool
    ) -> Masks | None:
        """The masks of the attention of this name, None where the arguments do not fit."""
        part: Any = self._modules[name]
        dim, shape = query.dim(), query.shape
        if dim not in (2, 3) or shape[-1] != part.embed_dim:
            return None
        other = shape
        if memory is not query:
            other = memory.shape
            if len(other) != dim or other[-1] != shape[-1]:
                return None
        at = 0 if part.batch_first else 1
        if dim == 3 and other[at] != shape[at]:
            return None
        if mask is None and padding is None:
            return Masks()
        if dim == 2:
            if padding is not None and padding.dim() != 1:
                return None
            padding = None if padding is None else padding.unsqueeze(0)
            sizes = (1, part.num_heads, shape[0], other[0])
        else:
            sizes = (shape[at], part.num_heads, shape[1 - at], other[1 - at])
        return masks_of(mask, padding, causal, sizes, query.dtype)

    def feed_forward(self, x: Tensor, residual: Tensor, norm: Any = None) -> Tensor:
        parts: Any = self._modules
        name = activation_name(self.activation)
        return feed_forward(parts["linear1"], parts["linear2"], x, name, residual, norm)

    def describe(
        self, inputs: list[Tensor], attentions: list[tuple[str, Description]], torchs: str
    ) -> Description:
        """attentions: of its parts, by name. torchs: why its forward is torch's."""
        sizes = f"{tuple(inputs[0].shape)} {inputs[0].dtype} {inputs[0].device.type}"
        name = "transformer_encoder_layer" if len(inputs) == 1 else "transformer_decoder_layer"
        if torchs:
            call = ModuleCall((torchs,), ())
            return Description(name, BACKENDS, call, sizes, lambda backend: "")
        first: Any = self._modules["linear1"]
        dtype = getattr(first, "weight_dtype", None)
        linear = describe_linear(inputs[0], first.weight, first.bias, weight_dtype=dtype)
        described = [part_of(linear, "linear1")]
        described += [part_of(found, part) for part, found in attentions]
        apart = self.why_apart(inputs)
        plan = f"part by part: {apart}" if apart else "fused: activation, residual and norm"
        call = ModuleCall((), tuple(described))
        return Description(name, BACKENDS, call, sizes, lambda backend: plan)


def batched(x: Tensor, batch_first: bool) -> Tensor:
    """(B, T, E) of what a module takes."""
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1).contiguous()


def as_before(x: Tensor, like: Tensor, batch_first: bool) -> Tensor:
    """The way back from `batched`."""
    if like.dim() == 2:
        return x.squeeze(0)
    return x if batch_first else x.transpose(0, 1).contiguous()
