"""Multiplicative attention: which parts of a memory a query looks at, scored by a product.

For query t and position s of a sentence's memory m:

    e_ts = q_t . m_s                     score="dot"        Q = M
    e_ts = q_t' W m_s                    score="general"
    e_ts = v' tanh(W [q_t; m_s])         score="concat"
    w_ts = softmax over s of e_ts        over the sentence's own positions
    context_t = sum over s of w_ts m_s

    query           (B, Tq, Q)
    memory          (B, S, M)
    weight          (Q, M) for general, (A, Q + M) for concat       W
    score_weight    (A), for concat only                            v
    keys            what `project_memory` made of this memory, once for all decode steps:
                    (B, S, Q) for general, (B, S, A) for concat, the memory itself for dot
    memory_lengths  int64 (B), each from 0 to S, on the CPU or the memory's device; absent: S
    context         (B, Tq, M)
    weights         (B, Tq, S)           zero past a sentence's end

A sentence of length zero has zeros for weights and context; memory past a sentence's end is not
read. All floating tensors have one dtype and device. At a decode step the beams of a sentence are
its queries: memory and keys are there once.

No kernel of its own: dot and general are `attention` with one head and scale 1, concat is
`additive_attention`, and theirs are the backends and the gradients. The projections are torch's
products; without keys, general projects the query.

Luong, Pham and Manning, Effective Approaches to Attention-based Neural Machine Translation, 2015
(arXiv:1508.04025): global attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.backends import Description, explained_by
from encdec_fast.ops._attention_checks import check_shapes
from encdec_fast.ops._call import State, autocasting, device_type
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.additive_attention import describe as describe_additive
from encdec_fast.ops.attention import attention
from encdec_fast.ops.attention import describe as describe_attention

SCORES = ("dot", "general", "concat")
_NAME = "multiplicative_attention"


def reference(
    query: Tensor,
    memory: Tensor,
    weight: State = None,
    score_weight: State = None,
    *,
    score: str = "dot",
    memory_lengths: State = None,
) -> tuple[Tensor, Tensor]:
    """(context, weights) in plain PyTorch, by the formulas above: what the result is held to."""
    if score == "concat":
        assert weight is not None and score_weight is not None
        sizes = (query.shape[1], memory.shape[1])
        pairs = torch.cat(
            [
                query.unsqueeze(2).expand(-1, -1, sizes[1], -1),
                memory.unsqueeze(1).expand(-1, sizes[0], -1, -1),
            ],
            -1,
        )
        scores = torch.tanh(pairs @ weight.t()) @ score_weight
    else:
        projected = query if weight is None else query @ weight
        scores = projected @ memory.transpose(1, 2)
    if memory_lengths is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        positions = torch.arange(memory.shape[1], device=memory.device)
        real = positions < memory_lengths.to(memory.device)[:, None, None]
        scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(~real, 0)
        memory = memory.masked_fill(~real.transpose(1, 2), 0)
    return weights @ memory, weights


def check_score(name: str, score: str) -> None:
    """ValueError for a score that there is not."""
    if score not in SCORES:
        raise ValueError(f"{name}: score must be 'dot', 'general' or 'concat', but it is {score!r}")


def _check_weights(score: str, weight: State, score_weight: State) -> None:
    """RuntimeError unless exactly the weights of this score are there."""
    wanted = {"weight": score != "dot", "score_weight": score == "concat"}
    for what, tensor in (("weight", weight), ("score_weight", score_weight)):
        if (tensor is not None) != wanted[what]:
            verb = "needs" if wanted[what] else "has no"
            raise RuntimeError(f"{_NAME}: score={score!r} {verb} {what}")


def _check(
    query: Tensor, memory: Tensor, weight: State, score_weight: State, score: str, keys: State
) -> None:
    """RuntimeError unless the tensors fit the query."""
    for what, tensor in (("query", query), ("memory", memory)):
        if tensor.dim() != 3:
            raise RuntimeError(f"{_NAME}: {what} must have 3 dimensions, got {tensor.dim()}")
    if not query.is_floating_point():
        raise RuntimeError(f"{_NAME}: expected floating-point tensors, but query is {query.dtype}")
    _check_weights(score, weight, score_weight)
    batch, _, size = query.shape
    positions, features = memory.shape[1:]
    shapes: dict[str, tuple[State, tuple[int, ...]]] = {
        "memory": (memory, (batch, positions, size if score == "dot" else features))
    }
    projected = size
    if weight is not None:
        rows = size if score == "general" else weight.shape[0] if weight.dim() else 0
        columns = features if score == "general" else size + features
        shapes["weight"] = (weight, (rows, columns))
        projected = rows
    if score_weight is not None:
        shapes["score_weight"] = (score_weight, (projected,))
    if keys is not None:
        shapes["keys"] = (keys, (batch, positions, projected))
    check_shapes(_NAME, "query", query, shapes)


def _projected(memory: Tensor, weight: State, score: str) -> Tensor:
    if weight is None:
        return memory
    return F.linear(memory, weight if score == "general" else weight[:, -memory.shape[-1] :])


def project_memory(memory: Tensor, weight: Tensor | None = None, *, score: str = "dot") -> Tensor:
    """The keys of a memory (B, S, M): once per sentence, for all decode steps.

    weight: as in `multiplicative_attention`. ValueError for an unknown score; RuntimeError for a
    weight that does not fit.
    """
    check_score("project_memory", score)
    if (weight is not None) != (score != "dot"):
        verb = "has no" if score == "dot" else "needs"
        raise RuntimeError(f"project_memory: score={score!r} {verb} weight")
    return _projected(memory, weight, score)


# A call in the terms of the op that runs it: its functions, tensors and options.
_Prepared = tuple[Callable[..., Any], Callable[..., Description], list[Tensor], dict[str, Any]]


def _prepare(
    query: Tensor,
    memory: Tensor,
    weight: State = None,
    score_weight: State = None,
    *,
    score: str = "dot",
    memory_lengths: Tensor | Sequence[int] | None = None,
    need_weights: bool = False,
    keys: State = None,
) -> _Prepared:
    check_score(_NAME, score)
    own: list[Any] = [query, memory, weight, score_weight, keys]
    if autocasting(device_type(query)):
        dtype = torch.get_autocast_dtype(device_type(query))
        own = [None if tensor is None else tensor.to(dtype) for tensor in own]
    query, memory, weight, score_weight, keys = own
    _check(query, memory, weight, score_weight, score, keys)
    options: dict[str, Any] = {"memory_lengths": memory_lengths, "need_weights": need_weights}
    if score == "concat":
        assert weight is not None and score_weight is not None
        queries = F.linear(query, weight[:, : query.shape[2]])
        keys = _projected(memory, weight, score) if keys is None else keys
        return (
            additive_attention,
            describe_additive,
            [queries, keys, memory, score_weight],
            options,
        )
    if keys is None:
        query = query if weight is None else query @ weight
        keys = memory
    heads = [tensor.unsqueeze(1) for tensor in (query, keys, memory)]
    return attention, describe_attention, heads, {**options, "scale": 1.0}


def describe(*args: Any, **options: Any) -> Description:
    """What `explain` asks of the public function; the arguments are the function's own."""
    _, describe_op, tensors, rest = _prepare(*args, **options)
    found = describe_op(*tensors, **rest)
    return found._replace(op=f"{_NAME}, by {found.op}")


@explained_by(describe)
def multiplicative_attention(
    query: Tensor,
    memory: Tensor,
    weight: Tensor | None = None,
    score_weight: Tensor | None = None,
    *,
    score: str = "dot",
    memory_lengths: Tensor | Sequence[int] | None = None,
    need_weights: bool = False,
    keys: Tensor | None = None,
) -> Any:
    """Multiplicative attention over a memory; shapes and scores are in this file's docstring.

    Returns the context (B, Tq, M), and with need_weights (context, weights). ValueError for an
    unknown score; RuntimeError for tensors that a score lacks or does not have, for sizes, dtypes
    or devices that do not fit, and for lengths below 0 or above S.
    """
    run, _, tensors, rest = _prepare(
        query,
        memory,
        weight,
        score_weight,
        score=score,
        memory_lengths=memory_lengths,
        need_weights=need_weights,
        keys=keys,
    )
    found = run(*tensors, **rest)
    if score == "concat":
        return found
    return tuple(t.squeeze(1) for t in found) if need_weights else found.squeeze(1)
