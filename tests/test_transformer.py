"""The Transformer's layers and stacks beside torch's, with every mask, fused and part by part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_as_good, error
from torch import Tensor, nn
from torch.nn import functional as F

import encdec_fast
from encdec_fast import explain, use_backend

E, HEADS, INNER, B, T, S = 12, 3, 20, 4, 5, 7
OURS: dict[str, Any] = {
    "encoder layer": encdec_fast.nn.TransformerEncoderLayer,
    "decoder layer": encdec_fast.nn.TransformerDecoderLayer,
    "encoder": encdec_fast.nn.TransformerEncoder,
    "decoder": encdec_fast.nn.TransformerDecoder,
    "transformer": encdec_fast.nn.Transformer,
}
ALL_KINDS = pytest.mark.parametrize("kind", OURS)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True, "batch_first": True},
    "gelu": {"activation": "gelu"},
    "a function": {"activation": torch.tanh, "batch_first": True},
    "silu": {"activation": F.silu},
    "a module": {"activation": nn.GELU(approximate="tanh")},
    "a module of its own": {"activation": nn.LeakyReLU(), "norm_first": True},
    "no bias": {"bias": False, "batch_first": True, "norm_first": True},
    "eps": {"layer_norm_eps": 0.1},
    "even heads": {"nhead": 2, "batch_first": True},
    "head size 1": {"nhead": E},
    "one feature": {"d_model": 1, "nhead": 1, "dim_feedforward": 1},
    "wide": {"d_model": 72, "nhead": 4, "dim_feedforward": 100, "batch_first": True},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
MASKS = (
    "none",
    "padding",
    "float padding",
    "causal",
    "causal bool",
    "mask",
    "heads",
    "padding, causal",
)
ALL_MASKS = pytest.mark.parametrize("masks", MASKS)


def build(kind: str, library: Any, options: dict[str, Any]) -> Any:
    arguments = {"d_model": E, "nhead": HEADS, "dim_feedforward": INNER, "dropout": 0.0, **options}
    if kind == "transformer":
        return library.Transformer(num_encoder_layers=2, num_decoder_layers=2, **arguments)
    part = "Encoder" if kind.startswith("encoder") else "Decoder"
    layer = getattr(library, f"Transformer{part}Layer")(**arguments)
    if kind.endswith("layer"):
        return layer
    norm = library.LayerNorm(arguments["d_model"])
    return getattr(library, f"Transformer{part}")(layer, 2, norm)


def trio(kind: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(the truth in float64, torch's module, ours): same weights, every one of them random."""
    theirs, ours = build(kind, nn, options), build(kind, encdec_fast.nn, options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return copy.deepcopy(theirs).double(), theirs, ours


def attention_mask(form: str, queries: int, keys: int, batch: int, heads: int) -> Tensor | None:
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    if form == "causal bool":
        return later
    if "causal" in form:
        return torch.zeros(queries, keys).masked_fill(later, -torch.inf)
    if form not in ("mask", "heads"):
        return None
    shape = (queries, keys) if form == "mask" else (batch * heads, queries, keys)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return hidden


def padding_mask(form: str, keys: int, batch: int) -> Tensor | None:
    """Holes anywhere; the first position is real."""
    if "padding" not in form:
        return None
    hidden = torch.rand(batch, keys) < 0.4
    hidden[:, 0] = False
    hidden[0] = False
    return torch.randn(batch, keys).masked_fill(hidden, -torch.inf) if "float" in form else hidden


def arguments(
    kind: str, options: dict[str, Any], masks: str, batch: int = B
) -> tuple[list[Tensor], dict[str, Any]]:
    """(inputs, masks) of a call."""
    size, heads = options.get("d_model", E), options.get("nhead", HEADS)

    def make(length: int) -> Tensor:
        first = options.get("batch_first", False)
        return torch.randn((batch, length, size) if first else (length, batch, size))

    src, tgt = make(S), make(T)
    own_src = attention_mask(masks, S, S, batch, heads)
    own_tgt = attention_mask(masks, T, T, batch, heads)
    across = attention_mask("mask" if masks in ("mask", "heads") else "", T, S, batch, heads)
    padding, other = padding_mask(masks, S, batch), padding_mask(masks, T, batch)
    decoding = {
        "tgt_mask": own_tgt,
        "memory_mask": across,
        "tgt_key_padding_mask": other,
        "memory_key_padding_mask": padding,
    }
    if kind.startswith("encoder"):
        name = "src_mask" if kind == "encoder layer" else "mask"
        return [src], {name: own_src, "src_key_padding_mask": padding}
    if kind.startswith("decoder"):
        return [tgt, src], decoding
    return [src, tgt], {"src_mask": own_src, "src_key_padding_mask": padding, **decoding}


def cast(values: Any, dtype: torch.dtype) -> Any:
    def one(x: Any) -> Any:
        real = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().to(dtype, copy=True) if real else x

    if isinstance(values, dict):
        return {name: one(x) for name, x in values.items()}
    return [one(x) for x in values]


def at_real(kind: str, options: dict[str, Any], output: Tensor, masks: dict[str, Any]) -> Tensor:
    """The rows of an encoder's output that are real; all of the others."""
    hidden = masks.get("src_key_padding_mask")
    if not kind.startswith("encoder") or hidden is None or hidden.dtype != torch.bool:
        return output
    return (output if options.get("batch_first") else output.transpose(0, 1))[~hidden]


@ALL_KINDS
@ALL_MASKS
@pytest.mark.parametrize("options", ["plain", "batch first", "norm first", "even heads"])
def test_masks(kind: str, masks: str, options: str, native: None) -> None:
    """In inference, where everything is fused, and in training mode without gradients."""
    chosen = OPTIONS[options]
    truth, theirs, ours = trio(kind, chosen)
    inputs, extra = arguments(kind, chosen, masks)
    with torch.no_grad():
        # In training mode torch has no fast path of its own, which wants other masks.
        expected = theirs(*inputs, **extra)
        exact = truth(*cast(inputs, torch.float64), **cast(extra, torch.float64))
        for train in (True, False):
            ours.train(train)
            with use_backend("cpu"):
                found = ours(*inputs, **extra)
            assert found.shape == expected.shape
            assert found.is_contiguous()
            rows = [[at_real(kind, chosen, x, extra)] for x in (found, expected, exact)]
            assert_as_good(*rows, 2.0)
            explained = explain(ours, *inputs, **extra)
            assert explained.backend == "cpu"
            assert "fused" in explained.plan


@ALL_KINDS
@ALL_OPTIONS
def test_options(kind: str, options: dict[str, Any], native: None) -> None:
    truth, theirs, ours = trio(kind, options)
    for masks in ("none", "padding"):
        inputs, extra = arguments(kind, options, masks)
        with torch.no_grad(), use_backend("cpu"):
            found = ours.eval()(*inputs, **extra)
        with torch.no_grad():
            expected = theirs(*inputs, **extra)
        exact = truth(*cast(inputs, torch.float64), **cast(extra, torch.float64))
        rows = [[at_real(kind, options, x, extra)] for x in (found, expected, exact)]
        assert_as_good(*rows, 2.0)


@ALL_KINDS
@pytest.mark.parametrize("masks", ["none", "padding", "padding, causal", "heads"])
@pytest.mark.parametrize("options", ["plain", "norm first", "gelu", "a function", "no bias"])
@pytest.mark.parametrize("train", [False, True])
def test_gradients(kind: str, masks: str, options: str, train: bool) -> None:
    chosen = OPTIONS[options]
    truth, theirs, ours = trio(kind, chosen)
    inputs, extra = arguments(kind, chosen, masks)
    found, outputs = [], []
    for module, dtype in ((ours, torch.float32), (theirs, torch.float32), (truth, torch.float64)):
        own, more = cast(inputs, dtype), cast(extra, dtype)
        leaves = [x.requires_grad_() for x in own]
        output = at_real(kind, chosen, module.train(train)(*own, **more), more)
        outputs.append([output.detach()])
        ramp = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        found.append(
            list(torch.autograd.grad((output * ramp).sum(), [*leaves, *module.parameters()]))
        )
    assert_as_good(*outputs, 2.0)
    # Of a norm's weight the gradient is a sum over rows that cancels: its largest error is torch's
    # times anything, in its favour or against it, and only the mean compares.
    assert_as_good(*found, 3.0, mean=True)
    assert_as_good(*found, 3.0, relative=2e-6)


@ALL_KINDS
def test_unbatched(kind: str, native: None) -> None:
    _, theirs, ours = trio(kind, {})
    for masks in ("none", "padding", "causal"):
        inputs, extra = arguments(kind, {}, masks, batch=1)
        inputs = [x[:, 0] for x in inputs]
        for name, mask in extra.items():
            if mask is not None and "padding" in name:
                extra[name] = mask[0]
        with torch.no_grad(), use_backend("cpu"):
            found = ours.eval()(*inputs, **extra)
        torch.testing.assert_close(found, theirs(*inputs, **extra), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@ALL_KINDS
def test_dtypes(kind: str, dtype: torch.dtype, native: None) -> None:
    truth, theirs, ours = trio(kind, {"batch_first": True})
    inputs, extra = arguments(kind, {"batch_first": True}, "none")
    exact = truth(*cast(inputs, torch.float64), **extra)
    inputs = cast(inputs, dtype)
    with torch.no_grad():
        found, expected = (module.to(dtype)(*inputs, **extra) for module in (ours, theirs))
    relative = 1e-13 if dtype == torch.float64 else 0.0
    assert_as_good([found], [expected], [exact], 2.0, relative=relative)


@ALL_KINDS
def test_hints(kind: str, native: None) -> None:
    """is_causal with its mask is the mask; without one it is an error, as in torch."""
    _, theirs, ours = trio(kind, {})
    inputs, extra = arguments(kind, {}, "padding, causal")
    hints = {"src": "is_causal"} if kind.startswith("encoder") else {"tgt": "tgt_is_causal"}
    if kind == "transformer":
        hints["src"] = "src_is_causal"
    with torch.no_grad(), use_backend("cpu"):
        expected = ours.eval()(*inputs, **extra)
        found = ours(*inputs, **extra, **dict.fromkeys(hints.values(), True))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for module in (theirs, ours):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module.train()(*inputs, **dict.fromkeys(hints.values(), True))


BAD: dict[str, Callable[[list[Tensor], dict[str, Any]], Any]] = {
    "features": lambda inputs, extra: inputs.__setitem__(0, torch.randn(T, B, E + 1)),
    "dimensions": lambda inputs, extra: inputs.__setitem__(0, torch.randn(1, T, B, E)),
    "padding": lambda inputs, extra: extra.update(
        {name: torch.zeros(B, 2).bool() for name in extra if "padding" in name}
    ),
    "mask": lambda inputs, extra: extra.update(
        {name: torch.zeros(2, 2).bool() for name in extra if "padding" not in name}
    ),
    "kind of mask": lambda inputs, extra: extra.update(
        {name: torch.zeros(B, S).long() for name in extra if "padding" in name}
    ),
}


@ALL_KINDS
@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_errors_are_those_of_torch(kind: str, spoil: Any, grad: bool) -> None:
    _, theirs, ours = trio(kind, {})
    inputs, extra = arguments(kind, {}, "none")
    spoil(inputs, extra)
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception) as expected:
            theirs(*inputs, **extra)
        with pytest.raises(expected.type):
            ours(*inputs, **extra)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
@ALL_KINDS
def test_weight_dtype(kind: str, weight_dtype: Any, native: None) -> None:
    """Each product is off by some parts of 256, and the norms keep that from growing."""
    options = {"d_model": 48, "dim_feedforward": 64, "batch_first": True}
    truth, _, ours = trio(kind, options)
    inputs, _ = arguments(kind, options, "none")
    exact = truth(*cast(inputs, torch.float64))
    ours.weight_dtype = weight_dtype
    assert ours.weight_dtype == weight_dtype
    with torch.no_grad(), use_backend("cpu"):
        found = ours(*inputs)
    assert 0 < error(found, exact) <= 0.1 * float(exact.abs().max())
    with pytest.raises(RuntimeError, match="inference"):
        ours(*inputs)


@pytest.mark.parametrize("change", ["hook", "replaced", "parametrized", "global hook", "subclass"])
@ALL_KINDS
def test_what_is_not_fused_is_honoured(kind: str, change: str) -> None:
    """Hooks are called, and other parts than torch's do what they do."""
    _, theirs, ours = trio(kind, {"batch_first": True})
    inputs, extra = arguments(kind, {"batch_first": True}, "none")
    seen: list[str] = []
    for name, model in (("theirs", theirs), ("ours", ours)):
        layer = model if kind.endswith("layer") else getattr(model, "encoder", model)
        layer = layer if kind.endswith("layer") else layer.layers[1]

        def hook(*_: Any, name: str = name) -> None:
            seen.append(name)

        if change == "hook":
            layer.linear2.register_forward_hook(hook)
        elif change == "replaced":
            layer.linear2 = nn.Sequential(nn.Linear(INNER, E, bias=False), nn.Tanh())
            nn.init.constant_(layer.linear2[0].weight, 0.1)
        elif change == "parametrized":
            nn.utils.parametrizations.weight_norm(layer.linear1)
        elif change == "subclass":
            layer.norm1 = type("Norm", (nn.LayerNorm,), {"forward": lambda self, x: x * 2})(E)
    handle = None
    if change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    found = ours.train()(*inputs, **extra)
    expected = theirs.train()(*inputs, **extra)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        ours.eval()(*inputs, **extra)
        explained = explain(ours, *inputs, **extra)
    if handle is not None:
        handle.remove()
    assert explained.backend == "torch"
    if change == "global hook":
        assert "global" in seen
    else:
        assert len(seen) == (3 if change == "hook" else 0)


@ALL_KINDS
def test_dropout_still_drops(kind: str) -> None:
    _, _, ours = trio(kind, {"dropout": 0.5})
    inputs, _ = arguments(kind, {}, "none")
    with torch.no_grad():
        assert not torch.equal(ours(*inputs), ours(*inputs))
        for module in ours.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        assert not torch.equal(ours(*inputs), ours(*inputs))
        assert torch.equal(ours.eval()(*inputs), ours(*inputs))


def test_a_causal_mask_of_another_dtype(native: None) -> None:
    """As torch's own function makes it, for a model in bfloat16."""
    _, theirs, ours = trio("decoder", {})
    inputs = cast(arguments("decoder", {}, "none")[0], torch.bfloat16)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    with torch.no_grad():
        expected = theirs.bfloat16()(*inputs, tgt_mask=mask)
        with use_backend("cpu"):
            found = ours.bfloat16()(*inputs, tgt_mask=mask)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_layers_of_two_layouts() -> None:
    """Such a stack is what torch makes of it."""
    _, theirs, ours = trio("encoder", {})
    for module in (theirs, ours):
        module.layers[1].self_attn.batch_first = True
    x = torch.randn(S, B, E)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
