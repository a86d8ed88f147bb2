"""What is refused: options, results of steps, sources; and what a config makes of its options."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_generation import SENTENCES, SOURCES, TARGETS, made, run_script, tokens_of
from test_generation_search import LARGE
from torch import Tensor

from encdec_fast.generation import GenerationConfig, generate, search

NATIVE = pytest.mark.usefixtures("native")
INTEGERS = {
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "max_batch_tokens": 1,
}
TOKENS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "vocabulary",
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
)
LISTS = ("suppress_tokens", "begin_suppress_tokens", "vocabulary", "eos_token_id")


def refused(word: str, **options: Any) -> None:
    """With a message that has the word; and also as a change of a config that is good."""
    with pytest.raises(ValueError, match=re.escape(word)):
        GenerationConfig(**options)
    with pytest.raises(ValueError, match=re.escape(word)):
        GenerationConfig().replace(**options)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    least = INTEGERS[name]
    for value in (least - 1, -7, 1.5, 2.0, "2", True):
        refused(f"{name} must be an integer of at least {least}", **{name: value})
    for value in (least, least + 1):
        more = {"num_beams": 9} if name == "num_return_sequences" else {}
        assert getattr(GenerationConfig(**{name: value}, **more), name) == value
    if name not in ("max_length", "max_new_tokens", "max_batch_tokens"):
        refused(name, **{name: None})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [0, 0.0, -1.0, math.nan]),
        ("top_p", [0.0, -0.1, math.nan, 1.0001, math.inf]),
        ("repetition_penalty", [0.0, -2.0, math.nan]),
        ("max_time", [0.0, -1.0, math.nan]),
        ("coverage_penalty", [-0.1, math.nan]),
        ("prefix_bias", [0.0, 1.0, -0.5, 2.0, math.nan]),
        ("early_stopping", ["always", 2, None, "False"]),
        ("seed", [1.0, "1"]),
        ("length_penalty", [math.nan]),
    ],
)
def test_values(name: str, values: list[Any]) -> None:
    for value in values:
        refused(name, **{name: value})


@pytest.mark.parametrize("name", [*TOKENS, "bad_words_ids"])
def test_tokens(name: str) -> None:
    values: list[Any] = [-1, "a", True]
    if name in ("decoder_start_token_id", "pad_token_id"):
        values += [[1]]
    if name in LISTS:
        values = [[value] for value in values] + [[1, -1]]
    if name == "bad_words_ids":
        values = [[[value]] for value in values] + [[[1], [2, -1]], [[]], [[1], []], [0], [5]]
    for value in values:
        refused(name, **{name: value})


def test_contradictions() -> None:
    refused("num_return_sequences is 3", num_return_sequences=3)
    refused("num_return_sequences is 3", num_return_sequences=3, num_beams=2)
    refused("num_return_sequences is 3", num_return_sequences=3, num_beams=2, do_sample=True)
    refused("min_new_tokens is 5", min_new_tokens=5, max_new_tokens=4)
    refused("min_new_tokens is 5", min_new_tokens=5, max_length=4)
    refused("min_length is 5", min_length=5, max_length=4)
    refused("forced_bos_token_id, 3", forced_bos_token_id=3, suppress_tokens=[2, 3])
    refused("forced_bos_token_id, 3", forced_bos_token_id=3, begin_suppress_tokens=[3])
    refused("forced_eos_token_id, 3", forced_eos_token_id=3, suppress_tokens=[3])
    refused("forced_eos_token_id, [3, 4]", forced_eos_token_id=[3, 4], suppress_tokens=[4, 3])
    refused("vocabulary", vocabulary=[])
    refused("vocabulary", vocabulary=[2, 3], suppress_tokens=[3, 2, 1])
    refused("forced_bos_token_id, 4", forced_bos_token_id=4, vocabulary=[2, 3])
    refused("forced_eos_token_id, 4", forced_eos_token_id=4, vocabulary=[2, 3])


def test_no_contradictions() -> None:
    GenerationConfig(num_return_sequences=3, do_sample=True)
    GenerationConfig(num_return_sequences=3, num_beams=3)
    GenerationConfig(min_new_tokens=4, max_new_tokens=4, max_length=2, min_length=9)
    GenerationConfig(min_length=4, max_length=4)
    GenerationConfig(forced_eos_token_id=[3, 4], suppress_tokens=[4])
    GenerationConfig(forced_eos_token_id=3, begin_suppress_tokens=[3])
    GenerationConfig(forced_eos_token_id=[3, 4], vocabulary=[4, 5])


def test_unknown_names() -> None:
    with pytest.raises(TypeError, match="beams"):
        GenerationConfig(beams=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="beams, width"):
        GenerationConfig().replace(width=1, num_beams=2, beams=3)


def test_it_does_not_change() -> None:
    config = GenerationConfig(num_beams=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_beams = 3  # type: ignore[misc]
    other = config.replace(top_k=7)
    assert (other.num_beams, other.top_k, config.top_k) == (2, 7, 50)
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config


def test_what_it_makes_of_them() -> None:
    assert [GenerationConfig().limit(n) for n in (1, 5)] == [21, 25]
    assert [GenerationConfig(max_length=9).limit(n) for n in (1, 5)] == [9, 9]
    assert [GenerationConfig(max_length=9, max_new_tokens=2).limit(n) for n in (1, 5)] == [3, 7]
    assert GenerationConfig(eos_token_id=3).end_tokens == (3,)
    assert GenerationConfig(eos_token_id=[5, 3]).end_tokens == (5, 3)
    assert GenerationConfig().end_tokens == ()
    assert GenerationConfig(eos_token_id=[5, 3]).fill_token == 5
    assert GenerationConfig(eos_token_id=5, pad_token_id=0).fill_token == 0
    assert GenerationConfig().fill_token == 0
    assert GenerationConfig(do_sample=True).draws
    assert not GenerationConfig(do_sample=True, num_beams=2).draws
    assert not GenerationConfig().draws


@NATIVE
@pytest.mark.parametrize("first", [0, 3])
def test_results_of_a_wrong_shape(first: int) -> None:
    """From step number `first` on."""

    def run(change: Callable[[Any], Any], **options: Any) -> None:
        calls = itertools.count()

        def step(tokens: Tensor, state: Any) -> Any:
            result = LARGE.table.step(tokens, state)
            return change(result) if next(calls) >= first else result

        config = GenerationConfig(num_beams=2)
        search(step, LARGE.table.state(), LARGE.prompts, config, **options)

    for part in (lambda s: s[:-1], lambda s: s[:, :, None], lambda s: s[0]):
        with pytest.raises(RuntimeError, match="logits"):
            run(lambda r, part=part: (part(r[0]), *r[1:]))
    with pytest.raises(ValueError, match="attention"):
        run(lambda r: r[:2], need_attention=True)
    if first > 0:
        with pytest.raises(RuntimeError, match="logits"):
            run(lambda r: (r[0][:, :-1], *r[1:]))


@NATIVE
def test_tokens_that_there_are_not() -> None:
    for options in ({"suppress_tokens": [30]}, {"bad_words_ids": [[1, 30]]}, {"vocabulary": [30]}):
        with pytest.raises(ValueError, match="token 30"):
            search(*LARGE.given(GenerationConfig(**options)))
    config = GenerationConfig(prefix_bias=0.5)
    with pytest.raises(IndexError, match="token 30"):
        search(*LARGE.given(config), prefixes=[[30]] * 6)
    with pytest.raises(ValueError, match="prompt"):
        search(LARGE.table.step, LARGE.table.state(), [[]] * 6, config)
    assert search(LARGE.table.step, LARGE.table.state(), [], config) == []


# Where nobody looked, these would read or write beyond the engine's memory: another process.
UNSAFE = """
import torch
from encdec_fast.generation import GenerationConfig, search
def step(tokens, state):
    S = wide if len(tokens) > 1 else 3
    return torch.randn(len(tokens), 8), state, torch.full((len(tokens), S), 1 / S)
def attempt(prompts=((0,),), given=None, **options):
    given = given or {}
    config = GenerationConfig(num_beams=3, max_new_tokens=8, **options)
    try:
        search(step, torch.zeros(len(prompts)), [list(p) for p in prompts], config, **given)
        print("accepted", flush=True)
    except (ValueError, IndexError, RuntimeError) as error:
        print(type(error).__name__, error, flush=True)
wide = 10**7
attempt(given={"need_attention": True})
wide = 3
attempt(given={"source_lengths": [10**8]}, coverage_penalty=0.5)
attempt(given={"source_lengths": []}, coverage_penalty=0.5)
attempt(given={"source_lengths": [-1]}, coverage_penalty=0.5)
attempt(eos_token_id=2 * 10**9, min_length=4)
attempt(prompts=[[-(10**9)]], repetition_penalty=2.0)
attempt(prompts=[[-(10**9)]], no_repeat_ngram_size=1)
print("alive", flush=True)
"""


@NATIVE
def test_nothing_is_read_or_written_outside() -> None:
    """What does not fit is refused, but for end tokens that the model cannot write: as for the
    reference they do not matter."""
    script = [sys.executable, "-c", UNSAFE]
    result = subprocess.run(script, capture_output=True, text=True, timeout=100)
    lines = result.stdout.splitlines()
    assert lines[-1:] == ["alive"], (lines, result.stderr[-500:])
    accepted = [line == "accepted" for line in lines[:-1]]
    assert accepted == [False] * 4 + [True] + [False] * 2, lines


HUGE = """
import resource, torch
import test_generation as tests
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for name in ("lstm-additive-2", "pre-relu-5"):
    model, config = tests.made(name)
    expected = tests.tokens_of(tests.generate(model, tests.SENTENCES, config))
    for options in (
        {"num_beams": 10**7},
        {"num_beams": 10**12},
        {"num_beams": 2**59},
        {"num_return_sequences": 10**9, "do_sample": True},
        {"num_return_sequences": 2**60, "do_sample": True},
    ):
        try:
            tests.generate(model, tests.SENTENCES, config, **options)
            print("accepted", flush=True)
        except (MemoryError, RuntimeError, ValueError) as error:
            print("refused", type(error).__name__, error, flush=True)
    assert tests.tokens_of(tests.generate(model, tests.SENTENCES, config)) == expected
"""


@NATIVE
def test_what_cannot_be_allocated() -> None:
    printed = run_script(HUGE)
    assert len(printed) == 10
    assert all(line.startswith("refused") for line in printed), printed


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "an empty sentence": ([[1, 2], []], {}, RuntimeError, "from 1 to"),
    "only padding": (torch.tensor([[1, 2], [0, 0]]), {}, RuntimeError, "from 1 to"),
    "no positions": (torch.zeros(2, 0).long(), {}, RuntimeError, "from 1 to"),
    "floats": (torch.ones(2, 3), {}, RuntimeError, "int64"),
    "one dimension": (torch.ones(3).long(), {}, RuntimeError, "shape"),
    "lengths": (torch.ones(2, 3).long(), {"source_lengths": [3, 4]}, RuntimeError, "lengths"),
    "fewer lengths": (torch.ones(2, 3).long(), {"source_lengths": [3]}, RuntimeError, "lengths"),
    "lengths of a list": ([[1]], {"source_lengths": [1]}, RuntimeError, "lengths"),
    "beyond the vocabulary": ([[SOURCES]], {}, IndexError, "range"),
    "a negative token": ([[-1]], {}, IndexError, "range"),
    "a prefix beyond": ([[1]], {"prefixes": [[TARGETS]]}, IndexError, "prompt"),
    "a soft one": ([[1]], {"prefixes": [[TARGETS]], "prefix_bias": 0.5}, IndexError, "prefix"),
    "a negative prefix": ([[1]], {"prefixes": [[-1]]}, IndexError, "prompt"),
    "too few prefixes": ([[1], [2]], {"prefixes": [[]]}, RuntimeError, "prefixes"),
    "no start": ([[1]], {"decoder_start_token_id": None}, ValueError, "decoder_start_token_id"),
    "a start beyond": ([[1]], {"decoder_start_token_id": TARGETS}, IndexError, "prompt"),
    "suppressed beyond": ([[1]], {"suppress_tokens": [TARGETS]}, ValueError, "token"),
    "no room": ([[1]], {"max_new_tokens": None, "max_length": 1}, ValueError, "max_length"),
    "another option": ([[1]], {"beams": 3}, TypeError, "beams"),
    "a dtype": ([[1]], {"weight_dtype": torch.float16}, ValueError, "weight_dtype"),
    "no number of beams": ([[1]], {"num_beams": 0}, ValueError, "num_beams"),
}


@NATIVE
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["lstm-additive-2", "pre-relu-5"])
def test_bad_input(name: str, case: str) -> None:
    model, config = made(name)
    source, options, error, word = BAD[case]
    before = tokens_of(generate(model, SENTENCES, config))
    with pytest.raises(error, match=word):
        generate(model, source, config, **options)
    assert tokens_of(generate(model, SENTENCES, config)) == before


@NATIVE
def test_positions() -> None:
    location, config = made("lstm-location-1")
    with pytest.raises(RuntimeError, match="9 positions"):
        generate(location, [[1] * 10], config)
    model, config = made("pre-relu-5")
    with pytest.raises(RuntimeError, match="max_length"):
        generate(model, [[1] * 31], config)
    with pytest.raises(ValueError, match="30 positions"):
        generate(model, [[1]], config, max_new_tokens=31)
    longest = generate(model, [[1] * 30], config, max_new_tokens=30, eos_token_id=None)
    assert longest.sequences.shape == (1, 31)
