"""A block of a Transformer layer with packed weights is one call; what is odd goes the long way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_short_way import Subclass, Watching
from torch import Tensor, nn

import encdec_fast
from encdec_fast import use_backend
from encdec_fast.nn import _transformer
from encdec_fast.ops import _blocks

B, S, E, HEADS, INNER = 3, 7, 32, 4, 48
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm first": {"norm_first": True},
    "no bias": {"bias": False},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": nn.functional.silu, "layer_norm_eps": 0.1},
}


class Ways:
    """blocks: calls of whole blocks that gave a result. parts: products that were asked about."""

    blocks = parts = 0

    def reset(self) -> None:
        self.blocks = self.parts = 0


@pytest.fixture
def ways(native: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    found = Ways()
    run = _transformer.run

    def counted(block: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*args: Any) -> Tensor | None:
            result = block(*args)
            found.blocks += result is not None
            return result

        return call

    def part(*args: Any, **options: Any) -> Tensor:
        found.parts += 1
        return run(*args, **options)

    monkeypatch.setattr(_transformer, "run", part)
    for name in ("self_attention", "feed_forward"):
        monkeypatch.setattr(_blocks, name, counted(getattr(_blocks, name)))
    with torch.no_grad(), use_backend(None):
        yield found


def layer_of(**options: Any) -> Any:
    torch.manual_seed(0)
    layer = encdec_fast.nn.TransformerEncoderLayer(
        E, HEADS, INNER, batch_first=True, **options
    ).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def masks() -> dict[str, dict[str, Any]]:
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[0, 3:] = hidden[2, 1] = True
    later = torch.ones(S, S, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": hidden},
        "causal": {"src_mask": later, "is_causal": True},
        "bool": {"src_mask": later.roll(1, 1)},
        "float": {"src_mask": torch.randn(S, S)},
        "both": {"src_mask": later, "src_key_padding_mask": hidden},
        "of each head": {"src_mask": torch.randn(B * HEADS, S, S)},
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("options", OPTIONS)
def test_plain_calls(options: str, name: str, ways: Ways) -> None:
    layer, x = layer_of(**OPTIONS[options]), torch.randn(B, S, E)
    given = masks()[name]
    first = layer(x, **given)  # packs
    assert ways.parts == 4 and ways.blocks == 0
    ways.reset()
    for backend in (None, "cpu"):
        with use_backend(backend), torch.inference_mode():
            assert torch.equal(layer(x, **given), first)
    assert ways.parts == 0 and ways.blocks == 4
    with use_backend("reference"):
        torch.testing.assert_close(first, layer(x, **given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, "int8"])
def test_dtypes(dtype: torch.dtype, weight_dtype: Any, ways: Ways) -> None:
    layer, x = layer_of().to(dtype), torch.randn(B, S, E, dtype=dtype)
    layer.weight_dtype = weight_dtype
    first = layer(x)
    ways.reset()
    assert torch.equal(layer(x), first)
    assert ways.parts == 0 and ways.blocks == 2
    layer.linear2.weight_dtype = None  # where the two differ their products are two calls
    layer(x)
    ways.reset()
    layer(x)
    assert (ways.blocks, ways.parts) == ((2, 0) if weight_dtype is None else (1, 2))


def test_without_padding(ways: Ways) -> None:
    """The tokens of all sentences one behind the other."""
    encoder = encdec_fast.nn.TransformerEncoder(layer_of(), 2).eval()
    x, given = torch.randn(B, S, E), masks()["padding"]
    first = encoder(x, **given)
    ways.reset()
    assert torch.equal(encoder(x, **given), first)
    assert ways.parts == 0 and ways.blocks == 4
    with use_backend("reference"):
        expected = encoder(x, **given)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


def test_decoder_layer(ways: Ways) -> None:
    """Its attention over the memory has weights in parts: three products, as ever."""
    layer = encdec_fast.nn.TransformerDecoderLayer(E, HEADS, INNER, batch_first=True).eval()
    x, memory = torch.randn(B, 4, E), torch.randn(B, S, E)
    first = layer(x, memory)
    ways.reset()
    assert torch.equal(layer(x, memory), first)
    assert ways.parts == 3 and ways.blocks == 2


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gradient": lambda layer, x: torch.enable_grad()(layer)(x),
    "autocast": lambda layer, x: torch.autocast("cpu", torch.bfloat16)(layer)(x),
    "torch": lambda layer, x: use_backend("torch")(layer)(x),
    "reference": lambda layer, x: use_backend("reference")(layer)(x),
    "dispatch mode": lambda layer, x: _watched(layer, x),
    "subclass": lambda layer, x: layer(x.as_subclass(Subclass)),
    "vmap": lambda layer, x: torch.vmap(layer)(x.unsqueeze(0))[0],
    "nobody": lambda layer, x: layer(x[:0]),
}


def _watched(layer: Any, x: Tensor) -> Tensor:
    with Watching():
        found: Tensor = layer(x)
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls(name: str, ways: Ways) -> None:
    layer, x = layer_of(), torch.randn(B, S, E)
    expected = layer(x)
    layer(x)
    assert ways.blocks == 2
    ways.reset()
    output = OTHERS[name](layer, x)
    assert ways.blocks == 0
    loose = {"rtol": 5e-2, "atol": 5e-2} if name == "autocast" else {"rtol": 1e-4, "atol": 1e-4}
    wanted = expected[: len(output)]
    torch.testing.assert_close(output.float().as_subclass(Tensor), wanted, **loose)
    assert output.requires_grad == (name == "gradient")


def test_a_bias_of_another_type(ways: Ways) -> None:
    layer, x = layer_of(), torch.randn(B, S, E)
    expected = layer(x)
    layer.linear1.bias = nn.Parameter(layer.linear1.bias.detach().as_subclass(Subclass))
    ways.reset()
    torch.testing.assert_close(layer(x).as_subclass(Tensor), expected)
    assert ways.blocks == 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.linear1.weight.mul_(-1),
    "through data": lambda layer: layer.self_attn.in_proj_weight.data.add_(1),
    "the second through data": lambda layer: layer.linear2.weight.data.mul_(-1),
    "another parameter": lambda layer: setattr(
        layer.linear2, "weight", nn.Parameter(-layer.linear2.weight)
    ),
    "a bias": lambda layer: layer.linear1.bias.add_(1),
    "a norm": lambda layer: layer.norm2.weight.mul_(3),
    "repack": encdec_fast.repack,
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_change(name: str, ways: Ways) -> None:
    layer, x = layer_of(), torch.randn(B, S, E)
    before = layer(x)
    CHANGES[name](layer)
    with use_backend("reference"):
        expected = layer(x)
    assert name == "repack" or not torch.allclose(before, expected, atol=1e-2)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    ways.reset()
    layer(x)
    assert ways.parts == 0 and ways.blocks == 2


WRONG: dict[str, Callable[[Any], Any]] = {
    "a long bias": lambda layer: setattr(
        layer.linear1, "bias", nn.Parameter(torch.zeros(INNER + 1))
    ),
    "a double bias": lambda layer: setattr(
        layer.self_attn.out_proj, "bias", nn.Parameter(torch.zeros(E, dtype=torch.double))
    ),
    "a short norm": lambda layer: setattr(layer.norm2, "weight", nn.Parameter(torch.ones(E - 1))),
    "features that do not fit": lambda layer: setattr(
        layer.linear2, "weight", nn.Parameter(torch.zeros(E, INNER + 2))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit(name: str, ways: Ways) -> None:
    layer, x = layer_of(), torch.randn(B, S, E)
    layer(x)
    layer(x)
    WRONG[name](layer)
    with pytest.raises(RuntimeError):
        layer(x)


def test_the_op_refuses_what_does_not_fit(native: None) -> None:
    """Called directly: nothing comes back, and nothing is read past its end."""
    layer, x = layer_of(), torch.randn(B, S, E)
    own = layer.state_dict()
    packs = [
        torch.ops.encdec_fast_cpu.linear_pack(own[f"{name}.weight"], 0)
        for name in ("linear1", "linear2")
    ]
    args = [x, x, own["linear1.weight"], own["linear1.bias"], packs[0]]
    args += [own["linear2.weight"], own["linear2.bias"], packs[1], 1, None, None, 0.0, False]
    call = torch.ops.encdec_fast_cpu.feed_forward_block
    assert len(call(*args)) == 1
    for place, wrong in (
        (0, x[..., 1:].contiguous()),
        (0, x.double()),
        (0, x[:0]),
        (1, x[:1].contiguous()),
        (1, x.transpose(0, 1)),
        (3, own["linear1.bias"][1:]),
        (5, own["linear2.weight"][1:]),
        (9, torch.ones(E + 1)),
    ):
        given = list(args)
        given[place] = wrong
        assert call(*given) == []
