"""Bridges: direct, gated and by attention, as functions and as modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_as_good, poison
from torch import Tensor, nn

import encdec_fast
from encdec_fast import explain, use_backend
from encdec_fast.nn import AttentionBridge, Bridge, DirectBridge, GatedBridge
from encdec_fast.ops import direct_bridge, merge_directions


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native")
    name: str = request.param
    return name


def pair(layers: int, B: int = 3, H: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(layers, B, H), torch.randn(layers, B, H)


def test_merging_is_by_layer() -> None:
    """As torch's encoders give their states: each layer forward, then backward."""
    encoder = nn.GRU(4, 5, num_layers=2, bidirectional=True)
    output, h_n = encoder(torch.randn(7, 3, 4))
    merged = merge_directions(h_n)
    assert merged.shape == (2, 3, 10)
    torch.testing.assert_close(merged[-1, :, :5], output[-1, :, :5])
    torch.testing.assert_close(merged[-1, :, 5:], output[0, :, 5:])
    torch.testing.assert_close(merge_directions(h_n, "sum"), merged[..., :5] + merged[..., 5:])


def test_direct() -> None:
    h, c = pair(2)
    assert direct_bridge(h) is h
    assert direct_bridge((h, c), 2) == (h, c)
    last = direct_bridge((h, c), 1, last_layers=True)
    assert torch.equal(last[0], h[1:])
    assert torch.equal(last[1], c[1:])
    both = direct_bridge((h, c), bidirectional=True, merge="sum")
    assert torch.equal(both[0], h[:1] + h[1:])
    h.requires_grad_()
    (grad,) = torch.autograd.grad(direct_bridge(h, 1, last_layers=True).sum(), h)
    assert torch.equal(grad, torch.tensor([0.0, 1.0])[:, None, None].expand(2, 3, 5))


BAD_STATES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "rank": (torch.randn(3, 5), {}, RuntimeError, r"\(layers, B, H\)"),
    "unequal rows": ((torch.randn(2, 3, 5), torch.randn(2, 4, 5)), {}, RuntimeError, "h and c"),
    "three": ((*pair(1), torch.randn(1, 3, 5)), {}, RuntimeError, "pair"),
    "odd directions": (torch.randn(3, 2, 5), {"bidirectional": True}, RuntimeError, "directions"),
    "merge": (torch.randn(2, 2, 5), {"merge": "mean"}, ValueError, "'concat', 'sum'"),
    "more layers": (
        torch.randn(2, 3, 5),
        {"num_layers": 3, "last_layers": True},
        RuntimeError,
        "decoder has 3 layers, but the encoder gives the states of 2$",
    ),
    "fewer layers": (torch.randn(2, 3, 5), {"num_layers": 1}, RuntimeError, "last_layers=True"),
}


@pytest.mark.parametrize(("states", "options", "kind", "text"), BAD_STATES.values(), ids=BAD_STATES)
def test_states_that_do_not_fit(
    states: Any, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        direct_bridge(states, **options)
    with pytest.raises(kind, match=text):
        DirectBridge(**options)(states)


BAD_KINDS: dict[str, tuple[Any, str]] = {
    "list": (list(pair(2)), "got list"),
    "none": (None, "got NoneType"),
    "three": ((*pair(1), torch.randn(1, 3, 5)), "got 3 of them"),
    "no tensors": ((torch.randn(1, 3, 5), None), "got tuple"),
}


@pytest.mark.parametrize(("states", "text"), BAD_KINDS.values(), ids=BAD_KINDS)
def test_states_of_another_kind(states: Any, text: str) -> None:
    for module, rest in (
        (DirectBridge(), ()),
        (DirectBridge(merge="projection", hidden_size=5, output_size=4, lstm=True), ()),
        (GatedBridge(5, 4), (torch.randn(3, 4),)),
    ):
        with pytest.raises(RuntimeError, match=rf"pair \(h, c\).*{text}"):
            module(states, *rest)


def test_merge_directions_refuses() -> None:
    with pytest.raises(RuntimeError, match="3 dimensions"):
        merge_directions(torch.randn(2, 5))
    with pytest.raises(ValueError, match="projection"):
        merge_directions(torch.randn(2, 3, 5), "projection")


def test_direct_module_runs_a_decoder() -> None:
    encoder = encdec_fast.nn.LSTM(4, 5, num_layers=2, bidirectional=True)
    decoder = encdec_fast.nn.LSTM(4 + 6, 6, num_layers=2)
    bridge = DirectBridge(
        2,
        bidirectional=True,
        merge="projection",
        hidden_size=5,
        output_size=6,
        lstm=True,
        feed=True,
    )
    _, states = encoder(torch.randn(7, 3, 4))
    first, fed = bridge(states)
    for state, linear, given in zip(
        first, (bridge.hidden_proj, bridge.cell_proj), states, strict=True
    ):
        torch.testing.assert_close(state, linear(torch.cat([given[0::2], given[1::2]], -1)))
    assert torch.equal(fed, first[0][-1])
    words = torch.randn(8, 3, 4)
    output, _ = decoder(torch.cat([words, fed.expand(8, -1, -1)], -1), first)
    output.sum().backward()
    assert all(p.grad is not None for p in [*bridge.parameters(), *encoder.parameters()])
    assert list(bridge.state_dict()) == [
        "hidden_proj.weight",
        "hidden_proj.bias",
        "cell_proj.weight",
        "cell_proj.bias",
    ]


def test_direct_module_of_a_gru() -> None:
    h, _ = pair(2)
    first, fed = DirectBridge(feed=True)(h)
    assert first is h
    assert torch.equal(fed, h[1])
    plain = DirectBridge(merge="projection", hidden_size=5, output_size=8)
    torch.testing.assert_close(plain(h), plain.hidden_proj(h))
    assert not list(DirectBridge().parameters())
    with pytest.raises(RuntimeError, match="one tensor"):
        plain(pair(2))
    with pytest.raises(RuntimeError, match="pair"):
        DirectBridge(merge="projection", hidden_size=5, output_size=8, lstm=True)(h)
    with pytest.raises(ValueError, match="hidden_size and output_size"):
        DirectBridge(merge="projection", hidden_size=5)
    with pytest.raises(ValueError, match="for merge='projection'"):
        DirectBridge(output_size=5)
    with pytest.raises(ValueError, match="'concat', 'sum', 'projection'"):
        DirectBridge(merge="mean")


def plain_gate(module: GatedBridge, state: Tensor, context: Tensor) -> Tensor:
    """The network of the module's docstring."""
    g = torch.sigmoid(module.gate(torch.cat([state, context], -1)))
    return g * state + (1 - g) * torch.tanh(module.context_proj(context))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gated_module(dtype: torch.dtype, bias: bool, backend: str) -> None:
    module = GatedBridge(19, 12, bias=bias, dtype=dtype)
    truth = copy.deepcopy(module).double()
    state, context = torch.randn(7, 19).to(dtype), torch.randn(7, 12).to(dtype)
    with use_backend(backend):
        poison()
        with torch.no_grad():
            assert_as_good(
                [module(state, context)],
                [plain_gate(module, state, context)],
                [plain_gate(truth, state.double(), context.double())],
                2.0,
            )
        found = torch.autograd.grad(module(state, context).sum(), list(module.parameters()))
    theirs = torch.autograd.grad(
        plain_gate(module, state, context).sum(), list(module.parameters())
    )
    expected = torch.autograd.grad(
        plain_gate(truth, state.double(), context.double()).sum(), list(truth.parameters())
    )
    assert_as_good(list(found), list(theirs), list(expected), 3.0)
    names = ["gate.weight", *(["gate.bias"] if bias else []), "context_proj.weight"]
    assert list(module.state_dict()) == names


def test_gated_module_takes_a_decoders_states() -> None:
    module = GatedBridge(5, 4)
    (h, c), context = pair(2), torch.randn(3, 4)
    mixed, cell = module((h, c), context)
    assert cell is c
    for layer in range(2):
        torch.testing.assert_close(mixed[layer], module(h[layer], context))
    torch.testing.assert_close(module(h, context.expand(2, -1, -1)), mixed)
    with pytest.raises(RuntimeError, match="context must have shape"):
        module(h[0], torch.randn(2, 4))


def test_gated_module_in_fewer_bits(native: None) -> None:
    module = GatedBridge(32, 16)
    state, context = torch.randn(3, 32), torch.randn(3, 16)
    with torch.no_grad():
        whole = module(state, context)
        for weight_dtype in (torch.bfloat16, "int8"):
            module.weight_dtype = weight_dtype
            assert explain(module, state, context).backend == "cpu"
            found = module(state, context)
            assert not torch.equal(found, whole)
            torch.testing.assert_close(found, whole, rtol=0.05, atol=0.02)
    with pytest.raises(RuntimeError, match="no_grad"):
        module(state, context)


def plain_summary(module: AttentionBridge, memory: Tensor, lengths: list[int]) -> Any:
    """The network of the module's docstring, a sentence at a time."""
    rows, weights = [], []
    for own, n in zip(memory, lengths, strict=True):
        hidden = torch.tanh(module.queries.unsqueeze(1) + module.memory_proj(own[:n]))
        weight = torch.softmax(module.score(hidden).squeeze(-1), dim=-1)
        rows.append(weight @ own[:n])
        weights.append(nn.functional.pad(weight, (0, memory.shape[1] - n)))
    summary = torch.stack(rows)
    first = summary.mean(1)
    if module.state_proj is not None:
        first = torch.tanh(module.state_proj(first))
    return first.expand(module.num_layers, -1, -1), summary, torch.stack(weights)


@pytest.mark.parametrize("hidden_size", [None, 9])
@pytest.mark.parametrize("queries", [1, 4])
def test_attention_module(hidden_size: int | None, queries: int, backend: str) -> None:
    module = AttentionBridge(6, 7, queries, hidden_size, num_layers=2)
    truth = copy.deepcopy(module).double()
    memory, lengths = torch.randn(3, 8, 6), [8, 3, 1]
    with use_backend(backend):
        found = module(memory, lengths, need_weights=True)
        alone = module(memory, lengths)
    expected = plain_summary(truth, memory.double(), lengths)
    theirs = plain_summary(module, memory, lengths)
    # relative: the error of tanh that csrc/attention/additive_factors.h states.
    assert_as_good(list(found), list(theirs), list(expected), 2.0, relative=1e-6)
    assert found[0].shape == (2, 3, hidden_size or 6)
    for a, b in zip(alone, found[:2], strict=True):
        assert torch.equal(a, b)
    assert_as_good(
        list(torch.autograd.grad(found[0].square().sum(), list(module.parameters()))),
        list(torch.autograd.grad(theirs[0].square().sum(), list(module.parameters()))),
        list(torch.autograd.grad(expected[0].square().sum(), list(truth.parameters()))),
        3.0,
        relative=1e-6,
    )


def test_attention_module_without_a_memory() -> None:
    """A sentence of length zero has zeros; a memory of no positions too."""
    module = AttentionBridge(6, 7, 2)
    first, summary = module(torch.randn(2, 5, 6), [5, 0])
    assert first[0, 0].any()
    assert not first[0, 1].any()
    assert not summary[1].any()
    assert not module(torch.randn(2, 0, 6))[1].any()
    for bad in (torch.randn(2, 5, 7), torch.randn(5, 6)):
        with pytest.raises(RuntimeError, match=r"\(B, S, 6\)"):
            module(bad)
    with pytest.raises(RuntimeError, match="found 6"):
        module(torch.randn(2, 5, 6), [5, 6])
    with pytest.raises(ValueError, match="at least 1"):
        AttentionBridge(6, 7, 0)


def test_a_decoder_attends_to_the_summary() -> None:
    bridge = AttentionBridge(6, 7, 3, hidden_size=5)
    attention = encdec_fast.nn.AdditiveAttention(5, 6, 8)
    first, summary = bridge(torch.randn(2, 9, 6))
    context = attention(first.transpose(0, 1), summary)
    assert context.shape == (2, 1, 6)
    context.sum().backward()
    assert all(p.grad is not None for p in bridge.parameters())


Made = tuple[Bridge, tuple[Any, ...]]


@pytest.fixture(params=["direct", "gated", "attention"])
def made(request: pytest.FixtureRequest) -> Made:
    """A module of each kind, and arguments for it."""
    if request.param == "direct":
        return DirectBridge(merge="projection", hidden_size=5, output_size=4), pair(2)[:1]
    if request.param == "gated":
        return GatedBridge(5, 4), (pair(2)[0], torch.randn(2, 3, 4))
    return AttentionBridge(6, 7, 2, 5), (torch.randn(3, 4, 6), torch.tensor([4, 0, 2]))


def test_copies(made: Made) -> None:
    module, arguments = made
    with torch.no_grad():
        expected = module(*arguments)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.testing.assert_close(other(*arguments), expected, rtol=0, atol=0)
    assert isinstance(module, Bridge)
    assert str(module)


@pytest.mark.parametrize("grad", [False, True])
def test_compile(made: Made, grad: bool) -> None:
    module, arguments = made
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*arguments), module(*arguments)
    torch.testing.assert_close(found, expected)
    if grad:
        first = [r[0] if isinstance(r, tuple) else r for r in (found, expected)]
        torch.testing.assert_close(
            *(torch.autograd.grad(r.square().sum(), list(module.parameters())) for r in first)
        )


def test_export_with_a_dynamic_batch(made: Made) -> None:
    module, arguments = made
    batch = torch.export.Dim("batch", min=2)
    at = {"DirectBridge": (1,), "GatedBridge": (1, 1), "AttentionBridge": (0, 0)}
    places = at[type(module).__name__]
    dynamic = tuple({place: batch} for place in places)
    more = tuple(
        torch.cat([t, t.flip(place)], place) for t, place in zip(arguments, places, strict=True)
    )
    with torch.no_grad():
        exported = torch.export.export(module, arguments, dynamic_shapes=dynamic).module()
        torch.testing.assert_close(exported(*more), module(*more))


def test_explain(native: None) -> None:
    with torch.no_grad():
        found = explain(GatedBridge(5, 4), pair(2), torch.randn(3, 4))
        assert found.backend == "cpu"
        assert "M=6 H=5 C=4" in str(found)
        found = explain(AttentionBridge(6, 7, 2), torch.randn(3, 4, 6))
        assert found.backend == "cpu"
        assert "Tq=2" in str(found)
