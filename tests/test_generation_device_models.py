"""generate() with whole models on the engine of the GPU: the tests of the compiled engine, for it.

Everywhere but in the last tests its ops run on whatever they would, so that all models and options
are searched in seconds; there they run in Triton's interpreter.
"""

# ruff: noqa: F401 (tests run where they are imported)

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_generation import (
    BEAMS,
    BUILDERS,
    FEW,
    SENTENCES,
    assert_agrees,
    generate,
    made,
    test_attention,
    test_batches,
    test_changed_models,
    test_no_sentences,
    test_prefixes,
    test_streams_by_the_order_given,
    test_weights_that_are_no_numbers,
    tokens_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from encdec_fast import explain, generation, use_backend
from encdec_fast.backends import Backend
from encdec_fast.ops import _triton

run: Any = importlib.import_module("encdec_fast.generation.device.run")
module: Any = importlib.import_module("encdec_fast.generation.generate")
BACKENDS = module.BACKENDS


@pytest.fixture(autouse=True)
def on_the_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The GPU's engine stands for the CPU's; tests with `interpreter` ask for it by name."""
    if "interpreter" not in request.fixturenames:

        def search(batch: Any) -> Any:
            with use_backend(None):  # the ops run on whatever they would
                return module._run_on(run.run, batch)

        here = Backend("cpu", search, lambda call: [])
        monkeypatch.setattr(module, "BACKENDS", (here, *BACKENDS[2:]))
    yield


@pytest.mark.parametrize("name", BUILDERS)
def test_as_reference(name: str) -> None:
    assert_agrees(name, {})
    assert_agrees(name, BEAMS)


@pytest.mark.parametrize("name", FEW)
def test_bfloat16(name: str) -> None:
    """Most tokens are the same until a hypothesis first differs, as with the compiled engine."""
    model, config = made(name)
    whole = tokens_of(generate(model, SENTENCES, config))
    narrow = tokens_of(generate(model, SENTENCES, config, weight_dtype=torch.bfloat16))
    pairs = zip(whole, narrow, strict=True)
    same = [a == b for one, two in pairs for a, b in zip(one[0], two[0], strict=False)]
    assert 0.7 * len(same) <= sum(same)
    # That it had other weights, and not float32's under another name.
    (own,) = (s for s in sessions_of(model).values() if s.steps.weights.dtype == torch.bfloat16)
    assert own.steps.weights(model.output.weight).dtype == torch.bfloat16


class Strict(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: numbers read on the host, or brought from there, and
    results whose sizes depend on values."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "lift_fresh",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
    )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        if name in self.FORBIDDEN:
            raise AssertionError(f"a step calls {function.name()}")
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise AssertionError("a step selects by a mask")
        return function(*args, **(kwargs or {}))


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": BEAMS,
    "coverage": {**BEAMS, "coverage_penalty": 0.4},
    "draws": {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "constraints": {
        **BEAMS,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[4], [5, 6]],
        "suppress_tokens": [7],
        "begin_suppress_tokens": [8],
        "min_length": 4,
        "forced_bos_token_id": 9,
        "vocabulary": list(range(2, 20)),
    },
    "penalties": {"num_beams": 2, "repetition_penalty": 1.3, "prefix_bias": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [name for name in FEW if "None" not in name])
def test_a_step_can_be_captured(name: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing back, and what is kept between steps and calls stays where it lies.

    A graph is stood in for by the function that it would be made of.
    """
    sessions: list[Any] = []

    def take(session: Any) -> None:
        if session not in sessions:
            sessions.append(session)
        lies = addresses(session)
        with Strict() if session.search.position[0] else contextlib.nullcontext():
            session.step()
        assert addresses(session) == lies

    monkeypatch.setattr(run.Session, "take", take)
    for op in ("_attention_checks", "cached_attention"):  # on a GPU they look at no values
        checks = importlib.import_module(f"encdec_fast.ops.{op}")
        monkeypatch.setattr(checks, "check_device_values", lambda tensor: False)
    model, config = made(name)
    config = config.replace(**OPTIONS[options])
    prefixes = [[3, 4]] * len(SENTENCES) if config.prefix_bias else None
    for _ in range(2):
        generate(model, SENTENCES, config, prefixes=prefixes)
    assert len(sessions) == 1
    assert explain(generate, model, SENTENCES, config).backend == "cpu"


def addresses(session: Any) -> list[int]:
    """Where everything lies that a session keeps."""
    found: list[int] = []

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            found.append(part.data_ptr())
        elif isinstance(part, (list, tuple)):
            for item in part:
                visit(item)

    for owner in (session.search, session.steps):
        for part in vars(owner).values():
            visit(part)
    return found


@pytest.mark.parametrize("name", FEW)
def test_on_triton(name: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder and search on Triton's kernels, asked for by name."""
    model, config = made(name)
    encode = type(model).generation_encode

    def as_ever(*args: Any) -> Any:
        with use_backend(None):
            return encode(*args)

    monkeypatch.setattr(type(model), "generation_encode", as_ever)
    few = [SENTENCES[0], SENTENCES[5]]
    config = config.replace(num_beams=2, num_return_sequences=2, max_new_tokens=5)
    with use_backend("reference"):
        expected = generate(model, few, config)
    with use_backend("triton"):
        assert explain(generate, model, few, config).backend == "triton"
        found = generate(model, few, config)
    assert tokens_of(found) == tokens_of(expected)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=2e-4)


def sessions_of(model: Any) -> Any:
    """What is kept of a model."""
    return run._kept[model].sessions if model in run._kept else {}


def test_sessions_are_few_and_released() -> None:
    """Four of each model, none for tensors that it no longer has, and none after `release`."""
    model, config = made("lstm-additive-2")
    model = copy.deepcopy(model)
    for beams in range(1, 8):
        generate(model, SENTENCES, config, num_beams=beams)
        assert len(sessions_of(model)) == min(beams, run.KEPT)
    before = [weakref.ref(parameter) for parameter in model.parameters()]
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    generate(model, SENTENCES, config)
    gc.collect()
    assert len(sessions_of(model)) == 1 and not any(parameter() for parameter in before)
    generation.release(model)
    assert len(sessions_of(model)) == 0
    assert tokens_of(generate(model, SENTENCES, config))


def test_sizes_share_sessions() -> None:
    """Batches of like sizes, prefixes of like lengths and sources of any are one session's."""
    model, config = made("pre-relu-5")
    model = copy.deepcopy(model)
    for sentences, prefixes in (
        (SENTENCES, None),
        (SENTENCES[:9], [[3]] * 9),
        (SENTENCES[1:], [[3, 4]] * 9),
    ):
        generate(model, sentences, config, num_beams=2, prefixes=prefixes)
    assert len(sessions_of(model)) == 1


def test_a_weight_in_another_ones_place() -> None:
    """Copies are made of the tensors that the model has now, where others lay before."""
    model, config = made("gru-dot-1")
    model = copy.deepcopy(model).bfloat16()
    generate(model, SENTENCES, config, weight_dtype=torch.float32)
    old = model.output.weight
    store = old.data
    old.data = store.clone()
    model.output.weight = torch.nn.Parameter(store)
    with torch.no_grad():
        model.output.weight.mul_(-1.1)
    found = tokens_of(generate(model, SENTENCES, config, weight_dtype=torch.float32))
    other = copy.deepcopy(model)
    assert found == tokens_of(generate(other, SENTENCES, config, weight_dtype=torch.float32))


@pytest.mark.parametrize("name", FEW)
def test_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the encoder's; a search has the dtype of its weights, and no session of its own."""
    model, config = made(name)
    model = copy.deepcopy(model)
    encode = type(model).generation_encode

    def plain(*args: Any) -> Any:  # not all of torch's encoder layers run under autocast
        with torch.autocast("cpu", enabled=False):
            return encode(*args)

    monkeypatch.setattr(type(model), "generation_encode", plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(model, SENTENCES, config)
    expected = generate(model, SENTENCES, config)
    assert tokens_of(found) == tokens_of(expected) and torch.equal(found.scores, expected.scores)
    assert len(sessions_of(model)) == 1


def test_attention_is_an_ordinary_tensor() -> None:
    model, config = made("lstm-additive-2")
    weights = generate(model, SENTENCES, config, need_attention=True).hypotheses[0][0].attention
    assert weights is not None and not weights.is_inference()
    (weights * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("fails", [False, True])
def test_captures(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After some steps of a session, not of each call; where it cannot be, the steps go on."""
    model, config = made("pre-relu-5")
    expected = tokens_of(generate(model, SENTENCES, config))
    model = copy.deepcopy(model)
    begin, recorded = run.Session.__init__, []

    def on_a_gpu(session: Any, *given: Any) -> None:
        begin(session, *given)
        session.captures = True

    def record(step: Any, device: torch.device) -> Any:
        recorded.append(step)
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    monkeypatch.setattr(run.Session, "__init__", on_a_gpu)
    monkeypatch.setattr(_triton.kernels("_replay"), "record", record)
    counts = []
    for _ in range(4):
        assert tokens_of(generate(model, SENTENCES, config)) == expected
        counts.append(len(recorded))
    # Some sentence goes on to the limit: the last step of the first call is the dozenth.
    assert counts == [1, 1, 1, 1]
    (session,) = sessions_of(model).values()
    assert (session.replay is None) == fails and session.taken >= run.EAGER
    assert ("could not be captured" in caplog.text) == fails


def test_time_to_prepare_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles and captures once, in a first call, is not the search's."""
    model, config = made("gru-dot-1")
    model = copy.deepcopy(model)
    step, slow = run.Session.step, [2.0]

    def compiling(session: Any) -> None:
        if slow:
            time.sleep(slow.pop())
        step(session)

    monkeypatch.setattr(run.Session, "step", compiling)
    found = generate(model, SENTENCES, config, max_time=1.5)
    assert tokens_of(found) == tokens_of(generate(model, SENTENCES, config))
