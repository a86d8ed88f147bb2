"""What `make demo` shows: a published model before and after, then this project's own with beams.

    python -m examples.demo [WORDS...] [options of examples/g2p.py]

First examples/g2p.py: the published GRU of g2p-en, plain and optimized, on dictionary words. Then
the recurrent model of examples/g2p_model (an LSTM with attention, trained here) pronounces the same
words with beam search, and a picture shows which letters it looked at for each phoneme.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from examples import g2p

try:
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"{error.name} is not installed: pip install {error.name}") from None

CHECKPOINT = Path(__file__).parent / "g2p_model" / "recurrent.safetensors"
PICTURE = Path("attention.png")
BEAMS = 5


def show_own_model(console: Console, words: Sequence[str]) -> None:
    """Print the phonemes of words by beam search, and write the picture of the attention."""
    from examples.g2p_model.checkpoint import load_model
    from examples.g2p_model.picture import draw
    from examples.g2p_model.pronounce import pronounce

    model, _ = load_model(CHECKPOINT)
    console.print(
        f"\nThe model of examples/g2p_model, {BEAMS} beams, letters to phonemes by attention:",
        highlight=False,
    )
    table = Table("word", "phonemes", box=None, pad_edge=False)
    for word, sounds in pronounce(model, words, BEAMS).items():
        table.add_row(word, " ".join(sounds))
    console.print(table)
    draw(model, words, PICTURE, BEAMS)
    console.print(f"wrote {PICTURE}: the letters that it looked at for each phoneme")


def main(argv: Sequence[str] | None = None) -> int:
    """Both parts; returns the exit code of the first, or of what went wrong in the second."""
    options = g2p.parser().parse_args(argv)
    code = g2p.main(argv)
    if code not in (g2p.OK, g2p.BAD_INPUT):
        return code
    given = [word.strip().lower() for word in options.words]
    words = [word for word in given if g2p.why_not(word) is None]
    try:
        show_own_model(Console(), [*words, *g2p.DEFAULT_WORDS])
    except g2p.Trouble as trouble:
        print(trouble, file=sys.stderr)
        return g2p.DIFFERENT
    except ImportError as error:
        print(f"{error.name} is not installed: pip install {error.name}", file=sys.stderr)
        return g2p.DIFFERENT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return g2p.INTERRUPTED
    return code


if __name__ == "__main__":
    raise SystemExit(main())
