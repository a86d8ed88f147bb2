"""Prints the Python that the Makefile uses: the active environment's if it has torch, else .venv's.

usage: find_python.py [TORCH]     TORCH: a torch that was asked for, which always goes to .venv
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 — an older Python may well start this
    sys.exit("encdec_fast needs Python >= 3.10; choose one with: make PYTHON=/path/to/python3 ...")

import re
import sysconfig
from importlib import metadata
from pathlib import Path

OWN = Path(".venv")


def has_usable_torch() -> bool:
    """Whether this environment has torch >= 2.10 and lets pip install beside it."""
    try:
        version = re.match(r"(\d+)\.(\d+)", metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return False
    in_venv = sys.prefix != sys.base_prefix
    managed = not in_venv and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    return version is not None and tuple(map(int, version.groups())) >= (2, 10) and not managed


def main() -> None:
    asked_for_a_torch = len(sys.argv) > 1 and sys.argv[1] != ""
    is_own = Path(sys.prefix).resolve() == OWN.resolve()
    if asked_for_a_torch or is_own or not has_usable_torch():
        print(OWN / "bin" / "python")
    else:
        print(sys.executable)


main()
