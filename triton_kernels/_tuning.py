"""Tiles by name: what is good without tuning, what was found on a device, what may be tried there.

What tuning found on a device lies in tuned/<device>.json, for everyone to read: the versions that
it was found with, and by name the tiles that are not the default ones. `python -m
benchmarks.gpu_tune` writes it.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch

# By name, everything that a launcher passes on: sizes (upper case) and the compiler's options.
Tile: TypeAlias = dict[str, Any]

TUNED = Path(__file__).parent / "tuned"
# The least of a size: a matrix product has at least 16 rows and columns.
LEAST = {
    "QUERIES": 1,
    "ROWS": 16,
    "KEYS": 16,
    "COLUMNS": 16,
    "FEATURES": 16,
    "UNITS": 16,
    "INNER": 16,
}
MOST = 128

_tried: contextvars.ContextVar[dict[str, Tile] | None] = contextvars.ContextVar(
    "encdec_fast_tried_tiles", default=None
)
_heard: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar(
    "encdec_fast_heard_tiles", default=None
)


def file_of(device: str) -> Path:
    """Where the tiles of a device of this name are kept."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


@cache
def _found(device: str) -> dict[str, Tile]:
    file = file_of(device)
    found: dict[str, Tile] = json.loads(file.read_text())["tiles"] if file.is_file() else {}
    return found


@cache
def _name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def tile(name: str, default: Tile, device: torch.device | None = None) -> Tile:
    """The tile of this name: the one that is tried, or was found on the device, or the default.

    device: None where nothing is launched.
    """
    heard = _heard.get()
    if heard is not None:
        heard.add(name)
    tried = (_tried.get() or {}).get(name)
    if tried is not None:
        return dict(tried)
    if device is None or device.type != "cuda":
        return dict(default)
    return {**default, **_found(_name(device.index)).get(name, {})}


@contextlib.contextmanager
def trying(name: str, other: Tile) -> Iterator[None]:
    """Inside the `with` block the tile of this name is another one, on every device."""
    token = _tried.set({**(_tried.get() or {}), name: other})
    try:
        yield
    finally:
        _tried.reset(token)


@contextlib.contextmanager
def listening() -> Iterator[set[str]]:
    """The names of the tiles that are asked for inside the `with` block."""
    heard: set[str] = set()
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def candidates(default: Tile) -> list[Tile]:
    """What a tuner tries beside the default: half and twice of its first two sizes with each number
    of warps, and one by one its other sizes and options.
    """
    sizes = [name for name in default if name in LEAST]
    around = {
        name: [n for n in (default[name] // 2, default[name], default[name] * 2) if _fits(name, n)]
        for name in sizes
    }
    first, warps = sizes[:2], (4, 8)
    found = [
        {**default, **dict(zip(first, chosen, strict=True)), "num_warps": n}
        for *chosen, n in product(*(around[name] for name in first), warps)
    ]
    found += [{**default, name: n} for name in sizes[2:] for n in around[name]]
    if "num_stages" in default:
        found += [{**default, "num_stages": n} for n in (1, 2, 3, 4)]
    if "maxnreg" in default:
        found.append({**default, "maxnreg": None if default["maxnreg"] else 255})
    return [one for i, one in enumerate(found) if one != default and one not in found[:i]]


def _fits(name: str, size: int) -> bool:
    return LEAST[name] <= size <= MOST
