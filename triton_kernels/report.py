"""Compile every kernel for GPUs that need not be there, and say what it takes of them.

    python -m encdec_fast.triton_kernels.report
    python -m encdec_fast.triton_kernels.report --default --capability 9.0 --json

    python -m encdec_fast.triton_kernels.report --candidates --capability 9.0

For each configuration that a launcher may choose without tuning: registers of a thread, bytes that
do not fit in them (spills), shared memory of a program, and which instructions multiply matrices.
--candidates adds all that a tuner may choose: what does not fit is left out there, and said to be.
Exit code 1 if another kernel spills, takes more shared memory than a program may have on that GPU,
or multiplies without tensor cores what is meant for them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from encdec_fast.triton_kernels import (
    additive_attention,
    attention,
    attention_backward,
    beam_search,
    cached_attention,
    cross_entropy,
    gated_bridge,
    linear,
    log_softmax_topk,
    recurrent,
)
from encdec_fast.triton_kernels._configuration import TYPES, Configuration
from encdec_fast.triton_kernels._tuning import candidates, trying
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may have, in bytes (CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability").
SHARED = {"8.0": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10, "12.0": 99 << 10}
FAMILIES = (
    additive_attention,
    attention,
    attention_backward,
    beam_search,
    cached_attention,
    cross_entropy,
    gated_bridge,
    linear,
    log_softmax_topk,
    recurrent,
)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True)
class Usage:
    """What one configuration takes on GPUs of one compute capability; sizes in bytes."""

    kernel: str
    capability: str
    registers: int
    spills: int
    shared: int
    products: str
    tensor_cores: bool  # whether its products are for them
    candidate: str = ""  # for a tuner: the name of its tile

    @property
    def problem(self) -> str:
        """Empty if it can run at full speed."""
        if self.spills:
            return f"{self.spills} bytes do not fit in registers"
        if self.shared > SHARED[self.capability]:
            return f"shared memory: at most {SHARED[self.capability]} bytes"
        if self.tensor_cores and self.products == "-":
            return "its products are not on tensor cores"
        return ""


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def usage(family: str, configuration: Configuration, capability: str) -> Usage:
    """Compile one configuration for a compute capability such as "9.0"."""
    kernel = configuration.kernel
    constants = {**configuration.constants, **dict.fromkeys(configuration.absent)}
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else configuration.types[n] for n in names}
    # Launchers see to it that tensors start at 16 bytes; sizes are whatever they are, unless the
    # configuration says more.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if types[n].startswith("*") or (n in configuration.aligned and n not in constants)
    }
    source = ASTSource(
        kernel, types, {(names.index(n),): value for n, value in constants.items()}, attributes
    )
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    options = {
        "num_warps": configuration.warps,
        "num_stages": configuration.stages,
        "maxnreg": configuration.registers,
    }
    compiled = triton.compile(source, target=target, options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    products = [name for name in _PRODUCTS if name in compiled.asm["ptx"]]
    return Usage(
        f"{family}.{configuration.name}",
        capability,
        registers,
        spills,
        compiled.metadata.shared,
        ", ".join(products) or "-",
        configuration.tensor_cores,
    )


Place = tuple[int, str, int, str, str, int]


def usage_at(place: Place) -> Usage:
    """What a process of the pool is asked for: kernels themselves cannot be sent to it."""
    family, dtype, index, capability, name, number = place
    module = FAMILIES[family]
    short = module.__name__.rpartition(".")[2]
    if not name:
        return usage(short, list(module.configurations(dtype))[index], capability)
    with trying(name, candidates(module.TILES[name])[number]):
        configuration = list(module.configurations(dtype))[index]
    return replace(usage(short, configuration, capability), candidate=name)


def candidate_places(family: int, capability: str) -> Iterator[Place]:
    """Every configuration that a candidate for a tile makes another one."""
    module = FAMILIES[family]
    for name, default in getattr(module, "TILES", {}).items():
        for dtype in TYPES:
            plain = list(module.configurations(dtype))
            for number, other in enumerate(candidates(default)):
                with trying(name, other):
                    changed = list(module.configurations(dtype))
                for i, (own, was) in enumerate(zip(changed, plain, strict=True)):
                    if own != was:
                        yield family, dtype, i, capability, name, number


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def usages(
    capabilities: Sequence[str], default: bool, with_candidates: bool = False
) -> Iterator[Usage]:
    """Every configuration of every kernel, or the default ones, compiled by all processors."""
    places: list[Place] = [
        (family, dtype, index, capability, "", 0)
        for family in range(len(FAMILIES))
        for dtype in TYPES
        for index, configuration in enumerate(FAMILIES[family].configurations(dtype))
        if configuration.default or not default
        for capability in capabilities
    ]
    if with_candidates:
        for capability in capabilities:
            for family in range(len(FAMILIES)):
                places += candidate_places(family, capability)
    workers = len(os.sched_getaffinity(0))
    with multiprocessing.Pool(workers, _leave_interrupts_to_the_parent) as pool:
        yield from pool.imap(usage_at, places)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m encdec_fast.triton_kernels.report",
        description="Compile the Triton kernels and say what they take of a GPU.",
        epilog="exit codes: 0 all fit, 1 some do not, 2 wrong arguments, 130 interrupted",
    )
    parser.add_argument("--capability", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--default", action="store_true", help="only what most calls take")
    parser.add_argument(
        "--candidates", action="store_true", help="also what a tuner may choose (takes long)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args(arguments)
    found = []
    if not options.json:
        print(f"{'kernel':58}{'for':>6}{'registers':>11}{'spills':>8}{'shared':>9}  products")
    for one in usages(options.capability, options.default, options.candidates):
        found.append(one)
        if not options.json:
            print(
                f"{one.kernel:58}{one.capability:>6}{one.registers:>11}{one.spills:>8}"
                f"{one.shared:>9}  {one.products}  {_said(one)}".rstrip(),
                flush=True,
            )
    if options.json:
        print(json.dumps([asdict(one) | {"problem": one.problem} for one in found]))
    return int(any(one.problem for one in found if not one.candidate))


def _said(one: Usage) -> str:
    """What the table says of a configuration's problem."""
    return f"left out: {one.problem}" if one.candidate and one.problem else one.problem


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
