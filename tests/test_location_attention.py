"""Location attention: the function on every backend, and the module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_as_good, poison, two_threads
from torch import Tensor

from encdec_fast import explain, use_backend
from encdec_fast.nn import LocationAttention
from encdec_fast.ops import location_attention
from encdec_fast.ops.location_attention import reference

# B, Tq, S, E, H, M, L
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 1, 1),
    "odd": (3, 5, 7, 19, 11, 13, 10),
    "a step": (4, 1, 50, 40, 33, 20, 50),
    "short": (2, 9, 3, 33, 40, 16, 64),
    "large": (5, 13, 40, 128, 96, 64, 100),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native")
    name: str = request.param
    return name


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    grad: bool = False,
) -> dict[str, Tensor]:
    """The function's tensors."""
    B, Tq, S, E, H, M, L = shape
    tensors = {
        "embedded": torch.randn(B, Tq, E),
        "hidden": torch.randn(B, Tq, H),
        "memory": torch.randn(B, S, M),
        "weight": torch.randn(L, E + H) / (E + H) ** 0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(L)
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


def bound(given: dict[str, Tensor]) -> float:
    """What the rounding of the scores, by two units in their last place, makes of the weights."""
    scores = torch.cat([given["embedded"], given["hidden"]], -1) @ given["weight"].t()
    scores = scores + given.get("bias", scores.new_zeros(()))
    largest = float(scores.detach().abs().max()) if scores.numel() else 0.0
    return 2 * torch.finfo(scores.dtype).eps * max(1.0, largest)


@ALL_SHAPES
@ALL_DTYPES
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_forward(
    shape: tuple[int, ...], dtype: torch.dtype, ragged: bool, bias: bool, backend: str
) -> None:
    given = make(shape, dtype, bias=bias)
    lengths = lengths_of(shape) if ragged else None
    truth = reference(**cast(given, torch.float64), memory_lengths=lengths)
    theirs = reference(**given, memory_lengths=lengths)
    with torch.no_grad(), use_backend(backend), two_threads():
        poison()
        found = location_attention(**given, memory_lengths=lengths, need_weights=True)
        alone = location_attention(**given, memory_lengths=lengths)
    assert_as_good(list(found), list(theirs), list(truth), 2.0, relative=bound(given))
    torch.testing.assert_close(alone, found[0])


@pytest.mark.parametrize("S", [10, 7])
def test_it_is_the_tutorial(S: int) -> None:
    """The decoder's own lines: one sentence, outputs padded with zeros to max_length."""
    module = LocationAttention(5, 6, max_length=10)
    embedded, hidden, memory = torch.randn(1, 1, 5), torch.randn(1, 1, 6), torch.randn(1, S, 4)
    encoder_outputs = torch.zeros(10, 4)
    encoder_outputs[:S] = memory[0]
    attn_weights = torch.softmax(module.attn(torch.cat((embedded[0], hidden[0]), 1)), dim=1)
    attn_applied = torch.bmm(attn_weights.unsqueeze(0), encoder_outputs.unsqueeze(0))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            context, weights = module(embedded, hidden, memory, need_weights=True)
        torch.testing.assert_close(context, attn_applied)
        torch.testing.assert_close(weights[0], attn_weights[:, :S])
    assert list(module.state_dict()) == ["attn.weight", "attn.bias"]


def test_lengths_share_out_the_whole_weight() -> None:
    given = make((3, 2, 8, 5, 4, 6, 12))
    _, weights = location_attention(**given, memory_lengths=[8, 3, 0], need_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([[1.0] * 2, [1.0] * 2, [0.0] * 2]))
    assert not weights[1, :, 3:].any()
    _, lost = location_attention(**given, need_weights=True)
    assert (lost.sum(-1) < 1).all()


@pytest.mark.parametrize("ragged", [False, True])
def test_gradients(ragged: bool) -> None:
    shape = SHAPES["odd"]
    given = make(shape, grad=True)
    lengths = torch.tensor([0, 7, 4]) if ragged else None

    def run(function: Any, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
        results = function(**tensors, **options, memory_lengths=lengths)
        total = sum((r * s.to(r.dtype)).sum() for r, s in zip(results, seeds, strict=True))
        return list(torch.autograd.grad(total, list(tensors.values())))

    seeds = [torch.randn(3, 5, 13), torch.randn(3, 5, 7)]
    assert_as_good(
        run(location_attention, given, need_weights=True),
        run(reference, cast(given, torch.float32)),
        run(reference, cast(given, torch.float64)),
        3.0,
        relative=bound(given),
    )


@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_of_the_kernels(ragged: bool, native: None) -> None:
    """float32, as a model trains; without the weights attention may take another way."""
    given = make(SHAPES["odd"], grad=True)
    lengths = torch.tensor([0, 7, 4]) if ragged else None
    seed = torch.randn(3, 5, 13)

    def run(context: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad((context * seed).sum(), list(tensors.values())))

    other, double = cast(given, torch.float32), cast(given, torch.float64)
    with two_threads():
        found = run(location_attention(**given, memory_lengths=lengths), given)
    theirs = run(reference(**other, memory_lengths=lengths)[0], other)
    truth = run(reference(**double, memory_lengths=lengths)[0], double)
    assert_as_good(found, theirs, truth, 3.0, relative=bound(given))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradcheck(ragged: bool, need_weights: bool) -> None:
    given = make((2, 2, 3, 2, 3, 2, 4), torch.float64, grad=True)
    lengths = torch.tensor([3, 2]) if ragged else None

    def function(*tensors: Tensor) -> Any:
        return location_attention(*tensors, lengths, need_weights)

    assert torch.autograd.gradcheck(function, tuple(given.values()))
    assert torch.autograd.gradgradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("ragged", [False, True])
def test_nan_stays_in_its_row(ragged: bool, backend: str) -> None:
    given = make((3, 4, 8, 6, 6, 5, 9))
    lengths = torch.tensor([8, 2, 5]) if ragged else None
    with use_backend(backend):
        clean = location_attention(**given, memory_lengths=lengths)
        spoiled = {**given, "hidden": given["hidden"].clone()}
        spoiled["hidden"][2, 1, 3] = torch.nan
        found = location_attention(**spoiled, memory_lengths=lengths)
    assert found[2, 1].isnan().all()
    others = torch.ones(3, 4, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(found[others], clean[others])


def test_padding_is_not_read(backend: str) -> None:
    given = make((3, 4, 8, 6, 6, 5, 9))
    lengths = torch.tensor([3, 0, 8])
    padding = (torch.arange(8) >= lengths.unsqueeze(1)).unsqueeze(2)
    poisoned = {**given, "memory": given["memory"].masked_fill(padding, torch.nan)}
    with use_backend(backend):
        found = location_attention(**poisoned, memory_lengths=lengths)
        assert torch.equal(found, location_attention(**given, memory_lengths=lengths))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("B, Tq, S", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_there(B: int, Tq: int, S: int, ragged: bool, backend: str) -> None:
    given = make((B, Tq, S, 4, 5, 6, 7))
    lengths = torch.full((B,), S) if ragged else None
    with use_backend(backend), torch.no_grad():
        context, weights = location_attention(**given, memory_lengths=lengths, need_weights=True)
    assert context.shape == (B, Tq, 6)
    assert weights.shape == (B, Tq, S)
    assert not context.any()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"embedded": torch.randn(2, 5)}, "embedded must have 3"),
    "hidden rank": ({"hidden": torch.randn(2, 5)}, "hidden must have 3"),
    "queries": ({"hidden": torch.randn(2, 4, 6)}, "hidden must have shape"),
    "batch": ({"memory": torch.randn(3, 4, 7)}, "memory must have shape"),
    "weight": ({"weight": torch.randn(8, 10)}, r"weight must have shape \(8, 11\)"),
    "vector": ({"weight": torch.randn(11)}, "weight must have shape"),
    "bias": ({"bias": torch.randn(7)}, r"bias must have shape \(8,\)"),
    "long memory": ({"memory": torch.randn(2, 9, 7)}, "at most the 8 positions.* has 9"),
    "dtype": ({"memory": torch.randn(2, 4, 7).double()}, "memory must be torch.float32"),
    "device": ({"hidden": torch.randn(2, 3, 6, device="meta")}, "on cpu"),
    "integers": ({"embedded": torch.ones(2, 3, 5).long()}, "floating-point"),
    "long length": ({"memory_lengths": [4, 5]}, "found 5"),
    "negative length": ({"memory_lengths": [4, -1]}, "found -1"),
    "few lengths": ({"memory_lengths": [4]}, "memory_lengths must have shape"),
    "float lengths": ({"memory_lengths": torch.tensor([1.0, 2.0])}, "integers"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(changed: dict[str, Any], message: str, grad: bool) -> None:
    given: dict[str, Any] = make((2, 3, 4, 5, 6, 7, 8), grad=grad)
    with pytest.raises(RuntimeError, match=message):
        location_attention(**{**given, **changed})


def test_a_changed_weight_is_never_stale(native: None) -> None:
    module = LocationAttention(20, 12, 30)
    arguments = (torch.randn(2, 1, 20), torch.randn(2, 1, 12), torch.randn(2, 25, 8), [25, 4])
    with torch.no_grad():
        before = module(*arguments)
        module.attn.weight.data.add_(torch.randn(30, 32))
        after = module(*arguments)
        assert torch.equal(after, copy.deepcopy(module)(*arguments))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 0, 3])])
@pytest.mark.parametrize("grad", [False, True])
def test_compile(lengths: Tensor | None, grad: bool) -> None:
    module = LocationAttention(6, 5, 9)
    arguments = (torch.randn(3, 2, 6), torch.randn(3, 2, 5), torch.randn(3, 4, 7), lengths)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*arguments), module(*arguments)
    torch.testing.assert_close(found, expected)
    if grad:
        parameters = list(module.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
        )


def test_export_with_dynamic_sizes() -> None:
    """Up to and with the whole of max_length."""
    dim = torch.export.Dim
    batch, queries, size = dim("batch", min=2), dim("queries", min=2), dim("size", min=2, max=20)
    example = (torch.randn(3, 2, 6), torch.randn(3, 2, 5), torch.randn(3, 4, 7))
    dynamic = ({0: batch, 1: queries}, {0: batch, 1: queries}, {0: batch, 1: size}, {0: batch})
    with torch.no_grad():
        module = LocationAttention(6, 5, 20)
        exported = torch.export.export(
            module, (*example, torch.tensor([4, 1, 3])), dynamic_shapes=dynamic
        ).module()
        lengths = torch.tensor([9, 0, 3, 1, 2])
        for S in (9, 20):
            other = (torch.randn(5, 7, 6), torch.randn(5, 7, 5), torch.randn(5, S, 7), lengths)
            torch.testing.assert_close(exported(*other), module(*other))


@pytest.mark.parametrize("lengths", [None, [4, 0, 3]])
def test_autocast(lengths: list[int] | None) -> None:
    module = LocationAttention(6, 5, 9)
    arguments = (torch.randn(3, 2, 6), torch.randn(3, 2, 5), torch.randn(3, 4, 7), lengths)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(*arguments)
    torch.testing.assert_close(found.float(), module(*arguments), rtol=0.05, atol=0.05)


def test_explain(native: None) -> None:
    module = LocationAttention(6, 5, 9)
    arguments = (torch.randn(3, 2, 6), torch.randn(3, 2, 5), torch.randn(3, 4, 7))
    with torch.no_grad():
        found = explain(module, *arguments)
    assert found.backend == "cpu"
    assert "M=6 N=9 K=11" in str(found)
    assert "by torch's softmax" in str(found)
    weight, bias = module.attn.weight, module.attn.bias
    training = explain(location_attention, *arguments, weight, bias, [4, 0, 3])
    assert training.backend == "torch"
    assert "by attention" in str(training)


def test_copies() -> None:
    module = LocationAttention(6, 5, 9)
    arguments = (torch.randn(3, 2, 6), torch.randn(3, 2, 5), torch.randn(3, 4, 7))
    with torch.no_grad():
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(*arguments), module(*arguments))
    assert "max_length=9" in repr(module)
