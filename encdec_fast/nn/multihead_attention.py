"""A drop-in torch.nn.MultiheadAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from encdec_fast.backends import Description
from encdec_fast.nn._transformer import (
    BACKENDS,
    COMPUTED,
    UNFIT,
    Masks,
    ModuleCall,
    Weights,
    decline,
    heads_second,
    masks_of,
    part_of,
    project,
    weights_of,
    why_torch,
)
from encdec_fast.ops._call import State, needs_gradient, weight_dtype_name
from encdec_fast.ops.attention import attention
from encdec_fast.ops.attention import describe as describe_attention
from encdec_fast.ops.linear import describe_call, run


def _batch_second(x: Tensor) -> Tensor:
    """(T, B, H, D) to (B, H, T, D)."""
    return x.permute(1, 2, 0, 3)


def _no_batch(x: Tensor) -> Tensor:
    """(T, H, D) to (1, H, T, D)."""
    return x.transpose(0, 1).unsqueeze(0)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on the kernels of this package.

    Arguments, parameters, initial values, state_dict, inputs, outputs and errors are those of
    torch.nn.MultiheadAttention, except:

    A query all of whose keys are masked gets zeros for its weights and its context, where torch has
        NaN.
    A bool mask beside a float one is as good as two of a kind, and warns of nothing.
    is_causal is believed: the mask that must come with it is not read.

    weight_dtype: None, torch.bfloat16 or "int8", the dtype in which inference holds the weights;
    the parameters keep theirs. RuntimeError where a gradient is needed.

    With add_bias_kv or add_zero_attn, nested tensors, subclasses of Tensor, torch.func, torch.jit,
    autocast and parametrized weights torch's own code runs, with weights that are not rounded;
    `explain` says so.
    """

    weight_dtype: torch.dtype | str | None = None

    def _why_torch(self, query: Tensor, key: Tensor, value: Tensor, weights: Weights | None) -> str:
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            return "add_bias_kv and add_zero_attn run on torch's own code"
        if weights is None:
            return COMPUTED
        return why_torch([query, key, value, *(w for w in weights if w is not None)])

    def _masks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: State,
        attn_mask: State,
        causal: bool,
    ) -> Masks | None:
        """The masks of a call, None where its arguments do not fit the module or each other."""
        if causal and attn_mask is None:
            return None
        dim = query.dim()
        if dim not in (2, 3) or key.dim() != dim or value.dim() != dim:
            return None
        if query.shape[-1] != self.embed_dim or key.shape[-1] != self.kdim:
            return None
        if value is not key and (
            value.shape[-1] != self.vdim or value.shape[:-1] != key.shape[:-1]
        ):
            return None
        if value is key and self.vdim != self.kdim:
            return None
        if dim == 2:
            batch, queries, keys = 1, query.shape[0], key.shape[0]
            if padding is not None:
                if padding.dim() != 1:
                    return None
                padding = padding.unsqueeze(0)
        else:
            at = 0 if self.batch_first else 1
            batch, queries, keys = query.shape[at], query.shape[1 - at], key.shape[1 - at]
            if key is not query and key.shape[at] != batch:
                return None
        return masks_of(
            attn_mask, padding, causal, (batch, self.num_heads, queries, keys), query.dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        weights = weights_of(self)
        reason = self._why_torch(query, key, value, weights)
        masks = None
        if not reason:
            masks = self._masks(query, key, value, key_padding_mask, attn_mask, is_causal)
        if masks is None or weights is None:
            self._decline(reason or UNFIT, [query, key, value])
            found: tuple[Tensor, Tensor | None] = super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
            return found
        dtype = weight_dtype_name(self.weight_dtype, training=False)
        batched = query.dim() == 3
        arrange = heads_second if self.batch_first else _batch_second
        arrange = arrange if batched else _no_batch
        inputs = (query, key, value)
        q, k, v = project(weights, inputs, self.num_heads, dtype, arrange)
        mask, bias, causal = masks
        result = attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average_weights=need_weights and average_attn_weights,
        )
        context, shown = result if need_weights else (result, None)
        if not batched:
            context, shown = context[0].transpose(0, 1), None if shown is None else shown[0]
        elif self.batch_first:
            context = context.transpose(1, 2)
        else:
            context = context.permute(2, 0, 1, 3)
        out, bias_of_out = weights.out, weights.out_bias
        return run(context.flatten(-2), out, bias_of_out, weight_dtype=dtype), shown

    def _decline(self, reason: str, inputs: list[Tensor]) -> None:
        """Before torch's own code runs: BackendRefused or RuntimeError if it must not."""
        if self.weight_dtype is not None:
            training = needs_gradient([*inputs, *self.parameters()])
            weight_dtype_name(self.weight_dtype, training)
        decline(reason)

    def _encdec_fast_describe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        weights = weights_of(self)
        sizes = f"query {tuple(query.shape)} key {tuple(key.shape)} H={self.num_heads}"
        sizes += f" {query.dtype} {query.device.type}"
        reason = self._why_torch(query, key, value, weights)
        masks = None
        if not reason:
            masks = self._masks(query, key, value, key_padding_mask, attn_mask, is_causal)
        if masks is None or weights is None:
            call = ModuleCall((reason or UNFIT,), ())
            return Description("multihead_attention", BACKENDS, call, sizes, lambda backend: "")
        options = ("", "", 0.0, weight_dtype_name(self.weight_dtype, training=False))
        linear = describe_call(query, weights.out, (weights.out_bias, None, None, None), *options)
        batch, queries, keys = 1, query.shape[0], key.shape[0]
        if query.dim() == 3:
            at = 0 if self.batch_first else 1
            batch, queries, keys = query.shape[at], query.shape[1 - at], key.shape[1 - at]
        q, k = (
            query.new_empty(
                batch, self.num_heads, n, self.head_dim, requires_grad=linear[1].training
            )
            for n in (queries, keys)
        )
        mask, bias, causal = masks
        looked = describe_attention(
            q,
            k,
            k,
            mask=mask,
            bias=bias,
            causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average_weights=need_weights and average_attn_weights,
        )
        call = ModuleCall((), (("linear", *linear), part_of(looked, "attention")))
        return Description("multihead_attention", BACKENDS, call, sizes, lambda backend: "")
