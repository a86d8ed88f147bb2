"""Attention over sentences that lie one behind the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_as_good, poison, two_threads
from torch import Tensor
from torch.library import opcheck

from encdec_fast import explain, use_backend
from encdec_fast.ops import attention, varlen_attention
from encdec_fast.ops.varlen_attention import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# lengths of queries, of memory, H, G, D, V
CASES = {
    "one": ([1], [1], 1, 1, 1, 1),
    "self": ([5, 30, 1, 17], [5, 30, 1, 17], 4, 4, 16, 16),
    "cross": ([3, 0, 20, 8], [40, 7, 0, 33], 4, 2, 19, 24),
    "long": ([150, 2, 70], [600, 90, 3], 2, 1, 64, 33),
    "empty": ([0, 0], [3, 0], 2, 2, 8, 8),
}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def make(case: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    queries, memory, H, G, D, V = case
    N, M = sum(queries), sum(memory)
    shapes = (N, H, D), (M, G, D), (M, G, V)
    return *(torch.randn(s).to(dtype) for s in shapes), offsets(queries), offsets(memory)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(case: Any, causal: bool, dtype: torch.dtype, native: None) -> None:
    given = make(case, dtype)
    double = [t.double() if t.is_floating_point() else t for t in given]
    with two_threads(), use_backend("cpu"):
        poison()
        found = varlen_attention(*given, causal=causal)
    with use_backend("reference"):
        theirs, truth = reference(*given, causal=causal), reference(*double, causal=causal)
    assert_as_good([found], [theirs], [truth], 2.0)
    if dtype is not torch.float32:
        return
    with use_backend("cpu"):  # each sentence alone, the short ones another way
        torch.testing.assert_close(found, reference(*given, causal=causal))


def test_views_of_one_projection(native: None) -> None:
    """Queries, keys and values side by side, as a projection leaves them."""
    lengths = [4, 9, 2]
    packed = torch.randn(sum(lengths), 3, 2, 8)
    q, k, v = packed.unbind(1)
    at = offsets(lengths)
    found = varlen_attention(q, k, v, at, at)
    padded = torch.zeros(3, 9, 3, 2, 8)
    for b, n in enumerate(lengths):
        padded[b, :n] = packed[at[b] : at[b + 1]]
    whole = attention(*padded.permute(2, 0, 3, 1, 4), memory_lengths=lengths).transpose(1, 2)
    expected = torch.cat([whole[b, :n] for b, n in enumerate(lengths)])
    torch.testing.assert_close(found, expected)


def test_gradients_and_explain(native: None) -> None:
    given = make(CASES["self"], torch.float32)
    assert explain(varlen_attention, *given).backend == "cpu"
    leaves = [t.requires_grad_() for t in given[:3]]
    assert explain(varlen_attention, *given).backend == "reference"
    found = torch.autograd.grad(varlen_attention(*given, causal=True).square().sum(), leaves)
    expected = torch.autograd.grad(reference(*given, causal=True).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck_and_compile() -> None:
    given = make(CASES["cross"], torch.float32)
    opcheck(torch.ops.encdec_fast.varlen_attention, (*given, True, 0.3))
    compiled = torch.compile(
        lambda *t: varlen_attention(*t), fullgraph=True, backend="aot_eager", dynamic=True
    )
    torch.testing.assert_close(compiled(*given), varlen_attention(*given))


BAD: dict[str, tuple[int, Tensor]] = {
    "rank": (0, torch.randn(2, 6, 2, 4)),
    "size": (1, torch.randn(5, 2, 3)),
    "rows": (2, torch.randn(6, 2, 4)),
    "heads": (0, torch.randn(6, 3, 4)),
    "dtype": (2, torch.randn(5, 2, 4).double()),
    "offsets decrease": (3, torch.tensor([0, 7, 6])),
    "offsets end early": (3, torch.tensor([0, 2, 5])),
    "offsets start late": (4, torch.tensor([1, 2, 5])),
    "offsets are negative": (4, torch.tensor([0, -1, 5])),
    "offsets of another batch": (4, torch.tensor([0, 5])),
    "offsets of floats": (4, torch.tensor([0.0, 1.0, 5.0])),
}


@pytest.mark.parametrize("changed", BAD.values(), ids=BAD)
def test_bad_input(changed: tuple[int, Tensor], other_backend: str) -> None:
    if other_backend == "torch":
        pytest.skip("torch has no such kernel")
    given = list(make(([2, 4], [1, 4], 2, 2, 4, 4), torch.float32))
    given[changed[0]] = changed[1]
    with pytest.raises(RuntimeError, match=r"varlen_attention|offsets"), use_backend(other_backend):
        varlen_attention(*given)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    *tensors, queries, memory = make(([2, 0, 3], [3, 2, 4], 4, 2, 3, 2), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def function(*own: Tensor) -> Tensor:
        return varlen_attention(*own, queries, memory, causal=causal)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_autocast() -> None:
    given = make(CASES["self"], torch.float32)
    rounded = [t.bfloat16() if t.is_floating_point() else t for t in given]
    with torch.autocast("cpu", torch.bfloat16):
        found = varlen_attention(*given)
    assert found.dtype == torch.bfloat16 and torch.equal(found, varlen_attention(*rounded))
