"""The command line of the library: `python -m encdec_fast info` says what runs here, and why.

Tables are drawn with rich where it is installed, and as plain text where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from encdec_fast._version import __version__
from encdec_fast.backends import library

Rows = list[tuple[str, str]]

EXIT_CODES = """\
exit codes:
  0  the compiled kernels are used
  1  something is missing: the package works, on torch's own kernels
  2  wrong usage
"""


@dataclass
class LibraryFacts:
    """One compiled library: where it is, and if it did not load, why and what to do."""

    name: str
    path: str
    loaded: bool
    reason: str | None = None
    hint: str | None = None


@dataclass
class Facts:
    """Everything that `info` says; its fields are the keys of `info --json`."""

    versions: dict[str, str | None]
    build: dict[str, Any] | None  # compiler, flags, cuda; None without the compiled module
    cpu: dict[str, Any]  # model and features; with the compiled module also isas and caches
    isa: dict[str, str | None]  # chosen, requested (ENCDEC_FAST_ISA), error
    threads: dict[str, int | None]  # torch: of each call; cores: that this process may use
    libraries: list[LibraryFacts] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the compiled kernels are used."""
        return self.isa["error"] is None and all(lib.loaded for lib in self.libraries)


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_without_module() -> dict[str, Any]:
    """What the operating system says of the processor, for when our own module did not load."""
    model, features = platform.processor() or platform.machine(), []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() == "flags":
                wanted = ("avx2", "fma", "f16c", "avx512", "avx_vnni", "amx")
                features = [flag for flag in value.split() if flag.startswith(wanted)]
                break
    except OSError:
        pass  # no such file on this system: the name above has to do
    return {"model": model, "features": features}


def _ask_extension(facts: Facts) -> None:
    """Fills in what the compiled module knows, where it loaded."""
    extension = library.extension
    if extension is None:
        facts.isa["error"] = "the compiled module did not load"
        return
    facts.build = dict(extension.build_info())
    facts.cpu = dict(extension.cpu_info())
    try:
        facts.isa["chosen"] = extension.chosen_isa()
    except RuntimeError as error:
        facts.isa["error"] = str(error)


def collect() -> Facts:
    """Looks at this installation and this machine."""
    facts = Facts(
        versions={
            "encdec_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version_of("triton"),
        },
        build=None,
        cpu=_cpu_without_module(),
        isa={
            "chosen": None,
            "requested": os.environ.get("ENCDEC_FAST_ISA") or None,
            "error": None,
        },
        threads={"torch": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))},
    )
    facts.libraries = [
        LibraryFacts(lib.name, str(lib.path), lib.loaded, lib.reason or None, lib.hint or None)
        for lib in library.status()
    ]
    _ask_extension(facts)
    return facts


def _bytes(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def _sections(facts: Facts) -> list[tuple[str, Rows]]:
    versions: Rows = [(name, value or "not installed") for name, value in facts.versions.items()]
    if facts.build is not None:
        versions.append(("built with", facts.build["compiler"]))
        versions.append(
            ("CUDA kernels", f"yes, for {library.needed_driver()}" if facts.build["cuda"] else "no")
        )
    cpu: Rows = [
        ("model", facts.cpu["model"]),
        ("features", " ".join(facts.cpu["features"]) or "none that matter here"),
    ]
    if "isas" in facts.cpu:
        levels = ("l1d", "l2", "l3")
        caches = ", ".join(f"{x.upper()} {_bytes(facts.cpu[x + '_bytes'])}" for x in levels)
        cpu += [("caches", caches), ("kernels for", " ".join(facts.cpu["isas"]) or "none")]
    chosen = facts.isa["chosen"] or f"none: {facts.isa['error']}"
    if facts.isa["chosen"] and facts.isa["requested"]:
        chosen += " (ENCDEC_FAST_ISA)"
    cpu.append(("instruction set", chosen))
    cpu.append(("threads", f"{facts.threads['torch']} of torch, {facts.threads['cores']} cores"))
    libraries: Rows = []
    for lib in facts.libraries:
        if lib.loaded:
            libraries.append((lib.name, f"loaded from {lib.path}"))
            continue
        libraries.append((lib.name, f"NOT LOADED ({lib.path})"))
        libraries.append(("  why", lib.reason or "unknown"))
        if lib.hint:
            libraries.append(("  what to do", lib.hint))
    return [("Versions", versions), ("Processor", cpu), ("Compiled libraries", libraries)]


def _print_plain(sections: list[tuple[str, Rows]]) -> None:
    for title, rows in sections:
        print(title)
        for label, value in rows:
            print(f"  {label:<18} {value}")


def _print_sections(sections: list[tuple[str, Rows]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(sections)
        return
    console = Console()
    for title, rows in sections:
        table = Table(title=Text(title, "bold"), title_justify="left", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True, min_width=18)
        table.add_column(overflow="fold")
        for label, value in rows:
            style = "yellow" if value.startswith(("NOT LOADED", "none:")) else ""
            table.add_row(Text(label), Text(value, style))
        console.print(table)


def info(as_json: bool) -> int:
    """Prints the facts; returns the exit code."""
    facts = collect()
    if as_json:
        print(json.dumps({**asdict(facts), "ok": facts.ok}, indent=2))
    else:
        _print_sections(_sections(facts))
        if not facts.ok:
            print("The package works, on torch's own kernels; the compiled ones are not used.")
    return 0 if facts.ok else 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="python -m encdec_fast", description="Fast encoder-decoder kernels for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"encdec_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "info",
        help="what runs here: versions, processor, threads, compiled libraries",
        description="Says which versions, instruction set, threads and compiled libraries are in "
        "use here, and where one did not load, why and what to do.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    arguments = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    return info(arguments.json)
