"""The attention decoder and attention without padding on the ops of the `triton` backend."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from helpers import assert_as_good
from test_attention_decoder import ALL_KINDS, CELLS, SHAPES, bound, copy, gradients, make, reference
from torch import Tensor
from torch.library import opcheck

from encdec_fast import explain, use_backend
from encdec_fast.ops import _triton, attention_decoder, varlen_attention

pytestmark = pytest.mark.usefixtures("interpreter")
FEW = pytest.mark.parametrize("shape", [SHAPES[name] for name in ("even", "odd")], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@FEW
@CELLS
@ALL_KINDS
@DTYPES
def test_decoder(shape: Any, cell: str, kind: str, dtype: torch.dtype) -> None:
    given = make(shape, cell, kind, dtype)
    with torch.no_grad():
        truth, theirs = reference(**copy(given, torch.float64)), reference(**given)
        with use_backend("triton"):
            assert explain(attention_decoder, **given).backend == "triton"
            found = attention_decoder(**given, need_weights=True)
            output, c_n = attention_decoder(**given)
    assert torch.equal(output, found[0]) and torch.equal(c_n, found[1])
    assert_as_good(list(found), list(theirs), list(truth), 2.0, relative=bound(given))


@CELLS
@ALL_KINDS
@pytest.mark.parametrize("inside", [True, False])
def test_gradients_of_the_decoder(cell: str, kind: str, inside: bool) -> None:
    """Backward runs on the same backend, whatever is asked for by then."""
    given = make(SHAPES["even"], cell, kind, torch.float32, grad=True)
    theirs, truth = copy(given, torch.float32), copy(given, torch.float64)
    expected, exact = reference(**theirs), reference(**truth)
    seeds = [torch.randn(result.shape) for result in exact]
    with use_backend("triton"):
        found = attention_decoder(**given, need_weights=True)
        if inside:
            ours = gradients(found, given, seeds)
    if not inside:
        ours = gradients(found, given, seeds)
    others = gradients(expected, theirs, seeds), gradients(exact, truth, seeds)
    assert_as_good(ours, *others, 3.0, relative=bound(given))


@CELLS
def test_op(cell: str) -> None:
    given = make(SHAPES["even"], cell, "additive", torch.float32, grad=True)
    names = ("input", "h0", "c0", "context0", "keys", "values", "weight_ih", "weight_hh")
    names += ("bias_ih", "bias_hh", "query_weight", "score_weight", "positions", "output_weight")
    names += ("coverage", "coverage_weight", "memory_lengths")
    tensors = [given.get(name) for name in names]
    with use_backend("triton"):
        op = torch.ops.encdec_fast.attention_decoder_train.default
        opcheck(op, (*tensors, cell, 1.0, True), test_utils=("test_schema", "test_faketensor"))


def test_a_whole_call_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, from the second call of its sizes on; the graph is stood in for by the launches."""
    module: Any = importlib.import_module("encdec_fast.ops._attention_decoder_triton")
    replay = _triton.kernels("_replay")
    captured: list[int] = []

    def capture(launch: Any, tensors: Any, device: torch.device) -> Any:
        captured.append(len(tensors))
        return lambda: launch(tensors)

    monkeypatch.setattr(replay, "capture", capture)
    module._replays.cache_clear()
    monkeypatch.setattr(module, "_captures", lambda call, tensor: not call.training)
    with torch.no_grad():
        for i in range(4):
            given = make(SHAPES["odd"], "lstm", "additive", torch.float32)
            expected = attention_decoder(**given, need_weights=True)
            with use_backend("triton"):
                found = attention_decoder(**given, need_weights=True)
            for own, true in zip(found, expected, strict=True):
                torch.testing.assert_close(own, true, rtol=1e-4, atol=1e-5)
            assert len(captured) == (i > 0)
    module._replays.cache_clear()  # its graphs are stand-ins


def sentences(dtype: torch.dtype, causal: bool) -> list[Tensor]:
    """Five of them, one without a query, one without a memory."""
    queries = torch.tensor([0, 5, 5, 9, 10, 12])
    memory = torch.tensor([0, 7, 9, 9, 30, 33])
    tensors = [torch.randn(n, h, 24) for n, h in ((12, 4), (33, 2), (33, 2))]
    return [*(tensor.to(dtype) for tensor in tensors), queries, queries if causal else memory]


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_without_padding(dtype: torch.dtype, causal: bool) -> None:
    query, key, value, starts, memory = sentences(dtype, causal)
    key, value = key[: int(memory[-1])], value[: int(memory[-1])]
    given = (query, key, value, starts, memory)
    doubles = [t.double() if t.is_floating_point() else t for t in given]
    with use_backend("reference"):
        truth = varlen_attention(*doubles, causal=causal, scale=0.3)
        theirs = varlen_attention(*given, causal=causal, scale=0.3)
    with use_backend("triton"):
        assert explain(varlen_attention, *given).backend == "triton"
        found = varlen_attention(*given, causal=causal, scale=0.3)
    assert found.dtype == dtype and found.is_contiguous()
    assert_as_good([found], [theirs], [truth], 2.0)


def test_nothing_without_padding() -> None:
    empty = torch.zeros(1).long()
    with use_backend("triton"):
        for offsets in (empty, torch.zeros(4).long()):
            found = varlen_attention(*torch.randn(3, 0, 2, 8).unbind(0), offsets, offsets)
            assert found.shape == (0, 2, 8)
