"""Parts whose weights an op reads: called all the same where they are more than a weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encdec_fast import explain, optimization_report, optimize, restore
from encdec_fast.nn import (
    AdditiveAttention,
    AttentionBridge,
    GatedBridge,
    Linear,
    LocationAttention,
    LuongAttention,
)

B, T, S = 3, 2, 4
LENGTHS = [4, 0, 3]


def make(name: str) -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    """(module, arguments, the parts that its op reads)."""
    query, memory = torch.randn(B, T, 24), torch.randn(B, S, 16)
    word, hidden = torch.randn(B, T, 6), torch.randn(B, T, 24)
    if name == "gated bridge":
        states = (torch.randn(2, B, 24), torch.randn(2, B, 24))
        return GatedBridge(24, 16), (states, torch.randn(B, 16)), ["gate", "context_proj"]
    if name == "location":
        return LocationAttention(6, 24, 9), (word, hidden, memory), ["attn"]
    if name == "location, lengths":
        return LocationAttention(6, 24, 9), (word, hidden, memory, LENGTHS, True), ["attn"]
    if name == "general":
        module = LuongAttention(24, 16, "general", output_size=5)
        return module, (query, memory, LENGTHS, True), ["memory_proj"]
    if name == "concat":
        module = LuongAttention(24, 16, "concat", 8)
        return module, (query, memory, LENGTHS), ["score_proj"]
    if name == "additive":
        return AdditiveAttention(24, 16, 8), (query, memory, LENGTHS, True), ["score"]
    if name == "coverage":
        module = AdditiveAttention(24, 16, 8, coverage=True)
        return module, (query, memory, LENGTHS, True), ["score", "coverage_proj"]
    return AttentionBridge(16, 8, 3), (memory, LENGTHS, True), ["score"]


NAMES = (
    "gated bridge",
    "location",
    "location, lengths",
    "general",
    "concat",
    "additive",
    "coverage",
    "attention bridge",
)
ALL_NAMES = pytest.mark.parametrize("name", NAMES)


def flat(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


class Adapted(nn.Linear):
    """A subclass that computes something else, as adapters do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5 * input.sum(-1, keepdim=True)


@ALL_NAMES
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_hook_on_a_part_is_called(name: str) -> None:
    module, arguments, parts = make(name)
    expected = flat(module(*arguments))
    expected_grads = torch.autograd.grad(expected[0].square().sum(), list(module.parameters()))
    for part in parts:
        seen: list[str] = []
        linear = module.get_submodule(part)
        for register in (linear.register_forward_hook, linear.register_full_backward_hook):
            handle = register(lambda *_, seen=seen: seen.append("hook"))
            found = flat(module(*arguments))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            grads = torch.autograd.grad(found[0].square().sum(), list(module.parameters()))
            torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
            assert seen
            explained = explain(module, *arguments)
            handle.remove()
            assert explained.backend == "torch"
            assert f"{part} has a hook" in str(explained)
            seen.clear()


@ALL_NAMES
@pytest.mark.parametrize("change", ["bias", "subclass", "module", "forward"])
def test_a_part_that_was_replaced_computes(name: str, change: str) -> None:
    """As plain torch does: each part is called, and its result is what counts."""
    module, arguments, parts = make(name)
    plain = flat(module(*arguments))
    for part in parts:
        other = copy.deepcopy(module)
        old: Any = other.get_submodule(part)
        sizes = (old.in_features, old.out_features)
        new: nn.Module = nn.Linear(*sizes) if change == "bias" else Adapted(*sizes, bias=False)
        if change == "module":
            new = nn.Sequential(nn.Linear(*sizes), nn.Tanh())
        if change == "forward":
            new = nn.Linear(*sizes)
            new.forward = lambda x, new=new: torch.tanh(x @ new.weight.t())
        setattr(other, part, new)
        found = flat(other(*arguments))
        calls: list[tuple[Tensor, Tensor]] = []
        handle = new.register_forward_hook(lambda _, x, y, calls=calls: calls.append((x[0], y)))
        torch.testing.assert_close(flat(other(*arguments)), found, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert calls
        for x, y in calls:
            torch.testing.assert_close(new(x), y)
        shared = change == "bias" and part in ("score", "score_proj")  # softmax does not see it
        assert shared or not torch.allclose(found[0], plain[0], atol=1e-4)


def test_a_bias_that_was_added_counts() -> None:
    bridge = GatedBridge(24, 16)
    bridge.context_proj = nn.Linear(16, 24)
    state, context = torch.randn(B, 24), torch.randn(B, 16)
    gate = torch.sigmoid(bridge.gate(torch.cat([state, context], -1)))
    expected = gate * state + (1 - gate) * torch.tanh(bridge.context_proj(context))
    torch.testing.assert_close(bridge(state, context), expected)
    bridge.weight_dtype = "int8"
    with pytest.raises(RuntimeError, match="inference"):
        bridge(state, context)
    bridge.weight_dtype = "int4"
    with pytest.raises(ValueError, match="weight_dtype must be"):
        bridge(state, context)


@ALL_NAMES
def test_optimize_leaves_what_an_op_reads(name: str) -> None:
    module, arguments, parts = make(name)
    state = set(module.__dict__)
    optimize(module, "int8")
    report = {line.name: line for line in optimization_report(module)}
    for part in parts:
        assert type(module.get_submodule(part)) is nn.Linear
        assert not report[part].fast
        assert report[part].weight_dtype is None
        assert f"op of {type(module).__name__} reads its weight" in str(report[part].reason)
    for line in report.values():
        assert line.fast == (line.weight_dtype == "int8")
    with torch.no_grad():
        module(*arguments)
    assert isinstance(module, GatedBridge) == ("" in report)
    restore(module)
    assert not any(type(part) is Linear for part in module.modules())
    assert state <= set(module.__dict__)


def test_optimize_of_a_gated_bridge() -> None:
    module, arguments, _ = make("gated bridge")
    with torch.no_grad():
        expected = module(*arguments)[0]
        optimize(module, "int8")
        found = module(*arguments)[0]
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.05)
        restore(module)
        assert torch.equal(module(*arguments)[0], expected)
    assert module.weight_dtype is None


@pytest.mark.parametrize("score", ["general", "concat"])
@pytest.mark.parametrize("own", [False, True])
def test_int8_is_the_same_with_and_without_keys(score: str, own: bool) -> None:
    """own: the part itself was optimized, and so is called."""
    module = LuongAttention(24, 16, score)
    query, memory = torch.randn(B, T, 24), torch.randn(B, S, 16)
    optimize(module.memory_proj if own else module, "int8")
    with torch.no_grad():
        shared = module(query, memory, LENGTHS, keys=module.project_memory(memory))
        torch.testing.assert_close(module(query, memory, LENGTHS), shared, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES[2:])
def test_memory_past_the_end_is_not_read_where_parts_are_called(name: str) -> None:
    module, arguments, parts = make(name)
    at = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.shape[1] == S)
    module.get_submodule(parts[0]).register_forward_hook(lambda *_: None)
    expected = flat(module(*arguments))
    spoiled = arguments[at].clone()
    spoiled[1] = torch.nan
    spoiled[2, 3:] = torch.nan
    given = list(arguments)
    given[at] = spoiled
    torch.testing.assert_close(flat(module(*given)), expected)


@ALL_NAMES
def test_compile_where_parts_are_called(name: str) -> None:
    module, arguments, parts = make(name)
    setattr(module, parts[0], nn.Sequential(module.get_submodule(parts[0])))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(*arguments)), flat(module(*arguments)))
