"""Do the tensors of an attention op fit each other? If not, what is wrong with them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from encdec_fast.ops._call import State
from encdec_fast.ops._checks import check_device_values


def additive(
    query: State,
    keys: State,
    values: State,
    score_weight: State,
    coverage: State,
    coverage_weight: State,
) -> None:
    """RuntimeError unless the tensors of `additive_attention` fit the query."""
    name = "additive_attention"
    assert query is not None and keys is not None and values is not None
    for what, tensor in (("query", query), ("keys", keys), ("values", values)):
        if tensor.dim() != 3:
            raise RuntimeError(f"{name}: {what} must have 3 dimensions, got {tensor.dim()}")
    batch, _, size = query.shape
    shapes = {
        "keys": (keys, (batch, keys.shape[1], size)),
        "values": (values, (batch, keys.shape[1], values.shape[2])),
        "score_weight": (score_weight, (size,)),
    }
    if (coverage is None) != (coverage_weight is None):
        raise RuntimeError(f"{name}: coverage and coverage_weight are given together or not at all")
    if coverage is not None:
        shapes["coverage"] = (coverage, (batch, keys.shape[1]))
        shapes["coverage_weight"] = (coverage_weight, (size,))
    check_shapes(name, "query", query, shapes)
    if not query.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point tensors, but query is {query.dtype}")
    if size == 0:
        raise RuntimeError(f"{name}: the attention size must not be 0")


def check_shapes(
    name: str, first: str, like: Tensor, shapes: dict[str, tuple[State, tuple[int, ...]]]
) -> None:
    """RuntimeError unless each tensor has its shape, and the dtype and device of `like`."""
    for what, (tensor, shape) in shapes.items():
        assert tensor is not None
        if tensor.shape != shape:
            raise RuntimeError(
                f"{name}: {what} must have shape {tuple(shape)} to fit {first} "
                f"{tuple(like.shape)}, but it is {tuple(tensor.shape)}"
            )
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise RuntimeError(
                f"{name}: {what} must be {like.dtype} on {like.device} as {first} is, "
                f"but it is {tensor.dtype} on {tensor.device}"
            )


def as_memory_lengths(lengths: Tensor | Sequence[int] | None, keys: Tensor) -> State:
    """`lengths` as an int64 tensor (B,) of the keys' batch; RuntimeError if it is none.

    On the CPU, or on the keys' device, where a captured CUDA graph can read them.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        if any(not isinstance(n, (int, Tensor)) for n in lengths):
            raise RuntimeError(f"memory_lengths must be integers, but it is {lengths!r}")
        lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    integer = not (lengths.is_floating_point() or lengths.is_complex())
    elsewhere = lengths.device.type != "cpu" and lengths.device != keys.device
    if not integer or lengths.dtype == torch.bool or elsewhere:
        raise RuntimeError(
            f"memory_lengths must be integers on the CPU or on {keys.device}, but it is "
            f"{lengths.dtype} on {lengths.device}"
        )
    if lengths.shape != (keys.shape[0],):
        raise RuntimeError(
            f"memory_lengths must have shape ({keys.shape[0]},), one for each sentence, "
            f"but it is {tuple(lengths.shape)}"
        )
    return lengths.detach().to(torch.int64).contiguous()


def length_values(lengths: State, most: int) -> None:
    """RuntimeError unless every length is from 0 to `most`; on a GPU only where asked for."""
    read = lengths is not None and check_device_values(lengths)
    values: list[int] = lengths.tolist() if lengths is not None and read else []
    if values and (min(values) < 0 or max(values) > most):
        wrong = min(values) if min(values) < 0 else max(values)
        raise RuntimeError(
            f"memory_lengths must be from 0 to the memory's {most} positions, but found {wrong}"
        )


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: State, bias: State
) -> tuple[State, State]:
    """mask and bias in 4 dimensions; RuntimeError unless the tensors of `attention` fit."""
    name = "attention"
    for what, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise RuntimeError(f"{name}: {what} must have 4 dimensions, got {tensor.dim()}")
    batch, heads, queries, size = query.shape
    own, keys = key.shape[1:3]
    check_shapes(
        name,
        "query",
        query,
        {
            "key": (key, (batch, own, keys, size)),
            "value": (value, (batch, own, keys, value.shape[3])),
        },
    )
    if not query.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point tensors, but query is {query.dtype}")
    if own == 0 or heads % own:
        raise RuntimeError(
            f"{name}: the query's {heads} heads must be a multiple of the key's {own}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise RuntimeError(
            f"{name}: mask must be bool (a float one is given as bias), but it is {mask.dtype}"
        )
    if bias is not None and bias.dtype != query.dtype:
        raise RuntimeError(
            f"{name}: bias must be {query.dtype} as query is, but it is {bias.dtype}"
        )
    whole = (batch, heads, queries, keys)
    found: list[State] = []
    for what, spread in (("mask", mask), ("bias", bias)):
        if spread is None:
            found.append(None)
            continue
        if spread.dim() < 4:
            spread = spread[(None,) * (4 - spread.dim())]
        sizes = zip(spread.shape, whole, strict=False)
        if spread.dim() != 4 or any(n not in (1, wanted) for n, wanted in sizes):
            raise RuntimeError(
                f"{name}: {what} must broadcast to {whole}, but it is {tuple(spread.shape)}"
            )
        if spread.device != query.device:
            raise RuntimeError(f"{name}: {what} must be on {query.device} as query is")
        found.append(spread)
    return found[0], found[1]


def probability(p: float) -> float:
    """A dropout probability; ValueError where it is none, as torch's."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, but it is {p}")
    return p


def varlen(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, memory_offsets: Tensor
) -> None:
    """RuntimeError unless the tensors of `varlen_attention` fit each other."""
    name = "varlen_attention"
    for what, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise RuntimeError(f"{name}: {what} must have 3 dimensions, got {tensor.dim()}")
    heads, size = query.shape[1:]
    shapes: dict[str, tuple[State, tuple[int, ...]]] = {
        "key": (key, (key.shape[0], key.shape[1], size)),
        "value": (value, (*key.shape[:2], value.shape[2])),
    }
    check_shapes(name, "query", query, shapes)
    if not query.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point tensors, but query is {query.dtype}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise RuntimeError(
            f"{name}: the {heads} heads of query must be a multiple of the {key.shape[1]} of key"
        )
    for what, offsets in (("query_offsets", query_offsets), ("memory_offsets", memory_offsets)):
        if not isinstance(offsets, Tensor):
            raise RuntimeError(f"{name}: {what} must be a tensor, but it is {type(offsets)}")
        where = offsets.device.type
        if offsets.dtype != torch.int64 or where != "cpu" or offsets.dim() != 1:
            raise RuntimeError(
                f"{name}: {what} must be a vector of int64 on the CPU, but it is "
                f"{tuple(offsets.shape)} {offsets.dtype} on {where}"
            )
    if query_offsets.shape != memory_offsets.shape or query_offsets.shape[0] == 0:
        raise RuntimeError(
            f"{name}: query_offsets and memory_offsets must have one number more than there are "
            f"sentences, but they have {len(query_offsets)} and {len(memory_offsets)}"
        )


def offset_values(name: str, offsets: Tensor, rows: int) -> list[int]:
    """The offsets as numbers; RuntimeError unless they go from 0 to `rows` without decreasing."""
    values: list[int] = offsets.tolist()
    steps = itertools.pairwise(values)
    if values[0] != 0 or values[-1] != rows or any(a > b for a, b in steps):
        raise RuntimeError(f"{name} must go from 0 to {rows} without decreasing, got {values}")
    return values


def decoder(tensors: Sequence[State], gates: int) -> None:
    """RuntimeError unless the tensors of `attention_decoder` fit the input, h0 and the memory."""
    name = "attention_decoder"
    input, h0, c0, context0, keys, values, weight_ih, weight_hh, *others = tensors
    bias_ih, bias_hh, query_weight, score_weight, positions, output_weight, *covered = others
    coverage, coverage_weight = covered
    assert input is not None and h0 is not None and context0 is not None and values is not None
    if (keys is None) == (positions is None):
        raise RuntimeError(f"{name}: either keys or positions must be given, and not both")
    scored = keys if positions is None else positions
    assert scored is not None
    ranks = {"input": (input, 3), "h0": (h0, 2), "context0": (context0, 2), "values": (values, 3)}
    for what, (tensor, rank) in {
        **ranks,
        "positions" if keys is None else "keys": (scored, 3),
    }.items():
        if tensor.dim() != rank:
            raise RuntimeError(f"{name}: {what} must have {rank} dimensions, got {tensor.dim()}")
    batch, steps, size = input.shape
    hidden, count, width = h0.shape[1], *values.shape[1:]
    attended, rows = scored.shape[2], gates * hidden
    fed = width if output_weight is None else context0.shape[1]
    if (c0 is None) != (gates == 3):
        raise RuntimeError(f"{name}: c0 is for an LSTM, and only for an LSTM")
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError(f"{name}: bias_ih and bias_hh are given together or not at all")
    if positions is not None and (query_weight is None or score_weight is not None):
        raise RuntimeError(f"{name}: positions go with query_weight and without score_weight")
    if (coverage is None) != (coverage_weight is None):
        raise RuntimeError(f"{name}: coverage and coverage_weight are given together or not at all")
    if coverage is not None and score_weight is None:
        raise RuntimeError(f"{name}: coverage is for additive scores, which have a score_weight")
    if positions is not None and output_weight is not None:
        raise RuntimeError(f"{name}: output_weight is for attention by keys, not by positions")
    if positions is not None and count > attended:
        raise RuntimeError(
            f"{name}: values must have at most the {attended} positions that there are scores for, "
            f"but they have {count}"
        )
    wanted: dict[str, tuple[State, tuple[int, ...]]] = {
        "h0": (h0, (batch, hidden)),
        "c0": (c0, (batch, hidden)),
        "context0": (context0, (batch, fed)),
        "keys": (keys, (batch, count, attended)),
        "values": (values, (batch, count, width)),
        "weight_ih": (weight_ih, (rows, size + fed)),
        "weight_hh": (weight_hh, (rows, hidden)),
        "bias_ih": (bias_ih, (rows,)),
        "bias_hh": (bias_hh, (rows,)),
        "query_weight": (query_weight, (attended, hidden)),
        "score_weight": (score_weight, (attended,)),
        "positions": (positions, (batch, steps, attended)),
        "output_weight": (output_weight, (fed, width + hidden)),
        "coverage": (coverage, (batch, count)),
        "coverage_weight": (coverage_weight, (attended,)),
    }
    shapes = {what: own for what, own in wanted.items() if own[0] is not None}
    check_shapes(name, "input", input, shapes)
    if query_weight is None and attended != hidden:
        raise RuntimeError(
            f"{name}: without query_weight the keys must have the {hidden} numbers of h, "
            f"but they have {attended}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point tensors, but input is {input.dtype}")
    if hidden == 0 or width == 0 or attended == 0 or fed == 0:
        raise RuntimeError(f"{name}: the sizes of h0, context0, keys and values must not be 0")
