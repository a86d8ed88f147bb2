"""`resets` of LSTM and GRU: the state before a step is zero, as if another sequence began there."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import provided
from torch import Tensor

import encdec_fast
from encdec_fast import BackendRefused, explain, ops, use_backend

MODULES: dict[str, Any] = {"lstm": encdec_fast.nn.LSTM, "gru": encdec_fast.nn.GRU}
EACH = pytest.mark.parametrize("kind", MODULES)
T, B, I, H = 7, 5, 6, 40


@pytest.fixture(params=["cuda", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return provided(request)


def resets_of(T: int, B: int) -> Tensor:
    """Some at the first step, some at the last, a sequence without any, one that always begins."""
    resets = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3
    resets[0, 0] = resets[-1, 1] = True
    resets[:, 2], resets[:, 3] = False, True
    return resets


def segments(module: Any, x: Tensor, resets: Tensor, state: Any) -> Tensor:
    """The output of a layer in one direction, each episode run by itself. x (T, B, I)."""
    rows = []
    for b in range(x.shape[1]):
        begins = [t for t in range(x.shape[0]) if resets[t, b]]
        bounds = sorted({0, *begins, x.shape[0]})
        outputs = []
        for first, end in pairwise(bounds):
            own = None
            if first == 0 and 0 not in begins:
                own = tuple(s[:, b : b + 1] for s in state) if isinstance(state, tuple) else None
                own = state[:, b : b + 1] if own is None else own
            outputs.append(module(x[first:end, b : b + 1], own)[0])
        rows.append(torch.cat(outputs))
    return torch.cat(rows, 1)


def states_of(kind: str, rows: int) -> Any:
    h, c = torch.randn(2, rows, B, H).unbind(0)
    return (h, c) if kind == "lstm" else h


@EACH
def test_as_episodes_by_themselves(kind: str, backend: str) -> None:
    module = MODULES[kind](I, H).requires_grad_(False)
    x, resets, state = torch.randn(T, B, I), resets_of(T, B), states_of(kind, 1)
    with use_backend("reference"):
        expected = segments(module, x, resets, state)
    with use_backend(backend):
        assert explain(module, x, state, resets=resets).backend == backend
        output, last = module(x, state, resets=resets)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    h_n = last[0] if kind == "lstm" else last
    torch.testing.assert_close(h_n[0], expected[-1], rtol=0, atol=1e-5)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(kind: str, dtype: torch.dtype, backend: str, cuda_kernels: None) -> None:
    """Of everything, with layers and directions, beside the reference in float64."""
    module = MODULES[kind](I, H, 2, bidirectional=True, batch_first=True)
    x, state = torch.randn(B, T, I), states_of(kind, 4)
    resets = resets_of(T, B).t()
    seeds: list[Tensor] = []

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        own = MODULES[kind](I, H, 2, bidirectional=True, batch_first=True)
        own.load_state_dict(module.state_dict())
        own = own.to(dtype)
        leaves = [
            t.to(dtype).requires_grad_()
            for t in (x, *(state if isinstance(state, tuple) else (state,)))
        ]
        given = tuple(leaves[1:]) if kind == "lstm" else leaves[1]
        with use_backend(backend):
            output, last = own(leaves[0], given, resets=resets)
            results = [output, *(last if isinstance(last, tuple) else (last,))]
            if not seeds:
                seeds.extend(torch.randn_like(result) for result in results)
            wanted = [*leaves, *own.parameters()]
            grads = torch.autograd.grad(results, wanted, [s.to(dtype) for s in seeds])
        return [*results, *grads]

    exact = run(torch.float64, "reference")
    plain, found = run(dtype, "reference"), run(dtype, backend)
    for true, their, own in zip(exact, plain, found, strict=True):
        floor = 8 * torch.finfo(dtype).eps * true.abs().max().item()
        allowed = 3 * (their.double() - true).abs().max().item() + floor
        assert (own.double() - true).abs().max().item() <= allowed


@EACH
def test_functions(kind: str, backend: str) -> None:
    """One sequence without a batch, and what a tracer sees."""
    module = MODULES[kind](I, H).requires_grad_(False)
    weights = list(module.parameters())
    function = getattr(ops, kind)
    x, resets = torch.randn(T, I), resets_of(T, B)[:, 0]
    with use_backend(backend):
        alone = function(x, None, weights, resets=resets)[0]
        batch = function(x.unsqueeze(1), None, weights, resets=resets.unsqueeze(1))[0]
    assert torch.equal(alone, batch[:, 0])
    with use_backend(backend):
        assert torch.equal(module(x, resets=resets)[0], alone)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x.unsqueeze(1), resets=resets.unsqueeze(1))[0], batch, rtol=0, atol=1e-5
    )


@EACH
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_backends_without_them_say_so(kind: str, name: str, native: None) -> None:
    module, x = MODULES[kind](I, H), torch.randn(T, B, I)
    with use_backend(name), pytest.raises(BackendRefused, match="resets"):
        module(x, resets=resets_of(T, B))


@EACH
def test_bad_resets(kind: str) -> None:
    module, x, resets = MODULES[kind](I, H), torch.randn(T, B, I), resets_of(T, B)
    for wrong in (resets.t(), resets.float(), resets[:, :2], resets.to("meta")):
        with pytest.raises(RuntimeError, match="'resets'"):
            module(x, resets=wrong)
    with pytest.raises(TypeError, match="'resets'"):
        module(x, resets=[True])
    with pytest.raises(ValueError, match="resets"):
        module(x, resets=resets, lengths=[T] * B)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T] * B))
    with pytest.raises(ValueError, match="resets"):
        module(packed, resets=resets)
    with pytest.raises(ValueError, match="resets"):
        getattr(ops, kind)(x, None, list(module.parameters()), resets=resets, lengths=[T] * B)
