"""generate of optimized transformers models against the same models as they were."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import generation_models as models
import pytest
import torch
from test_generation_reference import CASES, CONSTRAINTS, SEARCHES, names, resolved
from torch import Tensor

transformers = pytest.importorskip("transformers")

import encdec_fast  # noqa: E402
from encdec_fast.generation import GenerationConfig, reference  # noqa: E402
from encdec_fast.integrations import transformers as integration  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("native", "quiet"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]
ALL_MODELS = pytest.mark.parametrize("model", models.BUILDERS)
ENDINGS: dict[str, dict[str, Any]] = {
    f"{beams} beams, length_penalty {penalty}, early_stopping {stopping}": {
        "num_beams": beams,
        "num_return_sequences": beams,
        "length_penalty": penalty,
        "early_stopping": stopping,
    }
    for beams, penalty, stopping in itertools.product(
        range(2, 9), (-1.0, 0.0, 0.6, 1.0, 2.0), (False, True, "never")
    )
}
RENORMALIZED: dict[str, dict[str, Any]] = {
    # As in the configs of published Marian models.
    "beams, renormalized": {
        "num_beams": 4,
        "num_return_sequences": 4,
        "renormalize_logits": True,
        "bad_words_ids": [["a"], ["eos"]],
        "suppress_tokens": ["b"],
        "forced_eos_token_id": "eos",
        "max_new_tokens": 6,
    },
    "greedy, renormalized": {"renormalize_logits": True, "repetition_penalty": 1.4},
}
ALL_CASES = CASES | RENORMALIZED | ENDINGS
PAIRS = [
    (model, case)
    for number, model in enumerate(models.BUILDERS)
    for place, case in enumerate(ALL_CASES)
    # What ends a search is the same code for all models: each of ENDINGS is for three.
    if (case not in ENDINGS or place % 2 == number % 2)
    # Whisper suppresses at the place of the forced token, which is void; the engine behind it.
    and not (model == "whisper" and case.endswith("suppressed second"))
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns of options that go together here on purpose."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@cache
def optimized(model: str) -> Any:
    return integration.optimize(copy.deepcopy(models.build(model).model))


@contextlib.contextmanager
def no_decoder(model: Any) -> Iterator[None]:
    """A decoder of transformers that is called raises: only the engine can have run then."""
    home = sys.modules[type(model).__module__]
    name = type(model).__name__.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
    layer = getattr(home, "T5LayerCrossAttention" if name == "T5" else f"{name}DecoderLayer")
    with mock.patch.object(layer, "forward", side_effect=AssertionError("the decoder was called")):
        yield


class Run(NamedTuple):
    """What generate found: sequences (hypotheses, T); scores (hypotheses), None without beams."""

    sequences: Tensor
    scores: Tensor | None

    def hypotheses(self, prompt: int, config: GenerationConfig) -> list[list[int]]:
        """Without what fills them up."""
        rows = []
        for tokens in self.sequences.tolist():
            ends = [t for t in range(prompt, len(tokens)) if tokens[t] in config.end_tokens]
            rows.append(tokens[: ends[0] + 1 if ends else len(tokens)])
        return rows


def generate(model: Any, **options: Any) -> Run:
    found = model.generate(**options, return_dict_in_generate=True)
    return Run(found.sequences, found.get("sequences_scores"))


def arguments(model: str, options: dict[str, Any]) -> tuple[dict[str, Any], int, GenerationConfig]:
    """Of generate, for options as in CASES; the length of the prompt, and the options as here."""
    tiny = models.build(model)
    found = {"max_new_tokens": 10, "eos_token_id": "eos", **options}
    found = {name: resolved(value, names(model)) for name, value in found.items()}
    prefix = found.pop("prefix", [])
    renormalised = found.pop("renormalize_logits", None)
    if prefix and model == "whisper":  # its generate does not repeat first tokens that are given
        found.pop("num_return_sequences", None)
    config = GenerationConfig(**found)
    if renormalised:
        found["renormalize_logits"] = True
    if prefix:
        rows = [prefix[i % 2 :] + prefix[: i % 2] for i in range(len(models.LENGTHS))]
        found["decoder_input_ids"] = torch.tensor([[tiny.start, *row] for row in rows])
    return {**tiny.inputs, **found}, 1 + len(prefix), config


@cache
def both(model: str, case: str) -> tuple[Run, Run]:
    """transformers' own result, and the engine's."""
    given, _, config = arguments(model, ALL_CASES[case])
    # Without scores of each step transformers does not return those of the sequences.
    theirs = generate(models.build(model).model, **given, output_scores=config.num_beams > 1)
    with no_decoder(optimized(model)):
        return theirs, generate(optimized(model), **given)


@cache
def ties(model: str, case: str) -> tuple[int, int]:
    """Of how many hypotheses how many differ, by no more than rounding.

    That is so where the exact scores of both are the same, or where a search in float64 finds what
    the engine found: transformers' then dropped a hypothesis, or kept one, by its rounding.
    AssertionError for any other difference.
    """
    theirs, ours = both(model, case)
    _, prompt, config = arguments(model, ALL_CASES[case])
    rows, others = ours.hypotheses(prompt, config), theirs.hypotheses(prompt, config)
    same = torch.tensor([mine == other for mine, other in zip(rows, others, strict=True)])
    if theirs.scores is not None:
        assert ours.scores is not None
        # A length penalty of -1 multiplies by the length: scores of 150, 1.5e-5 to the next float.
        rtol = 2e-6 if config.length_penalty < 0 else 0.0
        torch.testing.assert_close(ours.scores[same], theirs.scores[same], atol=1e-4, rtol=rtol)
    if bool(same.all()):
        assert torch.equal(theirs.sequences, ours.sequences)
    tiny = models.build(model).double()
    for row in (~same).nonzero().flatten().tolist():
        sentence = row // config.num_return_sequences
        exact = [
            models.score(tiny, sentence, tokens, prompt, config)
            for tokens in (rows[row], others[row])
        ]
        assert abs(exact[0] - exact[1]) < 1e-5 or rows[row] in found_exactly(model, case)[sentence]
    return len(rows), int((~same).sum())


@cache
def found_exactly(model: str, case: str) -> list[list[list[int]]]:
    """What the reference finds in float64: each sentence's hypotheses."""
    given, _, config = arguments(model, ALL_CASES[case])
    tiny = models.build(model).double()
    start = torch.full((len(models.LENGTHS), 1), tiny.start)
    prompts = given.get("decoder_input_ids", start).tolist()
    found = reference.search(*tiny.step(), prompts, config)
    return [[hypothesis.tokens for hypothesis in hypotheses] for hypotheses in found]


@pytest.mark.parametrize(("model", "case"), PAIRS)
def test_same_tokens(model: str, case: str) -> None:
    ties(model, case)


def test_ties_are_rare() -> None:
    every = [ties(model, case) for model, case in PAIRS]
    assert sum(count for _, count in every) <= 0.01 * sum(total for total, _ in every)


@ALL_MODELS
def test_rounding_is_far_below_the_tolerance(model: str) -> None:
    """Otherwise scores would agree by chance: the sums of log-probabilities in float32 and 64."""
    tiny = models.build(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = torch.randint(4, models.VOCABULARY - 4, (len(models.LENGTHS), 11))
    sums = []
    for each in (tiny, tiny.double()):
        with torch.no_grad():
            logits = each.model(**each.inputs, decoder_input_ids=tokens).logits.double()
        chosen = logits.log_softmax(2)[:, :-1].gather(2, tokens[:, 1:].unsqueeze(2))
        sums.append(chosen.sum((1, 2)))
    torch.testing.assert_close(sums[0], sums[1], atol=2e-5, rtol=0)


@ALL_MODELS
def test_ends_are_early_and_vary(model: str) -> None:
    """Otherwise the comparisons would say little of when a search stops."""
    found = []
    for case in SEARCHES:
        _, prompt, config = arguments(model, ALL_CASES[case])
        found += both(model, case)[1].hypotheses(prompt, config)
    early = [len(tokens) for tokens in found if len(tokens) < 11]
    assert 0.3 <= len(early) / len(found) <= 0.8
    assert len(set(early)) >= 4


@cache
def plain(model: str, beams: int, count: int) -> Run:
    """What the engine finds without any other option."""
    options = {"num_beams": beams, "num_return_sequences": count}
    return generate(optimized(model), **arguments(model, options)[0])


@pytest.mark.parametrize("case", [case for case in CASES if case not in SEARCHES])
def test_options_matter(case: str) -> None:
    """With some model each changes what is found."""
    changes = False
    for model in (model for model, other in PAIRS if other == case):
        _, _, config = arguments(model, ALL_CASES[case])
        without = plain(model, config.num_beams, config.num_return_sequences)
        changes |= not torch.equal(both(model, case)[1].sequences, without.sequences)
    assert changes


@ALL_MODELS
def test_renormalized_scores_are_others(model: str) -> None:
    case = "beams, renormalized"
    given, _, _ = arguments(model, ALL_CASES[case] | {"renormalize_logits": False})
    renormalized, plainly = both(model, case)[1].scores, generate(optimized(model), **given).scores
    assert renormalized is not None and plainly is not None
    assert bool((renormalized > plainly + 1e-3).any())


@ALL_MODELS
def test_the_engine_runs(model: str) -> None:
    given, _, _ = arguments(model, {"num_beams": 3})
    told = encdec_fast.explain(optimized(model).generate, **given)
    assert told.backend == "cpu" and "beams=3 max_length=11" in told.sizes
    assert "float32" in told.plan
    own = models.build(model).model
    with no_decoder(own), pytest.raises(AssertionError, match="the decoder was called"):
        own.generate(**given)


def test_all_options_are_searched_for() -> None:
    """What is compared above is what transformers' config has and the engine too."""
    tried = {name for case in ALL_CASES.values() for name in case} - {"prefix"}
    assert len(CONSTRAINTS) > 20
    # Those have tests of their own.
    assert integration.requests.MAPPED - tried == {
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "max_time",
        "return_dict_in_generate",
    }
