"""How often a trained model mispronounces words that it has never seen, and where it looked.

    python -m examples.g2p_model.evaluate examples/g2p_model/recurrent.safetensors
    python -m examples.g2p_model.evaluate CHECKPOINT thoroughbred schnitzel --picture attention.png
    python -m examples.g2p_model.evaluate runs/recurrent/best.safetensors --half small.safetensors

A word is right if it equals one of the dictionary's pronunciations, stress included. The phoneme
error rate counts insertions, deletions and substitutions, beside the nearest pronunciation.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"{error.name} is not installed: pip install {error.name}") from None

from examples.g2p import BAD_INPUT, OK, exit_code, positive, why_not
from examples.g2p_model.checkpoint import load_model, save_model
from examples.g2p_model.data import Sounds, load_split
from examples.g2p_model.pronounce import error_rates, pronounce

WEIGHTS: dict[str, Any] = {"float32": None, "bfloat16": torch.bfloat16, "int8": "int8"}


def without_stress(sounds: Sounds) -> Sounds:
    """AH0 to AH."""
    return tuple(re.sub(r"\d", "", sound) for sound in sounds)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description="Error rates of a trained model.")
    add = options.add_argument
    add("checkpoint", type=Path, help="the .safetensors file; its JSON lies beside it")
    add("words", nargs="*", help="words to show; a few of the part if not given")
    add("--part", choices=("train", "validation", "test"), default="test", help="words (test)")
    add("--count", type=positive, help="a random part of the words; all if not given")
    add("--picture", type=Path, help="write a picture of the attention of the words shown there")
    add("--half", type=Path, help="store the weights in float16 there, and judge those")
    add("--beams", type=positive, default=1, help="hypotheses of the search (1: greedy)")
    add("--weights", choices=WEIGHTS, default="float32", help="as the engine holds them (float32)")
    add("--threads", type=positive, help="of torch; its own choice if not given")
    return options


def show(console: Console, found: dict[str, Sounds], known: dict[str, set[Sounds]]) -> None:
    """Words, what the model says, and what the dictionary does where that is something else."""
    table = Table("word", "phonemes", box=None, pad_edge=False)
    for word, sounds in found.items():
        text = " ".join(sounds)
        if word in known and sounds not in known[word]:
            text += (
                f"  [red]dictionary: {', '.join(' '.join(one) for one in sorted(known[word]))}[/]"
            )
        table.add_row(word, text)
    console.print(table)


def run(options: argparse.Namespace, console: Console) -> int:
    """Print words and error rates; returns the exit code."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model, about = load_model(options.checkpoint)
    if options.half:
        model = model.half().float()
        save_model(options.half, model, about, torch.float16)
    how = (options.beams, WEIGHTS[options.weights])
    split = load_split(about.get("training", {}).get("split_seed", 0))
    part: dict[str, set[Sounds]] = getattr(split, options.part)
    mixed = random.Random(0).sample(sorted(part), len(part))
    given = [word.strip().lower() for word in options.words]
    problems = [problem for word in given if (problem := why_not(word))]
    for problem in problems:
        print(problem, file=sys.stderr)
    shown = [word for word in given if why_not(word) is None] if given else mixed[:6]
    if shown:
        show(console, pronounce(model, shown, *how), split.train | split.validation | split.test)
    if options.picture and shown:
        from examples.g2p_model.picture import draw  # matplotlib is needed here only

        draw(model, shown, options.picture, options.beams)
    known = {word: part[word] for word in mixed[: options.count]}
    start = time.perf_counter()
    found = pronounce(model, list(known), *how)
    seconds = time.perf_counter() - start
    table = Table("", "words wrong", "phoneme error rate", box=None, pad_edge=False)
    rates = error_rates(found, known)
    table.add_row("with stress", f"{rates.words:.2%}", f"{rates.sounds:.2%}")
    plain = {word: {without_stress(one) for one in sounds} for word, sounds in known.items()}
    rates = error_rates({word: without_stress(sounds) for word, sounds in found.items()}, plain)
    table.add_row("without stress", f"{rates.words:.2%}", f"{rates.sounds:.2%}")
    console.print(f"\n{len(known):,} {options.part} words in {seconds:.0f} s", highlight=False)
    console.print(table)
    return BAD_INPUT if problems else OK


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    options = parser().parse_intermixed_args(argv)
    return exit_code(lambda: run(options, Console()))


if __name__ == "__main__":
    raise SystemExit(main())
