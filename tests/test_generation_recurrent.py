"""generate() with recurrent decoders: the ways it takes, and what must not depend on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_generation import (
    BUILDERS,
    FEW,
    SENTENCES,
    SOURCES,
    TARGETS,
    assert_agrees,
    made,
    tokens_of,
)
from torch import nn

from encdec_fast.generation import engine, generate
from encdec_fast.models import RecurrentEncoderDecoder

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("name", [name for name in FEW if name[0] in "lg"])
def test_batches_of_int8_weights(name: str) -> None:
    """What is rounded does not depend on what else is in the batch."""
    model, config = made(name)
    whole, alone = (
        generate(model, SENTENCES, config, weight_dtype="int8", max_batch_tokens=most)
        for most in (None, 1)
    )
    assert tokens_of(whole) == tokens_of(alone)
    torch.testing.assert_close(whole.scores, alone.scores, rtol=0, atol=1e-5)


def test_a_row_of_the_embedding_changes() -> None:
    """Gates that were made of it are not used any more."""
    sizes = {"embedding_size": 130, "hidden_size": 6, "encoder_hidden_size": 3}
    model = RecurrentEncoderDecoder(SOURCES, 129, **sizes)
    packed = engine._packed_for(model, model.generation_decoder(), "float32").model
    embedding = model.target_embedding.weight.data
    for row in range(129):
        assert packed.fresh()
        before = embedding[row].clone()
        embedding[row] += 5
        assert not packed.fresh()
        embedding[row] = before


def test_sizes_that_do_not_fit() -> None:
    model, config = made("lstm-additive-2")
    model = copy.deepcopy(model)
    model.target_embedding = nn.Embedding(TARGETS - 2, 7)
    with pytest.raises(
        IndexError, match=f"0 to {TARGETS - 1}, but its embedding has {TARGETS - 2}"
    ):
        generate(model, SENTENCES, config)
    few = tuple(range(TARGETS - 2))
    end = min(config.eos_token_id, TARGETS - 3)
    found = generate(model, SENTENCES, config, vocabulary=few, eos_token_id=end)
    assert max(max(tokens) for (tokens,) in tokens_of(found)) < TARGETS - 2
    model.target_embedding = nn.Embedding(TARGETS, 7)
    model.output = nn.Linear(38, TARGETS)
    with pytest.raises(RuntimeError, match="output must read 36 features, not 38"):
        generate(model, SENTENCES, config)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [name for name in BUILDERS if "-" in name and name[0] in "lg"])
def test_products_with_a_context_by_way_of_the_memory(name: str, beams: int) -> None:
    """Sentences alone: a short one's memory is less to read than the weights of a context are."""
    model, config = made(name)
    timing: dict[str, Any] = {}
    given = {"num_beams": beams, "max_batch_tokens": 1}
    found = generate(model, SENTENCES, config, **given, timing=timing)
    assert tokens_of(found) == tokens_of(assert_agrees(name, given))
    decoder = model.generation_decoder()
    readers = min(2, len(decoder.layers)) + 1 if decoder.attends else 1
    if decoder.attentional is not None:  # all others read what is made of the sum
        readers = 1
    most = readers * len(SENTENCES)
    assert 0.5 * most < timing["products_by_memory"] <= most
