"""Runs CMake (CMakeLists.txt describes the build) and packages what it installs.

Metadata is in pyproject.toml. Neither it nor an sdist needs torch; the build does, for its headers.

  ENCDEC_FAST_CMAKE_ARGS      passed on to CMake, for example "-DENCDEC_CUDA=OFF"
  ENCDEC_FAST_LOCAL_VERSION   what stands behind the version's "+": "cu130" for a CUDA 13.0 wheel
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """That of the sources. The local part names a build, so only the build knows it."""
    text = (ROOT / "encdec_fast" / "_version.py").read_text()
    (public,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    local = os.environ.get("ENCDEC_FAST_LOCAL_VERSION")
    return f"{public}+{local}" if local else public


class CMakeBuild(build_ext):
    """Builds every native part at once; the extension listed below stands for all of them."""

    def run(self) -> None:
        # An editable install has them in the source tree, a wheel in the folder that it is made of.
        target = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "encdec_fast"
        # One folder per Python, kept between builds, so that only what changed is compiled.
        base = ROOT / self.get_finalized_command("build").build_base
        build = base / f"cmake-{sys.implementation.cache_tag}"
        env = os.environ.copy()
        env["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", os.defpath)])
        cmake = shutil.which("cmake", path=env["PATH"])
        if cmake is None or shutil.which("ninja", path=env["PATH"]) is None:
            raise SystemExit(
                "encdec_fast is built with cmake and ninja, and they are not in PATH: "
                "pip install -r requirements/build.txt"
            )
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(env.get("ENCDEC_FAST_CMAKE_ARGS", "")),
        ]
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "lock", "w") as lock:
            # Two ninjas in one folder damage its records, and then all is compiled each time.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for command in (
                configure,
                [cmake, "--build", str(build)],
                [cmake, "--install", str(build), "--prefix", str(target)],
            ):
                if subprocess.run(command, env=env).returncode != 0:
                    # The compiler or CMake has said why; a traceback would hide it.
                    raise SystemExit(f"encdec_fast: this step failed: {shlex.join(command)}")
            # One of a build with other options would be packaged, and loaded, with these.
            installed = (build / "install_manifest.txt").read_text().splitlines()
            for library in (target / "lib").glob("*.so"):
                if str(library) not in installed:
                    library.unlink()

    def get_outputs(self) -> list[str]:
        return []  # installed by CMake, into folders that are packaged whole

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    version=version(),
    packages=[
        *find_packages(include=["encdec_fast", "encdec_fast.*"]),
        "encdec_fast.triton_kernels",
    ],
    package_dir={"encdec_fast.triton_kernels": "triton_kernels"},
    package_data={"encdec_fast.triton_kernels": ["tuned/*.json"]},
    ext_modules=[Extension("encdec_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
