"""A recurrent decoder's step as one launch, beside the step that it stands for; generate() on it.

The kernel runs on a GPU, or on the CPU as tests/cpp/gpu_on_cpu.h does it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from encdec_fast import explain, use_backend
from encdec_fast.backends import BackendRefused
from encdec_fast.generation import Encoded, GenerationConfig, RecurrentDecoder, generate
from encdec_fast.generation.device import decode_step, why_not_one_launch
from encdec_fast.generation.device.recurrent import RecurrentSteps
from encdec_fast.generation.device.weights import Weights
from encdec_fast.models import RecurrentEncoderDecoder
from encdec_fast.ops import _recurrent_cuda

pytestmark = pytest.mark.usefixtures("cuda_kernels")

SOURCES, TARGETS, S = 17, 23, 9
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the attention of few rows needs, and fewer than there are units."""
    if DEVICE.type == "cpu":
        limits = _recurrent_cuda.ON_CPU._replace(processors=3)
        monkeypatch.setattr(decode_step, "limits", lambda device: limits)


def made(cell: str, attention: str | None, layers: int, **options: Any) -> RecurrentEncoderDecoder:
    torch.manual_seed(len(cell) + layers)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_size": 24, "encoder_hidden_size": 8}
    if attention == "dot":
        sizes["encoder_hidden_size"] = 12  # the memory must have the state's size
    model = RecurrentEncoderDecoder(
        SOURCES,
        TARGETS,
        **{**sizes, **options},
        cell=cell,
        attention=attention,
        decoder_layers=layers,
        max_source_length=S,
    )
    for parameter in model.parameters():
        parameter.data.mul_(2.5 if parameter.dim() > 1 else 1)
    return model.to(DEVICE).eval().requires_grad_(False)


def both(
    decoder: RecurrentDecoder, B: int, K: int, dtype: torch.dtype
) -> tuple[RecurrentSteps, RecurrentSteps]:
    """The step in many launches and in one, with the same states and memory."""
    weights = Weights(decoder, dtype, DEVICE)
    steps = [RecurrentSteps(decoder, weights, B, K, S, True, one) for one in (False, True)]
    H, M, layers = decoder.hidden_size, decoder.context_size, len(decoder.layers)
    states = tuple(torch.randn(layers, B, H, device=DEVICE).to(dtype) for _ in steps[0].states)
    lengths = [min(S, n) for n in (S, 4, 1, 7, 0, S, 3, 2)][:B]
    memory = torch.randn(B, S, M, device=DEVICE).to(dtype) if decoder.attends else None
    context = torch.randn(B, M, device=DEVICE).to(dtype) if M else None
    for own in steps:
        own.begin(Encoded(memory, lengths, states if len(states) > 1 else states[0], context))
    return steps[0], steps[1]


def advance(steps: RecurrentSteps, tokens: Tensor, parents: Tensor) -> list[Tensor]:
    unused = torch.zeros(0)
    logits, shown = steps.step(tokens, parents, unused, unused)
    found = [logits, *steps.states, steps.context]
    return [tensor.clone() for tensor in (*found, *([] if shown is None else [shown]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "K"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("attention", ["additive", "dot", "general", "concat", None])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_as_in_many_launches(
    cell: str, attention: str | None, layers: int, B: int, K: int, dtype: torch.dtype
) -> None:
    """Steps in a row, in which rows go on from others and tokens are no tokens."""
    decoder = made(cell, attention, layers).generation_decoder()
    assert isinstance(decoder, RecurrentDecoder)
    many, one = both(decoder, B, K, dtype)
    generator = torch.Generator().manual_seed(1)
    bound = 2e-5 if dtype == torch.float32 else 4e-2
    for step in range(3):
        tokens = torch.randint(-3, TARGETS + 3, (B * K,), generator=generator).to(DEVICE)
        within = torch.randint(K, (B, K), generator=generator)
        parents = (within + K * torch.arange(B).unsqueeze(1)).flatten().to(DEVICE)
        expected, found = advance(many, tokens, parents), advance(one, tokens, parents)
        assert len(expected) == len(found)
        for own, true in zip(found, expected, strict=True):
            assert own.dtype == true.dtype and own.shape == true.shape
            scale = max(1.0, true.double().abs().max().item()) if true.numel() else 1.0
            torch.testing.assert_close(own, true, rtol=0, atol=bound * scale)
        for other, own in zip(many.states, one.states, strict=True):
            own.copy_(other)  # so that one step's rounding is not the next one's
        one.context.copy_(many.context)
        assert step == 0 or found[0].std() > 0.01


@pytest.mark.parametrize("name", ["lstm-additive-2", "gru-general-1", "gru-None-2"])
def test_generate(name: str) -> None:
    """The tokens and the attention of the engine, greedily and with beams."""
    cell, attention, layers = name.split("-")
    model = made(cell, None if attention == "None" else attention, int(layers))
    sentences = [[3, 5, 7, 2], [4], [9, 8, 7, 6, 5]]
    options = {"decoder_start_token_id": 1, "eos_token_id": 2, "max_new_tokens": 7}
    for beams in (1, 2):
        config = GenerationConfig(**options, num_beams=beams)
        with use_backend("cuda"):
            assert explain(generate, model, sentences, config).backend == "cuda"
            found = generate(model, sentences, config, need_attention=attention != "None")
        with use_backend("reference"):
            expected = generate(model, sentences, config, need_attention=attention != "None")
        for mine, others in zip(found.hypotheses, expected.hypotheses, strict=True):
            for own, other in zip(mine, others, strict=True):
                assert own.tokens == other.tokens
                if other.attention is not None:
                    assert own.attention is not None
                    torch.testing.assert_close(own.attention, other.attention, rtol=0, atol=1e-4)


def test_it_runs_where_it_is_asked_for() -> None:
    model = made("lstm", "additive", 1)
    sentences = [[3, 5, 7, 2]]
    explanation = explain(generate, model, sentences)
    assert explanation.backend != "cuda"
    assert explanation.reasons["cuda"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"attention": "location"}, "no location attention"),
        ({"hidden_size": 20}, "multiples of 8"),
        ({"embedding_size": 7}, "multiples of 8"),
    ],
)
def test_what_it_refuses(model: dict[str, Any], says: str) -> None:
    given = {"cell": "lstm", "attention": "additive", "layers": 1, **model}
    refused = made(**given)
    assert says in why_not_one_launch(refused.generation_decoder())
    with use_backend("cuda"), pytest.raises(BackendRefused, match=says):
        generate(refused, [[1, 2]], decoder_start_token_id=1, eos_token_id=2, max_new_tokens=3)


def test_it_refuses_many_rows() -> None:
    config = GenerationConfig(decoder_start_token_id=1, eos_token_id=2, max_new_tokens=3)
    model = made("lstm", "additive", 1)
    with use_backend("cuda"), pytest.raises(BackendRefused, match="at most 8 rows"):
        generate(model, [[1, 2]] * 5, config.replace(num_beams=2))


@pytest.mark.parametrize(("B", "K"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("attention", ["additive", "general", None])
def test_shared_memory_is_what_the_kernel_says(
    attention: str | None, layers: int, B: int, K: int
) -> None:
    """A byte less than it is said to need is refused by the op itself."""
    decoder = made("lstm", attention, layers).generation_decoder()
    assert isinstance(decoder, RecurrentDecoder)
    _, one = both(decoder, B, K, torch.float32)
    assert one.launch is not None
    needed = decode_step.shared_bytes(decoder, B * K, S if decoder.attends else 0)
    tokens = torch.zeros(B * K, dtype=torch.int64, device=DEVICE)
    one.launch.limits = one.launch.limits._replace(shared_bytes=needed)
    advance(one, tokens, tokens)
    one.launch.limits = one.launch.limits._replace(shared_bytes=needed - 1)
    with pytest.raises(RuntimeError, match=f"a block needs {needed} bytes"):
        advance(one, tokens, tokens)


def test_bad_tensors() -> None:
    """What a kernel would read or write out of bounds for is an error of the op."""
    decoder = made("lstm", "additive", 1).generation_decoder()
    _, one = both(decoder, 1, 2, torch.float32)
    tokens = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    unused = torch.zeros(0)
    for wrong in (tokens[:1], tokens.int()):
        with pytest.raises(RuntimeError, match="tokens"):
            one.step(wrong, tokens, unused, unused)
        with pytest.raises(RuntimeError, match="parents"):
            one.step(tokens, wrong, unused, unused)
    one.context = one.context[:, :8]
    with pytest.raises(RuntimeError, match="input weights"):
        one.step(tokens, tokens, unused, unused)
