"""Measure a suite beside its peers and print one table.

    python -m benchmarks.report rnn --cell lstm --dtype float32 --batch 1 8 --time 50 --budget 60

See benchmarks/README.md for what is measured and how, and command.py for the command line.
"""

from __future__ import annotations

import os
import sys

from benchmarks import allocator

INTERRUPTED = 130


def with_allocator_settings() -> None:
    """Start this process again with the allocator settings that a benchmark needs."""
    if not allocator.is_set():
        sys.stdout.flush()
        command = [sys.executable, "-m", "benchmarks.report", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **allocator.ALLOCATOR})


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        with_allocator_settings()
        # Here and not above: torch and the peers take seconds to load, once is enough.
        from benchmarks import command

        return command.main(sys.argv[1:])
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "rich", "numpy"):
            raise
        print(f"{error.name} is not installed: pip install {error.name}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
