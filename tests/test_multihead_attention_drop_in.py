"""nn.MultiheadAttention in torch's world: copies, graphs, and what falls back."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients
from test_multihead_attention import (
    HEADS,
    INPUTS,
    MASKS,
    B,
    E,
    S,
    T,
    make_inputs,
    make_masks,
    sizes,
    trio,
)
from torch import nn

import encdec_fast
from encdec_fast import BackendRefused, explain, use_backend

FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "add_bias_kv": ({"add_bias_kv": True}, "add_bias_kv"),
    "add_zero_attn": ({"add_zero_attn": True}, "add_zero_attn"),
    "parametrized": ({}, "computed anew"),
    "autocast": ({}, "autocast"),
    "misfit": ({}, "do not fit"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks(name: str, native: None) -> None:
    """torch's own code runs, `explain` says why, and a request for the kernel is refused."""
    options, reason = FALLBACKS[name]
    _, theirs, ours = trio(options)
    inputs = make_inputs(ours, "cross")
    extra: dict[str, Any] = {}
    if name == "parametrized":
        for module in (theirs, ours):
            nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
    if name == "misfit":
        extra["key_padding_mask"] = torch.zeros(B, S, dtype=torch.int64)
    context = torch.autocast("cpu", torch.bfloat16) if name == "autocast" else None
    with torch.no_grad(), context or contextlib.nullcontext():
        explained = explain(ours, *inputs, **extra)
        assert explained.backend == "torch"
        assert reason in str(explained)
        with use_backend("cpu"), pytest.raises(encdec_fast.BackendRefused, match=reason):
            ours(*inputs, **extra)
        if name != "misfit":
            found, expected = ours(*inputs), theirs(*inputs)
            torch.testing.assert_close(found, expected)


def test_nested_and_transforms_fall_back() -> None:
    _, theirs, ours = trio({"batch_first": True})
    ours.num_heads = theirs.num_heads = 2  # torch's nested path wants an even number
    ours.head_dim = theirs.head_dim = E // 2
    rows = [torch.randn(n, E) for n in (3, 5)]
    nested = torch.nested.nested_tensor(rows)
    with torch.no_grad():
        found, _ = ours.eval()(nested, nested, nested, need_weights=False)
        for a, row in zip(found.unbind(), rows, strict=True):
            torch.testing.assert_close(a, ours(row, row, row)[0], rtol=1e-5, atol=1e-5)
    x = torch.randn(3, T, E)
    mapped = torch.vmap(lambda row: ours(row, row, row)[0])(x)
    torch.testing.assert_close(mapped, torch.stack([ours(row, row, row)[0] for row in x]))


def test_explain(native: None) -> None:
    _, _, ours = trio({})
    inputs = make_inputs(ours, "cross")
    with torch.no_grad():
        assert explain(ours, *inputs).backend == "cpu"
        assert "multihead_attention" in str(explain(ours, *inputs))
    explained = explain(ours, *inputs)
    assert explained.backend == "parts"  # linear is torch's, attention is not
    assert "linear: a gradient is needed" in explained.reasons["cpu"][0]


@pytest.mark.parametrize("name", [None, "cpu", "torch", "reference", "triton"])
@pytest.mark.parametrize("weights", [False, True])
def test_explain_agrees_with_what_runs(name: str | None, weights: bool, native: None) -> None:
    """A module is refused where one of its parts is, and `explain` says so before."""
    _, _, ours = trio({})
    inputs = make_inputs(ours, "cross")
    with torch.no_grad(), use_backend(name):
        explained = explain(ours, *inputs, need_weights=weights)
        refused = name == "triton" or (name == "torch" and weights)
        assert explained.backend == (None if refused else name or "cpu")
        if refused:
            with pytest.raises(BackendRefused):
                ours(*inputs, need_weights=weights)
        else:
            ours(*inputs, need_weights=weights)


def test_drop_in() -> None:
    for options in ({}, {"kdim": 5}, {"add_bias_kv": True}, {"bias": False}):
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(E, HEADS, **options)
        torch.manual_seed(3)
        ours = encdec_fast.nn.MultiheadAttention(E, HEADS, **options)
        assert isinstance(ours, nn.MultiheadAttention)
        pairs = zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True)
        assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    ours = encdec_fast.nn.MultiheadAttention(E, HEADS)
    x = torch.randn(T, B, E)
    with torch.no_grad():
        expected = ours(x, x, x)[0]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x, x, x)[0], expected)
        assert ours.double()(x.double(), x.double(), x.double())[0].dtype == torch.float64
        ours.float()
        zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
        assert (torch.func.functional_call(ours, zeros, (x, x, x))[0] == 0).all()
        assert torch.equal(ours(x, x, x)[0], expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", INPUTS)
def test_compile(grad: bool, form: str) -> None:
    _, _, ours = trio({"batch_first": True})
    inputs = make_inputs(ours, form)
    masks = make_masks(MASKS["both"], *sizes(ours, inputs))
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*inputs, **masks), ours(*inputs, **masks)
    torch.testing.assert_close(found, expected)
    if grad:
        assert_same_gradients(found[0], expected[0], ours, inputs)


def test_export_with_dynamic_sizes() -> None:
    _, _, ours = trio({"batch_first": True})
    batch, queries, keys = (torch.export.Dim(name, min=2, max=64) for name in "BTS")
    query, key, padding = torch.randn(3, 4, E), torch.randn(3, 5, E), torch.zeros(3, 5).bool()
    shapes = {"query": {0: batch, 1: queries}, "key": {0: batch, 1: keys}}
    shapes.update(value=shapes["key"], key_padding_mask={0: batch, 1: keys})
    arguments = {"query": query, "key": key, "value": key, "key_padding_mask": padding}
    with torch.no_grad():
        exported = torch.export.export(ours, (), arguments, dynamic_shapes=shapes)
        assert "encdec_fast.attention" in str(exported.graph)
        query, key, padding = torch.randn(6, 9, E), torch.randn(6, 7, E), torch.rand(6, 7) < 0.3
        arguments = {"query": query, "key": key, "value": key, "key_padding_mask": padding}
        torch.testing.assert_close(exported.module()(**arguments), ours(**arguments))
