"""Transformer modules whose parts were changed after they were made: the result is torch's."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from helpers import error
from test_transformer import ALL_KINDS, B, T, arguments, trio
from torch import Tensor, nn

import encdec_fast
from encdec_fast import BackendRefused, explain, optimize, use_backend

FIRST = {"batch_first": True}
WIDE = {"d_model": 24, "nhead": 4, "batch_first": True}
STACKS = pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])


def layers(kind: str, model: Any) -> list[Any]:
    """Its layers; of a Transformer the decoder's."""
    if kind.endswith("layer"):
        return [model]
    return list((model.decoder if kind == "transformer" else model).layers)


def same(ours: Any, theirs: Any, inputs: list[Tensor], extra: dict[str, Any]) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found, expected = ours(*inputs, **extra), theirs(*inputs, **extra)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@ALL_KINDS
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_norm_over_more_than_a_token(kind: str, affine: bool, number: int) -> None:
    _, theirs, ours = trio(kind, FIRST)
    inputs, extra = arguments(kind, FIRST, "causal")
    shape = inputs[0 if kind != "transformer" else 1].shape[1:]
    norm = nn.LayerNorm(shape, elementwise_affine=affine)
    for model in (theirs, ours):
        layer = layers(kind, model)[-1]
        if not hasattr(layer, f"norm{number}"):
            return
        setattr(layer, f"norm{number}", copy.deepcopy(norm))
        model.train()  # torch's own fast path does not know such norms either
    same(ours, theirs, inputs, extra)
    ours.eval()
    same(ours, theirs, inputs, extra)
    with torch.no_grad():
        assert f"norm{number} is not over" in explain(ours, *inputs, **extra).plan


@pytest.mark.parametrize("options", [WIDE, {**WIDE, "batch_first": False}])
@pytest.mark.parametrize("form", ["end", "anywhere"])
@pytest.mark.parametrize("affine", [False, True])
def test_a_final_norm_over_more_than_a_token(
    options: dict[str, Any], form: str, affine: bool
) -> None:
    """What it sees of padding is what it sees in torch, whose way depends on the mask."""
    _, theirs, ours = trio("encoder", options)
    (x,), _ = arguments("encoder", options, "none")
    hidden = torch.zeros(B, x.shape[1 if options["batch_first"] else 0], dtype=torch.bool)
    hidden[0, -2:] = True
    hidden[1, 2] = form == "anywhere"
    norm = nn.LayerNorm(x.shape[1:], elementwise_affine=affine)
    ours = optimize(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model.norm = copy.deepcopy(norm)
        model.eval()
    same(ours, theirs, [x], {"src_key_padding_mask": hidden})
    same(ours, theirs, [x], {})
    with torch.no_grad():
        explained = explain(ours, x, src_key_padding_mask=hidden)
    assert "the final norm is not over" in str(explained)


@pytest.mark.parametrize("kind", ["decoder layer", "decoder", "transformer"])
@pytest.mark.parametrize("first", [False, True])
def test_attentions_of_two_layouts(kind: str, first: bool) -> None:
    """Such a layer is what torch makes of it; with as many rows as tokens no error tells."""
    options = {"batch_first": first}
    _, theirs, ours = trio(kind, options)
    for model in (theirs, ours):
        for layer in layers(kind, model):
            layer.multihead_attn.batch_first = not first
        model.eval()
    inputs = [torch.randn(T, T, 12), torch.randn(T, T, 12)]
    same(ours, theirs, inputs, {})
    with torch.no_grad():
        assert "batch_first is not the same" in explain(ours, *inputs).plan


@ALL_KINDS
@pytest.mark.parametrize("block", ["_sa_block", "_mha_block", "_ff_block"])
def test_a_block_replaced_on_the_instance(kind: str, block: str) -> None:
    _, theirs, ours = trio(kind, FIRST)
    inputs, extra = arguments(kind, FIRST, "none")
    with torch.no_grad():
        before = ours(*inputs, **extra)
    for model in (theirs, ours):
        model.train()
        layer = layers(kind, model)[-1]
        if not hasattr(layer, block):
            return
        setattr(layer, block, types.MethodType(lambda self, x, *_, **options: x * 0.5, layer))
    same(ours, theirs, inputs, extra)
    with torch.no_grad():
        assert not torch.allclose(ours(*inputs, **extra), before, atol=1e-3)
        assert f"{block} was replaced" in str(explain(ours, *inputs, **extra))


@STACKS
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "heads"])
def test_layers_of_unequal_heads(kind: str, masks: str) -> None:
    """A mask per head fits no other number of heads: torch's error, and no result."""
    _, theirs, ours = trio(kind, FIRST)
    inputs, extra = arguments(kind, FIRST, masks)
    for model in (theirs, ours):
        for name in ("self_attn", "multihead_attn"):
            attention = getattr(layers(kind, model)[1], name, None)
            if attention is not None:
                attention.num_heads, attention.head_dim = 2, 6
        model.train()
    if masks != "heads":
        same(ours, theirs, inputs, extra)
        return
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises(Exception) as expected:
                theirs(*inputs, **extra)
            with pytest.raises(expected.type):
                ours(*inputs, **extra)


@ALL_KINDS
@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_dtype_that_there_is_not(kind: str, grad: bool) -> None:
    _, _, ours = trio(kind, FIRST)
    inputs, extra = arguments(kind, FIRST, "none")
    ours.weight_dtype = "foo"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"'int8'.*'foo'"):
        ours(*inputs, **extra)
    for module, given in (
        (encdec_fast.nn.Linear(3, 4), (torch.randn(2, 3),)),
        (encdec_fast.nn.MultiheadAttention(4, 2), (torch.randn(2, 3, 4),) * 3),
    ):
        module.weight_dtype = "foo"
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="weight_dtype must be"):
            module(*given)
        with pytest.raises(ValueError, match="weight_dtype must be"):
            explain(module, *given)


PADDING: dict[str, Any] = {
    "long": torch.zeros(B, T + 1, dtype=torch.bool),
    "turned": torch.zeros(T, B, dtype=torch.bool),
    "float": torch.zeros(B, T + 1),
    "one dimension": torch.zeros(T, dtype=torch.bool),
    "three dimensions": torch.zeros(B, T, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
@pytest.mark.parametrize("form", PADDING)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_padding_of_another_shape(
    kind: str, form: str, grad: bool, train: bool, first: bool
) -> None:
    _, theirs, _ = trio(kind, {**WIDE, "batch_first": first})
    theirs.train(train)
    ours = optimize(copy.deepcopy(theirs))
    x = torch.randn((B, T, 24) if first else (T, B, 24))
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception) as expected:
            theirs(x, src_key_padding_mask=PADDING[form])
        with pytest.raises(expected.type):
            ours(x, src_key_padding_mask=PADDING[form])


@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["src_key_padding_mask", "mask"])
@pytest.mark.parametrize("grad", [False, True])
def test_float_masks_of_another_dtype(kind: str, dtype: Any, where: str, grad: bool) -> None:
    """Torch's fast path takes them, and the way with gradients does not."""
    _, theirs, _ = trio(kind, WIDE)
    theirs.eval()
    ours = optimize(copy.deepcopy(theirs))
    mask = torch.zeros((B, T) if "padding" in where else (T, T), dtype=dtype)
    mask[:, -1] = -torch.inf
    name = "src_mask" if where == "mask" and kind == "encoder layer" else where
    x = torch.randn(B, T, 24)
    with torch.set_grad_enabled(grad):
        if grad:
            with pytest.raises(Exception) as expected:
                theirs(x, **{name: mask})
            with pytest.raises(expected.type):
                ours(x, **{name: mask})
            return
        found, exact = ours(x, **{name: mask}), theirs(x, **{name: mask})
        assert error(found, exact) < 1e-4
        with use_backend("cpu"), pytest.raises(BackendRefused, match="do not fit"):
            ours(x, **{name: mask})
