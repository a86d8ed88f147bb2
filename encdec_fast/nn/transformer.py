"""Drop-in torch.nn.TransformerEncoder, TransformerDecoder and Transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.nn._transformer import (
    BACKENDS,
    UNFIT,
    ModuleCall,
    Sentences,
    Whole,
    decline,
    is_causal_mask,
    plain,
    why_torch,
)
from encdec_fast.nn._transformer_layer import NORMS, Kinds, adopt, as_before, batched, signed_as
from encdec_fast.nn.layer_norm import LayerNorm
from encdec_fast.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer
from encdec_fast.ops._call import GRAPHS, State, context_of

_ENCODER_LAYERS: Kinds = frozenset({TransformerEncoderLayer})
_DECODER_LAYERS: Kinds = frozenset({TransformerDecoderLayer})


class Stack(Whole):
    """What the encoder and the decoder share."""

    layers: Any
    norm: Any

    def why_torch(self, kinds: Kinds, inputs: list[Tensor]) -> str:
        """Why torch's own forward runs, over whatever the layers are; "" if it does not."""
        for number, layer in enumerate(self.layers):
            if not plain(layer, kinds):
                return f"layers.{number} is of another class, is parametrized, or has a hook"
            reason: str = layer.why_parts()
            if reason:
                return f"layers.{number}: {reason}"
            if layer.batch_first() != self.layers[0].batch_first():
                return "batch_first is not the same in all layers"
        return why_torch(inputs) if len(self.layers) else "it has no layers"

    def why_apart(self, inputs: list[Tensor]) -> str:
        """Why the layers are called as modules; "" if they are fused. After `why_torch`."""
        for number, layer in enumerate(self.layers):
            reason: str = layer.why_apart(inputs)
            if reason:
                return f"layers.{number}: {reason}"
            if layer.heads() != self.layers[0].heads():
                return "the number of heads is not the same in all layers"
        return ""

    def normed(self, x: Tensor) -> Tensor:
        result: Tensor = x if self.norm is None else self.norm(x)
        return result


def _length(x: Tensor, batch_first: bool) -> int:
    return x.shape[1 if x.dim() == 3 and batch_first else 0]


class TransformerEncoder(Stack, nn.TransformerEncoder):
    """torch.nn.TransformerEncoder on the kernels of this package.

    Arguments, parameters, state_dict, inputs, outputs and errors are those of
    torch.nn.TransformerEncoder; so are the layers, which must be
    `encdec_fast.nn.TransformerEncoderLayer` to be fast.

    In eager mode, on the CPU, without gradients and dropout, with a bool src_key_padding_mask (True
    anywhere) and no mask but the causal one, only the real tokens are computed, and padded
    positions of the output are zero. (torch's own nested fast path makes zeros of them too, for
    masks that are True at the end only; before its final norm.) enable_nested_tensor=False turns
    this off, as it does torch's.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        always = type(self) is not TransformerEncoder or (is_causal is True and mask is None)
        padding = src_key_padding_mask
        if always or self._why_torch(src, padding):
            found: Tensor = super().forward(src, mask, padding, is_causal)
            return found
        batch_first = self.layers[0].batch_first()
        causal = is_causal_mask(mask, is_causal, _length(src, batch_first))
        if not self.why_apart([src]):
            where = self.layers[0].where(src, mask, padding, causal)
            if where is None:
                decline(UNFIT)
                found = super().forward(src, mask, padding, is_causal)
                return found
            if not self._why_whole(src, mask, padding, causal):
                assert padding is not None
                real = ~padding
                if not bool(real.all()):
                    return self._without_padding(src, real, causal)
                where = self.layers[0].where(src, mask, None, causal)
            x = batched(src, batch_first)
            for layer in self.layers:
                x = layer.fused(x, where)
            return self.normed(as_before(x, src, batch_first))
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=padding, is_causal=causal)
        return self.normed(x)

    def _why_torch(self, src: Tensor, padding: State) -> str:
        """Why torch's own forward runs; "" if it does not."""
        reason = self.why_torch(_ENCODER_LAYERS, [src])
        if reason or padding is None:
            return reason
        # What such a norm sees of padding depends on whether torch computes it.
        if isinstance(self.norm, nn.LayerNorm) and self.norm.normalized_shape != src.shape[-1:]:
            return "the final norm is not over the features of one token"
        if src.dim() != 3:
            return ""
        rows = src.shape[:2] if self.layers[0].batch_first() else src.shape[1::-1]
        return "" if padding.shape == rows else UNFIT

    def _why_whole(self, src: Tensor, mask: State, padding: State, causal: bool) -> str:
        """Why padding is computed too; "" if it is not."""
        if padding is None or padding.dtype != torch.bool or src.dim() != 3:
            return "there is no bool src_key_padding_mask"
        if mask is not None and not causal:
            return "there is a mask"
        if not getattr(self, "enable_nested_tensor", True):
            return "enable_nested_tensor is False"
        if torch.compiler.is_compiling() or context_of(src, []) in GRAPHS:
            return "in a graph the number of tokens is not known"
        return "" if src.device.type == "cpu" else "the tensors are not on the CPU"

    def _without_padding(self, src: Tensor, real: Tensor, causal: bool) -> Tensor:
        """The stack on the real tokens only; zeros at the others. real: (B, S)."""
        ends = real.sum(1).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        sentence, position = real.nonzero(as_tuple=True)
        if self.layers[0].batch_first():
            index = sentence * src.shape[1] + position
        else:
            index = position * src.shape[1] + sentence
        where = Sentences(offsets, causal)
        x = src.reshape(-1, src.shape[-1]).index_select(0, index)
        for layer in self.layers:
            x = layer.fused(x, where)
        own = self.norm is None or plain(self.norm, NORMS)
        x = self.normed(x) if own else x
        whole = x.new_zeros(src.shape[0] * src.shape[1], src.shape[2])
        whole = whole.index_copy_(0, index, x).view(src.shape)
        return whole if own else self.normed(whole)

    def _encdec_fast_describe(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Description:
        """What `explain` asks of a module."""
        sizes = f"{tuple(src.shape)} {src.dtype} {src.device.type} layers={len(self.layers)}"
        reason = self._why_torch(src, src_key_padding_mask)
        if reason:
            call = ModuleCall((reason,), ())
            return Description("transformer_encoder", BACKENDS, call, sizes, lambda backend: "")
        causal = is_causal_mask(mask, is_causal, _length(src, self.layers[0].batch_first()))
        first = self.layers[0]._encdec_fast_describe(src, mask, src_key_padding_mask, causal)
        apart = self.why_apart([src])
        whole = apart or self._why_whole(src, mask, src_key_padding_mask, causal)
        plan = f"layer by layer: {apart}" if apart else "fused: activation, residual and norm"
        plan += f"\npadding is computed: {whole}" if whole else "\nonly the real tokens"
        return Description("transformer_encoder", BACKENDS, first.call, sizes, lambda backend: plan)


class TransformerDecoder(Stack, nn.TransformerDecoder):
    """torch.nn.TransformerDecoder on the kernels of this package.

    Arguments, parameters, state_dict, inputs, outputs and errors are those of
    torch.nn.TransformerDecoder; so are the layers, which must be
    `encdec_fast.nn.TransformerDecoderLayer` to be fast.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        inputs = [tgt, memory]
        always = type(self) is not TransformerDecoder or (
            (tgt_is_causal is True and tgt_mask is None)
            or (memory_is_causal and memory_mask is None)
        )
        if always or self.why_torch(_DECODER_LAYERS, inputs):
            found: Tensor = super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
            return found
        batch_first = self.layers[0].batch_first()
        causal = is_causal_mask(tgt_mask, tgt_is_causal, _length(tgt, batch_first))
        if not self.why_apart(inputs):
            where = self.layers[0].where(tgt, memory, masks, (causal, memory_is_causal))
            if where is not None:
                x, m = batched(tgt, batch_first), batched(memory, batch_first)
                for layer in self.layers:
                    x = layer.fused(x, m, where)
                return self.normed(as_before(x, tgt, batch_first))
        x = tgt
        for layer in self.layers:
            x = layer(x, memory, *masks, causal, memory_is_causal)
        return self.normed(x)

    def _encdec_fast_describe(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        sizes = f"{tuple(tgt.shape)} {tgt.dtype} {tgt.device.type} layers={len(self.layers)}"
        reason = self.why_torch(_DECODER_LAYERS, [tgt, memory])
        if reason:
            call = ModuleCall((reason,), ())
            return Description("transformer_decoder", BACKENDS, call, sizes, lambda backend: "")
        causal = is_causal_mask(tgt_mask, tgt_is_causal, _length(tgt, self.layers[0].batch_first()))
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        first = self.layers[0]._encdec_fast_describe(tgt, memory, *masks, causal, memory_is_causal)
        apart = self.why_apart([tgt, memory])
        plan = f"layer by layer: {apart}" if apart else "fused: activation, residual and norm"
        return Description("transformer_decoder", BACKENDS, first.call, sizes, lambda backend: plan)


class Transformer(Whole, nn.Transformer):
    """torch.nn.Transformer on the kernels of this package.

    Arguments, parameters, initial values, state_dict, inputs, outputs and errors are those of
    torch.nn.Transformer. Its encoder and decoder are `encdec_fast.nn.TransformerEncoder` and
    `TransformerDecoder`, unless custom ones are given: those stay what they are.
    """

    @signed_as(nn.Transformer.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        custom = (options.get("custom_encoder"), options.get("custom_decoder"), *args[7:9])
        stacks: Any = ((self.encoder, _ENCODER), (self.decoder, _DECODER))
        for stack, kinds in stacks:
            if any(stack is given for given in custom):
                continue
            stack.__class__ = kinds[0]
            stack.norm.__class__ = LayerNorm
            for layer in stack.layers:
                layer.__class__ = kinds[1]
                adopt(layer)

    def _encdec_fast_describe(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        sizes = f"src {tuple(src.shape)} tgt {tuple(tgt.shape)} {src.dtype} {src.device.type}"
        reasons: list[str] = []
        parts: list[Any] = []
        plans: list[str] = []
        stacks: Any = (("encoder", self.encoder), ("decoder", self.decoder))
        arguments: tuple[Any, ...] = (src, src_mask, src_key_padding_mask, src_is_causal)
        for name, stack in stacks:
            if type(stack) in (TransformerEncoder, TransformerDecoder):
                found = stack._encdec_fast_describe(*arguments)
                reasons += [f"{name}: {reason}" for reason in found.call.reasons]
                parts += [(f"{name}: {part[0]}", *part[1:]) for part in found.call.parts]
                plans += [f"{name}: {line}" for line in found.plan("").splitlines()]
            else:
                reasons.append(f"{name} is none of encdec_fast")
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            arguments = (tgt, src, *masks, tgt_is_causal, memory_is_causal)
        call = ModuleCall(tuple(reasons), tuple(parts))
        plan = "\n".join(plans)
        return Description("transformer", BACKENDS, call, sizes, lambda backend: plan)


_ENCODER = (TransformerEncoder, TransformerEncoderLayer)
_DECODER = (TransformerDecoder, TransformerDecoderLayer)
