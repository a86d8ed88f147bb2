"""The allocator settings of a benchmark. Imports nothing heavy: it runs before everything else."""

from __future__ import annotations

import os

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def is_set() -> bool:
    """Whether freed pages stay with the process, so that no contender pays for fresh ones.

    glibc reads these once, when a process starts.
    """
    return all(os.environ.get(name) == value for name, value in ALLOCATOR.items())
