"""Optimized transformers models: their variants, their weights, their copies, what they draw."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import generation_models as models
import pytest
import torch
from test_transformers import ALL_MODELS, generate, no_decoder, optimized, quiet
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import encdec_fast  # noqa: E402
from encdec_fast.generation import GenerationConfig  # noqa: E402
from encdec_fast.integrations import transformers as integration  # noqa: E402

__all__ = ["quiet"]
pytestmark = [
    pytest.mark.usefixtures("native", "quiet"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]
BEAMS = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}


def fresh(model: str) -> Any:
    return copy.deepcopy(models.build(model).model)


def assert_as_before(model: Any, before: Any, **options: Any) -> None:
    """The engine finds with `model` what transformers finds with `before`, and the same scores."""
    theirs = generate(before, **options, output_scores=True)
    with no_decoder(model):
        ours = generate(model, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    if theirs.scores is not None:
        assert ours.scores is not None
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=2e-6)


def bart(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        **models.SIZES | {"max_position_embeddings": 64, "init_std": 0.3} | changes
    )
    name = "MarianMTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration"
    model = getattr(transformers, name)(config).eval()
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=1, eos_token_id=2, pad_token_id=3
    )
    return model


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Bart", {"activation_function": "relu"}),
    "gelu_new": ("MBart", {"activation_function": "gelu_new"}),
    "swish": ("Marian", {"activation_function": "swish", "pad_token_id": 3}),
    "silu": ("Bart", {"activation_function": "silu"}),
    "scaled": ("Bart", {"scale_embedding": True}),
    "scaled before its norm": ("MBart", {"scale_embedding": True}),
    "not scaled": ("Marian", {"scale_embedding": False, "pad_token_id": 3}),
    "vocabularies of its own": (
        "Marian",
        {
            "decoder_vocab_size": 50,
            "share_encoder_decoder_embeddings": False,
            "tie_word_embeddings": False,
            "pad_token_id": 3,
        },
    ),
    "deeper than its encoder": ("Bart", {"decoder_layers": 4, "encoder_layers": 1}),
    "other heads": ("MBart", {"decoder_attention_heads": 8, "decoder_ffn_dim": 20}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    kind, changes = VARIANTS[variant]
    before = bart(kind, **changes)
    with torch.no_grad():  # norms that do something
        for module in before.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    model = integration.optimize(copy.deepcopy(before))
    tokens = torch.randint(4, 50, (3, 7))
    for options in ({"max_new_tokens": 12}, BEAMS):
        assert_as_before(model, before, input_ids=tokens, **options)


def test_t5_relative_positions() -> None:
    """As the model computes them for the last of many tokens; more where a search needs more."""
    attention = models.build("t5").model.decoder.block[0].layer[0].SelfAttention
    expected = attention.compute_bias(1, 600, past_seen_tokens=599)[0, :, 0].flip(1)
    own = integration.optimize(fresh("t5")).generate
    for asked, length in ((1, 512), (600, 1024), (1, 1024)):
        table = own.describe(asked).position_bias
        assert table.shape == (4, length)
        n = min(length, 600)
        assert torch.equal(table[:, :n], expected[:, :n])
    assert own.describe(1).position_bias is table


def test_t5_search_beyond_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "DISTANCES", 4)
    tiny = models.build("t5")
    model = integration.optimize(fresh("t5"))
    for length in (3, 5, 6, 30, 4):
        assert_as_before(
            model, tiny.model, **tiny.inputs, max_new_tokens=length, min_new_tokens=length
        )


@ALL_MODELS
def test_changed_weights_are_used(model: str) -> None:
    before, tiny = fresh(model), models.build(model)
    changing = integration.optimize(fresh(model))
    found = generate(changing, **tiny.inputs, **BEAMS).sequences
    names = [name for name, p in before.named_parameters() if "decoder" in name and p.dim() > 1]
    names += ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    changes = 0
    for name, through in itertools.product((names[3], names[-2], names[-1]), ("torch", ".data")):
        if name not in dict(before.named_parameters()):
            continue
        for one in (before, changing):
            parameter = one.get_parameter(name)
            torch.manual_seed(7)
            with torch.no_grad():
                (parameter if through == "torch" else parameter.data).add_(
                    torch.randn_like(parameter)
                )
        assert_as_before(changing, before, **tiny.inputs, **BEAMS)
        last, found = found, generate(changing, **tiny.inputs, **BEAMS).sequences
        changes += not torch.equal(last, found)
    assert changes >= 2


@ALL_MODELS
def test_copies_have_their_own_weights(model: str) -> None:
    tiny = models.build(model)
    original = integration.optimize(fresh(model))
    found = generate(original, **tiny.inputs, **BEAMS)
    for made in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert made.generate.model is made
        assert integration.memory(made)["decoder"] == 0
        before = fresh(model)
        for one in (made, before):
            torch.manual_seed(3)
            with torch.no_grad():
                weight = one.get_input_embeddings().weight
                weight.add_(torch.randn_like(weight))
        assert_as_before(made, before, **tiny.inputs, **BEAMS)
        assert not torch.equal(found.sequences, generate(made, **tiny.inputs, **BEAMS).sequences)
        assert torch.equal(found.sequences, generate(original, **tiny.inputs, **BEAMS).sequences)


@ALL_MODELS
def test_saving(model: str, tmp_path: Path) -> None:
    tiny, original = models.build(model), integration.optimize(fresh(model), torch.bfloat16)
    original.generation_config.transformers_version = transformers.__version__
    if getattr(original.get_output_embeddings(), "bias", None) is not None:
        original.get_output_embeddings().bias = None  # no model that is loaded has one
    original.save_pretrained(tmp_path)
    loaded = type(original).from_pretrained(tmp_path)
    assert "generate" not in loaded.__dict__
    assert type(loaded) is type(original)
    restored = integration.restore(original)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name])
    assert_as_before(integration.optimize(restored), loaded, **tiny.inputs, **BEAMS)


@ALL_MODELS
def test_restore(model: str) -> None:
    tiny, one = models.build(model), fresh(model)
    assert integration.restore(one) is one
    for dtype in (None, "int8"):
        assert integration.optimize(one, dtype) is one
        assert type(one) is type(tiny.model)
        assert any(type(m) is encdec_fast.nn.Linear for m in one.get_encoder().modules())
    for _ in range(2):
        assert integration.restore(one) is one
        assert "generate" not in one.__dict__
        assert not any(type(m) is encdec_fast.nn.Linear for m in one.modules())
    expected = tiny.model.generate(**tiny.inputs, max_new_tokens=5)
    assert torch.equal(one.generate(**tiny.inputs, max_new_tokens=5), expected)


def test_memory() -> None:
    tiny, one = models.build("bart"), fresh("bart")
    assert integration.memory(one) == {"encoder": 0, "decoder": 0}
    taken = {}
    for dtype in (None, torch.bfloat16, "int8"):
        integration.optimize(one, dtype)
        assert integration.memory(one) == {"encoder": 0, "decoder": 0}  # what was packed is gone
        one.generate(**tiny.inputs, max_new_tokens=2)
        taken[dtype] = integration.memory(one)
    for part in ("encoder", "decoder"):
        assert taken[None][part] > taken[torch.bfloat16][part] > taken["int8"][part] > 0
    weights = [m.weight for m in tiny.model.model.decoder.modules() if isinstance(m, nn.Linear)]
    assert taken[None]["decoder"] >= 4 * sum(weight.numel() for weight in weights)
    assert "int8" in str(encdec_fast.explain(one.generate, **tiny.inputs))


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.88), ("int8", 0.8)])
def test_rounded_weights(dtype: Any, least: float) -> None:
    """Each next token after what the exact model wrote: an other one is not followed by others.

    A token changes where the two likeliest are closer than what rounding does to them. With these
    models, steep and random, 93 and 87 of 100 stay; the bounds are three standard deviations of
    288 such tokens below. Parameters rounded to bfloat16 in transformers itself keep 91, a decoder
    without its second layer keeps 30.
    """
    same: list[Tensor] = []
    for model in models.BUILDERS:
        tiny, rounded = models.build(model), integration.optimize(fresh(model), dtype)
        options = {**tiny.inputs, "suppress_tokens": [tiny.pad]}
        expected = tiny.model.generate(**options, max_new_tokens=8, min_new_tokens=8)
        start = torch.full((expected.shape[0], 1), tiny.start)
        expected = torch.cat([start, expected[:, -8:]], 1)
        for t in range(1, 9):
            given = {**options, "decoder_input_ids": expected[:, :t], "min_new_tokens": 1}
            with no_decoder(rounded):
                found = rounded.generate(**given, max_new_tokens=1)
            same.append(found[:, -1] == expected[:, t])
    agreeing = torch.cat(same).float().mean()
    assert least <= agreeing < 1  # the weights are rounded indeed


@ALL_MODELS
@pytest.mark.parametrize(
    ("dtype", "held"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float32")]
)
def test_models_of_few_bits(model: str, dtype: torch.dtype, held: str) -> None:
    """A model whose parameters are bfloat16 runs with weights as they are."""
    tiny = models.build(model)
    one = integration.optimize(fresh(model).to(dtype))
    inputs = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tiny.inputs.items()}
    assert held in encdec_fast.explain(one.generate, **inputs).plan
    with no_decoder(one):
        found = one.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    expected = tiny.model.generate(**tiny.inputs, max_new_tokens=3, min_new_tokens=3)
    assert (found == expected).float().mean() > 0.5


def exact(model: str, sentence: int, given: list[int], warpers: list[Any]) -> Tensor:
    """The distribution of the next token, in float64."""
    step, state = models.build(model).double().step()
    state = {k: None if t is None else t[sentence : sentence + 1] for k, t in state.items()}
    for token in given:
        logits, state = step(torch.tensor([token]), state)
    for warper in warpers:
        logits = warper(torch.tensor([given]), logits)
    return logits[0].softmax(0)


def draws(model: str, sentence: int, count: int, **options: Any) -> Tensor:
    """So many first tokens of a sentence."""
    tiny = models.build(model)
    inputs = {name: t[sentence : sentence + 1] for name, t in tiny.inputs.items()}
    options = {"top_k": 0, **options}
    with no_decoder(optimized(model)):
        found = optimized(model).generate(
            **inputs, **options, do_sample=True, max_new_tokens=1, num_return_sequences=count
        )
    return found[:, -1]


def surprise(found: Tensor, p: Tensor) -> float:
    """Pearson's chi-square in standard deviations from what it is for draws from p.

    Tokens of which fewer than five are expected are counted together. Infinite where a token was
    drawn that cannot be.
    """
    counts = torch.bincount(found, minlength=p.numel()).double()
    if bool((counts[p == 0] > 0).any()):
        return float("inf")
    expected = p * found.numel()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = expected.numel() - 1
    square = float(((counts - expected) ** 2 / expected).sum())
    return (square - freedom) / (2 * freedom) ** 0.5


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
}


@pytest.mark.parametrize(
    ("model", "case"), [*(("marian", case) for case in SAMPLING), ("gated_t5", "all")]
)
def test_draws_are_from_the_distribution(model: str, case: str) -> None:
    """Four standard deviations; draws at another temperature are far beyond."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    options = SAMPLING[case]
    kinds = (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    )
    warpers = [kind(options[name]) for name, kind in kinds if name in options]
    p = exact(model, 0, [models.build(model).start], warpers)
    torch.manual_seed(11)
    assert abs(surprise(draws(model, 0, 30_000, **options), p)) < 4
    hotter = {**options, "temperature": 1.05 * options.get("temperature", 1.0)}
    assert surprise(draws(model, 0, 30_000, **hotter), p) > 4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["draws", "beams"])
@ALL_MODELS
def test_seeds(model: str, options: dict[str, Any]) -> None:
    tiny = models.build(model)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(
            optimized(model).generate(
                **tiny.inputs, **options, do_sample=True, max_new_tokens=8, temperature=1.5
            )
        )
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])


def test_scores_of_drawn_beams() -> None:
    tiny = models.build("mbart")
    config = GenerationConfig(num_beams=4, max_new_tokens=7, eos_token_id=tiny.eos)
    torch.manual_seed(5)
    options = {"num_beams": 4, "max_new_tokens": 7, "do_sample": True}
    ours = generate(optimized("mbart"), **tiny.inputs, **options)
    assert ours.scores is not None
    for sentence, tokens in enumerate(ours.hypotheses(1, config)):
        expected = models.score(tiny, sentence, tokens, 1, config)
        assert float(ours.scores[sentence]) == pytest.approx(expected, abs=1e-4)


def test_other_classes() -> None:
    class Own(transformers.BartForConditionalGeneration):  # type: ignore[misc]
        """May do anything."""

    own = Own(models.build("bart").model.config)
    for model in (nn.Linear(2, 2), models.build("bart").model.model, own):
        for function in (integration.optimize, integration.restore, integration.memory):
            with pytest.raises(TypeError, match=r"MarianMTModel, .* T5ForConditionalGeneration"):
                function(model)


def test_errors_of_optimize() -> None:
    one = fresh("bart")
    with pytest.raises(ValueError, match="weight_dtype must be"):
        integration.optimize(one, torch.float16)
    assert "generate" not in one.__dict__
    one.generate = print
    with pytest.raises(RuntimeError, match="has a generate of its own"):
        integration.optimize(one)
