"""What optimized transformers models return and stream, how they may be called, and Whisper."""

from __future__ import annotations

import copy
from typing import Any

import generation_models as models
import pytest
import torch
from test_transformers import ALL_MODELS, generate, no_decoder, optimized, quiet
from test_transformers_fallback import fresh, logged
from torch import Tensor

transformers = pytest.importorskip("transformers")

import encdec_fast  # noqa: E402
from encdec_fast.integrations import transformers as integration  # noqa: E402

__all__ = ["quiet"]
pytestmark = [
    pytest.mark.usefixtures("native", "quiet"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append((tuple(value.shape), value.tolist()))

    def end(self) -> None:
        self.seen.append("end")


@ALL_MODELS
def test_streams(model: str) -> None:
    tiny = models.build(model)
    given: dict[str, Any] = {name: t[2:3] for name, t in tiny.inputs.items()}
    given |= {
        "max_new_tokens": 9,
        "min_new_tokens": 4,
        "decoder_input_ids": torch.tensor([[tiny.start, 5, 6]]),
    }
    theirs, ours = Streamer(), Streamer()
    tiny.model.generate(**given, streamer=theirs)
    with no_decoder(optimized(model)):
        optimized(model).generate(**given, streamer=ours)
    assert ours.seen == theirs.seen
    assert len(ours.seen) > 3 and ours.seen[-1] == "end"


def test_streams_of_several(caplog: pytest.LogCaptureFixture) -> None:
    tiny = models.build("t5")
    theirs, ours = Streamer(), Streamer()
    tiny.model.generate(**tiny.inputs, max_new_tokens=4, streamer=theirs)
    optimized("t5").generate(**tiny.inputs, max_new_tokens=4, streamer=ours)
    assert ours.seen == theirs.seen and "a streamer of more than one" in logged(caplog)[0]
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        optimized("t5").generate(**tiny.inputs, num_beams=2, streamer=ours)


@ALL_MODELS
def test_objects(model: str) -> None:
    """Classes and fields of what is returned."""
    tiny = models.build(model)
    for beams in (1, 3):
        given = {**tiny.inputs, "num_beams": beams, "max_new_tokens": 4}
        own = tiny.model.generate(**given, return_dict_in_generate=True)
        found = optimized(model).generate(**given, return_dict_in_generate=True)
        assert type(found) is type(own)
        assert torch.equal(found.sequences, own.sequences)
        assert found.sequences.dtype == own.sequences.dtype
        assert ("sequences_scores" in found) == (beams > 1)


def test_other_ways_to_call() -> None:
    """Positional arguments, a config, encoder outputs, bool masks, no mask, one sentence."""
    tiny, model = models.build("marian"), optimized("marian")
    config = transformers.GenerationConfig(num_beams=3, max_new_tokens=7, length_penalty=0.3)
    tokens, mask = tiny.inputs["input_ids"], tiny.inputs["attention_mask"]
    encoded = tiny.model.get_encoder()(**tiny.inputs)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((tokens,), {"max_new_tokens": 6}),
        ((tokens, config), {"attention_mask": mask}),
        ((), {"input_ids": tokens, "generation_config": config, "attention_mask": mask.bool()}),
        ((tokens[3:4],), {"generation_config": config}),
        ((), {"encoder_outputs": encoded, "attention_mask": mask, "num_beams": 2}),
        ((), {"decoder_start_token_id": [3, 4, 5, 6, 7, 8], "inputs": tokens}),
        ((tokens,), {"use_cache": False, "num_beams": 2, "max_new_tokens": 4}),
        ((tokens,), {"eos_token_id": None, "num_beams": 2, "max_new_tokens": 4}),
        ((tokens,), {"max_time": 100.0, "max_new_tokens": 4}),
        ((tokens,), {"custom_generate": None, "streamer": None, "logits_processor": []}),
    ]
    for args, given in calls:
        expected = tiny.model.generate(*args, **copy.deepcopy(given))
        with no_decoder(model):
            assert torch.equal(model.generate(*args, **copy.deepcopy(given)), expected), given
            with torch.inference_mode():
                assert torch.equal(model.generate(*args, **copy.deepcopy(given)), expected)


def test_max_time() -> None:
    tiny = models.build("marian")
    found = optimized("marian").generate(**tiny.inputs, max_new_tokens=60, max_time=1e-9)
    assert found.shape[1] <= 3


def talking() -> Any:
    """A Whisper with languages, tasks, timestamps and tokens that it never writes."""
    model = fresh("whisper")
    model.generation_config.update(
        is_multilingual=True,
        lang_to_id={"<|en|>": 41, "<|de|>": 42},
        task_to_id={"transcribe": 43, "translate": 44},
        no_timestamps_token_id=45,
        prev_sot_token_id=40,
        max_initial_timestamp_index=3,
        suppress_tokens=[5, 6, 99],
        begin_suppress_tokens=[7, 2],
        max_length=20,
    )
    for name, value in {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 41, "<|de|>": 42},
        "task_to_id": {"transcribe": 43, "translate": 44},
        "no_timestamps_token_id": 45,
        "prev_sot_token_id": 40,
        "max_initial_timestamp_index": 3,
    }.items():
        setattr(model.generation_config, name, value)
    return model


WHISPER: dict[str, dict[str, Any]] = {
    "language": {"language": "en"},
    "languages": {"language": ["en", "de", "en", "en", "de", "de"]},
    "task": {"language": "de", "task": "translate", "num_beams": 3},
    "prompt": {"language": "en", "prompt_ids": torch.tensor([40, 8, 9, 10])},
    "temperature": {"language": "en", "temperature": 0.0},
    "beams": {"language": "en", "num_beams": 4, "max_new_tokens": 12},
}


@pytest.mark.parametrize("case", WHISPER)
def test_whisper(case: str) -> None:
    before, model = talking(), integration.optimize(talking())
    given = {**models.build("whisper").inputs, **WHISPER[case]}
    expected = before.generate(**given)
    with no_decoder(model):
        found = model.generate(**given)
    assert torch.equal(found, expected)
    assert not bool(torch.isin(found, torch.tensor([5, 6])).any())


def test_whisper_detects_languages(caplog: pytest.LogCaptureFixture) -> None:
    before, model = talking(), integration.optimize(talking())
    given = models.build("whisper").inputs
    assert torch.equal(model.generate(**given), before.generate(**given))
    assert not logged(caplog)


@pytest.mark.parametrize("kind", ["timestamps", "long"])
def test_whisper_with_timestamps(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    before, model = talking(), encdec_fast.restore(integration.optimize(talking()))
    torch.manual_seed(6)
    given: dict[str, Any] = {"language": "en", "input_features": torch.randn(1, 6, 16)}
    if kind == "timestamps":
        given["return_timestamps"] = True
    else:
        given["input_features"] = torch.randn(1, 6, 50)
    expected = before.generate(**given)
    assert torch.equal(model.generate(**given), expected)
    reasons = {"timestamps": "return_timestamps", "long": "WhisperTimeStampLogitsProcessor"}
    assert len(logged(caplog)) == 1 and reasons[kind] in logged(caplog)[0]


def test_whisper_suppresses_at_a_forced_token(caplog: pytest.LogCaptureFixture) -> None:
    given = {
        **models.build("whisper").inputs,
        "forced_bos_token_id": 9,
        "begin_suppress_tokens": [3],
        "max_new_tokens": 4,
    }
    found = generate(optimized("whisper"), **given)
    assert torch.equal(found.sequences, generate(models.build("whisper").model, **given).sequences)
    assert "begin_suppress_tokens at another place" in logged(caplog)[0]
