"""What the Transformer modules share: masks, projections, attention, and what may be fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from encdec_fast.backends import Backend, Description, select
from encdec_fast.nn.linear import Linear
from encdec_fast.ops import _blocks
from encdec_fast.ops._call import State, autocasting, context_of, device_type, weight_dtype_name
from encdec_fast.ops._cpu import CONTEXTS
from encdec_fast.ops.attention import attention
from encdec_fast.ops.linear import Rows, run
from encdec_fast.ops.varlen_attention import varlen_attention

PROJECTIONS = frozenset({nn.Linear, NonDynamicallyQuantizableLinear, Linear})
COMPUTED = "a weight is computed anew in every call"
UNFIT = "the arguments do not fit: torch says what is wrong"


class Masks(NamedTuple):
    """Who may look at whom, as `attention` takes it."""

    mask: State = None
    bias: State = None
    causal: bool = False


class Sentences(NamedTuple):
    """Sentences of unequal lengths, one behind the other. offsets: as in `varlen_attention`."""

    offsets: Tensor
    causal: bool = False


class Weights(NamedTuple):
    """The weights of a torch.nn.MultiheadAttention: in_proj, or q, k and v."""

    in_proj: State
    q: State
    k: State
    v: State
    bias: State
    out: Tensor
    out_bias: State


def not_here(*args: Any) -> NoReturn:
    raise AssertionError("a module runs itself")


def why_torch(tensors: list[Tensor]) -> str:
    """What stands between these inputs and the ops of this package; "" if nothing does."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.is_nested:
            return "a tensor is nested"
    if autocasting(device_type(first)):
        return CONTEXTS["autocast"]
    if torch.compiler.is_compiling():
        return ""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces it"
    return CONTEXTS.get(context_of(first, tensors), "")


def plain(module: nn.Module | None, kinds: frozenset[type[nn.Module]]) -> bool:
    """Whether a module is exactly one of these kinds, and nobody listens to it."""
    if module is None or type(module) not in kinds:
        return False
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )


def weights_of(module: nn.Module) -> Weights | None:
    """The weights of an attention as they are now, None where they are not its parameters."""
    own: Any = module._parameters
    out = module._modules.get("out_proj")
    if out is None or type(out) not in PROJECTIONS:
        return None
    last: Any = out._parameters
    try:
        return Weights(
            own["in_proj_weight"],
            own["q_proj_weight"],
            own["k_proj_weight"],
            own["v_proj_weight"],
            own["in_proj_bias"],
            last["weight"],
            last["bias"],
        )
    except KeyError:
        return None


def can_fuse(module: Any) -> bool:
    """Whether an attention is one that `attend` computes."""
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return False
    out = module._modules.get("out_proj")
    if type(out) not in PROJECTIONS or "weight" not in out._parameters:
        return False
    same: bool = module.kdim == module.embed_dim == module.vdim
    return same


def masks_of(
    attn_mask: State,
    padding: State,
    causal: bool,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Masks | None:
    """torch's masks (True: not allowed) as ours, None where they do not fit.

    sizes: B, H, T, S. attn_mask: (T, S) or (B * H, T, S). padding: (B, S). causal is the promise
    that attn_mask is the causal mask: it is believed, and the mask not read.
    """
    if attn_mask is None and padding is None:
        return Masks(None, None, causal)
    B, H, T, S = sizes
    mask: State = None
    bias: State = None
    if attn_mask is not None:
        shape, kind = attn_mask.shape, attn_mask.dtype
        # A causal mask is not read, so that of another dtype will do, as in torch.
        unread = causal and padding is None and kind.is_floating_point
        if kind not in (torch.bool, dtype) and not unread:
            return None
        if shape not in ((T, S), (B * H, T, S)):
            return None
        if not causal:
            found = attn_mask if len(shape) == 2 else attn_mask.view(B, H, T, S)
            if kind == torch.bool:
                mask = ~found
            else:
                bias = found
    if padding is not None:
        if padding.dtype not in (torch.bool, dtype) or padding.shape != (B, S):
            return None
        spread = padding.view(B, 1, 1, S)
        if padding.dtype == torch.bool:
            mask = ~spread if mask is None else mask & ~spread
        else:
            bias = spread if bias is None else bias + spread
    return Masks(mask, bias, causal)


def is_causal_mask(mask: State, hint: bool | None, size: int) -> bool:
    """torch's rule: the hint where there is one, else whether the mask is the causal one."""
    if hint is not None or mask is None:
        return hint is True
    if mask.shape != (size, size):
        return False
    if torch.compiler.is_compiling() or context_of(mask, []):  # no values to read in a graph
        return False
    later = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(later, -torch.inf))


def project(
    weights: Weights,
    inputs: tuple[Tensor, Tensor, Tensor],
    heads: int,
    weight_dtype: str,
    arrange: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Queries, keys and values of these inputs (..., E); one product for equal ones.

    arrange: brings (..., n * H, D) into the layout wanted, in which heads are dimension 1.
    """
    packed, bias = weights.in_proj, weights.bias
    size = weights.out.shape[1]
    found: list[Tensor] = []
    start = 0
    while start < 3:
        input, end = inputs[start], start + 1
        if packed is None:
            weight = weights[1 + start]
            assert weight is not None
            rows: Rows = None
        else:
            weight = packed
            while end < 3 and inputs[end] is input:
                end += 1
            rows = None if end - start == 3 else (start * size, end * size)
        part = bias
        if bias is not None and end - start < 3:
            part = bias[start * size : end * size]
        product = run(input, weight, part, weight_dtype=weight_dtype, rows=rows)
        shape = (*product.shape[:-1], (end - start) * heads, size // heads)
        arranged = arrange(product.view(shape))
        found.extend((arranged,) if end - start == 1 else arranged.chunk(end - start, 1))
        start = end
    return found


def as_it_is(x: Tensor) -> Tensor:
    """(N, H, D) stays."""
    return x


def heads_second(x: Tensor) -> Tensor:
    """(B, T, H, D) to (B, H, T, D)."""
    return x.transpose(1, 2)


def attend(
    module: Any,
    query: Tensor,
    memory: Tensor,
    where: Masks | Sentences,
    residual: Tensor,
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    """norm(residual + attention) on (B, T, E), or on (N, E) with sentences."""
    weights = weights_of(module)
    assert weights is not None
    dtype = weight_dtype_name(getattr(module, "weight_dtype", None), training=False)
    batched = type(where) is Masks
    if memory is query and weights.in_proj is not None:
        if isinstance(where, Sentences):
            seen: Any = (where.offsets, None, None, where.causal)
        else:
            seen = (None, *where)
        own = (weights.in_proj, weights.bias, weights.out, weights.out_bias)
        found = _blocks.self_attention(
            query, residual, own, _norm_of(norm), module.num_heads, seen, dtype
        )
        if found is not None:
            return found
    inputs, arrange = (query, memory, memory), heads_second if batched else as_it_is
    q, k, v = project(weights, inputs, module.num_heads, dtype, arrange)
    if isinstance(where, Sentences):
        context = varlen_attention(q, k, v, where.offsets, where.offsets, causal=where.causal)
    else:
        mask, bias, causal = where
        context = attention(q, k, v, mask=mask, bias=bias, causal=causal).transpose(1, 2)
    return _finish(context.flatten(-2), weights.out, weights.out_bias, residual, norm, "", dtype)


def _finish(
    input: Tensor,
    weight: Tensor,
    bias: State,
    residual: State,
    norm: nn.LayerNorm | None,
    activation: str,
    weight_dtype: str,
) -> Tensor:
    scale, shift, eps = _norm_of(norm) or (None, None, 0.0)
    kind = "" if norm is None else "layer"
    after = (residual, scale, shift, activation, kind, eps)
    return run(input, weight, bias, *after, weight_dtype)


def _norm_of(norm: nn.LayerNorm | None) -> tuple[State, State, float] | None:
    """Weight, bias and eps."""
    if norm is None:
        return None
    own: Any = norm._parameters
    return own["weight"], own["bias"], norm.eps


def product(
    module: nn.Module,
    input: Tensor,
    activation: str = "",
    residual: State = None,
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    """norm(residual + activation(linear(input))), where `module` is the linear."""
    own: Any = module._parameters
    dtype = weight_dtype_name(getattr(module, "weight_dtype", None), training=False)
    return _finish(input, own["weight"], own["bias"], residual, norm, activation, dtype)


def feed_forward(
    first: nn.Module,
    second: nn.Module,
    x: Tensor,
    activation: str,
    residual: Tensor,
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    """norm(residual + second(activation(first(x)))), where both are linears."""
    held = getattr(first, "weight_dtype", None)
    if held == getattr(second, "weight_dtype", None):
        one: Any = first._parameters
        other: Any = second._parameters
        own = (one["weight"], one["bias"], other["weight"], other["bias"])
        dtype = weight_dtype_name(held, training=False)
        found = _blocks.feed_forward(x, residual, own, activation, _norm_of(norm), dtype)
        if found is not None:
            return found
    return product(second, product(first, x, activation), "", residual, norm)


def activation_name(activation: Any) -> str:
    """What `linear` calls this function; "" if it does not know it."""
    if activation is F.relu or activation is torch.relu:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if activation is F.silu:
        return "silu"
    if isinstance(activation, nn.Module) and plain(activation, _ACTIVATIONS):
        if isinstance(activation, nn.GELU):
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        return "relu" if isinstance(activation, nn.ReLU) else "silu"
    return ""


_ACTIVATIONS: frozenset[type[nn.Module]] = frozenset({nn.ReLU, nn.GELU, nn.SiLU})


class ModuleCall(NamedTuple):
    """What is known of a call of a whole module.

    reasons: why it is torch's own. parts: (name, its backends, its call) of each op otherwise.
    """

    reasons: tuple[str, ...]
    parts: tuple[tuple[str, tuple[Backend, ...], Any], ...]


def _parts_why_not(backend: str, call: ModuleCall) -> list[str]:
    found = list(call.reasons)
    for name, backends, part in call.parts:
        own = (b.why_not(part) for b in backends if b.name == backend)
        found += [f"{name}: {reason}" for reason in next(own, [f"it has no backend '{backend}'"])]
    return found


def _one_why_not(call: ModuleCall) -> list[str]:
    if call.reasons:
        return list(call.reasons)
    first = {next((b.name for b in own if not b.why_not(part)), "") for _, own, part in call.parts}
    return ["one backend runs all parts"] if len(first) < 2 else []


def _torch_why_not(call: ModuleCall) -> list[str]:
    return [] if call.reasons else _parts_why_not("torch", call)


# "parts": each part is run by the first that accepts it, and these are several.
BACKENDS = (
    Backend("parts", not_here, _one_why_not),
    Backend("triton", not_here, partial(_parts_why_not, "triton")),
    Backend("cpu", not_here, partial(_parts_why_not, "cpu")),
    Backend("torch", not_here, _torch_why_not),
    Backend("reference", not_here, lambda call: list(call.reasons)),
)


def decline(reason: str) -> None:
    """Before torch's own code runs in place of the kernels: BackendRefused if it must not."""
    if not torch.compiler.is_compiling():
        select(BACKENDS, ModuleCall((reason,), ()))


def part_of(description: Description, name: str) -> tuple[str, tuple[Backend, ...], Any]:
    return name, description.backends, description.call


class Whole(nn.Module):
    """A module whose products are those of its parts.

    weight_dtype: that of the parts, None where they differ; setting it sets theirs.
    """

    def _with_weights(self) -> list[Any]:
        found = [m for m in self.modules() if not isinstance(m, Whole)]
        return [module for module in found if hasattr(type(module), "weight_dtype")]

    @property
    def weight_dtype(self) -> torch.dtype | str | None:
        kinds = {module.weight_dtype for module in self._with_weights()}
        return kinds.pop() if len(kinds) == 1 else None

    @weight_dtype.setter
    def weight_dtype(self, value: torch.dtype | str | None) -> None:
        for module in self._with_weights():
            module.weight_dtype = value
