"""Additive attention: the op on every backend, and the module."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import hypothesis
import pytest
import torch
from helpers import assert_as_good, poison, two_threads
from hypothesis import strategies
from torch import Tensor, nn
from torch.library import opcheck

import encdec_fast
from encdec_fast import explain, use_backend
from encdec_fast.ops import additive_attention
from encdec_fast.ops.additive_attention import reference

# B, Tq, S, A, D
SHAPES = {
    "one of each": (1, 1, 1, 1, 1),
    "odd": (3, 5, 7, 19, 11),
    "one query": (4, 1, 50, 40, 33),
    "one query of whole vectors": (3, 1, 37, 64, 32),
    "two queries": (2, 2, 17, 16, 16),
    "three queries": (2, 3, 16, 48, 32),
    "many queries": (1, 70, 9, 33, 40),
    "long memory": (2, 6, 300, 24, 130),
    "large": (5, 13, 40, 128, 96),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["cpu", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "reference":
        request.getfixturevalue({"cpu": "native", "triton": "interpreter"}[request.param])
    name: str = request.param
    return name


def small_enough(backend: str, shape: tuple[int, ...]) -> None:
    """Triton's interpreter takes a second for what a kernel does in a microsecond."""
    if backend == "triton" and shape in (SHAPES["large"], SHAPES["long memory"]):
        pytest.skip("too large for Triton's interpreter")


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    coverage: bool = False,
    scale: float = 1.0,
    grad: bool = False,
) -> dict[str, Tensor]:
    """The op's floating arguments."""
    B, Tq, S, A, D = shape
    tensors = {
        "query": scale * torch.randn(B, Tq, A),
        "keys": scale * torch.randn(B, S, A),
        "values": torch.randn(B, S, D),
        "score_weight": torch.randn(A) * 3 / A**0.5,
    }
    if coverage:
        tensors |= {"coverage": torch.rand(B, S), "coverage_weight": torch.randn(A)}
    return {name: t.to(dtype).requires_grad_(grad) for name, t in tensors.items()}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }


def bound(given: dict[str, Tensor]) -> float:
    """What the error of tanh that csrc/attention/additive_factors.h states makes of the weights.

    A tanh is off by at most 5e-7 (torch's by less, near zero), and the errors of the terms of a
    score, which are roundings, add up like their squares.
    """
    return 5e-7 * float(given["score_weight"].detach().double().norm())


def lengths_of(shape: tuple[int, ...]) -> Tensor:
    """From 0 to S, with both extremes where there is room."""
    lengths = torch.randint(0, shape[2] + 1, (shape[0],))
    lengths[0], lengths[-1] = 0, shape[2]
    return lengths


@ALL_SHAPES
@ALL_DTYPES
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("coverage", [False, True])
def test_forward(
    shape: tuple[int, ...], dtype: torch.dtype, ragged: bool, coverage: bool, backend: str
) -> None:
    small_enough(backend, shape)
    given = make(shape, dtype, coverage=coverage)
    lengths = lengths_of(shape) if ragged else None
    with torch.no_grad(), two_threads():
        truth = reference(**cast(given, torch.float64), memory_lengths=lengths)
        theirs = reference(**given, memory_lengths=lengths)
        with use_backend(backend):
            poison()
            context, weights = additive_attention(
                **given, memory_lengths=lengths, need_weights=True
            )
            alone = additive_attention(**given, memory_lengths=lengths)
    assert_as_good([context, weights], list(theirs), list(truth), 2.0, relative=bound(given))
    assert torch.equal(alone, context)
    if lengths is not None:
        for row, n in enumerate(lengths.tolist()):
            assert not weights[row, :, n:].any()


def gradients(function: Any, given: dict[str, Tensor], seeds: list[Tensor]) -> list[Tensor]:
    """Of the sum of seed * result, with respect to every tensor."""
    total = sum((r * s.to(r.dtype)).sum() for r, s in zip(function(given), seeds, strict=True))
    return list(torch.autograd.grad(total, list(given.values())))


@ALL_SHAPES
@ALL_DTYPES
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("coverage", [False, True])
def test_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, ragged: bool, coverage: bool, backend: str
) -> None:
    small_enough(backend, shape)
    given = make(shape, dtype, coverage=coverage, grad=True)
    lengths = lengths_of(shape) if ragged else None

    def plain(tensors: dict[str, Tensor]) -> Any:
        return reference(**tensors, memory_lengths=lengths)

    def ours(tensors: dict[str, Tensor]) -> Any:
        return additive_attention(**tensors, memory_lengths=lengths, need_weights=True)

    seeds = [torch.randn(r.shape) for r in plain(given)]
    truth = gradients(plain, cast(given, torch.float64), seeds)
    theirs = gradients(plain, cast(given, dtype), seeds)
    with use_backend(backend), two_threads():
        poison()
        found = gradients(ours, given, seeds)
    assert_as_good(found, theirs, truth, 3.0, relative=bound(given))


@pytest.mark.parametrize("scale", [8.0, 30.0, 1e3, 1e30])
def test_numbers_that_saturate(scale: float, native: None) -> None:
    """Queries and keys beyond the range of the exponentials, both ways."""
    shape = (2, 5, 40, 33, 20)
    given = make(shape, scale=scale, grad=True)
    lengths = torch.tensor([40, 23])
    with use_backend("cpu"):
        results = additive_attention(**given, memory_lengths=lengths, need_weights=True)
    truth = reference(**cast(given, torch.float64), memory_lengths=lengths)
    theirs = reference(**given, memory_lengths=lengths)
    assert_as_good(list(results), list(theirs), list(truth), 2.0, relative=bound(given))
    seeds = [torch.randn(r.shape) for r in truth]

    def plain(tensors: dict[str, Tensor]) -> Any:
        return reference(**tensors, memory_lengths=lengths)

    def ours(tensors: dict[str, Tensor]) -> Any:
        return additive_attention(**tensors, memory_lengths=lengths, need_weights=True)

    assert_as_good(
        gradients(ours, given, seeds),
        gradients(plain, cast(given, torch.float32), seeds),
        gradients(plain, cast(given, torch.float64), seeds),
        3.0,
        relative=bound(given),
    )


def test_huge_scores(native: None) -> None:
    given = make((2, 3, 20, 16, 8))
    given["score_weight"] = given["score_weight"] * 1e4
    results = additive_attention(**given, need_weights=True)
    truth = reference(**cast(given, torch.float64))
    theirs = reference(**given)
    assert_as_good(list(results), list(theirs), list(truth), 2.0, relative=bound(given))


def test_nan_stays_in_its_row(backend: str) -> None:
    given = make((3, 6, 9, 20, 8))
    with use_backend(backend):
        clean = additive_attention(**given)
        for name, bad in (("query", torch.nan), ("query", torch.inf), ("keys", torch.nan)):
            spoiled = {**given, name: given[name].clone()}
            spoiled[name][1, 2, 3] = bad
            context = additive_attention(**spoiled)
            expected = reference(**spoiled)[0]
            assert torch.equal(context.isnan(), expected.isnan()), (name, bad)
            for row in (0, 2):
                assert torch.equal(context[row], clean[row])


def test_padding_is_not_read(backend: str) -> None:
    """NaN past a sentence's end reaches no result and no gradient."""
    lengths = torch.tensor([3, 0, 8])
    clean = make((3, 4, 8, 20, 6))
    padding = (torch.arange(8) >= lengths.unsqueeze(1)).unsqueeze(2)
    found = []
    for fill in (0.0, torch.nan):
        given = {name: t.clone() for name, t in clean.items()}
        for name in ("keys", "values"):
            given[name] = given[name].masked_fill(padding, fill)
        given = {name: t.requires_grad_() for name, t in given.items()}
        with use_backend(backend):
            results = additive_attention(**given, memory_lengths=lengths, need_weights=True)
        found.append(
            [*results, *torch.autograd.grad(sum(r.sum() for r in results), given.values())]
        )
    for with_zeros, with_nan in zip(*found, strict=True):
        assert not with_nan.isnan().any()
        assert torch.equal(with_zeros, with_nan)


@hypothesis.given(
    B=strategies.integers(1, 5),
    Tq=strategies.integers(1, 9),
    S=strategies.integers(1, 40),
    A=strategies.integers(1, 40),
    seed=strategies.integers(0, 2**31),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_sentences_one_at_a_time(B: int, Tq: int, S: int, A: int, seed: int) -> None:
    torch.manual_seed(seed)
    given = make((B, Tq, S, A, 5), grad=True)
    lengths = torch.randint(0, S + 1, (B,))
    context, weights = additive_attention(**given, memory_lengths=lengths, need_weights=True)
    for row, n in enumerate(lengths.tolist()):
        alone, own = additive_attention(
            given["query"][row : row + 1],
            given["keys"][row : row + 1, :n],
            given["values"][row : row + 1, :n],
            given["score_weight"],
            need_weights=True,
        )
        torch.testing.assert_close(context[row], alone[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[row, :, :n], own[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5)], ids=str)
def test_nothing_there(shape: tuple[int, ...], backend: str) -> None:
    given = make(shape, grad=True)
    with use_backend(backend):
        context, weights = additive_attention(**given, need_weights=True)
    B, Tq, S, _, D = shape
    assert context.shape == (B, Tq, D)
    assert weights.shape == (B, Tq, S)
    assert not context.any()
    grads = torch.autograd.grad(context.sum() + weights.sum(), list(given.values()))
    assert not any(grad.any() for grad in grads)


def test_layouts(backend: str) -> None:
    given = make((3, 4, 6, 8, 5))
    odd = {
        "query": given["query"].transpose(0, 1).contiguous().transpose(0, 1),
        "keys": given["keys"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "values": torch.cat([given["values"]] * 2, dim=2)[..., 5:],
        "score_weight": torch.stack([given["score_weight"]] * 2, dim=1)[:, 1],
    }
    with use_backend(backend):
        torch.testing.assert_close(additive_attention(**odd), additive_attention(**given))
        spread = {**given, "keys": given["keys"][:1].expand(3, -1, -1)}
        whole = {**given, "keys": spread["keys"].contiguous()}
        torch.testing.assert_close(additive_attention(**spread), additive_attention(**whole))
        # Keys that are the values and the queries.
        x = torch.randn(2, 5, 7, requires_grad=True)
        v = torch.randn(7)
        (grad,) = torch.autograd.grad(additive_attention(x, x, x, v).square().sum(), x)
    (expected,) = torch.autograd.grad(reference(x, x, x, v)[0].square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coverage", [False, True])
def test_gradcheck(coverage: bool) -> None:
    given = make((2, 3, 4, 3, 2), torch.float64, coverage=coverage, grad=True)
    names, lengths = list(given), torch.tensor([4, 2])

    def function(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors, strict=True))
        return additive_attention(**named, memory_lengths=lengths, need_weights=True)

    assert torch.autograd.gradcheck(function, list(given.values()))
    assert torch.autograd.gradgradcheck(function, list(given.values()))


def test_double_backward(backend: str) -> None:
    given = make((2, 3, 4, 5, 3), grad=True)

    def second(function: Any) -> list[Tensor]:
        context, weights = function(**given)
        first = torch.autograd.grad(
            context.square().sum() + weights.square().sum(), given.values(), create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), given.values()))

    with use_backend(backend):
        found = second(lambda **t: additive_attention(**t, need_weights=True))
    torch.testing.assert_close(found, second(reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(need_weights: bool, grad: bool) -> None:
    given = make((2, 3, 4, 5, 6), coverage=True, grad=grad)
    arguments = (*given.values(), torch.tensor([4, 1]), need_weights)
    ops = torch.ops.encdec_fast
    opcheck(ops.additive_attention_train if grad else ops.additive_attention, arguments)


class Step(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = encdec_fast.nn.AdditiveAttention(6, 5, 7, **options)

    def forward(self, query: Tensor, memory: Tensor, lengths: Tensor) -> Any:
        return self.attention(query, memory, lengths, need_weights=True)


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad: bool) -> None:
    module, lengths = Step(), torch.tensor([4, 0, 3])
    query, memory = torch.randn(3, 2, 6), torch.randn(3, 4, 5)
    with torch.set_grad_enabled(grad):
        expected = module(query, memory, lengths)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found = compiled(query, memory, lengths)
    torch.testing.assert_close(found, expected)
    if grad:
        parameters = list(module.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(found[0].square().sum(), parameters),
            torch.autograd.grad(expected[0].square().sum(), parameters),
        )


def test_export_with_dynamic_sizes() -> None:
    dim = torch.export.Dim
    batch, queries, size = dim("batch", min=2), dim("queries", min=2), dim("size", min=2)
    example = (torch.randn(3, 2, 6), torch.randn(3, 4, 5), torch.tensor([4, 1, 3]))
    dynamic = ({0: batch, 1: queries}, {0: batch, 1: size}, {0: batch})
    with torch.no_grad():
        module = Step()
        exported = torch.export.export(module, example, dynamic_shapes=dynamic).module()
        other = (torch.randn(5, 7, 6), torch.randn(5, 9, 5), torch.tensor([9, 0, 3, 1, 2]))
        torch.testing.assert_close(exported(*other), module(*other))


def test_vmap_and_forward_mode() -> None:
    given = make((2, 3, 4, 5, 6))
    rest = list(given.values())[1:]
    many = torch.randn(4, *given["query"].shape)
    found = torch.func.vmap(lambda query: additive_attention(query, *rest))(many)
    for one, query in zip(found, many, strict=True):
        torch.testing.assert_close(one, additive_attention(query, *rest))
    _, slope = torch.func.jvp(
        lambda query: additive_attention(query, *rest), (many[0],), (torch.ones_like(many[0]),)
    )
    expected = torch.func.jvp(
        lambda query: reference(query, *rest)[0], (many[0],), (torch.ones_like(many[0]),)
    )[1]
    torch.testing.assert_close(slope, expected)


def test_autocast() -> None:
    module = encdec_fast.nn.AdditiveAttention(6, 5, 7)
    query, memory = torch.randn(3, 2, 6), torch.randn(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        context = module(query, memory)
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.float(), module(query, memory), rtol=0.05, atol=0.05)


def test_explain(native: None) -> None:
    given = make((2, 3, 4, 5, 6))
    found = explain(additive_attention, **given)
    assert found.backend == "cpu"
    assert "B=2 Tq=3 S=4 A=5 D=6" in str(found)
    double = explain(additive_attention, **cast(given, torch.float64))
    assert double.backend == "reference"
    assert "float64" in double.reasons["cpu"][0]
    module = encdec_fast.nn.AdditiveAttention(6, 5, 7)
    assert explain(module, torch.randn(3, 2, 6), torch.randn(3, 4, 5)).backend == "cpu"


def test_the_same_bits_twice_and_on_any_number_of_threads(native: None) -> None:
    given = make((3, 40, 50, 64, 32), grad=True)
    found = []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        context = additive_attention(**given)
        found.append([context, *torch.autograd.grad(context.sum(), list(given.values()))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"query": torch.randn(3, 5)}, "3 dimensions"),
    "batch": ({"keys": torch.randn(4, 4, 5)}, "keys must have shape"),
    "attention size": ({"keys": torch.randn(2, 4, 6)}, "keys must have shape"),
    "memory": ({"values": torch.randn(2, 5, 6)}, "values must have shape"),
    "score": ({"score_weight": torch.randn(1, 5)}, "score_weight must have shape"),
    "dtype": ({"values": torch.randn(2, 4, 6).double()}, "values must be torch.float32"),
    "device": ({"values": torch.randn(2, 4, 6, device="meta")}, "on cpu"),
    "integers": (
        {
            n: torch.ones(s, dtype=torch.int64)
            for n, s in (
                ("query", (2, 3, 5)),
                ("keys", (2, 4, 5)),
                ("values", (2, 4, 6)),
                ("score_weight", (5,)),
            )
        },
        "floating-point",
    ),
    "coverage alone": ({"coverage": torch.rand(2, 4)}, "together"),
    "coverage": (
        {"coverage": torch.rand(2, 5), "coverage_weight": torch.rand(5)},
        "coverage must have shape",
    ),
    "negative length": ({"memory_lengths": [4, -1]}, "found -1"),
    "long length": ({"memory_lengths": [4, 5]}, "found 5"),
    "few lengths": ({"memory_lengths": [4]}, "shape"),
    "float lengths": ({"memory_lengths": torch.tensor([1.0, 2.0])}, "integers"),
    "lengths elsewhere": (
        {"memory_lengths": torch.ones(2, dtype=torch.int64, device="meta")},
        "CPU",
    ),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(changed: dict[str, Any], message: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=message):
        additive_attention(**{**make((2, 3, 4, 5, 6), grad=grad), **changed})


def plain_module(module: Any, query: Tensor, memory: Tensor, lengths: list[int]) -> Any:
    """The network in plain torch, a sentence and a query at a time, with coverage if it has it."""
    contexts, weights = [], []
    for row, n in enumerate(lengths):
        keys, own = module.memory_proj(memory[row, :n]), memory[row, :n]
        coverage = torch.zeros(n, dtype=query.dtype)
        for q in module.query_proj(query[row]):
            hidden = keys + q
            if module.coverage:
                hidden = hidden + module.coverage_proj(coverage.unsqueeze(1))
            weight = torch.softmax(module.score(torch.tanh(hidden)).squeeze(1), dim=0)
            coverage = coverage + weight
            contexts.append(weight @ own)
            weights.append(nn.functional.pad(weight, (0, memory.shape[1] - n)))
    shape = query.shape[:2]
    return torch.stack(contexts).view(*shape, -1), torch.stack(weights).view(*shape, -1)


@pytest.mark.parametrize("coverage", [False, True])
def test_module(coverage: bool, backend: str) -> None:
    module = encdec_fast.nn.AdditiveAttention(6, 5, 7, coverage=coverage)
    truth = copy.deepcopy(module).double()
    query, memory = torch.randn(3, 4, 6), torch.randn(3, 8, 5)
    lengths = [8, 3, 1]
    expected = plain_module(truth, query.double(), memory.double(), lengths)
    with use_backend(backend):
        found = module(query, memory, lengths, need_weights=True)
        alone = module(query, memory, lengths)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, found[0])
    grads = torch.autograd.grad(found[0].square().sum(), list(module.parameters()))
    of_truth = torch.autograd.grad(expected[0].square().sum(), list(truth.parameters()))
    for a, b in zip(grads, of_truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_module_step_by_step() -> None:
    """Decode steps that share the projected keys and hand on the coverage."""
    module = encdec_fast.nn.AdditiveAttention(6, 5, 7, coverage=True)
    query, memory = torch.randn(3, 4, 6), torch.randn(3, 8, 5)
    keys, coverage = module.project_memory(memory), None
    together, weights = module(query, memory, need_weights=True)
    for t in range(4):
        context, weight = module(
            query[:, t : t + 1], memory, need_weights=True, keys=keys, coverage=coverage
        )
        torch.testing.assert_close(context[:, 0], together[:, t])
        torch.testing.assert_close(weight[:, 0], weights[:, t])
        coverage = weights[:, : t + 1].sum(1)
    with pytest.raises(RuntimeError, match="without it"):
        encdec_fast.nn.AdditiveAttention(6, 5, 7)(query, memory, coverage=coverage)


MEMORY = """
import resource, sys, torch
from encdec_fast.ops import additive_attention

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(B, Tq, S, A):
    shapes = ((B, Tq, A), (B, S, A), (B, S, A), (A,))
    tensors = [torch.ones(shape, requires_grad=True) for shape in shapes]
    before = peak()
    additive_attention(*tensors).sum().backward()
    return peak() - before

run(2, 2, 3, 4)
print(run(2, 128, 512, 256))
"""


def test_nothing_of_the_size_of_the_product_is_stored(native: None) -> None:
    """Forward and backward: the (B, Tq, S, A) product alone would take 134 MB."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(found.stdout) < 2 * 128 * 512 * 256 * 4 / 8
