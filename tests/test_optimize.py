"""optimize, restore and the report."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import encdec_fast
from encdec_fast import optimization_report, optimize, restore

SWAPS = {
    nn.LSTM: encdec_fast.nn.LSTM,
    nn.GRU: encdec_fast.nn.GRU,
    nn.RNN: encdec_fast.nn.RNN,
    nn.LSTMCell: encdec_fast.nn.LSTMCell,
    nn.GRUCell: encdec_fast.nn.GRUCell,
    nn.RNNCell: encdec_fast.nn.RNNCell,
    nn.Linear: encdec_fast.nn.Linear,
}


class Peephole(nn.LSTM):
    """A subclass, whose forward is its own business."""


class Seq2Seq(nn.Module):
    """A small encoder-decoder with one of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 8, num_layers=2, dropout=0.1, bidirectional=True)
        self.bridge = nn.Linear(16, 8)
        self.decoder = nn.ModuleList([nn.GRU(6, 8), nn.RNN(8, 8, nonlinearity="relu")])
        self.cells = nn.ModuleDict(
            {"lstm": nn.LSTMCell(8, 8), "gru": nn.GRUCell(8, 8), "rnn": nn.RNNCell(8, 8)}
        )
        self.own = Peephole(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.GRU(8, 8), "weight_hh_l0")
        self.last = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        memory, _ = self.encoder(self.embed(tokens))
        x, _ = self.decoder[0](self.embed(tokens))
        x = self.bridge(memory) + x
        x, _ = self.decoder[1](x)
        x, _ = self.own(x)
        x, _ = self.normed(x)
        h, _ = self.cells["lstm"](x[-1])
        h = self.cells["rnn"](self.cells["gru"](h))
        result: Tensor = self.last(h)
        return result


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_swaps_in_place_and_gives_the_same() -> None:
    model = Seq2Seq().eval()
    tokens = torch.randint(0, 11, (5, 3))
    modules = list(model.modules())
    parameters = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = classes(model)
    with torch.no_grad():
        expected = model(tokens)
        assert optimize(model) is model
        torch.testing.assert_close(model(tokens), expected)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    model.load_state_dict(state, strict=True)
    assert list(model.state_dict()) == list(state)
    assert classes(model) == [SWAPS.get(kind, kind) for kind in before]


def test_training_is_the_same() -> None:
    model = Seq2Seq()
    model.encoder.dropout = 0.0
    fast = optimize(copy.deepcopy(model))
    tokens = torch.randint(0, 11, (5, 3))
    for one in (model, fast):
        one(tokens).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_restore() -> None:
    model = Seq2Seq()
    before = classes(model), [set(module.__dict__) for module in model.modules()]
    optimize(model, "int8")
    assert restore(model) is model
    assert before == (classes(model), [set(module.__dict__) for module in model.modules()])
    assert not any(hasattr(module, "weight_dtype") for module in model.modules())
    restore(model)
    assert before[0] == classes(model)


def test_idempotent_but_for_the_weight_dtype() -> None:
    model = optimize(Seq2Seq())
    first = classes(model)
    for weight_dtype in ("int8", torch.bfloat16, None):
        optimize(model, weight_dtype)
        assert classes(model) == first
        assert model.encoder.weight_dtype == weight_dtype
        assert model.cells["gru"].weight_dtype == weight_dtype
    restore(model)
    assert type(model.encoder) is nn.LSTM


def test_modules_that_were_ours_before_stay_ours() -> None:
    model = nn.Sequential(encdec_fast.nn.GRU(3, 4))
    model[0].weight_dtype = torch.bfloat16
    optimize(model, "int8")
    assert model[0].weight_dtype == "int8"
    restore(model)
    assert type(model[0]) is encdec_fast.nn.GRU
    assert model[0].weight_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", SWAPS)
def test_the_root_itself(kind: Any) -> None:
    model = kind(3, 4)
    assert optimize(model) is model
    assert type(model) is SWAPS[kind]
    x = torch.randn(2, 3)
    model(x)
    assert type(restore(model)) is kind
    model(x)


def test_hooks_mode_and_requires_grad_stay() -> None:
    model = nn.Sequential(nn.LSTM(3, 4)).eval()
    seen: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: seen.append("hook"))
    model[0].weight_hh_l0.requires_grad_(False)
    optimize(model)
    model(torch.randn(2, 2, 3))
    assert seen == ["hook"]
    assert not model[0].training
    assert not model[0].weight_hh_l0.requires_grad
    handle.remove()
    model(torch.randn(2, 2, 3))
    assert seen == ["hook"]


def test_tied_weights_and_shared_modules() -> None:
    shared = nn.GRU(4, 4)
    tied = nn.GRU(4, 4)
    tied.weight_hh_l0 = shared.weight_hh_l0
    model = nn.ModuleList([shared, shared, tied])
    optimize(model)
    assert model[0] is model[1]
    assert model[2].weight_hh_l0 is model[0].weight_hh_l0
    assert len(optimization_report(model)) == 2


def test_an_optimizer_made_before_still_trains() -> None:
    model = nn.Sequential(nn.GRU(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimize(model)
    x = torch.randn(5, 2, 3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x)[0] - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_copies_remember() -> None:
    model = optimize(nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2)), "int8")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model)
        assert other[0].weight_dtype == "int8"
        assert type(restore(other)[0]) is nn.LSTM
    assert type(model[0]) is encdec_fast.nn.LSTM


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
def test_weight_dtype(weight_dtype: Any) -> None:
    model = Seq2Seq().eval()
    tokens = torch.randint(0, 11, (5, 3))
    with torch.no_grad():
        expected = model(tokens)
        optimize(model, weight_dtype)
        output = model(tokens)
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=0.0, atol=0.05)
    with pytest.raises(RuntimeError, match="inference"):
        model(tokens)
    with pytest.raises(ValueError, match="weight_dtype"):
        optimize(model, "int4")


def test_report() -> None:
    model = Seq2Seq()
    before = optimization_report(model)
    assert not any(line.fast for line in before)
    optimize(model, "int8")
    report = {line.name: line for line in optimization_report(model)}
    assert set(report) == {
        "encoder",
        "decoder.0",
        "decoder.1",
        "cells.lstm",
        "cells.gru",
        "cells.rnn",
        "bridge",
        "last",
        "own",
        "normed",
    }
    assert report["encoder"].fast
    assert report["encoder"].weight_dtype == "int8"
    assert not report["own"].fast
    assert "subclass of torch.nn.LSTM" in report["own"].reason
    assert "parametrized" in report["normed"].reason
    text = str(optimization_report(model))
    assert "encoder: encdec_fast.nn.LSTM: fast, weights in int8" in text
    assert "own: " in text
    assert "left alone: it is a subclass" in text
    assert "no module" in str(optimization_report(nn.Tanh()))


def test_a_forward_of_its_own_is_left_alone() -> None:
    model = nn.Sequential(nn.GRU(3, 4))
    model[0].forward = lambda x: (x, None)
    optimize(model)
    assert type(model[0]) is nn.GRU
    assert "forward was replaced" in optimization_report(model)[0].reason


def test_restore_leaves_what_was_parametrized_since() -> None:
    model = optimize(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), "int8")
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(3, 24)
    with torch.no_grad():
        expected = model[0](x)
        restore(model)
        assert torch.equal(model[0](x), expected)
    assert isinstance(model[0], encdec_fast.nn.Linear)
    assert type(model[1]) is nn.Linear
    report = {line.name: line for line in optimization_report(model)}
    assert "parametrized" in report["0"].reason
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    restore(model)
    assert type(model[0]) is nn.Linear
    assert not hasattr(model[0], "weight_dtype")
    model(x)


def test_restore_leaves_a_class_that_was_given_since() -> None:
    class Mine(encdec_fast.nn.Linear):
        """A class of the user's own."""

    model = optimize(nn.Sequential(nn.Linear(3, 4)))
    model[0].__class__ = Mine
    assert type(restore(model)[0]) is Mine
