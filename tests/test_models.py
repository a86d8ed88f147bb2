"""encdec_fast.models: shapes, what a score may depend on, gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encdec_fast import generate
from encdec_fast.models import RecurrentEncoderDecoder, TransformerEncoderDecoder
from encdec_fast.models.transformer import sinusoidal_positions
from encdec_fast.nn import AdditiveAttention

SOURCES, TARGETS = 11, 13
ATTENTIONS = ("additive", "dot", "general", "concat", "location", None)
LENGTHS = [6, 1, 4]


def recurrent(**options: Any) -> RecurrentEncoderDecoder:
    sizes = {"embedding_size": 6, "hidden_size": 8, "encoder_hidden_size": 4}
    return RecurrentEncoderDecoder(SOURCES, TARGETS, **sizes, max_source_length=9, **options)


def transformer(**options: Any) -> TransformerEncoderDecoder:
    sizes = (16, 4, 2, 2, 24)
    return TransformerEncoderDecoder(SOURCES, TARGETS, *sizes, max_length=20, **options)


MODELS: dict[str, Any] = {
    **{
        f"{cell}-{attention}-{layers}": lambda c=cell, a=attention, n=layers: recurrent(
            cell=c, attention=a, encoder_layers=2, decoder_layers=n
        )
        for cell in ("lstm", "gru")
        for attention in ATTENTIONS
        for layers in (1, 2, 3)
    },
    "transformer": transformer,
    "transformer-post": lambda: transformer(norm_first=False, activation="gelu"),
    "transformer-tied": lambda: transformer(tied_output=True),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = MODELS[request.param]()
    return made


def tokens() -> tuple[Tensor, Tensor]:
    """A source (3, 6), padded with 0 after LENGTHS, and a target (3, 5)."""
    source = torch.randint(1, SOURCES, (3, 6))
    for row, length in zip(source, LENGTHS, strict=True):
        row[length:] = 0
    return source, torch.randint(0, TARGETS, (3, 5))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_shapes(model: nn.Module) -> None:
    source, target = tokens()
    assert model(source, LENGTHS, target).shape == (3, 5, TARGETS)


def test_lengths_are_those_without_padding(model: nn.Module) -> None:
    source, target = tokens()
    model.eval()
    expected = model(source, LENGTHS, target)
    assert torch.equal(model(source, None, target), expected)
    assert torch.equal(model(source, torch.tensor(LENGTHS), target), expected)


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(model: nn.Module, training: bool) -> None:
    source, target = tokens()
    model.eval()  # no dropout; with gradients other code runs than without
    with torch.set_grad_enabled(training):
        together = model(source, LENGTHS, target)
        for index, length in enumerate(LENGTHS):
            row = slice(index, index + 1)
            close(model(source[row, :length], None, target[row]), together[row])


@pytest.mark.parametrize("training", [False, True])
def test_later_tokens_change_nothing(model: nn.Module, training: bool) -> None:
    source, target = tokens()
    model.eval()
    other = target.clone()
    other[:, 3] = (other[:, 3] + 1) % TARGETS
    with torch.set_grad_enabled(training):
        one, two = (model(source, LENGTHS, given) for given in (target, other))
    close(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3:], two[:, 3:])


def test_gradients_reach_every_parameter(model: nn.Module) -> None:
    source, target = tokens()
    model.train()
    scores = model(source, LENGTHS, target)
    nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_state_dict(model: nn.Module, request: pytest.FixtureRequest) -> None:
    other = MODELS[request.node.callspec.params["model"]]()
    other.load_state_dict(model.state_dict())
    source, target = tokens()
    assert torch.equal(other.eval()(source, LENGTHS, target), model.eval()(source, LENGTHS, target))


def test_dropout_is_for_training_only() -> None:
    source, target = tokens()
    for one in (recurrent(dropout=0.5, decoder_layers=2), transformer(dropout=0.5)):
        call = (source, LENGTHS, target)
        assert not torch.equal(one(*call), one(*call))
        one.eval()
        assert torch.equal(one(*call), one(*call))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("attention", ["additive", None])
def test_encode_gives_the_first_state(cell: str, attention: str | None) -> None:
    model = recurrent(cell=cell, attention=attention, encoder_layers=1, decoder_layers=3)
    memory, state = model.encode(tokens()[0], LENGTHS)
    assert memory.shape == (3, 6, 8)
    if attention is None:
        state, fed = state
        assert fed.shape == (3, 8)
    parts = state if cell == "lstm" else (state,)
    assert len(parts) == (2 if cell == "lstm" else 1)
    for part in parts:
        assert part.shape == (3, 3, 8)
        assert part[0].abs().sum() > 0
        assert part[1:].abs().sum() == 0  # the encoder has no layers for these


def test_steps_of_the_decoder_are_the_whole() -> None:
    """What a search does: one token at a time, with the states kept."""
    model = recurrent(encoder_layers=2, decoder_layers=2).eval()
    source, target = tokens()
    expected = model(source, LENGTHS, target)
    memory, (h, c) = model.encode(source, LENGTHS)
    first, above = (h[0], c[0]), (h[1:], c[1:])
    for t in range(target.shape[1]):
        x = model.target_embedding(target[:, t])
        output, first = model.decoder.cell(x, memory, first, LENGTHS)
        top, above = model.upper(output.unsqueeze(1), above)
        scores = model.output(torch.cat([top[:, 0], first[-1]], dim=-1))
        close(scores, expected[:, t])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # torch's own
def test_transformer_is_torch_s() -> None:
    model = transformer(dropout=0.0).eval()
    plain = nn.Transformer(16, 4, 2, 2, 24, 0.0, batch_first=True, norm_first=True).eval()
    plain.load_state_dict(model.transformer.state_dict())
    source, target = tokens()
    padding = source == 0
    embedded = model.source_embedding(source) * 4 + sinusoidal_positions(6, 16)
    asked = model.target_embedding(target) * 4 + sinusoidal_positions(5, 16)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    found = plain(
        embedded,
        asked,
        tgt_mask=later,
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    close(model(source, LENGTHS, target), model.output(found))
    memory = plain.encoder(embedded, src_key_padding_mask=padding)
    close(model.encode(source)[~padding], memory[~padding])


def test_positions() -> None:
    found = sinusoidal_positions(7, 6)
    for t, i in ((0, 0), (3, 0), (5, 2)):
        angle = torch.tensor(t / 10000 ** (2 * i / 6))
        close(found[t, 2 * i], angle.sin())
        close(found[t, 2 * i + 1], angle.cos())
    assert not any("positions" in name for name in transformer().state_dict())


def test_tied_output() -> None:
    model = transformer(tied_output=True)
    assert model.output.weight is model.target_embedding.weight


@pytest.mark.parametrize("make", [recurrent, transformer])
class TestBadInput:
    def refused(self, make: Any, message: str, *call: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            make()(*call)

    def test_shapes(self, make: Any) -> None:
        source, target = tokens()
        self.refused(make, "source must be int64", source[0], None, target)
        self.refused(make, "source must be int64", source.float(), LENGTHS, target)
        self.refused(make, "target must be int64", source, LENGTHS, target[:, :0])
        self.refused(make, "each of the 3 sentences", source, LENGTHS, target[:2])

    def test_lengths(self, make: Any) -> None:
        source, target = tokens()
        self.refused(make, "must be 3 integers", source, [6, 1], target)
        self.refused(make, "must be 3 integers", source, [6.0, 1.0, 4.0], target)
        self.refused(make, "between 1 and 6", source, [7, 1, 4], target)
        self.refused(make, "between 1 and 6", source, [6, 0, 4], target)
        self.refused(make, "between 1 and 6", torch.zeros_like(source), None, target)

    def test_tokens_outside_of_the_vocabulary(self, make: Any) -> None:
        source, target = tokens()
        with pytest.raises(IndexError):
            make()(source + SOURCES, LENGTHS, target)
        with pytest.raises(IndexError):
            make()(source, LENGTHS, target - TARGETS)


def test_too_long() -> None:
    source, target = torch.ones(1, 21, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="source must have at most max_length = 20 tokens"):
        transformer()(source, None, target)
    with pytest.raises(RuntimeError, match="target must have at most max_length = 20 tokens"):
        transformer()(target, None, source)
    with pytest.raises(RuntimeError, match="9"):
        recurrent(attention="location")(source, None, target)


def test_bad_options() -> None:
    for options, message in (
        ({"cell": "rnn"}, "'lstm' or 'gru'"),
        ({"attention": "global"}, "attention must be one of"),
        ({"encoder_layers": 0}, "at least 1"),
        ({"decoder_layers": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            recurrent(**options)
    with pytest.raises(ValueError, match="max_source_length"):
        RecurrentEncoderDecoder(5, 5, 4, 4, attention="location")
    with pytest.raises(ValueError, match="d_model must be even"):
        TransformerEncoderDecoder(5, 5, 5, 1, 1, 1, 4)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_coverage(cell: str, layers: int, beams: int) -> None:
    """Each hypothesis has a coverage of its own, and the score of its tokens, teacher-forced."""
    torch.manual_seed(1)
    model = recurrent(cell=cell, decoder_layers=layers).eval()
    old: Any = model.decoder.cell.attention
    sizes = (old.query_size, old.memory_size, old.attention_size)
    model.decoder.cell.attention = AdditiveAttention(*sizes, coverage=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    source = [[5, 6, 9, 2, 7], [7], [3, 4, 8]]
    options = {"eos_token_id": 3, "max_length": 8, "length_penalty": 0.0, "num_beams": beams}
    found = generate(model, source, decoder_start_token_id=2, **options).hypotheses
    for tokens, (best, *_) in zip(source, found, strict=True):
        target = torch.tensor([best.tokens])
        with torch.no_grad():
            scores = model(torch.tensor([tokens]), [len(tokens)], target[:, :-1])
        log_probs = scores.log_softmax(-1).gather(2, target[:, 1:, None]).squeeze()
        torch.testing.assert_close(best.score, float(log_probs.sum()), rtol=1e-4, atol=1e-4)
        if beams == 1:
            assert torch.equal(scores.argmax(-1), target[:, 1:])
