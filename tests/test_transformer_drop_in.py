"""The Transformer modules in torch's world: optimize, copies, graphs, and what falls back."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients
from test_transformer import ALL_KINDS, HEADS, INNER, B, E, S, T, arguments, at_real, build, trio
from torch import Tensor, nn

import encdec_fast
from encdec_fast import explain, optimization_report, optimize, restore, use_backend

SWAPS: dict[Any, Any] = {
    nn.MultiheadAttention: encdec_fast.nn.MultiheadAttention,
    nn.Linear: encdec_fast.nn.Linear,
    nn.LayerNorm: encdec_fast.nn.LayerNorm,
    nn.TransformerEncoderLayer: encdec_fast.nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: encdec_fast.nn.TransformerDecoderLayer,
    nn.TransformerEncoder: encdec_fast.nn.TransformerEncoder,
    nn.TransformerDecoder: encdec_fast.nn.TransformerDecoder,
    nn.Transformer: encdec_fast.nn.Transformer,
}
FIRST = {"batch_first": True}


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_the_same_from_the_same_seed() -> None:
    for options in ({}, {"norm_first": True, "bias": False}, {"activation": "gelu"}):
        torch.manual_seed(7)
        theirs = nn.Transformer(E, HEADS, 2, 3, INNER, **options)
        torch.manual_seed(7)
        ours = encdec_fast.nn.Transformer(E, HEADS, 2, 3, INNER, **options)
        pairs = zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True)
        assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
        assert classes(ours) == [SWAPS.get(kind, kind) for kind in classes(theirs)]
    for kind, own in SWAPS.items():
        assert issubclass(own, kind)
        assert inspect.signature(own) == inspect.signature(kind)
    with pytest.raises(RuntimeError, match="relu/gelu"):
        encdec_fast.nn.TransformerEncoderLayer(E, HEADS, activation="tanh")


def test_custom_parts_stay_what_they_are() -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, INNER)
    custom = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    for model in (
        encdec_fast.nn.Transformer(E, HEADS, 1, 1, INNER, custom_encoder=custom),
        encdec_fast.nn.Transformer(E, HEADS, 1, 1, INNER, 0.1, "relu", custom),
    ):
        assert model.encoder is custom
        assert type(custom) is nn.TransformerEncoder
        assert type(custom.layers[0]) is nn.TransformerEncoderLayer
        assert type(model.decoder) is encdec_fast.nn.TransformerDecoder
    stack = encdec_fast.nn.TransformerEncoder(layer, 2)
    assert type(stack.layers[1]) is nn.TransformerEncoderLayer
    x = torch.randn(S, B, E)
    stack.eval()
    torch.testing.assert_close(stack(x), stack.layers[1](stack.layers[0](x)))
    with torch.no_grad():
        assert "another class" in str(explain(stack, x))


def test_optimize_and_restore() -> None:
    model = nn.Transformer(E, HEADS, 2, 2, INNER, batch_first=True).eval()
    inputs, extra = arguments("transformer", FIRST, "padding")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, held = classes(model), [set(module.__dict__) for module in model.modules()]
    modules = list(model.modules())
    expected = model(*inputs, **extra)
    assert optimize(model) is model
    assert classes(model) == [SWAPS.get(kind, kind) for kind in before]
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    model.load_state_dict(state, strict=True)
    with torch.no_grad(), use_backend("cpu"):
        torch.testing.assert_close(model(*inputs, **extra), expected, rtol=1e-4, atol=1e-5)
    first = classes(model)
    optimize(model, "int8")
    assert classes(model) == first
    assert model.weight_dtype == "int8"
    assert model.decoder.layers[1].multihead_attn.weight_dtype == "int8"
    with torch.no_grad():
        assert not torch.equal(model(*inputs, **extra), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder.layers[0].linear1.weight_dtype == "int8"
        assert classes(restore(other)) == before
    assert restore(model) is model
    assert before == classes(model)
    assert held == [set(module.__dict__) for module in model.modules()]
    torch.testing.assert_close(model(*inputs, **extra), expected)


def test_what_was_ours_stays_ours() -> None:
    layer = encdec_fast.nn.TransformerEncoderLayer(E, HEADS, INNER)
    layer.linear1.weight_dtype = torch.bfloat16
    assert layer.weight_dtype is None
    optimize(layer, "int8")
    assert layer.weight_dtype == "int8"
    restore(layer)
    assert type(layer) is encdec_fast.nn.TransformerEncoderLayer
    assert layer.linear1.weight_dtype == torch.bfloat16
    assert layer.linear2.weight_dtype is None
    layer.weight_dtype = "int8"
    assert layer.self_attn.weight_dtype == "int8"


def test_report() -> None:
    class Own(nn.TransformerEncoderLayer):
        """Its forward is its own business."""

    model = nn.Sequential(nn.Transformer(E, HEADS, 1, 1, INNER), Own(E, HEADS, INNER))
    before = {line.name: line for line in optimization_report(model)}
    assert not any(line.fast for line in before.values())
    assert "0.encoder.layers.0.self_attn" in before
    assert "0.encoder.layers.0.self_attn.out_proj" not in before
    optimize(model, "int8")
    after = {line.name: line for line in optimization_report(model)}
    assert list(after) == list(before)
    assert [name for name, line in after.items() if not line.fast] == ["1"]
    assert "subclass of torch.nn.TransformerEncoderLayer" in after["1"].reason
    assert after["0.decoder.norm"].weight_dtype is None
    assert after["0.decoder.layers.0.linear1"].weight_dtype == "int8"


@ALL_KINDS
def test_copies_and_functional_call(kind: str) -> None:
    _, _, ours = trio(kind, FIRST)
    ours.eval()
    inputs, extra = arguments(kind, FIRST, "padding")
    with torch.no_grad():
        expected = ours(*inputs, **extra)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(*inputs, **extra), expected)
        twice = {name: 2 * p for name, p in ours.named_parameters()}
        found = torch.func.functional_call(ours, twice, tuple(inputs), extra)
        other = copy.deepcopy(ours)
        other.load_state_dict(twice)
        assert torch.equal(found, other(*inputs, **extra))
        assert torch.equal(ours(*inputs, **extra), expected)
    with torch.inference_mode():
        assert torch.equal(ours(*inputs, **extra), expected)


@ALL_KINDS
@pytest.mark.parametrize("shape", [(0, 3), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_empty_and_single(kind: str, shape: tuple[int, int], grad: bool) -> None:
    _, theirs, ours = trio(kind, FIRST)
    x = torch.randn(*shape, E)
    inputs = [x] if kind in ("encoder", "encoder layer") else [x, x]
    with torch.set_grad_enabled(grad):
        for train in (True, False):
            found = ours.train(train)(*inputs)
            assert found.shape == x.shape and found.requires_grad == grad
            if x.numel():  # torch's own has no fast path for nothing
                torch.testing.assert_close(found, theirs.train(train)(*inputs))


@ALL_KINDS
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_the_dtypes_of_torch(kind: str, grad: bool) -> None:
    _, theirs, ours = trio(kind, FIRST)
    inputs, extra = arguments(kind, FIRST, "none")
    for module in (theirs, ours):
        module.train(grad)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(*inputs, **extra), theirs(*inputs, **extra)
        assert "autocast" in str(explain(ours, *inputs, **extra))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_nested_and_transforms() -> None:
    layer = encdec_fast.nn.TransformerEncoderLayer(E, 2, INNER, batch_first=True).eval()
    rows = [torch.randn(n, E) for n in (3, 5)]
    with torch.no_grad():
        found = layer(torch.nested.nested_tensor(rows))
        for a, row in zip(found.unbind(), rows, strict=True):
            torch.testing.assert_close(a, layer(row), rtol=1e-4, atol=1e-5)
        x = torch.randn(3, 4, E)
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-4, atol=1e-5)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        total: Tensor = torch.func.functional_call(layer, parameters, (x,)).square().mean()
        return total

    parameters = dict(layer.named_parameters())
    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(expected), rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


def test_explain(native: None) -> None:
    model = build("transformer", encdec_fast.nn, FIRST).eval()
    inputs, extra = arguments("transformer", FIRST, "padding")
    with torch.no_grad():
        explained = explain(model, *inputs, **extra)
        assert explained.backend == "cpu"
        assert "only the real tokens" in explained.plan
        assert "decoder: fused" in explained.plan
        mask = torch.zeros(S, S)
        assert "there is a mask" in explain(model.encoder, inputs[0], mask, **padding(extra)).plan
        model.encoder.enable_nested_tensor = False
        found = explain(model.encoder, inputs[0], **padding(extra))
        assert "enable_nested_tensor" in found.plan
    explained = explain(model, *inputs, **extra)
    assert explained.backend == "parts"  # attention is not torch's
    assert "part by part" in str(explain(model.encoder.layers[0], inputs[0]))
    norm = model.encoder.norm
    assert explain(norm, inputs[0]).backend == "torch"
    torch.testing.assert_close(norm(inputs[0]), nn.LayerNorm(E)(inputs[0]))


def padding(extra: dict[str, Any]) -> dict[str, Any]:
    return {"src_key_padding_mask": extra["src_key_padding_mask"]}


@ALL_KINDS
@pytest.mark.parametrize("grad", [False, True])
def test_compile(kind: str, grad: bool) -> None:
    _, _, ours = trio(kind, FIRST)
    inputs, extra = arguments(kind, FIRST, "padding, causal")
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            found, expected = (module(*inputs, **extra) for module in (compiled, ours))
            rows = [at_real(kind, FIRST, x, extra) for x in (found, expected)]
            torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)
            if grad:
                assert_same_gradients(*rows, ours, inputs)


def test_packs_are_kept(native: None) -> None:
    """Rows of a parameter are packed once, in a graph and outside of it."""
    from encdec_fast.ops import _packing

    _, _, ours = trio("decoder layer", FIRST)
    inputs, _ = arguments("decoder layer", FIRST, "none")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for module in (compiled, ours):
            module(*inputs)
            before = {id(entry.blob) for entry in _packing._entries.values()}
            module(*inputs)
            assert {id(entry.blob) for entry in _packing._entries.values()} == before


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(strict: bool) -> None:
    model = build("transformer", encdec_fast.nn, FIRST).eval()
    batch, sources, targets = (torch.export.Dim(name, min=2, max=64) for name in "BST")

    def make(batch: int, sources: int, targets: int) -> dict[str, Any]:
        hidden = torch.rand(batch, sources) < 0.3
        hidden[:, 0] = False
        later = torch.ones(targets, targets, dtype=torch.bool).triu(1)
        return {
            "src": torch.randn(batch, sources, E),
            "tgt": torch.randn(batch, targets, E),
            "tgt_mask": later,
            "src_key_padding_mask": hidden,
            "memory_key_padding_mask": hidden,
            "tgt_is_causal": True,
        }

    shapes: dict[str, Any] = {
        "src": {0: batch, 1: sources},
        "tgt": {0: batch, 1: targets},
        "tgt_mask": {0: targets, 1: targets},
        "src_key_padding_mask": {0: batch, 1: sources},
        "memory_key_padding_mask": {0: batch, 1: sources},
        "tgt_is_causal": None,
    }
    with torch.no_grad():
        exported = torch.export.export(
            model, (), make(B, S, T), dynamic_shapes=shapes, strict=strict
        )
        assert "encdec_fast.linear" in str(exported.graph)
        values = make(6, 9, 3)
        found = exported.module()(**values)
        torch.testing.assert_close(found, model(**values), rtol=1e-4, atol=1e-5)
