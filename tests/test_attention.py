"""Scaled dot-product attention: every backend, every kind of mask."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from helpers import assert_as_good, poison, two_threads
from hypothesis import strategies
from torch import Tensor
from torch.nn import functional as F

from encdec_fast import explain, use_backend
from encdec_fast.ops import attention
from encdec_fast.ops.attention import reference

# B, H, G, Tq, S, D, V
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 1, 1),
    "odd": (2, 3, 3, 5, 7, 19, 11),
    "one query": (4, 2, 2, 1, 50, 64, 64),
    "shared keys": (2, 6, 2, 3, 40, 32, 24),
    "one shared key head": (1, 8, 1, 9, 33, 16, 16),
    "many queries": (2, 2, 2, 70, 45, 33, 40),
    "long memory": (1, 2, 1, 20, 700, 64, 64),
    "wide": (1, 1, 1, 15, 20, 256, 200),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
MASKS = ("none", "lengths", "mask", "bias", "causal", "everything", "nothing counts")


def make(shape: tuple[int, ...], masks: str, dtype: torch.dtype) -> dict[str, Any]:
    """The op's arguments."""
    B, H, G, Tq, S, D, V = shape
    given: dict[str, Any] = {
        "query": torch.randn(B, H, Tq, D).to(dtype),
        "key": torch.randn(B, G, S, D).to(dtype),
        "value": torch.randn(B, G, S, V).to(dtype),
    }
    if masks in ("lengths", "everything"):
        lengths = torch.randint(0, S + 1, (B,))
        lengths[0], lengths[-1] = 0, S
        given["memory_lengths"] = lengths
    if masks in ("mask", "everything"):
        given["mask"] = torch.rand(B, 1, Tq, S) < 0.7
    if masks == "nothing counts":
        given["mask"] = torch.zeros(Tq, S, dtype=torch.bool)
        given["mask"][::2] = True
    if masks in ("bias", "everything"):
        given["bias"] = torch.randn(H, Tq, S).to(dtype)
    if masks in ("causal", "everything"):
        given["causal"] = True
    return given


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in given.items()
    }


@ALL_SHAPES
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(shape: Any, masks: str, dtype: torch.dtype, backend: str) -> None:
    given = make(shape, masks, dtype)
    with torch.no_grad(), two_threads():
        truth = reference(**cast(given, torch.float64))
        theirs = reference(**given)
        with use_backend(backend):
            poison()
            output = attention(**given)
    assert_as_good([output], [theirs[0]], [truth[0]], 2.0)


@ALL_SHAPES
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(shape: Any, masks: str, dtype: torch.dtype, kernels: str) -> None:
    given = make(shape, masks, dtype)
    with two_threads():
        poison()
        output, weights = attention(**given, need_weights=True)
        assert torch.equal(output, attention(**given))
    truth = reference(**cast(given, torch.float64))
    theirs = reference(**given)
    assert_as_good([output, weights], list(theirs), list(truth), 2.0)


def test_agrees_with_torch() -> None:
    """The reference itself, beside torch's function."""
    given = make(SHAPES["odd"], "bias", torch.float64)
    expected = F.scaled_dot_product_attention(
        given["query"], given["key"], given["value"], attn_mask=given["bias"]
    )
    torch.testing.assert_close(reference(**given)[0], expected)
    causal = F.scaled_dot_product_attention(
        given["query"], given["key"], given["value"], is_causal=True, scale=0.3
    )
    del given["bias"]
    torch.testing.assert_close(reference(**given, causal=True, scale=0.3)[0], causal)


@ALL_SHAPES
@pytest.mark.parametrize("masks", MASKS)
def test_averaged_weights(shape: Any, masks: str, kernels: str) -> None:
    given = make(shape, masks, torch.float32)
    with two_threads():
        poison()
        output, mean = attention(**given, need_weights=True, average_weights=True)
        whole, weights = attention(**given, need_weights=True)
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close(mean, weights.mean(1), rtol=1e-6, atol=1e-7)


def test_beams_share_a_memory(kernels: str) -> None:
    """A decode step: one query per beam, keys and values once per sentence."""
    B, beams, S = 3, 4, 20
    q, k, v = torch.randn(B, 2, beams, 16), torch.randn(B, 2, S, 16), torch.randn(B, 2, S, 16)
    alone = attention(
        q.transpose(1, 2).reshape(B * beams, 2, 1, 16),
        k.repeat_interleave(beams, 0),
        v.repeat_interleave(beams, 0),
        memory_lengths=[S - b // beams for b in range(B * beams)],
    )
    together = attention(q, k, v, memory_lengths=[S - b for b in range(B)])
    torch.testing.assert_close(together.transpose(1, 2).reshape(B * beams, 2, 1, 16), alone)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_scores(scale: float, kernels: str) -> None:
    for dtype in (torch.float32, torch.float16):
        given = make(SHAPES["many queries"], "none", dtype)
        given["scale"] = scale
        output = attention(**given)
        truth = reference(**cast(given, torch.float64))[0]
        theirs = reference(**cast(given, torch.float32))[0]
        assert output.isfinite().all()
        allowed = 4 * (theirs.double() - truth).abs().max() + 4 * torch.finfo(dtype).eps * 4
        assert (output.double() - truth).abs().max() <= allowed


def test_minus_infinity_and_nan(kernels: str) -> None:
    """A float mask of -inf only gives zeros; NaN stays in its row."""
    given = make(SHAPES["many queries"], "none", torch.float32)
    clean = attention(**given)
    bias = torch.zeros(70, 45)
    bias[3], bias[5, 7] = -torch.inf, torch.nan
    output = attention(**given, bias=bias)
    assert not output[:, :, 3].any()
    assert output[:, :, 5].isnan().all()
    rest = [t for t in range(70) if t not in (3, 5)]
    torch.testing.assert_close(output[:, :, rest], clean[:, :, rest])
    spoiled = {**given, "query": given["query"].clone()}
    spoiled["query"][1, 0, 9, 2] = torch.nan
    found = attention(**spoiled)
    assert found[1, 0, 9].isnan().all()
    found[1, 0, 9] = clean[1, 0, 9]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("name", ["one query", "many queries"])
def test_padding_is_not_read(name: str, backend: str) -> None:
    given = make(SHAPES[name], "lengths", torch.float32)
    padding = torch.arange(SHAPES[name][4]) >= given["memory_lengths"].unsqueeze(1)
    found = []
    for fill in (0.0, torch.nan):
        spoiled = dict(given)
        for part in ("key", "value"):
            spoiled[part] = given[part].masked_fill(padding[:, None, :, None], fill)
        with use_backend(backend):
            found.append(attention(**spoiled))
    assert all(torch.equal(found[0], other) for other in found)
    assert not found[-1].isnan().any()


@hypothesis.given(
    B=strategies.integers(1, 4),
    Tq=strategies.integers(1, 40),
    S=strategies.integers(1, 70),
    D=strategies.integers(1, 40),
    causal=strategies.booleans(),
    seed=strategies.integers(0, 2**31),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_sentences_one_at_a_time(B: int, Tq: int, S: int, D: int, causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, 2, Tq, D), torch.randn(B, 1, S, D), torch.randn(B, 1, S, 5)
    lengths = torch.randint(0, S + 1, (B,))
    output = attention(q, k, v, memory_lengths=lengths, causal=causal)
    for row, n in enumerate(lengths.tolist()):
        own = slice(row, row + 1)
        alone = attention(q[own], k[own, :, :n], v[own, :, :n], causal=causal)
        torch.testing.assert_close(output[own], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 4, 5, 6), (2, 2, 2, 0, 4, 5, 6), (2, 2, 2, 3, 0, 5, 6)], ids=str
)
def test_nothing_there(shape: Any, backend: str) -> None:
    given = make(shape, "none", torch.float32)
    with use_backend(backend):
        output = attention(**given)
    assert output.shape == (*shape[:2], shape[3], shape[6])
    assert not output.any()  # zeros, and no NaN


def test_layouts(backend: str) -> None:
    """Heads side by side in the features, as projections leave them; broadcast and odd masks."""
    x = torch.randn(2, 20, 3, 4, 8)
    q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
    mask = torch.rand(20, 2).t().unsqueeze(1).unsqueeze(1) < 0.8
    bias = torch.randn(4, 1, 20)
    with use_backend(backend):
        found = attention(q, k, v, mask=mask, bias=bias)
        whole = attention(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            mask=mask.expand(2, 4, 20, 20).contiguous(),
            bias=bias.expand(2, 4, 20, 20).contiguous(),
        )
        torch.testing.assert_close(found, whole)
        turned = torch.randn(2, 4, 8, 20).transpose(2, 3)
        torch.testing.assert_close(attention(turned, k, v), attention(turned.contiguous(), k, v))
        torch.testing.assert_close(attention(q, q, q), attention(q, q.clone(), q.clone()))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_of_heads_side_by_side(
    size: int, masks: str, dtype: torch.dtype, native: None
) -> None:
    """As projections leave them, where a row of memory has the keys of all heads."""
    given = make((3, 16, 16, 1, 37, size, size), masks, dtype)
    beside = dict(given)
    for part in ("query", "key", "value"):
        beside[part] = given[part].transpose(1, 2).contiguous().transpose(1, 2)
    truth = reference(**cast(given, torch.float64))
    theirs = reference(**given)
    with two_threads():
        poison()
        found = attention(**beside, need_weights=True)
        assert torch.equal(found[0], attention(**beside))
    assert_as_good(list(found), list(theirs), list(truth), 2.0)


@pytest.mark.parametrize("size", [64, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_of_more_than_a_megabyte(size: int, dtype: torch.dtype, native: None) -> None:
    """They are written past the caches where rows begin lines, and the same as small ones."""
    given = make((4, 8, 8, 300, 280, 64, size), "none", dtype)
    leaves = [given[name].requires_grad_() for name in ("query", "key", "value")]
    with two_threads():
        poison()
        output = attention(**given)
        together = torch.autograd.grad(output.sum(), leaves)
        for sentence in range(4):
            alone = attention(*(x[sentence : sentence + 1] for x in leaves))
            assert torch.equal(alone[0], output[sentence])
            for found, expected in zip(
                torch.autograd.grad(alone.sum(), leaves), together, strict=True
            ):
                assert torch.equal(found[sentence], expected[sentence])


@pytest.mark.parametrize("size", [32, 64])
def test_nan_stays_in_its_head(size: int, native: None) -> None:
    given = make((2, 16, 16, 1, 37, size, size), "none", torch.float32)
    beside = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in given.items()}
    clean = attention(**beside)
    for part in ("query", "key", "value"):
        beside[part][1, 3, 0, 5] = torch.nan
        found = attention(**beside)
        assert found[1, 3, 0, 5].isnan()
        beside[part][1, 3, 0, 5] = given[part][1, 3, 0, 5]
        found[1, 3] = clean[1, 3]
        assert torch.equal(found, clean)


def test_the_same_bits_on_any_number_of_threads(native: None) -> None:
    given = make((3, 4, 2, 60, 50, 32, 32), "everything", torch.float32)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(attention(**given))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_explain(native: None) -> None:
    given = make(SHAPES["shared keys"], "none", torch.float32)
    found = explain(attention, **given)
    assert found.backend == "cpu"
    assert "H=6 G=2" in str(found)
    given["query"].requires_grad_()
    assert explain(attention, **given).backend == "cpu"
    double = cast(given, torch.float64)
    assert explain(attention, **double).backend == "torch"
    assert explain(attention, **double, need_weights=True).backend == "reference"


def test_autocast() -> None:
    given = make(SHAPES["odd"], "none", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(**given).dtype == torch.bfloat16
        assert attention(**cast(given, torch.float64)).dtype == torch.float64


BAD: dict[str, dict[str, Any]] = {
    "rank": {"query": torch.randn(3, 5, 8)},
    "batch": {"key": torch.randn(3, 2, 6, 8)},
    "size": {"key": torch.randn(2, 2, 6, 9)},
    "keys and values": {"value": torch.randn(2, 2, 7, 8)},
    "heads": {"query": torch.randn(2, 3, 5, 8)},
    "dtype": {"value": torch.randn(2, 2, 6, 8).double()},
    "device": {"key": torch.randn(2, 2, 6, 8, device="meta")},
    "mask of floats": {"mask": torch.zeros(5, 6)},
    "mask's shape": {"mask": torch.ones(5, 7, dtype=torch.bool)},
    "mask's rank": {"mask": torch.ones(1, 1, 1, 5, 6, dtype=torch.bool)},
    "bias's shape": {"bias": torch.zeros(3, 5, 6)},
    "bias's dtype": {"bias": torch.zeros(5, 6).double()},
    "length": {"memory_lengths": [6, 7]},
    "negative length": {"memory_lengths": [6, -1]},
    "few lengths": {"memory_lengths": [6]},
}


@pytest.mark.parametrize("changed", BAD.values(), ids=BAD)
def test_bad_input(changed: dict[str, Any]) -> None:
    given = make((2, 4, 2, 5, 6, 8, 8), "none", torch.float32)
    with pytest.raises(RuntimeError, match=r"attention|memory_lengths"):
        attention(**{**given, **changed})


def test_lengths_of_every_kind(backend: str) -> None:
    given = make(SHAPES["one query"], "none", torch.float32)
    lengths = torch.tensor([3, 0, 50, 7])
    with use_backend(backend):
        expected = attention(**given, memory_lengths=lengths)
        for same in (lengths.tolist(), lengths.int(), lengths.repeat_interleave(2)[::2]):
            torch.testing.assert_close(attention(**given, memory_lengths=same), expected)
        for wrong in ("abcd", [1.5, 2.0, 3.0, 4.0]):
            with pytest.raises(RuntimeError, match="memory_lengths must be integers"):
                attention(**given, memory_lengths=wrong)


def test_values_and_queries_of_no_size(backend: str) -> None:
    q, k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 6)
    with use_backend("reference" if backend == "torch" else backend):
        poison()
        _, weights = attention(q, k, v[..., :0], need_weights=True)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3))
    with use_backend(backend):
        mean = attention(q[..., :0], k[..., :0], v)
        torch.testing.assert_close(mean, v.mean(2, keepdim=True).expand(2, 2, 3, 6))


@pytest.mark.parametrize("queries", [1, 20])
def test_scores_that_overflow(queries: int, kernels: str) -> None:
    """Sums of -infinity count like masked keys, with a mask or without."""
    q, k = torch.full((1, 1, queries, 4), -1e30), torch.full((1, 1, 2, 4), 1e30)
    value = torch.ones(1, 1, 2, 1)
    for bias in (None, torch.zeros(1, 2)):
        assert not attention(q, k, value, bias=bias).any()
    k[0, 0, 1, 0] = torch.nan
    assert attention(q, k, value).isnan().all()


def test_the_output_is_no_view(native: None) -> None:
    q = torch.randn(1, 2, 3, 4)
    factor = torch.ones((), requires_grad=True)
    with torch.no_grad():
        output = attention(q, q, q)
    assert not output._is_view()
    output.mul_(factor)
    output.sum().backward()
