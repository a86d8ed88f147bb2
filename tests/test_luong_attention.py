"""Multiplicative attention: the function on every backend, and the module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_as_good, poison, two_threads
from torch import Tensor

from encdec_fast import explain, use_backend
from encdec_fast.nn import LuongAttention
from encdec_fast.ops import multiplicative_attention
from encdec_fast.ops.multiplicative_attention import SCORES, project_memory, reference

# B, Tq, S, Q, M, A; for dot M is Q
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 1),
    "odd": (3, 5, 7, 19, 11, 13),
    "one query": (4, 1, 50, 40, 33, 20),
    "many queries": (2, 40, 9, 33, 40, 16),
    "long memory": (2, 3, 300, 24, 30, 17),
    "large": (5, 13, 40, 128, 96, 64),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ALL_SCORES = pytest.mark.parametrize("score", SCORES)
# The error of tanh that csrc/attention/additive_factors.h states, in a score of 3 / sqrt(A) terms.
BOUND = {"dot": 0.0, "general": 0.0, "concat": 3e-6}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native")
    name: str = request.param
    return name


def make(
    shape: tuple[int, ...], score: str, dtype: torch.dtype = torch.float32, grad: bool = False
) -> dict[str, Tensor]:
    """The function's tensors."""
    B, Tq, S, Q, M, A = shape
    M = Q if score == "dot" else M
    tensors = {"query": torch.randn(B, Tq, Q), "memory": torch.randn(B, S, M) / M**0.5}
    if score == "general":
        tensors["weight"] = torch.randn(Q, M) / Q**0.5
    elif score == "concat":
        tensors["weight"] = torch.randn(A, Q + M) / (Q + M) ** 0.5
        tensors["score_weight"] = torch.randn(A) * 3 / A**0.5
    return {name: t.to(dtype).requires_grad_(grad) for name, t in tensors.items()}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }


def lengths_of(shape: tuple[int, ...]) -> Tensor:
    """From 0 to S, with both extremes where there is room."""
    lengths = torch.randint(0, shape[2] + 1, (shape[0],))
    lengths[0], lengths[-1] = 0, shape[2]
    return lengths


@ALL_SHAPES
@ALL_SCORES
@ALL_DTYPES
@pytest.mark.parametrize("ragged", [False, True])
def test_forward(
    shape: tuple[int, ...], score: str, dtype: torch.dtype, ragged: bool, backend: str
) -> None:
    given = make(shape, score, dtype)
    lengths = lengths_of(shape) if ragged else None
    options: dict[str, Any] = {"score": score, "memory_lengths": lengths}
    truth = reference(**cast(given, torch.float64), **options)
    theirs = reference(**given, **options)
    with use_backend(backend), two_threads():
        poison()
        found = multiplicative_attention(**given, **options, need_weights=True)
        alone = multiplicative_attention(**given, **options)
        keys = project_memory(given["memory"], given.get("weight"), score=score)
        shared = multiplicative_attention(**given, **options, keys=keys, need_weights=True)
    relative = BOUND[score]
    assert_as_good(list(found), list(theirs), list(truth), 2.0, relative=relative)
    torch.testing.assert_close(alone, found[0])
    # With keys the memory is projected and not the query: each score is rounded elsewhere.
    relative += 2 * float(torch.finfo(dtype).eps) if score == "general" else 0
    assert_as_good(list(shared), list(theirs), list(truth), 2.0, relative=relative)


@ALL_SCORES
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(score: str, shared: bool) -> None:
    given = make(SHAPES["odd"], score, grad=True)
    lengths = torch.tensor([0, 7, 4])

    def run(function: Any, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
        results = function(**tensors, **options, score=score, memory_lengths=lengths)
        total = sum((r * s.to(r.dtype)).sum() for r, s in zip(results, seeds, strict=True))
        return list(torch.autograd.grad(total, list(tensors.values())))

    seeds = [torch.randn(3, 5, given["memory"].shape[2]), torch.randn(3, 5, 7)]
    truth = run(reference, cast(given, torch.float64))
    theirs = run(reference, cast(given, torch.float32))
    keys = project_memory(given["memory"], given.get("weight"), score=score) if shared else None
    found = run(multiplicative_attention, given, need_weights=True, keys=keys)
    assert_as_good(found, theirs, truth, 3.0, relative=BOUND[score])


@ALL_SCORES
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradcheck(score: str, need_weights: bool) -> None:
    given = make((2, 2, 3, 3, 2, 2), score, torch.float64, grad=True)
    names, lengths = list(given), torch.tensor([3, 2])

    def function(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors, strict=True))
        return multiplicative_attention(
            **named, score=score, memory_lengths=lengths, need_weights=need_weights
        )

    assert torch.autograd.gradcheck(function, tuple(given.values()))
    assert torch.autograd.gradgradcheck(function, tuple(given.values()))


@ALL_SCORES
def test_double_backward(score: str, backend: str) -> None:
    given = make((2, 3, 4, 5, 5, 6), score, grad=True)

    def second(function: Any) -> list[Tensor]:
        context, weights = function(**given, score=score)
        first = torch.autograd.grad(
            context.square().sum() + weights.square().sum(),
            list(given.values()),
            create_graph=True,
        )
        total = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(total, list(given.values())))

    with use_backend(backend):
        found = second(lambda **options: multiplicative_attention(**options, need_weights=True))
    torch.testing.assert_close(found, second(reference), rtol=1e-3, atol=1e-4)


@ALL_SCORES
def test_nan_and_padding(score: str, backend: str) -> None:
    """NaN of a query stays in its row; NaN past a sentence's end reaches nothing."""
    given = make((3, 4, 8, 6, 6, 5), score)
    lengths = torch.tensor([3, 0, 8])
    with use_backend(backend):
        clean = multiplicative_attention(**given, score=score, memory_lengths=lengths)
        padding = (torch.arange(8) >= lengths.unsqueeze(1)).unsqueeze(2)
        poisoned = {**given, "memory": given["memory"].masked_fill(padding, torch.nan)}
        found = multiplicative_attention(**poisoned, score=score, memory_lengths=lengths)
        assert torch.equal(found, clean)
        assert not found[1].any()
        query = given["query"].clone()
        query[2, 1, 3] = torch.nan
        spoiled = multiplicative_attention(
            **{**given, "query": query}, score=score, memory_lengths=lengths
        )
    assert spoiled[2, 1].isnan().all()
    others = torch.ones(3, 4, dtype=torch.bool)
    others[2, 1] = False
    # Additive attention does the queries beside a NaN in another way, rounded elsewhere.
    torch.testing.assert_close(spoiled[others], clean[others], rtol=1e-5, atol=1e-6)


@ALL_SCORES
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 4, 5), (2, 0, 3, 4, 4, 5), (2, 2, 0, 4, 4, 5)])
def test_nothing_there(score: str, shape: tuple[int, ...], backend: str) -> None:
    given = make(shape, score)
    with use_backend(backend):
        context, weights = multiplicative_attention(**given, score=score, need_weights=True)
    assert context.shape == (shape[0], shape[1], shape[4])
    assert weights.shape == shape[:3]
    assert not context.any()


BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "score": ("dot", {"score": "bilinear"}, ValueError, "'dot', 'general' or 'concat'"),
    "rank": ("dot", {"query": torch.randn(2, 5)}, RuntimeError, "query must have 3"),
    "memory rank": ("dot", {"memory": torch.randn(4, 5)}, RuntimeError, "memory must have 3"),
    "sizes": ("dot", {"memory": torch.randn(2, 4, 6)}, RuntimeError, "memory must have shape"),
    "batch": ("general", {"memory": torch.randn(3, 4, 6)}, RuntimeError, "memory must have"),
    "weight": ("general", {"weight": torch.randn(6, 5)}, RuntimeError, r"shape \(5, 6\)"),
    "vector": ("concat", {"weight": torch.randn(11)}, RuntimeError, "weight must have shape"),
    "concat weight": ("concat", {"weight": torch.randn(7, 10)}, RuntimeError, r"\(7, 11\)"),
    "v": ("concat", {"score_weight": torch.randn(6)}, RuntimeError, "score_weight must have"),
    "no weight": ("general", {"weight": None}, RuntimeError, "'general' needs weight"),
    "no v": ("concat", {"score_weight": None}, RuntimeError, "'concat' needs score_weight"),
    "a weight": ("dot", {"weight": torch.randn(5, 5)}, RuntimeError, "'dot' has no weight"),
    "a v": ("general", {"score_weight": torch.randn(5)}, RuntimeError, "has no score_weight"),
    "keys": ("general", {"keys": torch.randn(2, 4, 6)}, RuntimeError, "keys must have shape"),
    "concat keys": ("concat", {"keys": torch.randn(2, 3, 7)}, RuntimeError, "keys must have"),
    "dtype": ("dot", {"memory": torch.randn(2, 4, 5).double()}, RuntimeError, "torch.float32"),
    "device": ("dot", {"memory": torch.randn(2, 4, 5, device="meta")}, RuntimeError, "on cpu"),
    "integers": ("dot", {"query": torch.ones(2, 3, 5).long()}, RuntimeError, "floating-point"),
    "long length": ("dot", {"memory_lengths": [4, 5]}, RuntimeError, "found 5"),
    "negative length": ("concat", {"memory_lengths": [-1, 4]}, RuntimeError, "found -1"),
    "few lengths": ("general", {"memory_lengths": [4]}, RuntimeError, "memory_lengths must"),
}


@pytest.mark.parametrize(("score", "changed", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_input(score: str, changed: dict[str, Any], kind: type[Exception], text: str) -> None:
    given = {**make((2, 3, 4, 5, 6, 7), score), "score": score}
    with pytest.raises(kind, match=text):
        multiplicative_attention(**{**given, **changed})


def test_project_memory_refuses() -> None:
    memory = torch.randn(2, 4, 5)
    assert project_memory(memory) is memory
    with pytest.raises(RuntimeError, match="needs weight"):
        project_memory(memory, score="general")
    with pytest.raises(RuntimeError, match="has no weight"):
        project_memory(memory, torch.randn(5, 5))
    with pytest.raises(ValueError, match="score must be"):
        project_memory(memory, score="cosine")


@ALL_SCORES
def test_autocast(score: str) -> None:
    given = make((2, 3, 4, 5, 6, 7), score)
    with torch.autocast("cpu", torch.bfloat16):
        found = multiplicative_attention(**given, score=score)
    assert found.dtype == torch.bfloat16
    expected = multiplicative_attention(**given, score=score)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_vmap() -> None:
    given = make((2, 3, 4, 5, 5, 7), "dot")
    many = torch.randn(4, *given["query"].shape)
    found = torch.func.vmap(lambda query: multiplicative_attention(query, given["memory"]))(many)
    for one, query in zip(found, many, strict=True):
        torch.testing.assert_close(one, multiplicative_attention(query, given["memory"]))


def plain(module: LuongAttention, query: Tensor, memory: Tensor, lengths: list[int]) -> Any:
    """The network of the module's docstring, a sentence at a time."""
    results, weights = [], []
    for q, whole, n in zip(query, memory, lengths, strict=True):
        own = whole[:n]
        if module.score == "dot":
            scores = q @ own.t()
        elif module.score == "general":
            scores = q @ module.memory_proj(own).t()
        else:
            hidden = module.query_proj(q).unsqueeze(1) + module.memory_proj(own).unsqueeze(0)
            scores = module.score_proj(torch.tanh(hidden)).squeeze(-1)
        weight = torch.softmax(scores, dim=-1)
        result = weight @ own
        if module.output_size is not None:
            result = torch.tanh(module.output_proj(torch.cat([result, q], -1)))
        results.append(result)
        weights.append(torch.nn.functional.pad(weight, (0, whole.shape[0] - n)))
    return torch.stack(results), torch.stack(weights)


STATE: dict[str, list[str]] = {
    "dot": [],
    "general": ["memory_proj.weight"],
    "concat": ["query_proj.weight", "memory_proj.weight", "score_proj.weight"],
}


@ALL_SCORES
@pytest.mark.parametrize("output_size", [None, 9])
@pytest.mark.parametrize("shared", [False, True])
def test_module(score: str, output_size: int | None, shared: bool) -> None:
    memory_size = 6 if score == "dot" else 8
    size = 7 if score == "concat" else None
    module = LuongAttention(6, memory_size, score, size, output_size=output_size)
    truth = copy.deepcopy(module).double()
    query, memory, lengths = torch.randn(3, 4, 6), torch.randn(3, 8, memory_size), [8, 3, 1]
    keys = module.project_memory(memory) if shared else None
    found = module(query, memory, lengths, need_weights=True, keys=keys)
    alone = module(query, memory, lengths, keys=keys)
    theirs = plain(module, query, memory, lengths)
    expected = plain(truth, query.double(), memory.double(), lengths)
    assert_as_good(list(found), list(theirs), list(expected), 2.0, relative=1e-6)
    torch.testing.assert_close(alone, found[0])
    assert found[0].shape == (3, 4, output_size or memory_size)
    names = STATE[score] + (["output_proj.weight"] if output_size else [])
    assert list(module.state_dict()) == names
    if names:
        assert_as_good(
            list(torch.autograd.grad(found[0].square().sum(), list(module.parameters()))),
            list(torch.autograd.grad(theirs[0].square().sum(), list(module.parameters()))),
            list(torch.autograd.grad(expected[0].square().sum(), list(truth.parameters()))),
            3.0,
            relative=1e-6,
        )


def test_module_refuses() -> None:
    with pytest.raises(ValueError, match="to be equal"):
        LuongAttention(5, 6, "dot")
    with pytest.raises(ValueError, match="score must be"):
        LuongAttention(5, 6, "additive")
    with pytest.raises(ValueError, match="attention_size is for"):
        LuongAttention(5, 6, "general", 7)


@ALL_SCORES
def test_decode_steps_share_the_keys(score: str) -> None:
    module = LuongAttention(6, 6, score, output_size=5)
    query, memory, lengths = torch.randn(3, 4, 6), torch.randn(3, 8, 6), torch.tensor([8, 0, 5])
    with torch.no_grad():
        together = module(query, memory, lengths)
        keys = module.project_memory(memory)
        for t in range(4):
            step = module(query[:, t : t + 1], memory, lengths, keys=keys)
            torch.testing.assert_close(step[:, 0], together[:, t])


@ALL_SCORES
@pytest.mark.parametrize("grad", [False, True])
def test_compile(score: str, grad: bool) -> None:
    module = LuongAttention(6, 6, score, output_size=5)
    query, memory, lengths = torch.randn(3, 2, 6), torch.randn(3, 4, 6), torch.tensor([4, 0, 3])
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found = compiled(query, memory, lengths, need_weights=True)
        expected = module(query, memory, lengths, need_weights=True)
    torch.testing.assert_close(found, expected)
    if grad:
        parameters = list(module.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(found[0].square().sum(), parameters),
            torch.autograd.grad(expected[0].square().sum(), parameters),
        )


@ALL_SCORES
def test_export_with_dynamic_sizes(score: str) -> None:
    dim = torch.export.Dim
    batch, queries, size = dim("batch", min=2), dim("queries", min=2), dim("size", min=2)
    example = (torch.randn(3, 2, 6), torch.randn(3, 4, 6), torch.tensor([4, 1, 3]))
    dynamic = ({0: batch, 1: queries}, {0: batch, 1: size}, {0: batch})
    with torch.no_grad():
        module = LuongAttention(6, 6, score)
        exported = torch.export.export(module, example, dynamic_shapes=dynamic).module()
        other = (torch.randn(5, 7, 6), torch.randn(5, 9, 6), torch.tensor([9, 0, 3, 1, 2]))
        torch.testing.assert_close(exported(*other), module(*other))


@ALL_SCORES
def test_explain(score: str, native: None) -> None:
    module = LuongAttention(6, 6, score)
    query, memory = torch.randn(3, 2, 6), torch.randn(3, 4, 6)
    with torch.no_grad():
        found = explain(module, query, memory)
        assert found.backend == "cpu"
        given = make((3, 2, 4, 6, 6, 5), score)
        direct = explain(multiplicative_attention, **given, score=score)
    by = "additive_attention" if score == "concat" else "multiplicative_attention, by attention"
    assert found.op == by
    assert direct.op.startswith("multiplicative_attention, by a")
    double = {name: t.double() for name, t in given.items()}
    assert explain(multiplicative_attention, **double, score=score).backend != "cpu"


@ALL_SCORES
def test_copies(score: str) -> None:
    module = LuongAttention(6, 6, score, output_size=5)
    query, memory = torch.randn(3, 2, 6), torch.randn(3, 4, 6)
    with torch.no_grad():
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(query, memory), module(query, memory))
    assert score in repr(module)
