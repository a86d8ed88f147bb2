"""ops.cached_attention: a step of decoding against the attention op, its cache, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from encdec_fast import BackendRefused, explain, ops, use_backend
from encdec_fast.ops import cached_attention

SHAPES = pytest.mark.parametrize(  # R, H, D, P, and the place of each step
    "shape", [(3, 2, 5, 7, 4), (4, 3, 64, 130, 129), (1, 1, 16, 1, 0), (5, 2, 33, 70, 64)], ids=str
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["triton", "reference"])
def name(request: pytest.FixtureRequest) -> str:
    """Every backend of this op."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    found: str = request.param
    return found


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of a step: query, key and value lie in one product, as a decoder makes them.

    What a hypothesis has not written yet is NaN.
    """
    R, H, D, P, place = shape
    query, key, value = torch.randn(R, 3, H, D).to(dtype).unbind(1)
    keys, values = torch.randn(2, P, R, H, D).to(dtype).unbind(0)
    keys[place:], values[place:] = torch.nan, torch.nan
    return {
        "query": query,
        "key": key,
        "value": value,
        "keys": keys.contiguous(),
        "values": values.contiguous(),
        "rows": torch.randint(max(1, R), (R, P), dtype=torch.int32),
        "places": torch.full((R,), place),
    }


def exactly(given: dict[str, Any], bias: Tensor | None, scale: float | None) -> Tensor:
    """In float64, a hypothesis at a time, by what attention is."""
    R, _, D = given["query"].shape
    found = []
    for r in range(R):
        n = int(given["places"][r])
        places, rows = torch.arange(n), given["rows"][r, :n].long()
        keys = torch.cat([given["keys"][places, rows], given["key"][r : r + 1]]).double()
        values = torch.cat([given["values"][places, rows], given["value"][r : r + 1]]).double()
        scores = torch.einsum("hd,shd->hs", given["query"][r].double(), keys)
        scores = scores * (D**-0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias[:, : n + 1].double()
        found.append(torch.einsum("hs,shd->hd", scores.softmax(1), values))
    return torch.stack(found)


@DTYPES
@SHAPES
@pytest.mark.parametrize("options", ["", "bias", "scale"])
def test_step(shape: tuple[int, ...], dtype: torch.dtype, options: str, name: str) -> None:
    """The output, and in the cache the new key and value and nothing else."""
    given = make(shape, dtype)
    bias = torch.randn(shape[1], shape[3]).to(dtype) if options == "bias" else None
    scale = 0.3 if options == "scale" else None
    before = [given["keys"].clone(), given["values"].clone()]
    expected = exactly(given, bias, scale)
    with use_backend(name):
        found = cached_attention(**given, bias=bias, scale=scale)
    assert found.dtype == dtype and found.is_contiguous()
    # Some roundings of weights and sums; in half precision the reference rounds its scores, too.
    bound = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
    place = shape[4]
    for cache, old, new in zip(
        (given["keys"], given["values"]), before, (given["key"], given["value"]), strict=True
    ):
        assert torch.equal(cache[place], new)
        old[place] = new
        assert torch.equal(cache.nan_to_num(), old.nan_to_num())


def test_as_attention(name: str) -> None:
    """Steps one behind the other, without a search, are causal attention."""
    R, H, D, P = 3, 2, 8, 6
    query, key, value = torch.randn(3, R, H, P, D).unbind(0)
    keys, values = torch.full((2, P, R, H, D), torch.nan).unbind(0)
    rows = torch.arange(R, dtype=torch.int32).unsqueeze(1).expand(R, P).contiguous()
    steps = []
    with use_backend(name):
        for t in range(P):
            new = [tensor[:, :, t] for tensor in (query, key, value)]
            step = cached_attention(*new, keys, values, rows, torch.full((R,), t))
            steps.append(step)
    expected = ops.attention(query, key, value, causal=True)
    torch.testing.assert_close(torch.stack(steps, 2), expected, rtol=1e-5, atol=1e-5)


def test_unequal_places(name: str) -> None:
    given = make((4, 2, 8, 9, 0))
    given["keys"], given["values"] = torch.randn(2, 9, 4, 2, 8).unbind(0)
    given["places"] = torch.tensor([8, 0, 3, 5])
    given["rows"] = torch.arange(4, dtype=torch.int32).unsqueeze(1).expand(4, 9).contiguous()
    expected = exactly(given, None, None)
    with use_backend(name):
        torch.testing.assert_close(
            cached_attention(**given).double(), expected, rtol=1e-5, atol=1e-5
        )


def test_nothing(name: str) -> None:
    with use_backend(name):
        assert cached_attention(**make((0, 2, 4, 3, 0))).shape == (0, 2, 4)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"query": torch.randn(2, 4)}, RuntimeError, "query must have 3 dimensions"),
    "cache": ({"keys": torch.randn(6, 2, 4)}, RuntimeError, "keys must have 4 dimensions"),
    "integers": ({"query": torch.ones(3, 2, 4, dtype=torch.int64)}, RuntimeError, "floating"),
    "sizes": ({"key": torch.randn(3, 2, 5)}, RuntimeError, "key must have shape"),
    "dtype": ({"value": torch.randn(3, 2, 4).double()}, RuntimeError, "value must be"),
    "strides": (
        {"values": torch.randn(3, 6, 2, 4).transpose(0, 1)},
        RuntimeError,
        "values must be contiguous",
    ),
    "bias": ({"bias": torch.randn(2, 5)}, RuntimeError, "bias must have shape"),
    "rows' dtype": ({"rows": torch.zeros(3, 6).long()}, RuntimeError, "rows must be torch.int32"),
    "rows' shape": ({"rows": torch.zeros(3, 5).int()}, RuntimeError, "rows must be torch.int32"),
    "places": ({"places": torch.zeros(3).int()}, RuntimeError, "places must be torch.int64"),
    "no place": ({"places": torch.tensor([0, 6, 0])}, IndexError, "places must be from 0 to 5"),
    "negative": ({"places": torch.tensor([0, -1, 0])}, IndexError, "places must be from 0 to 5"),
    "no row": ({"rows": torch.full((3, 6), 3).int()}, IndexError, "rows must be from 0 to 2"),
    "gradient": (
        {"query": torch.randn(3, 2, 4, requires_grad=True)},
        RuntimeError,
        "it is for inference",
    ),
    "no positions": (
        {"keys": torch.randn(0, 3, 2, 4), "values": torch.randn(0, 3, 2, 4)},
        RuntimeError,
        "a position",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str, name: str) -> None:
    """Before anything is written."""
    changed, error, says = BAD[bad]
    given = {**make((3, 2, 4, 6, 2)), **changed}
    before = given["keys"].clone()
    with use_backend(name), pytest.raises(error, match=says):
        cached_attention(**given)
    assert torch.equal(given["keys"].nan_to_num(), before.nan_to_num())


def test_indices_are_clamped(interpreter: None) -> None:
    """What nobody has checked, as on a GPU, reads and writes nothing outside."""
    kernels = ops._triton.kernels("cached_attention")
    given = make((3, 2, 4, 6, 5))
    given["keys"], given["values"] = torch.randn(2, 6, 3, 2, 4).unbind(0)
    wild = dict(given, keys=given["keys"].clone(), values=given["values"].clone())
    wild["places"] = torch.tensor([99, 5, 2**40])
    wild["rows"] = torch.where(given["rows"] == 2, 2**30, given["rows"])
    found = kernels.step(*wild.values(), None, 0.5)
    torch.testing.assert_close(found, kernels.step(*given.values(), None, 0.5))
    wild["places"] = torch.tensor([-7, 0, -1])
    given["places"] = torch.zeros(3).long()
    found = kernels.step(*wild.values(), None, 0.5)
    torch.testing.assert_close(found, kernels.step(*given.values(), None, 0.5))


def test_explain_and_refusals(interpreter: None) -> None:
    given = make((3, 2, 4, 6, 2))
    assert explain(cached_attention, **given).backend == "reference"
    with use_backend("triton"):
        assert explain(cached_attention, **given).backend == "triton"
        with pytest.raises(BackendRefused, match="257"):
            cached_attention(**make((1, 1, 257, 3, 1)))


def test_op(name: str) -> None:
    given = make((3, 2, 4, 6, 2))
    given["keys"], given["values"] = torch.randn(2, 6, 3, 2, 4).unbind(0)
    with use_backend(name):
        opcheck(torch.ops.encdec_fast.cached_attention.default, (*given.values(), None, 0.5))


def test_compile() -> None:
    """The cache is written in a compiled graph, too."""
    given = make((3, 2, 4, 6, 2))
    other = {key: value.clone() for key, value in given.items()}
    expected = cached_attention(**other)
    found = torch.compile(cached_attention, fullgraph=True)(**given)
    torch.testing.assert_close(found, expected)
    assert torch.equal(given["keys"][2], other["keys"][2])


def test_offsets_beyond_32_bits(interpreter: None) -> None:
    """A cache of more than 2**31 numbers, of which few are ever touched: the last row's keys."""
    kernels = ops._triton.kernels("cached_attention")
    R, P, H, D = 2**31 // (3 * 2 * 256) + 5, 3, 2, 256
    given = make((2, H, D, P, 2))
    keys, values = (torch.empty(P, R, H, D) for _ in range(2))
    assert keys.numel() > 2**31
    rows = torch.full((1, P), R - 1, dtype=torch.int32)
    for place in range(2):
        keys[place, R - 1], values[place, R - 1] = (
            given["keys"][place, 1],
            given["values"][place, 1],
        )
    output = torch.empty(1, H, D)
    new = [given[name][:1] for name in ("query", "key", "value")]
    tensors = (*new, keys, values, rows, torch.tensor([2]), None, output)
    strides = [tensor.stride(0) for tensor in new]
    # Programs of the first row alone: it reads the last one.
    tile = {"KEYS": 16, "D": D, "HEAD": D}
    kernels.step_kernel[H,](*tensors, R, P, H, 0.1, *strides, **tile)
    small = dict(given, rows=torch.ones(2, P, dtype=torch.int32))
    expected = exactly(small, None, 0.1)[:1]
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys[2, 0], given["key"][0])
