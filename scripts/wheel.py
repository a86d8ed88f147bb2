"""Builds a wheel into dist/, or tries the wheels that are there.

usage: wheel.py cpu | cuda          as `make wheel` and `make wheel-cuda` do
       wheel.py test PYTHON ...     each wheel in each of these environments, which have a torch
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# A folder of its own, so that the build in place never sees the options of a wheel's. Both kinds
# share it: between them little is compiled anew.
BUILD = ROOT / "build" / "wheel"
PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
# What others bring: torch, the OpenMP that comes with it, and the driver. A copy in the wheel would
# be a second one in the process. pyproject.toml has the same list for cibuildwheel.
EXCLUDED = ("libtorch*.so", "libc10*.so", "libgomp.so.1", "libcuda.so.1")


def local_version(nvcc_output: str) -> str:
    """The local part of a CUDA wheel's version: cu130, where `nvcc --version` prints 13.0."""
    release = re.search(r"release (\d+)\.(\d+)", nvcc_output)
    if release is None:
        sys.exit(f"nvcc names no release of CUDA: {nvcc_output.strip()}")
    return "cu" + release[1] + release[2]


def sizes(wheel: Path) -> list[str]:
    """Lines that say how large a wheel is, and the libraries in it, the largest first."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [(i.file_size, i.filename) for i in archive.infolist() if ".so" in i.filename]
    lines = [(wheel.stat().st_size, wheel.name), *sorted(libraries, reverse=True)]
    return [f"{size / 2**20:8.2f} MiB  {name}" for size, name in lines]


def build(cuda: bool) -> None:
    local = ""
    if cuda:
        nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
        if nvcc is None:
            sys.exit("A CUDA wheel needs nvcc, and there is none in PATH or CUDACXX.")
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        local = local_version(said.stdout)
    # setuptools packages whatever lies in its folders: of sources that are gone, of the other kind.
    for folder in BUILD.glob("*"):
        if not folder.name.startswith("cmake-"):
            shutil.rmtree(folder)
    raw = BUILD / "raw"
    raw.mkdir(parents=True)
    environment = {
        **os.environ,
        "ENCDEC_FAST_LOCAL_VERSION": local,
        "ENCDEC_FAST_CMAKE_ARGS": f"-DENCDEC_CUDA={'ON' if cuda else 'OFF'}",
    }
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(raw)]
    # The metadata in the source tree is that of the build in place, and stays.
    command += [f"-C--global-option=egg_info --egg-base={BUILD}"]
    command += [f"-C--build-option=build --build-base={BUILD}", str(ROOT)]
    subprocess.run(command, env=environment, check=True)
    (unrepaired,) = raw.glob("*.whl")
    name = unrepaired.name.split("-")[:3]
    for wheel in DIST.glob("*.whl"):
        if wheel.name.split("-")[:3] == name:
            wheel.unlink()  # an older one: its platform tag may be another
    # Finds the oldest system that the libraries run on, and names it in the wheel's tag.
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(DIST)]
    repair += [f"--exclude={pattern}" for pattern in EXCLUDED]
    subprocess.run([*repair, str(unrepaired)], check=True)
    for wheel in DIST.glob("*.whl"):
        if wheel.name.split("-")[:3] == name:
            print(*sizes(wheel), sep="\n")


def test(pythons: list[str]) -> int:
    """Runs wheel_smoke.py with each wheel in each environment; returns how many failed."""
    wheels = [path for path in sorted(DIST.glob("*.whl")) if path.name.split("-")[2] == PYTHON_TAG]
    if not wheels:
        sys.exit(f"There is no wheel for {PYTHON_TAG} in dist/: make wheel")
    failures = 0
    for python in pythons:
        pip = [str(Path(python).absolute()), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        for wheel in wheels:
            print(f"{wheel.name} with {python}", flush=True)
            # Without --force-reinstall, which would install torch again, too.
            subprocess.run([*pip, "uninstall", "--yes", "encdec_fast"], check=True)
            subprocess.run([*pip, "install", str(wheel)], check=True)
            # Far from the checkout, and isolated: what is imported is what was installed.
            with tempfile.TemporaryDirectory() as elsewhere:
                smoke = [pip[0], "-I", str(ROOT / "scripts" / "wheel_smoke.py")]
                failures += subprocess.run(smoke, cwd=elsewhere).returncode != 0
    return failures


def main(arguments: list[str]) -> int:
    if arguments in (["cpu"], ["cuda"]):
        build(cuda=arguments == ["cuda"])
        return 0
    if arguments[:1] == ["test"] and len(arguments) > 1:
        return 1 if test(arguments[1:]) else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"This step failed: {shlex.join(error.cmd)}")  # and has said why
