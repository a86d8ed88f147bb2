"""What the engine does not do is done as before; results, objects and streams as before."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import generation_models as models
import pytest
import torch
from test_transformers import ALL_MODELS, no_decoder, optimized, quiet
from torch import Tensor, nn
from torch.nn.utils import parametrize

transformers = pytest.importorskip("transformers")

import encdec_fast  # noqa: E402
from encdec_fast.integrations import transformers as integration  # noqa: E402
from encdec_fast.integrations._transformers_requests import MAPPED, MARGINAL, asked_for  # noqa: E402

__all__ = ["quiet"]
pytestmark = [
    pytest.mark.usefixtures("native", "quiet"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
    pytest.mark.filterwarnings("ignore:Unfeasible length constraints"),
]
LOG = integration.__name__


def fresh(model: str) -> Any:
    return copy.deepcopy(models.build(model).model)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOG]


class Constant(transformers.LogitsProcessor):  # type: ignore[misc]
    """Makes one token likely."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([9]), float(scores.max()) + 1)


class Short(transformers.StoppingCriteria):  # type: ignore[misc]
    """Ends everything at four tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 4)


def shifted(mask: Tensor) -> Tensor:
    """Padding on the left."""
    return mask.flip(1)


# The options, and what the reason says. Those that are functions are given the model.
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "logits_processor": ({"logits_processor": [Constant()]}, "the argument logits_processor"),
    "stopping_criteria": ({"stopping_criteria": [Short()]}, "the argument stopping_criteria"),
    "prefix_allowed_tokens_fn": (
        {"prefix_allowed_tokens_fn": lambda batch, tokens: [5, 6, 7]},
        "the argument prefix_allowed_tokens_fn",
    ),
    "assistant": ({"assistant_model": fresh}, "the argument assistant_model"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
    "scores": (
        {"output_scores": True, "return_dict_in_generate": True, "num_beams": 2},
        "output_scores=True",
    ),
    "attentions": (
        {"output_attentions": True, "return_dict_in_generate": True},
        "output_attentions=True",
    ),
    "hidden states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states=True",
    ),
    "logits": (
        {"output_logits": True, "return_dict_in_generate": True, "num_beams": 2},
        "output_logits=True",
    ),
    "min_p": ({"min_p": 0.1, "do_sample": True}, "min_p=0.1"),
    "typical_p": ({"typical_p": 0.5, "do_sample": True}, "typical_p=0.5"),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.1, "do_sample": True}, "epsilon_cutoff=0.1"),
    "eta_cutoff": ({"eta_cutoff": 0.1, "do_sample": True}, "eta_cutoff=0.1"),
    "exponential": (
        {"exponential_decay_length_penalty": (2, 3.0)},
        "exponential_decay_length_penalty=(2, 3.0)",
    ),
    "sequence_bias": ({"sequence_bias": [[[9], 4.0]]}, "sequence_bias="),
    "invalid values": ({"remove_invalid_values": True}, "remove_invalid_values=True"),
    "source ngrams": ({"encoder_no_repeat_ngram_size": 1}, "encoder_no_repeat_ngram_size=1"),
    "source tokens": ({"encoder_repetition_penalty": 2.0}, "encoder_repetition_penalty=2.0"),
    "renormalized": (
        {"renormalize_logits": True, "num_beams": 3, "no_repeat_ngram_size": 2},
        "renormalize_logits with beams and no_repeat_ngram_size",
    ),
    "cache": ({"cache_implementation": "dynamic"}, "the argument cache_implementation"),
    "left padding": ({"attention_mask": shifted}, "padding on the left, or holes"),
    "decoder mask": (
        {
            "decoder_input_ids": torch.tensor([[2, 5, 6]] * 6),
            "decoder_attention_mask": torch.tensor([[1, 0, 1]] * 6),
        },
        "the argument decoder_attention_mask",
    ),
    "long minimum": ({"min_length": 30}, "min_length is 30, above max_length, 9"),
    "many positions": (
        {"max_new_tokens": 70, "only": 4},
        "max_length is 71, but the decoder has 64 positions",
    ),
    "top_p of nothing": ({"top_p": 0.0, "do_sample": True}, "top_p must be above 0"),
}


def case_of(name: str, model: str) -> tuple[dict[str, Any], str]:
    options, reason = FOREIGN[name]
    inputs = dict(models.build(model).inputs)
    given: dict[str, Any] = {**inputs, "max_new_tokens": 8, **options}
    if given.get("assistant_model") is fresh:
        given["assistant_model"] = fresh(model)
        given = {key: t[:1] if isinstance(t, Tensor) else t for key, t in given.items()}
    if given["attention_mask"] is shifted:
        given |= {key: shifted(t) for key, t in inputs.items()}
    only = given.pop("only", 0 if "prompt_lookup_num_tokens" in given else None)
    if only is not None:
        given = {k: t[only : only + 1] if isinstance(t, Tensor) else t for k, t in given.items()}
    return given, reason


def equal(one: Any, other: Any) -> bool:
    """Of sequences, and of all else that generate returns."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return all(map(equal, one, other)) and len(one) == len(other)
    return one.keys() == other.keys() and all(
        equal(one[key], other[key]) for key in one if key not in ("cache", "past_key_values")
    )


def test_a_cache_of_the_caller() -> None:
    """What it holds was read before: only transformers' own method goes on from there."""
    model, tiny = fresh("bart"), models.build("bart")
    integration.optimize(model)
    empty = transformers.EncoderDecoderCache(
        transformers.DynamicCache(), transformers.DynamicCache()
    )
    for name in ("cache", "past_key_values"):
        told = encdec_fast.explain(model.generate, **tiny.inputs, **{name: empty})
        assert told.backend == "torch" and f"the argument {name}" in str(told)


@pytest.mark.parametrize("name", FOREIGN)
def test_as_before(name: str, caplog: pytest.LogCaptureFixture) -> None:
    given, reason = case_of(name, "bart")
    # With the encoder as it was, so that all numbers are the same.
    model = encdec_fast.restore(fresh("bart"))
    integration.optimize(model)
    encdec_fast.restore(model)
    caplog.set_level(logging.INFO, LOG)
    torch.manual_seed(2)
    # A copy: transformers leaves hooks behind where attentions were asked for.
    expected = fresh("bart").generate(**copy.deepcopy(given))
    torch.manual_seed(2)
    found = model.generate(**copy.deepcopy(given))
    assert equal(found, expected)
    assert len(logged(caplog)) == 1 and reason in logged(caplog)[0], logged(caplog)
    told = encdec_fast.explain(model.generate, **given)
    assert told.backend == "torch" and any(reason in text for text in told.reasons["cpu"])
    assert len(logged(caplog)) == 1


def test_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG)
    tiny, model = models.build("t5"), integration.optimize(fresh("t5"))
    for options in ({"min_p": 0.1}, {"min_p": 0.1}, {"typical_p": 0.5}, {"typical_p": 0.5}):
        model.generate(**tiny.inputs, do_sample=True, max_new_tokens=2, **options)
    levels = [record.levelname for record in caplog.records if record.name == LOG]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO"]


def test_sampling_options_count_with_sampling_only() -> None:
    given = {**models.build("t5").inputs, "max_new_tokens": 3, "typical_p": 0.5, "min_p": 0.2}
    with no_decoder(optimized("t5")):
        optimized("t5").generate(**given)
    assert encdec_fast.explain(optimized("t5").generate, **given).backend == "cpu"


def test_every_field_counts() -> None:
    """Of transformers' config: known to the engine, or a reason against it."""
    fields = set(vars(transformers.GenerationConfig()))
    assert fields >= MAPPED
    for name in sorted(fields - MAPPED - MARGINAL):
        config = transformers.GenerationConfig(do_sample=True)
        assert list(asked_for(config)) == []
        setattr(config, name, 0.123)
        assert list(asked_for(config)) == [f"{name}=0.123"]


# What is done to a model that was optimized, and the reason.
def _replace_linear(model: Any) -> None:
    class Adapted(nn.Linear):
        """Adds something, as adapters do."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 0.5

    layer = model.model.decoder.layers[1].encoder_attn
    adapted = Adapted(32, 32)
    adapted.load_state_dict(layer.v_proj.state_dict())
    layer.v_proj = adapted


class _Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.1


def _own_forward(model: Any) -> None:
    decoder = model.model.decoder
    forward = decoder.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.last_hidden_state = found.last_hidden_state * 0.5
        return found

    decoder.forward = scaled


def _activation(model: Any) -> None:
    model.model.decoder.layers[0].activation_fn = nn.Tanh()


def _norm(model: Any) -> None:
    model.model.decoder.layers[0].final_layer_norm = nn.Identity()


def _hook(model: Any) -> None:
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda m, args, out: out * 1.1)


def _parametrize(model: Any) -> None:
    parametrize.register_parametrization(model.model.decoder.layers[0].fc1, "weight", _Same())


def _max_norm(model: Any) -> None:
    model.model.decoder.embed_tokens.max_norm = 1.0


def _bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, models.VOCABULARY))


TOUCHED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "linear": (_replace_linear, "Adapted"),
    "forward": (_own_forward, "model.decoder has a method of its own"),
    "hook": (_hook, "model.decoder.layers.0.fc1 has a hook"),
    "parametrized": (_parametrize, "layers.0.fc1"),
    "activation": (_activation, "the activation Tanh"),
    "activations": (
        lambda model: setattr(model.model.decoder.layers[1], "activation_fn", nn.SiLU()),
        "layers differ in activation",
    ),
    "norm": (_norm, "Identity is no norm"),
    "max_norm": (_max_norm, "max_norm"),
    "two biases": (_bias, "bias beside final_logits_bias"),
    "float64": (lambda model: model.double(), "torch.float64"),
    "training": (lambda model: model.train(), "is in training mode"),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_touched_models(name: str, caplog: pytest.LogCaptureFixture) -> None:
    touch, reason = TOUCHED[name]
    before, model = fresh("bart"), encdec_fast.restore(integration.optimize(fresh("bart")))
    given = {**models.build("bart").inputs, "max_new_tokens": 6}
    model.generate(**given)
    assert not logged(caplog)
    for one in (before, model):
        touch(one)
    torch.manual_seed(4)
    expected = before.generate(**given)
    torch.manual_seed(4)
    assert torch.equal(model.generate(**given), expected)
    assert len(logged(caplog)) == 1 and reason in logged(caplog)[0], logged(caplog)


def test_hooks_of_the_encoder_are_called() -> None:
    model, seen = integration.optimize(fresh("bart")), []
    model.model.encoder.layers[0].register_forward_hook(lambda *args: seen.append(1))
    with no_decoder(model):
        model.generate(**models.build("bart").inputs, max_new_tokens=4)
    assert len(seen) == 1


def test_after_attentions_were_asked_for() -> None:
    """transformers leaves hooks behind, that do nothing."""
    model, given = integration.optimize(fresh("bart")), models.build("bart").inputs
    model.generate(**given, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
    assert any(module._forward_hooks for module in model.model.decoder.modules())
    with no_decoder(model):
        model.generate(**given, max_new_tokens=2)


def test_autocast(caplog: pytest.LogCaptureFixture) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        optimized("bart").generate(**models.build("bart").inputs, max_new_tokens=2)
    assert "torch.autocast is on" in logged(caplog)[0]


def test_embeddings_in_place_of_tokens(caplog: pytest.LogCaptureFixture) -> None:
    tiny = models.build("bart")
    given = {
        "inputs_embeds": tiny.model.get_input_embeddings()(tiny.inputs["input_ids"]),
        "attention_mask": tiny.inputs["attention_mask"],
        "max_new_tokens": 5,
    }
    assert torch.equal(optimized("bart").generate(**given), tiny.model.generate(**given))
    assert "the argument inputs_embeds" in logged(caplog)[0]


def test_without_tokens(caplog: pytest.LogCaptureFixture) -> None:
    tiny = models.build("mbart")
    given = {**tiny.inputs, "max_new_tokens": 5}
    given["attention_mask"] = given["attention_mask"].clone()
    given["attention_mask"][2] = 0
    assert torch.equal(optimized("mbart").generate(**given), tiny.model.generate(**given))
    assert "no token that the attention mask lets count" in logged(caplog)[0]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, ValueError, "Group"),
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "Contrastive"),
        ({"nonsense": 3}, ValueError, "nonsense"),
        ({"decoder_input_ids": torch.tensor([[57, 99]] * 6)}, IndexError, "out of range"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "num_return_sequences"),
        ({"inputs": torch.tensor([[4]])}, ValueError, "were passed alongside"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_as_before(options: dict[str, Any], error: Any, text: str) -> None:
    tiny = models.build("mbart")
    messages = []
    for model in (tiny.model, optimized("mbart")):
        with pytest.raises(error, match=text) as caught:
            model.generate(**tiny.inputs, **options)
        messages.append(f"{caught.type} {caught.value}")
    assert messages[0] == messages[1]


@ALL_MODELS
def test_requested_backends(model: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny, generate_ = models.build(model), optimized(model).generate
    with encdec_fast.use_backend("torch"):
        with no_decoder(optimized(model)), pytest.raises(AssertionError, match="was called"):
            generate_(**tiny.inputs, max_new_tokens=3)
        assert encdec_fast.explain(generate_, **tiny.inputs).backend == "torch"
    assert not logged(caplog)
    with encdec_fast.use_backend("cpu"):
        generate_(**tiny.inputs, max_new_tokens=3)
        with pytest.raises(encdec_fast.BackendRefused, match="output_scores=True"):
            generate_(**tiny.inputs, max_new_tokens=3, output_scores=True)
