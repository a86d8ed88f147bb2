"""The CMU dictionary as training pairs: a split by word, symbols as indices, batches."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.g2p import END, END_OF_WORD, GRAPHEMES, PHONEMES, START, Trouble, load_dictionary

Sounds = tuple[str, ...]
Pair = tuple[str, Sounds]

PADDING = 0  # "<pad>" among the letters and among the phonemes
MAX_LENGTH = 40  # of a word and of a pronunciation, marks included; the longest here have 29
_LETTER = {letter: index for index, letter in enumerate(GRAPHEMES)}
_SOUND = {sound: index for index, sound in enumerate(PHONEMES)}


@dataclass(frozen=True)
class Split:
    """Words with all their pronunciations, in three parts that share no word."""

    train: dict[str, set[Sounds]]
    validation: dict[str, set[Sounds]]
    test: dict[str, set[Sounds]]


def part_of(word: str, seed: int) -> str:
    """ "train" for 90 of 100 words, "validation" and "test" for 5 each.

    The word and the seed alone decide, so that a word stays where it is when others come or go.
    """
    digest = hashlib.sha256(f"{seed} {word}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") % 100
    if place < 90:
        return "train"
    return "validation" if place < 95 else "test"


def load_split(seed: int = 0) -> Split:
    """The words of letters only of the CMU dictionary. Trouble if it is not installed."""
    split = Split({}, {}, {})
    for word, sounds in load_dictionary().items():
        part: dict[str, set[Sounds]] = getattr(split, part_of(word, seed))
        part[word] = sounds
    return split


def invented_words(
    words: Iterable[str], count: int, known: Container[str], seed: int = 0
) -> list[str]:
    """`count` different words that are not known, whose letters follow each other as in `words`.

    Each letter, and the end, is drawn as often as it comes behind the three before it there.
    Trouble where hardly any new word can be made like this.
    """
    following: dict[str, list[str]] = defaultdict(list)
    for word in words:
        padded = f"   {word} "
        for i in range(len(padded) - 3):
            following[padded[i : i + 3]].append(padded[i + 3])
    generator, found = random.Random(seed), dict[str, None]()
    for _ in range(100 * count):
        word = "   "
        while not word.endswith(" ") or word == "   ":
            word += generator.choice(following[word[-3:]])
        word = word.strip()
        if word not in known and len(word) < MAX_LENGTH:
            found[word] = None
        if len(found) == count:
            break
    if len(found) < count:
        raise Trouble(f"{count} words cannot be invented from these: ask for fewer")
    return list(found)


def pairs(words: dict[str, set[Sounds]]) -> list[Pair]:
    """Every word with each of its pronunciations, in an order that is always the same."""
    return [(word, sounds) for word in sorted(words) for sounds in sorted(words[word])]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows])


def encode_words(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters (B, S) with the end mark, padded, and their lengths (B)."""
    rows = [[*(_LETTER[letter] for letter in word), END_OF_WORD] for word in words]
    return _padded(rows), torch.tensor([len(row) for row in rows])


def encode_sounds(sounds: Sequence[Sounds]) -> Tensor:
    """Phonemes (B, T + 1) from the start mark to the end mark, padded."""
    return _padded([[START, *(_SOUND[one] for one in row), END] for row in sounds])


@dataclass(frozen=True)
class Batch:
    """source (B, S), lengths (B); target (B, T + 1), of which the model reads all but the last."""

    pairs: Sequence[Pair]
    source: Tensor
    lengths: Tensor
    target: Tensor

    @classmethod
    def of(cls, chosen: Sequence[Pair]) -> Batch:
        source, lengths = encode_words([word for word, _ in chosen])
        return cls(chosen, source, lengths, encode_sounds([sounds for _, sounds in chosen]))


def batches(chosen: Sequence[Pair], size: int, seed: int | None = None) -> Iterator[Batch]:
    """Batches of pairs of similar lengths, so that little is padded.

    seed: another one mixes pairs and batches otherwise; None: shortest first, in order.
    """
    mixed = list(chosen)
    generator = random.Random(seed)
    if seed is not None:
        generator.shuffle(mixed)
    mixed.sort(key=lambda pair: (len(pair[0]), len(pair[1])))  # stable: equal lengths stay mixed
    groups = [mixed[start : start + size] for start in range(0, len(mixed), size)]
    if seed is not None:
        generator.shuffle(groups)
    return map(Batch.of, groups)
