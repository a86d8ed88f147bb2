"""Attention over sentences of unequal lengths that lie one behind the other, without padding.

Rows offsets[b] to offsets[b + 1] of a tensor are those of sentence b; a query sees the memory of
its own sentence only. Otherwise the mathematics is that of `attention`:

    query           (N, H, D)         N: the queries of all sentences
    key             (M, G, D)         M: the keys of all sentences; H a multiple of G
    value           (M, G, V)
    query_offsets   int64 (B + 1) on the CPU, from 0 to N, not decreasing
    memory_offsets  int64 (B + 1) on the CPU, from 0 to M, not decreasing
    output          (N, H, V)

With causal, query t of a sentence sees its keys s <= t. A query without keys has zeros. All
floating tensors have one dtype and device. The kernel is for inference; where a gradient is needed
the sentences go through `attention` one at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.backends import Backend, Description, explained_by, select
from encdec_fast.ops import _attention_checks as checks
from encdec_fast.ops import _triton
from encdec_fast.ops._call import GRAPHS, autocasting, context_of, device_type, needs_gradient
from encdec_fast.ops._cpu import unfit
from encdec_fast.ops._packing import with_rows
from encdec_fast.ops.attention import attention

_library = torch.library.Library("encdec_fast", "FRAGMENT")
_library.define(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor query_offsets,"
    " Tensor memory_offsets, bool causal, float scale) -> Tensor"
)


class VarlenCall(NamedTuple):
    """What a backend needs to know of a call: its metadata, never its values."""

    dtype: torch.dtype
    device: str
    training: bool
    causal: bool
    scale: float
    context: str  # as in ops/_call.py


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    memory_offsets: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The sentences one at a time, each by `attention`."""
    starts = checks.offset_values("query_offsets", query_offsets, query.shape[0])
    memory = checks.offset_values("memory_offsets", memory_offsets, key.shape[0])

    def rows(tensor: Tensor, offsets: list[int], b: int) -> Tensor:
        return tensor[offsets[b] : offsets[b + 1]].transpose(0, 1).unsqueeze(0)

    found = [
        attention(
            rows(query, starts, b),
            rows(key, memory, b),
            rows(value, memory, b),
            causal=causal,
            scale=scale,
        )[0].transpose(0, 1)
        for b in range(len(starts) - 1)
    ]
    return torch.cat(found) if found else query.new_empty(0, query.shape[1], value.shape[2])


def _reference(call: VarlenCall, *tensors: Tensor) -> Tensor:
    return reference(*tensors, causal=call.causal, scale=call.scale)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))


def _cpu(
    call: VarlenCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    memory_offsets: Tensor,
) -> Tensor:
    found: Tensor = torch.ops.encdec_fast_cpu.varlen_attention.default(
        with_rows(query),
        with_rows(key),
        with_rows(value),
        query_offsets.contiguous(),
        memory_offsets.contiguous(),
        call.causal,
        call.scale,
    )
    return found


def _why_not(call: VarlenCall) -> list[str]:
    return unfit(call) + (["a gradient is needed: it has none"] if call.training else [])


def _triton_run(
    call: VarlenCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    memory_offsets: Tensor,
) -> Tensor:
    """By `attention`: its kernels skip what lies behind a sentence's end, so room costs little."""
    B = query_offsets.numel() - 1
    if query.shape[0] == 0 or B < 1:
        return query.new_zeros((*query.shape[:2], value.shape[2]))
    queries, memory = (offsets.diff() for offsets in (query_offsets, memory_offsets))

    def places(sizes: Tensor) -> tuple[int, Tensor]:
        """(the most rows of a sentence, where each row lies in (B, most))."""
        most = int(sizes.max())
        at = torch.arange(most) < sizes.unsqueeze(1)
        return most, at.flatten().nonzero().squeeze(1).to(query.device)

    def padded(rows: Tensor, most: int, at: Tensor) -> Tensor:
        room = rows.new_zeros(B * most, *rows.shape[1:])
        return room.index_copy_(0, at, rows).view(B, most, *rows.shape[1:]).transpose(1, 2)

    (T, of_queries), (S, of_memory) = places(queries), places(memory)
    output = attention(
        padded(query, T, of_queries),
        padded(key, S, of_memory),
        padded(value, S, of_memory),
        memory_lengths=memory,
        causal=call.causal,
        scale=call.scale,
    )
    found: Tensor = output.transpose(1, 2).flatten(0, 1).index_select(0, of_queries)
    return found


def _why_not_triton(call: VarlenCall) -> list[str]:
    return _triton.unfit(call) + (["a gradient is needed: it has none"] if call.training else [])


BACKENDS = (
    Backend("triton", _triton_run, _why_not_triton),
    Backend("cpu", _cpu, _why_not),
    Backend("reference", _reference, lambda call: []),
)


def _run(*args: Any) -> Tensor:
    tensors, (causal, scale) = args[:5], args[5:]
    query = tensors[0]
    call = VarlenCall(query.dtype, device_type(query), False, causal, scale, "")
    result: Tensor = select(BACKENDS, call).run(call, *tensors)
    return result


_library.impl("varlen_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("encdec_fast::varlen_attention", _fake, lib=_library)


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    memory_offsets: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[VarlenCall, tuple[Tensor, ...]]:
    """The metadata and the tensors of a call of the public function."""
    device = device_type(query)
    if autocasting(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    checks.varlen(query, key, value, query_offsets, memory_offsets)
    given = [key, value]
    context = "compile" if torch.compiler.is_compiling() else context_of(query, given)
    scale = float(max(1, query.shape[-1]) ** -0.5 if scale is None else scale)
    training = needs_gradient([query, *given])
    call = VarlenCall(query.dtype, device, training, causal, scale, context)
    return call, (query, key, value, query_offsets, memory_offsets)


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    call, (query, key, value, offsets, _) = _prepare(*args, **options)
    sizes = f"B={offsets.numel() - 1} H={query.shape[1]} G={key.shape[1]} N={query.shape[0]}"
    sizes += f" M={key.shape[0]} D={query.shape[2]} V={value.shape[2]} {call.dtype} {call.device}"
    sizes += " training" if call.training else " inference"
    return Description("varlen_attention", BACKENDS, call, sizes, lambda backend: "")


@explained_by(describe)
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    memory_offsets: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention without padding; shapes are in this file's docstring.

    Returns the output (N, H, V). RuntimeError for tensors whose sizes, dtypes or devices do not fit
    and for offsets that do not go from 0 to the number of rows without decreasing. A graph of
    torch.compile that needs a gradient cannot hold it: the lengths would be values of a tensor.
    """
    call, tensors = _prepare(
        query, key, value, query_offsets, memory_offsets, causal=causal, scale=scale
    )
    if call.context in GRAPHS and not call.training:
        result: Tensor = torch.ops.encdec_fast.varlen_attention(*tensors, causal, call.scale)
        return result
    found: Tensor = select(BACKENDS, call).run(call, *tensors)
    return found
