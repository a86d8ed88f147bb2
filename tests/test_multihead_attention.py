"""nn.MultiheadAttention beside torch's: every option, every form of mask, and what falls back."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis
import pytest
import torch
from helpers import assert_as_good, error
from hypothesis import strategies
from torch import Tensor, nn

import encdec_fast
from encdec_fast import use_backend
from encdec_fast.ops.linear import run

E, HEADS, B, T, S = 12, 3, 4, 5, 7
INPUTS = ("self", "cross", "query is key", "all differ")
# key_padding_mask, attn_mask (kind and dimensions), is_causal
MASKS: dict[str, tuple[str, str, bool]] = {
    "none": ("", "", False),
    "padding": ("bool", "", False),
    "float padding": ("float", "", False),
    "mask": ("", "bool 2", False),
    "mask of heads": ("", "bool 3", False),
    "float mask": ("", "float 2", False),
    "float mask of heads": ("", "float 3", False),
    "both": ("bool", "bool 2", False),
    "both float": ("float", "float 3", False),
    "padding, float mask": ("bool", "float 2", False),
    "float padding, mask of heads": ("float", "bool 3", False),
    "causal": ("", "causal bool", True),
    "causal float, padding": ("bool", "causal float", True),
}
ALL_MASKS = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
WEIGHTS = {"no weights": (False, True), "mean": (True, True), "every head": (True, False)}
ALL_WEIGHTS = pytest.mark.parametrize("shown", WEIGHTS.values(), ids=WEIGHTS)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 5, "vdim": 9, "batch_first": True},
    "kdim": {"kdim": 20, "bias": False},
    "one head": {"num_heads": 1},
    "head size 1": {"num_heads": 12, "batch_first": True},
    "odd size": {"embed_dim": 7, "num_heads": 7},
    "one feature": {"embed_dim": 1, "num_heads": 1, "batch_first": True},
    "wide": {"embed_dim": 72, "num_heads": 2, "batch_first": True},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def trio(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """(the truth in float64, torch's module, ours): same weights, every one of them random."""
    arguments = {"embed_dim": E, "num_heads": HEADS, **options}
    theirs = nn.MultiheadAttention(**arguments)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.to(dtype)
    ours = encdec_fast.nn.MultiheadAttention(**arguments).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return copy.deepcopy(theirs).double(), theirs, ours


def make_inputs(module: Any, form: str, batch: int = B, keys: int = S) -> list[Tensor]:
    """query, key and value in the module's layout."""

    def make(length: int, size: int) -> Tensor:
        x = torch.randn(batch, length, size)
        return x if module.batch_first else x.transpose(0, 1).contiguous()

    query = make(T, module.embed_dim)
    if form == "self":
        return [query, query, query]
    if form == "query is key":
        return [query, query, make(T, module.vdim)]
    key = make(keys, module.kdim)
    return [query, key, make(keys, module.vdim) if form == "all differ" else key]


def make_masks(
    masks: tuple[str, str, bool], heads: int, batch: int, queries: int, keys: int
) -> dict[str, Any]:
    """The masks of a call; no query is without keys."""
    padding, attention, causal = masks
    found: dict[str, Any] = {"is_causal": causal}
    if padding:
        real = torch.rand(batch, keys) < 0.6
        real[:, 0] = True
        values = torch.randn(batch, keys).masked_fill(~real, -torch.inf)
        found["key_padding_mask"] = ~real if padding == "bool" else values
    if attention:
        kind, form = attention.split() if not causal else attention.split()[::-1]
        shape = (batch * heads, queries, keys) if form == "3" else (queries, keys)
        seen = torch.rand(shape) < 0.6
        seen[..., 0] = True
        values = torch.randn(shape)
        if causal:
            seen = torch.ones(shape, dtype=torch.bool).tril()
            values = torch.zeros(shape)
        found["attn_mask"] = ~seen if kind == "bool" else values.masked_fill(~seen, -torch.inf)
    return found


def cast(tensors: Any, dtype: torch.dtype) -> Any:
    """Tensors of a list or dict in another dtype; what is the same stays the same."""
    known: dict[int, Any] = {}

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return known.setdefault(id(x), x.detach().to(dtype, copy=True))

    if isinstance(tensors, dict):
        return {name: one(x) for name, x in tensors.items()}
    return [one(x) for x in tensors]


def results(module: Any, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    return [found for found in module(*inputs, **options) if found is not None]


def sizes(module: Any, inputs: list[Tensor]) -> tuple[int, int, int, int]:
    at = 0 if module.batch_first else 1
    query, key = inputs[0].shape, inputs[1].shape
    return module.num_heads, query[at], query[1 - at], key[1 - at]


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("batch_first", [False, True])
@ALL_MASKS
@ALL_WEIGHTS
def test_equal_to_torch(
    form: str, batch_first: bool, masks: Any, shown: tuple[bool, bool], native: None
) -> None:
    truth, theirs, ours = trio({"batch_first": batch_first})
    inputs = make_inputs(ours, form)
    options = make_masks(masks, *sizes(ours, inputs))
    options.update(need_weights=shown[0], average_attn_weights=shown[1])
    for train in (True, False):
        ours.train(train)
        with torch.no_grad():
            expected = results(theirs, inputs, options)
            exact = results(truth, cast(inputs, torch.float64), cast(options, torch.float64))
            with use_backend("cpu"):
                found = results(ours, inputs, options)
        assert [f.shape for f in found] == [e.shape for e in expected]
        assert_as_good(found, expected, exact, 2.0)
        assert found[0].is_contiguous()


@ALL_OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_options(options: dict[str, Any], dtype: torch.dtype, native: None) -> None:
    truth, theirs, ours = trio(options, dtype)
    forms = ("all differ", "cross") if ours.kdim == ours.vdim else ("all differ",)
    for form in (*forms, "self") if ours._qkv_same_embed_dim else forms:
        inputs = cast(make_inputs(ours, form), dtype)
        for masks in ("none", "both"):
            extra = make_masks(MASKS[masks], *sizes(ours, inputs))
            with torch.no_grad():
                expected = results(theirs, inputs, extra)
                exact = results(truth, cast(inputs, torch.float64), extra)
                with use_backend(None if dtype == torch.float64 else "cpu"):
                    found = results(ours, inputs, extra)
            # In float64 torch is the truth itself.
            relative = 1e-14 if dtype == torch.float64 else 0.0
            assert_as_good(found, expected, exact, 2.0, relative=relative)


@pytest.mark.parametrize("masks", ["none", "both float", "padding", "causal float, padding"])
@ALL_WEIGHTS
def test_unbatched(masks: str, shown: tuple[bool, bool], native: None) -> None:
    _, theirs, ours = trio({})
    query, key = torch.randn(T, E), torch.randn(S, E)
    options = make_masks(MASKS[masks], HEADS, 1, T, S)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][0]
    options.update(need_weights=shown[0], average_attn_weights=shown[1])
    for inputs in ([query] * 3, [query, key, key]):
        if inputs[1] is query and masks != "none":
            continue
        with torch.no_grad(), use_backend("cpu"):
            found = results(ours, inputs, options)
        expected = results(theirs, inputs, options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("masks", ["none", "both", "both float", "causal float, padding"])
@pytest.mark.parametrize("options", ["plain", "batch first", "no bias"])
def test_gradients(form: str, masks: str, options: str) -> None:
    """Of the inputs, of the parameters and of a float mask."""
    truth, theirs, ours = trio(OPTIONS[options])
    inputs = make_inputs(ours, form)
    extra = make_masks(MASKS[masks], *sizes(ours, inputs))
    found = []
    for module, dtype in ((ours, torch.float32), (theirs, torch.float32), (truth, torch.float64)):
        own, more = cast(inputs, dtype), cast(extra, dtype)
        leaves = list({id(x): x for x in own}.values())
        if masks == "both float":
            leaves.append(more["attn_mask"])
        for leaf in leaves:
            leaf.requires_grad_()
        output, weights = module(*own, **more)
        total = (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)).sum()
        total = total + weights.square().sum()
        gradients = torch.autograd.grad(total, [*leaves, *module.parameters()])
        # Where torch has NaN for a query without keys, we have zeros.
        found.append(gradients if module is ours else [g.nan_to_num(0.0) for g in gradients])
    assert_as_good(*found, 3.0)


def test_dropout_is_equal_in_distribution() -> None:
    """Weights are dropped, and those that stay are scaled, as often and as much as torch's."""
    _, theirs, ours = trio({"dropout": 0.4})
    x = torch.randn(40, 16, E)
    shown: dict[str, Tensor] = {}
    for name, module in (("theirs", theirs), ("ours", ours)):
        _, shown[name] = module(x, x, x, average_attn_weights=False)
    kept = shown["ours"] != 0
    assert abs(kept.float().mean() - (shown["theirs"] != 0).float().mean()) < 0.02
    _, whole = ours.eval()(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(shown["ours"][kept], whole[kept] / 0.6)
    torch.manual_seed(5)
    first = ours.train()(x, x, x)[0]
    torch.manual_seed(5)
    assert torch.equal(ours(x, x, x)[0], first)


@pytest.mark.parametrize("grad", [False, True])
def test_a_query_without_keys_gives_zeros(grad: bool, native: None) -> None:
    """Zeros for weights and context, so the bias of the last projection for the output."""
    _, _, ours = trio({"batch_first": True})
    x = torch.randn(B, T, E)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    mask = torch.zeros(T, T, dtype=torch.bool)
    mask[2] = True
    scores = torch.zeros(T, T).masked_fill(mask, -torch.inf)
    for options in (
        {"key_padding_mask": padding, "attn_mask": mask},
        {"key_padding_mask": padding, "attn_mask": scores},
        {"key_padding_mask": torch.zeros(B, T).masked_fill(padding, -torch.inf)},
    ):
        with torch.set_grad_enabled(grad):
            output, weights = ours(x, x, x, **options)
        empty = padding[:, :1] | (mask[:, 0] if "attn_mask" in options else mask.new_zeros(T))
        assert output.isfinite().all()
        assert (weights[empty] == 0).all()
        bias = ours.out_proj.bias.expand(int(empty.sum()), E)
        torch.testing.assert_close(output[empty], bias)
        if grad:
            output.sum().backward()
            assert all(p.grad.isfinite().all() for p in ours.parameters())


@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 6), min_size=1, max_size=5),
    heads=strategies.sampled_from([1, 2, 5]),
    size=strategies.integers(1, 9),
    batch_first=strategies.booleans(),
    seed=strategies.integers(0, 99),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_batch_gives_what_its_sentences_give(
    lengths: list[int], heads: int, size: int, batch_first: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    module = encdec_fast.nn.MultiheadAttention(heads * size, heads, batch_first=batch_first)
    longest = max(lengths)
    x = torch.randn(len(lengths), longest, heads * size)
    padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    whole = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        output, weights = module(whole, whole, whole, key_padding_mask=padding)
        output = output if batch_first else output.transpose(0, 1)
        for row, length in enumerate(lengths):
            own = x[row, :length]
            alone, shown = module(own, own, own)
            torch.testing.assert_close(output[row, :length], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights[row, :length, :length], shown, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_empty_and_single(
    batch: int, queries: int, keys: int, batch_first: bool, grad: bool
) -> None:
    module = encdec_fast.nn.MultiheadAttention(E, HEADS, batch_first=batch_first)
    shapes = ((batch, queries, E), (batch, keys, E))
    query, key = (torch.randn(s if batch_first else (s[1], s[0], E)) for s in shapes)
    with torch.set_grad_enabled(grad):
        output, weights = module(query, key, key)
    assert output.shape == query.shape
    assert weights.shape == (batch, queries, keys)
    if keys == 0:
        torch.testing.assert_close(output, module.out_proj.bias.expand(query.shape))


BAD: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "features": ({"query": torch.randn(T, B, E + 1)}, AssertionError),
    "dimensions": ({"query": torch.randn(B, 1, T, E)}, AssertionError),
    "key's dimensions": ({"key": torch.randn(S, E)}, AssertionError),
    "values": ({"value": torch.randn(S + 1, B, E)}, AssertionError),
    "batch": ({"query": torch.randn(T, B + 1, E)}, RuntimeError),
    "dtype": ({"query": torch.randn(T, B, E).double()}, RuntimeError),
    "causal alone": ({"is_causal": True, "need_weights": False}, RuntimeError),
    "padding's shape": ({"key_padding_mask": torch.zeros(B, S + 1)}, AssertionError),
    "padding's dtype": ({"key_padding_mask": torch.zeros(B, S).long()}, AssertionError),
    "mask's shape": ({"attn_mask": torch.zeros(T, S + 1)}, RuntimeError),
    "mask's heads": ({"attn_mask": torch.zeros(B, T, S)}, RuntimeError),
    "mask's dtype": ({"attn_mask": torch.zeros(T, S).int()}, AssertionError),
}


@pytest.mark.parametrize(("changed", "kind"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_errors_are_those_of_torch(
    changed: dict[str, Any], kind: type[Exception], grad: bool
) -> None:
    _, theirs, ours = trio({})
    key = torch.randn(S, B, E)
    arguments = {"query": torch.randn(T, B, E), "key": key, "value": key, **changed}
    for module in (theirs, ours):
        with torch.set_grad_enabled(grad), pytest.raises(kind):
            module(**arguments)
    for wrong in ({"num_heads": 5}, {"embed_dim": 0}):
        made = {"embed_dim": E, "num_heads": HEADS, **wrong}
        with pytest.raises((AssertionError, ValueError)):
            encdec_fast.nn.MultiheadAttention(**made)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("form", INPUTS)
def test_weight_dtype(weight_dtype: Any, form: str, native: None) -> None:
    """The error of each product is a few parts of 256: a hundredth of the output's size, here."""
    truth, _, ours = trio({"embed_dim": 48, "batch_first": True})
    inputs = make_inputs(ours, form)
    exact = truth(*cast(inputs, torch.float64))[0].detach()
    ours.weight_dtype = weight_dtype
    with torch.no_grad(), use_backend("cpu"):
        found = ours(*inputs)[0]
    assert 0 < error(found, exact) <= 0.03 * float(exact.abs().max())
    with pytest.raises(RuntimeError, match="inference"):
        ours(*inputs)
    with pytest.raises(RuntimeError, match="inference"), torch.autocast("cpu", torch.bfloat16):
        ours(*inputs)


def test_a_changed_weight_is_never_stale(native: None) -> None:
    _, _, ours = trio({})
    inputs = make_inputs(ours, "cross")
    with torch.no_grad(), use_backend("cpu"):
        before = ours(*inputs)[0]
        for part in (slice(0, E), slice(E, 3 * E)):
            ours.in_proj_weight.data[part].mul_(1.5)
            after = ours(*inputs)[0]
            assert not torch.allclose(before, after)
            assert torch.equal(after, copy.deepcopy(ours)(*inputs)[0])
            before = after


@pytest.mark.parametrize(("form", "products"), zip(INPUTS, (2, 3, 3, 4), strict=True))
def test_equal_inputs_are_one_product(form: str, products: int, monkeypatch: Any) -> None:
    """Beside the last projection: one for self-attention, one for keys and values of a memory."""
    _, _, ours = trio({})
    inputs = make_inputs(ours, form)
    seen: list[Any] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        seen.append(args)
        return run(*args, **options)

    monkeypatch.setattr("encdec_fast.nn._transformer.run", counted)
    monkeypatch.setattr("encdec_fast.nn.multihead_attention.run", counted)
    with torch.no_grad():
        ours(*inputs)
    assert len(seen) == products
