"""Find the fastest tiles of the Triton kernels on this GPU, and keep them for it.

    python -m benchmarks.gpu_tune                          # every tile, in the time of --budget
    python -m benchmarks.gpu_tune --tile "attention forward"

For each tile the candidates of triton_kernels/_tuning.py that fit this GPU (none spills) stand
beside the default, in cases of gpu_cases.py that use it; the fastest one is kept where it is more
than 2% faster. Writes triton_kernels/tuned/<gpu>.json, with what was there before for tiles that
were not tuned now. Exit codes: 0, 1 if nothing could be tuned, 2 wrong arguments, 130 interrupted
(what was found until then is written).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu_cases import GpuCase, on, speed_cases
from benchmarks.gpu_check import DTYPES, results, times
from encdec_fast import use_backend

FASTER = 1.02  # than the default, to be kept
# Of a tile's name: the ops whose cases use it.
OPS = {
    "attention": ("attention",),
    "additive_attention": ("additive_attention",),
    "gated_bridge": ("gated_bridge",),
    "recurrent": ("lstm", "gru"),
}


def tiles() -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number of the family, name, default) of every tile that can be tuned."""
    from encdec_fast.triton_kernels import report

    for number, family in enumerate(report.FAMILIES):
        for name, default in getattr(family, "TILES", {}).items():
            yield number, name, default


def fitting(family: int, name: str, device: torch.device) -> list[dict[str, Any]]:
    """The candidates of a tile none of whose kernels has a problem on this device."""
    from encdec_fast.triton_kernels import report
    from encdec_fast.triton_kernels._tuning import candidates

    major, minor = torch.cuda.get_device_capability(device)
    capability = f"{major}.{minor}"
    places = [place for place in report.candidate_places(family, capability) if place[4] == name]
    known, bad = {place[5] for place in places}, set()
    with multiprocessing.get_context("spawn").Pool() as pool:  # a GPU is in use here: no fork
        for place, usage in zip(places, pool.map(report.usage_at, places), strict=True):
            if usage.problem:
                bad.add(place[5])
    tried = candidates(report.FAMILIES[family].TILES[name])
    return [one for i, one in enumerate(tried) if i in known - bad]


def cases_of(name: str, device: torch.device) -> Iterator[tuple[GpuCase, str]]:
    """Cases, with the dtypes in which they are run, that launch a kernel with this tile."""
    from encdec_fast.triton_kernels._tuning import listening

    wanted = OPS[re.split(r"\W", name)[0]]
    for case in speed_cases():
        if case.op not in wanted:
            continue
        for dtype in ("float32", "bfloat16"):
            with listening() as asked, use_backend("triton"):
                results(case.run, on(device, DTYPES[dtype], case.leaves(), case.trains))
            if name in asked:
                yield case, dtype


def tune(family: int, name: str, default: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The fastest tile, which may be the default; RuntimeError where no case uses it."""
    from encdec_fast.triton_kernels._tuning import trying

    cases = list(cases_of(name, device))
    if not cases:
        raise RuntimeError("no case of gpu_cases.py uses it")
    others = fitting(family, name, device)
    scores = [0.0] * (1 + len(others))  # the product of times over the default's, as logarithms
    for case, dtype in cases:
        leaves = on(device, DTYPES[dtype], case.leaves(), case.trains)

        def call(own: dict[str, Any], case: GpuCase = case, leaves: Any = leaves) -> object:
            with trying(name, own), use_backend("triton"):
                return results(case.run, leaves)

        calls = {str(i): lambda own=own: call(own) for i, own in enumerate([default, *others])}
        seconds = times(calls, device)  # type: ignore[arg-type]
        for i in range(len(scores)):
            ratio = torch.tensor(seconds[str(i)] / seconds["0"])
            scores[i] += float(ratio.log()) / len(cases)
    best = min(range(len(scores)), key=lambda i: scores[i])
    faster = float(torch.tensor(-scores[best]).exp())
    return default if best == 0 or faster < FASTER else others[best - 1]


def write(device: str, found: dict[str, dict[str, Any]]) -> str:
    """Keep what was found for a device; the name of the file."""
    import triton
    from encdec_fast.triton_kernels._tuning import file_of

    file = file_of(device)
    kept = json.loads(file.read_text())["tiles"] if file.is_file() else {}
    whole = {
        "device": device,
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
        "command": "python -m benchmarks.gpu_tune",
        "tiles": dict(sorted({**kept, **found}.items())),
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return file.name


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tune",
        description="Find the fastest tiles of the Triton kernels on this GPU.",
        epilog="exit codes: 0, 1 nothing could be tuned, 2 wrong arguments, 130 interrupted",
    )
    parser.add_argument("--tile", nargs="+", help="only tiles whose names begin so")
    parser.add_argument("--budget", type=float, default=480.0, metavar="S", help="seconds")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here to tune for")
    chosen = [t for t in tiles() if not options.tile or t[1].startswith(tuple(options.tile))]
    if not chosen:
        parser.error(f"no tile begins so; there are: {', '.join(t[1] for t in tiles())}")
    device, console = torch.device("cuda"), Console(stderr=True)
    found, code, end = {}, 0, time.monotonic() + options.budget
    try:
        for family, name, default in chosen:
            if time.monotonic() > end:
                console.print(f"{name}: no time was left for it", highlight=False)
                continue
            try:
                best = tune(family, name, default, device)
            except RuntimeError as error:
                console.print(f"{name}: {str(error).splitlines()[0]}", highlight=False)
                continue
            found[name] = best
            said = "the default" if best == default else str(best)
            console.print(f"{name}: {said}", highlight=False)
    except KeyboardInterrupt:
        code = 130
    if found:
        print("wrote", write(torch.cuda.get_device_name(device), found))
    return code or int(not found)


if __name__ == "__main__":
    sys.exit(main())
