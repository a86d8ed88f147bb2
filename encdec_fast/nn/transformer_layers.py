"""Drop-in torch.nn.TransformerEncoderLayer and TransformerDecoderLayer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from encdec_fast.backends import Description
from encdec_fast.nn._transformer import UNFIT, Masks, Sentences, attend, decline
from encdec_fast.nn._transformer_layer import Layer, adopt, as_before, batched, known, signed_as
from encdec_fast.nn.multihead_attention import MultiheadAttention
from encdec_fast.ops._call import State


class TransformerEncoderLayer(Layer, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on the kernels of this package.

    Arguments, parameters, initial values, state_dict, inputs, outputs and errors are those of
    torch.nn.TransformerEncoderLayer; masks are as in `encdec_fast.nn.MultiheadAttention`. Without
    gradients and dropout a layer is five calls, and with packed weights two: activation, residual
    and norm are computed where the products are. With gradients the parts run one after the other.

    Where a part was replaced by a module of another class, has a hook or is parametrized, a block
    (_sa_block, _mha_block, _ff_block) was replaced on the instance, or the masks do not fit, and
    for nested tensors, subclasses of Tensor, torch.func, torch.jit and autocast, torch's own
    forward runs over the parts; `explain` says so.
    """

    _parts = known(
        "self_attn",
        "linear1",
        "dropout",
        "linear2",
        "norm1",
        "norm2",
        "dropout1",
        "dropout2",
    )

    @signed_as(nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        always = type(self) is not TransformerEncoderLayer or (is_causal and src_mask is None)
        found: Tensor
        if always or self.why_torch([src]):
            found = super().forward(src, src_mask, src_key_padding_mask, is_causal)
            return found
        if not self.why_apart([src]):
            where = self.where(src, src_mask, src_key_padding_mask, is_causal)
            if where is None:
                decline(UNFIT)
                found = super().forward(src, src_mask, src_key_padding_mask, is_causal)
                return found
            batch_first = self.batch_first()
            return as_before(self.fused(batched(src, batch_first), where), src, batch_first)
        padding = src_key_padding_mask
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, padding, is_causal=is_causal))
        result: Tensor = self.norm2(x + self._ff_block(x))
        return result

    def where(self, src: Tensor, mask: State, padding: State, causal: bool) -> Masks | None:
        """The masks of the attention, None where they do not fit."""
        return self.masks("self_attn", src, src, mask, padding, causal)

    def fused(self, x: Tensor, where: Masks | Sentences) -> Tensor:
        """The layer on (B, S, E), or on (N, E) with sentences."""
        parts: Any = self._modules
        attention, norm1, norm2 = parts["self_attn"], parts["norm1"], parts["norm2"]
        if self.norm_first:
            h = norm1(x)
            x = attend(attention, h, h, where, x)
            return self.feed_forward(norm2(x), x)
        x = attend(attention, x, x, where, x, norm1)
        return self.feed_forward(x, x, norm2)

    def _encdec_fast_describe(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        torchs = self.why_torch([src])
        own: Any = self.self_attn
        found = []
        if not torchs and isinstance(own, MultiheadAttention):
            masks = (src_key_padding_mask, False, src_mask, True, is_causal)
            found = [("self_attn", own._encdec_fast_describe(src, src, src, *masks))]
        return self.describe([src], found, torchs)


class TransformerDecoderLayer(Layer, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on the kernels of this package.

    Everything that is said of `encdec_fast.nn.TransformerEncoderLayer` is true of it too; it is
    eight calls, and with packed weights five.
    """

    _parts = known(
        "self_attn",
        "multihead_attn",
        "linear1",
        "dropout",
        "linear2",
        "norm1",
        "norm2",
        "norm3",
        "dropout1",
        "dropout2",
        "dropout3",
    )

    @signed_as(nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        hints = (tgt_is_causal, memory_is_causal)
        inputs = [tgt, memory]
        fit = (tgt_mask is not None or not tgt_is_causal) and (
            memory_mask is not None or not memory_is_causal
        )
        if fit and type(self) is TransformerDecoderLayer:
            where = None
            if not self.why_torch(inputs) and not self.why_apart(inputs):
                where = self.where(tgt, memory, masks, hints)
            if where is not None:
                batch_first = self.batch_first()
                x, m = batched(tgt, batch_first), batched(memory, batch_first)
                return as_before(self.fused(x, m, where), tgt, batch_first)
        # torch's layer has no fast path of its own: its forward is the parts one by one.
        found: Tensor = super().forward(tgt, memory, *masks, *hints)
        return found

    def where(
        self,
        tgt: Tensor,
        memory: Tensor,
        masks: tuple[State, State, State, State],
        hints: tuple[bool, bool],
    ) -> tuple[Masks, Masks] | None:
        """The masks of both attentions, None where they do not fit."""
        mask, memory_mask, padding, memory_padding = masks
        first = self.masks("self_attn", tgt, tgt, mask, padding, hints[0])
        across = (memory_mask, memory_padding, hints[1])
        second = self.masks("multihead_attn", tgt, memory, *across)
        return None if first is None or second is None else (first, second)

    def fused(self, x: Tensor, memory: Tensor, where: tuple[Masks, Masks]) -> Tensor:
        """The layer on x (B, T, E) and memory (B, S, E)."""
        parts: Any = self._modules
        own, across = parts["self_attn"], parts["multihead_attn"]
        norm1, norm2, norm3 = parts["norm1"], parts["norm2"], parts["norm3"]
        if self.norm_first:
            h = norm1(x)
            x = attend(own, h, h, where[0], x)
            x = attend(across, norm2(x), memory, where[1], x)
            return self.feed_forward(norm3(x), x)
        x = attend(own, x, x, where[0], x, norm1)
        x = attend(across, x, memory, where[1], x, norm2)
        return self.feed_forward(x, x, norm3)

    def _encdec_fast_describe(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        torchs = self.why_torch([tgt, memory])
        own: Any = self.self_attn
        across: Any = self.multihead_attn
        found = []
        if not torchs and isinstance(own, MultiheadAttention):
            described = own._encdec_fast_describe(
                tgt, tgt, tgt, tgt_key_padding_mask, False, tgt_mask, True, tgt_is_causal
            )
            found.append(("self_attn", described))
        if not torchs and isinstance(across, MultiheadAttention):
            described = across._encdec_fast_describe(
                tgt,
                memory,
                memory,
                memory_key_padding_mask,
                False,
                memory_mask,
                True,
                memory_is_causal,
            )
            found.append(("multihead_attn", described))
        return self.describe([tgt, memory], found, torchs)
