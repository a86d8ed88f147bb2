"""Padding in a Transformer: it is not computed, changes nothing, and may be all there is."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from test_transformer import ALL_KINDS, HEADS, INNER, B, E, S, arguments, trio
from torch import Tensor, nn

import encdec_fast
from encdec_fast import use_backend


@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.Tanh])
@pytest.mark.parametrize("batch_first", [False, True])
def test_padding_is_not_computed(norm: Any, batch_first: bool, native: None) -> None:
    """It is zero, whatever stood there, and a sentence may be padding only."""
    layer = encdec_fast.nn.TransformerEncoderLayer(E, HEADS, INNER, batch_first=batch_first)
    final = norm if norm is None else norm(E) if norm is nn.LayerNorm else norm()
    encoder = encdec_fast.nn.TransformerEncoder(layer, 2, final).eval()
    x = torch.randn(B, S, E)
    hidden = torch.rand(B, S) < 0.4
    hidden[1] = True
    hidden[2] = False

    def call(x: Tensor) -> Tensor:
        found: Tensor = encoder(
            x if batch_first else x.transpose(0, 1), src_key_padding_mask=hidden
        )
        return found if batch_first else found.transpose(0, 1)

    with torch.no_grad(), use_backend("cpu"):
        found = call(x)
        spoiled = call(x.masked_fill(hidden[..., None], torch.nan))
        everything = encoder(x if batch_first else x.transpose(0, 1), src_key_padding_mask=None)
    assert torch.equal(found, spoiled)
    assert (found[hidden] == 0).all()
    torch.testing.assert_close(
        found[2], (everything if batch_first else everything.transpose(0, 1))[2]
    )
    hidden[:] = True
    with torch.no_grad():
        assert (call(x) == 0).all()
    encoder.enable_nested_tensor = False
    hidden[:] = False
    hidden[0, 3:] = True
    with torch.no_grad():
        kept = call(x)
        assert (kept[0, 3:] != 0).all()
        encoder.enable_nested_tensor = True
        torch.testing.assert_close(call(x)[~hidden], kept[~hidden])


@hypothesis.given(
    lengths=strategies.lists(strategies.integers(0, 6), min_size=1, max_size=5),
    causal=strategies.booleans(),
    batch_first=strategies.booleans(),
    seed=strategies.integers(0, 99),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_batch_gives_what_its_sentences_give(
    lengths: list[int], causal: bool, batch_first: bool, seed: int
) -> None:
    """Real tokens anywhere in a row: the same as those tokens alone."""
    torch.manual_seed(seed)
    layer = encdec_fast.nn.TransformerEncoderLayer(E, HEADS, INNER, batch_first=batch_first)
    encoder = encdec_fast.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(len(lengths), 6, E)
    real = torch.stack([torch.randperm(6) < n for n in lengths])
    mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
    whole = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        output = encoder(whole, mask=mask, src_key_padding_mask=~real)
        output = output if batch_first else output.transpose(0, 1)
        for row, n in enumerate(lengths):
            if n:
                own = None if mask is None else mask[:n, :n]
                alone = encoder(x[row, real[row]], mask=own)
                torch.testing.assert_close(output[row, real[row]], alone, rtol=1e-4, atol=1e-5)


@ALL_KINDS
@pytest.mark.parametrize("grad", [False, True])
def test_a_query_without_keys_is_no_nan(kind: str, grad: bool) -> None:
    _, _, ours = trio(kind, {"batch_first": True})
    inputs, extra = arguments(kind, {"batch_first": True}, "padding")
    for name, mask in extra.items():
        if mask is not None and "padding" in name:
            mask[1] = True
    with torch.set_grad_enabled(grad):
        output = ours(*inputs, **extra)
    assert output.isfinite().all()
    if grad:
        output.sum().backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters())
