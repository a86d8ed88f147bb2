"""The training itself: its settings, its state, and how both go to a folder and come back."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.g2p import Trouble
from examples.g2p_model import checkpoint
from examples.g2p_model.data import (
    PADDING,
    Batch,
    Pair,
    Sounds,
    Split,
    batches,
    invented_words,
    pairs,
)
from examples.g2p_model.dropout import use_byte_dropout
from examples.g2p_model.growth import grown
from examples.g2p_model.pronounce import error_rates, pronounce
from examples.g2p_model.teacher import Teacher


@dataclass(frozen=True)
class Settings:
    """What a training depends on; the names are those of the command line.

    average: what is validated and kept as the best model has the average of the weights of all
        batches so far, in which those of the last have the part 1 - average (Polyak and Juditsky,
        1992); 0: their last values. weights: the checkpoint that a training starts from, of this
        model or of a smaller one (growth.py). teacher: checkpoints whose mean distribution is half
        of what is learned (Hinton et al., 2015, arXiv:1503.02531), at temperature 1. invented: how
        many words without a known pronunciation are learned from the teacher alone.
    with_validation: the validation words are trained on, too, as one does once all else has been
        chosen; what is kept then is the last epoch's model, for nothing is left to choose by.
    """

    model: str
    arguments: dict[str, Any]
    epochs: int = 30
    batch: int = 128
    rate: float = 1.5e-3
    warmup: int = 500
    schedule: str = "cosine"
    smoothing: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.0
    weights: str | None = None
    teacher: list[str] | None = None
    invented: int = 0
    with_validation: bool = False
    patience: int = 8
    bfloat16: bool = False
    seed: int = 0
    split_seed: int = 0
    words: int | None = None
    validation_words: int = 1500


@dataclass(frozen=True)
class Data:
    """train and validation: pairs. sample: the validation words that are pronounced.

    invented: words that are in no part of the split.
    """

    train: list[Pair]
    validation: list[Pair]
    sample: dict[str, set[Sounds]]
    invented: list[str]

    @classmethod
    def of(cls, split: Split, settings: Settings) -> Data:
        words = split.train
        if settings.with_validation:
            words = words | split.validation
        if settings.words is not None:
            words = _sample(words, settings.words)
        sample = _sample(split.validation, settings.validation_words)
        known = {*split.train, *split.validation, *split.test}
        invented = invented_words(words, settings.invented, known)
        return cls(pairs(words), pairs(split.validation), sample, invented)


# What may change in the midst of a training: how long it goes on, and what is kept of it.
FREE = ("epochs", "patience", "average")


def _fixed(about: dict[str, Any]) -> dict[str, Any]:
    """All settings but the free ones, of a JSON."""
    flat = {"model": about.get("model"), **about.get("arguments", {}), **about.get("training", {})}
    return {n: value for n, value in flat.items() if n not in FREE and value is not None}


def _sample(words: dict[str, set[Sounds]], count: int) -> dict[str, set[Sounds]]:
    chosen = random.Random(0).sample(sorted(words), min(count, len(words)))
    return {word: words[word] for word in chosen}


@dataclass
class Progress:
    """Where a training is. epoch and batch: how many are done, of batches in the present epoch.

    factor: of the learning rate, after plateaus. loss: the sum over the present epoch's batches.
    best: the lowest [word error rate, loss]; waited: epochs since.
    """

    epoch: int = 0
    batch: int = 0
    factor: float = 1.0
    loss: float = 0.0
    best: list[float] = field(default_factory=lambda: [math.inf, math.inf])
    waited: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """A model with its optimizer, and how far they are."""

    def __init__(self, settings: Settings, data: Data) -> None:
        self.settings, self.data, self.progress = settings, data, Progress()
        torch.manual_seed(settings.seed)
        self.model = checkpoint.build(settings.model, settings.arguments)
        use_byte_dropout(self.model)
        if settings.weights:
            self.start_from(Path(settings.weights))
        self.teacher: Teacher | None = None
        if settings.teacher:
            weights = torch.bfloat16 if settings.bfloat16 else None
            self.teacher = Teacher([Path(one) for one in settings.teacher], weights)
        if data.invented:
            if self.teacher is None:
                raise Trouble("nobody can pronounce invented words: name a --teacher")
            taught = self.teacher.pronounce(data.invented)
            self.data = replace(data, train=data.train + taught)
        average = get_ema_multi_avg_fn(settings.average)
        self.average = AveragedModel(self.model, multi_avg_fn=average)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.batches_per_epoch = math.ceil(len(self.data.train) / settings.batch)

    def start_from(self, path: Path) -> None:
        """Take the weights of a checkpoint. Trouble if they are another model's."""
        try:
            self.model.load_state_dict(grown(checkpoint.read_tensors(path), self.model))
        except RuntimeError as error:
            raise Trouble(f"{path} does not hold the weights of such a model: {error}") from None

    @property
    def best(self) -> nn.Module:
        """The model that is validated."""
        return self.average.module if self.settings.average else self.model

    @property
    def finished(self) -> bool:
        done = self.progress.epoch >= self.settings.epochs
        return done or self.progress.waited >= self.settings.patience

    def rate(self) -> float:
        """The learning rate of the next batch: a straight line up, then the schedule."""
        step = self.progress.epoch * self.batches_per_epoch + self.progress.batch + 1
        warmup, last = self.settings.warmup, self.settings.epochs * self.batches_per_epoch
        if step <= warmup:
            return self.settings.rate * step / warmup
        if self.settings.schedule == "plateau":
            return self.settings.rate * self.progress.factor
        done = (step - warmup) / max(1, last - warmup)
        return self.settings.rate * 0.5 * (1 + math.cos(math.pi * done))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the phonemes of a batch; with smoothing and in bfloat16 in training."""
        training = model.training
        with torch.autocast("cpu", torch.bfloat16, enabled=training and self.settings.bfloat16):
            scores = model(batch.source, batch.lengths, batch.target[:, :-1])
        found, right = scores.float().flatten(0, 1), batch.target[:, 1:].flatten()
        smoothing = self.settings.smoothing if training else 0.0
        loss = cross_entropy(found, right, ignore_index=PADDING, label_smoothing=smoothing)
        if self.teacher is None or not training:
            return loss
        return 0.5 * loss + 0.5 * cross_entropy(found[right != PADDING], self.teacher(batch))

    def step(self, batch: Batch) -> float:
        """One batch; its loss. Trouble if that is no number: the weights stay as they were."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch)
        if not math.isfinite(loss.item()):
            raise Trouble("the loss is no longer a number: train with a lower --rate")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return loss.item()

    def epoch(self) -> Iterator[float]:
        """The rest of the present epoch, batch by batch: the mean loss so far."""
        progress, settings = self.progress, self.settings
        self.model.train()
        seed = settings.seed * 1_000_003 + progress.epoch
        chosen = batches(self.data.train, settings.batch, seed)
        for batch in islice(chosen, progress.batch, None):
            progress.loss += self.step(batch)
            progress.batch += 1
            yield progress.loss / progress.batch

    @torch.inference_mode()
    def validate(self) -> tuple[float, float]:
        """Word error rate of the sample, and loss of all validation pairs, without smoothing."""
        model = self.best.eval()
        total = count = 0.0
        for batch in batches(self.data.validation, 512):
            sounds = int((batch.target[:, 1:] != PADDING).sum())
            total += self.loss(model, batch).item() * sounds
            count += sounds
        found = pronounce(model, list(self.data.sample))
        return error_rates(found, self.data.sample).words, total / count

    def end_epoch(self, folder: Path) -> str:
        """Validate, save, and say what was found, in a line."""
        progress = self.progress
        words, loss = self.validate()
        rate, trained = self.rate(), progress.loss / self.batches_per_epoch
        progress.epoch, progress.batch, progress.loss = progress.epoch + 1, 0, 0.0
        entry = {"rate": rate, "train": trained, "validation": loss, "word_error_rate": words}
        progress.history.append(entry)
        better = self.settings.with_validation or [words, loss] < progress.best
        if better:
            progress.best, progress.waited = [words, loss], 0
        else:
            progress.waited += 1
            progress.factor *= 0.5  # without a schedule of plateaus nobody asks for it
        self.save(folder)
        if better:
            checkpoint.save_model(
                folder / "best.safetensors", self.best, self.about(), torch.float32
            )
        return (
            f"epoch {progress.epoch} | rate {rate:.1e} | training {trained:.4f} | "
            f"validation {loss:.4f} | words wrong {words:.2%}{' *' if better else ''}"
        )

    def about(self) -> dict[str, Any]:
        """What the JSON beside the weights says."""
        known = asdict(self.settings)
        model = {"model": known.pop("model"), "arguments": known.pop("arguments")}
        return {**model, "training": known, "progress": asdict(self.progress)}

    def save(self, folder: Path) -> None:
        """All that `load` needs, as last.*; the JSON, which the others belong to, comes last."""
        state: dict[str, Tensor] = {"random": torch.get_rng_state()}
        for number, values in self.optimizer.state_dict()["state"].items():
            state |= {f"{number}.{name}": value for name, value in values.items()}
        average = self.average.state_dict()
        state |= {f"average.{name}": value for name, value in average.items()}
        checkpoint.save_tensors(folder / "last.optimizer.safetensors", state)
        checkpoint.save_model(folder / "last.safetensors", self.model, self.about(), torch.float32)

    def load(self, folder: Path) -> None:
        """Go on from a folder; only `FREE` settings may be others than there.

        Trouble for other settings, and if the folder holds nothing.
        """
        about = checkpoint.read_json(folder / "last.json")
        before, now = (_fixed(one) for one in (about, self.about()))
        if before != now:
            raise Trouble(
                f"{folder} was trained with other settings, {before}, than {now}: "
                "give the same ones, or another --output"
            )
        self.progress = Progress(**about["progress"])
        self.model.load_state_dict(checkpoint.read_tensors(folder / "last.safetensors"))
        state = checkpoint.read_tensors(folder / "last.optimizer.safetensors")
        torch.set_rng_state(state.pop("random"))
        values: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            owner, _, key = name.partition(".")
            values.setdefault(owner, {})[key] = tensor
        self.average.load_state_dict(values.pop("average"))
        numbered = {int(number): value for number, value in values.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
