"""Encoder layers of optimized transformers models: the same numbers, and who computes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import generation_models as models
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import encdec_fast  # noqa: E402
from encdec_fast.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.usefixtures("native")
FUSED = ("marian", "bart", "mbart", "whisper")
EACH = pytest.mark.parametrize("name", FUSED)
B, T, E = 3, 6, models.SIZES["d_model"]


def layers(name: str) -> tuple[Any, Any]:
    """The first encoder layer as it was, and that of an optimized copy."""
    own, fast = (copy.deepcopy(models.build(name).model) for _ in range(2))
    integration.optimize(fast)
    return own.get_encoder().layers[0], fast.get_encoder().layers[0]


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, E, generator=torch.Generator().manual_seed(0)).to(dtype)


def allowed() -> Tensor:
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    mask[1, :, :, 4:] = mask[2, :, :, 1:] = False
    return mask


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": allowed,
    "added": lambda: torch.zeros(B, 1, T, T).masked_fill_(~allowed(), float("-inf")),
    "of each head": lambda: allowed().expand(B, models.SIZES["encoder_attention_heads"], T, T),
}


@EACH
@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_as_before(name: str, kind: str) -> None:
    own, fast = layers(name)
    expected = own(states(), MASKS[kind]())
    assert encdec_fast.explain(fast, states(), MASKS[kind]()).backend == "cpu"
    found = fast(states(), MASKS[kind]())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if kind != "none":  # the mask changes something
        assert (found - fast(states(), None)).abs().max() > 1e-3


@EACH
def test_whole_encoders(name: str) -> None:
    tiny = models.build(name)
    own, fast = copy.deepcopy(tiny.model).get_encoder(), copy.deepcopy(tiny.model)
    fast = integration.optimize(fast).get_encoder()
    given = {k: v for k, v in tiny.inputs.items() if name != "whisper" or k == "input_features"}
    with torch.no_grad():
        expected = own(**given, output_hidden_states=True)
        found = fast(**given, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == len(fast.layers) + 1
    real = given.get("attention_mask", torch.ones(expected[0].shape[:2])).bool()
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one[real], other[real], atol=5e-5, rtol=5e-5)


@EACH
def test_generate_runs_the_fused_layers(name: str) -> None:
    """Whatever arguments transformers gives to the layers of an encoder."""
    tiny = models.build(name)
    fast = integration.optimize(copy.deepcopy(tiny.model))
    own = type(fast.get_encoder().layers[0]).__mro__[2]
    with mock.patch.object(own, "forward", side_effect=AssertionError("part by part")):
        fast.generate(**tiny.inputs, max_new_tokens=2)
        with pytest.raises(AssertionError, match="part by part"):
            copy.deepcopy(tiny.model).generate(**tiny.inputs, max_new_tokens=2)


def _train(layer: Any) -> None:
    layer.train()


def _hook(layer: Any) -> None:
    layer.fc1.register_forward_hook(lambda module, args, output: output + 1)


def _other_activation(layer: Any) -> None:
    layer.activation_fn = nn.Tanh()


def _other_linear(layer: Any) -> None:
    layer.self_attn.q_proj = nn.Linear(E, E)


def _parametrized(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.fc2)


def _flex(layer: Any) -> None:
    layer.self_attn.config = copy.copy(layer.self_attn.config)
    layer.self_attn.config._attn_implementation = "flex_attention"


def _float16(layer: Any) -> None:
    layer.half()


TOUCHED: dict[str, tuple[Callable[[Any], None], str]] = {
    "training": (_train, "training"),
    "hook": (_hook, "fc1"),
    "activation": (_other_activation, "activation_fn"),
    "linear": (_other_linear, "self_attn.q_proj"),
    "parametrized": (_parametrized, "fc2"),
    "implementation": (_flex, "self_attn"),
    "float16": (_float16, "float16"),
}


@pytest.mark.parametrize("kind", TOUCHED)
def test_part_by_part(kind: str) -> None:
    """Where a layer is another than it was made, transformers' forward runs, and says why."""
    touch, reason = TOUCHED[kind]
    pair = layers("bart")
    for layer in pair:
        torch.manual_seed(3)
        touch(layer)
    dtype = next(pair[0].parameters()).dtype
    told = encdec_fast.explain(pair[1], states(dtype), None)
    assert told.backend == "torch" and any(reason in text for text in told.reasons["cpu"])
    if kind == "implementation":
        return
    found = []
    for layer in pair:
        torch.manual_seed(4)
        with torch.no_grad():
            found.append(layer(states(dtype), None))
    tolerance = 1e-2 if kind == "float16" else 2e-5
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)


def test_gradients_pass() -> None:
    own, fast = layers("mbart")
    found = []
    for layer in (own, fast):
        layer.requires_grad_(True)
        x = states().requires_grad_()
        layer(x, allowed()).square().sum().backward()
        found.append((x.grad, layer.fc1.weight.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.08), ("int8", 0.08)])
@torch.no_grad()
def test_coarser_weights(dtype: Any, bound: float) -> None:
    model = models.build("marian").model
    fast = integration.optimize(copy.deepcopy(model), dtype)
    expected = model.get_encoder().layers[0](states(), None)
    found = fast.get_encoder().layers[0](states(), None)
    assert encdec_fast.explain(fast.get_encoder().layers[0], states(), None).backend == "cpu"
    worst = (found - expected).abs().max() / expected.abs().max()
    assert 1e-5 < worst < bound


def test_copies_and_restore() -> None:
    model = models.build("whisper").model
    fast = integration.optimize(copy.deepcopy(model))
    kind = type(fast.get_encoder().layers[0])
    assert kind is not type(model.get_encoder().layers[0])
    assert isinstance(fast.get_encoder().layers[0], type(model.get_encoder().layers[0]))
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin.get_encoder().layers[0]) is kind
        integration.restore(twin)
        assert type(twin.get_encoder().layers[0]) is type(model.get_encoder().layers[0])
