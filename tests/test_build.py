"""The build: code that stays in its instruction set, a whole wheel, and a package that works
without its compiled libraries."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import encdec_fast
from encdec_fast.backends import library

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(encdec_fast.__file__).resolve().parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
ISAS = ["avx2", "avx512", "avx512_bf16"]  # that kernels are compiled for
ALL_ISAS = [*ISAS, "avx512_amx"]

# Holds a few shapes against float64 (and not against torch in float32, whose oneDNN kernel gives
# wrong results under emulation); prints the instruction set, if any, and the backend that ran.
LSTM_SCRIPT = """
import torch, encdec_fast
from encdec_fast.backends import library
torch.manual_seed(0)
backends = set()
for size, batch in ((5, 1), (16, 3), (33, 9)):
    ours = encdec_fast.nn.LSTM(size, size, num_layers=2, bidirectional=True)
    truth = torch.nn.LSTM(size, size, num_layers=2, bidirectional=True).double()
    truth.load_state_dict(ours.state_dict())
    x = torch.randn(7, batch, size)
    with torch.no_grad():
        backends.add(encdec_fast.explain(ours, x).backend)
        torch.testing.assert_close(ours(x)[0].double(), truth(x.double())[0], rtol=1e-5, atol=1e-5)
print(library.extension.chosen_isa() if library.extension else None, *backends)
"""

needs_objects = pytest.mark.skipif(
    not BUILD.is_dir(), reason="no build folder: the library was not built in this source tree"
)
needs_module = pytest.mark.skipif(
    library.extension is None, reason="the compiled module is not built"
)
qemu = shutil.which("qemu-x86_64")
needs_qemu = pytest.mark.skipif(
    qemu is None, reason="no qemu-x86_64 (Debian package qemu-user) to emulate an older processor"
)
HASWELL = [qemu or "qemu-x86_64", "-cpu", "Haswell"]


def run(
    command: list[str], cwd: Path | None = None, timeout: int = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def tool(name: str, *arguments: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} (binutils) to read object files with")
    result = run([name, *arguments])
    assert result.returncode == 0, result.stderr
    return result.stdout


def objects(target: str) -> list[Path]:
    # As CMake lists them: the folder may still hold those of a source that is gone.
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    outputs = [Path(command["output"]) for command in commands]
    found = [BUILD / path for path in outputs if f"{target}.dir" in path.parts]
    if not found:
        pytest.skip(f"{target} has no objects")
    return found


def instructions(path: Path) -> Iterator[str]:
    for line in tool("objdump", "-d", "--no-show-raw-insn", str(path)).splitlines():
        _, tab, instruction = line.partition("\t")
        if tab:
            yield instruction


def inner_loops(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Address and instructions of each loop that holds no other jump."""
    code: list[tuple[int, str]] = []
    for line in tool("objdump", "-d", "--no-show-raw-insn", str(path)).splitlines():
        address, tab, instruction = line.partition(":\t")
        if not tab:
            code = []
            continue
        here = int(address, 16)
        code.append((here, instruction))
        jump = re.match(r"j(?!mp)\w+\s+([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < here:
            start = int(jump[1], 16)
            body = [text for at, text in code if at >= start]
            if not any(text.startswith("j") for text in body[:-1]):
                yield start, body


# What must not appear in the objects of a target: registers and instructions of a newer processor.
EVEX = r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]"
FOREIGN = {
    "encdec_core": rf"%ymm|{EVEX}|^v[a-z]+\d*[a-z]* .*%xmm",
    "encdec_kernels_avx2": EVEX,
    "encdec_kernels_avx512": r"^v(dpbf16ps|cvtne2?ps2?bf16|cvtneps2bf16|pdpbusds?|pdpwssds?)\b",
}


@needs_objects
@pytest.mark.parametrize("target", FOREIGN)
def test_objects_hold_no_code_for_a_newer_processor(target: str) -> None:
    foreign = re.compile(FOREIGN[target])
    for path in objects(target):
        found = [line for line in instructions(path) if foreign.search(line)]
        assert not found, f"{path.name}: {len(found)} instructions such as {found[:3]}"


@needs_objects
def test_the_matrix_unit_is_used_in_one_source() -> None:
    tiles = re.compile(r"^(ld|st)tilecfg|^tile|^tdp")
    using = {
        path.name
        for target in ("encdec_core", *(f"encdec_kernels_{isa}" for isa in ISAS))
        for path in objects(target)
        if any(tiles.search(line) for line in instructions(path))
    }
    assert using == {"amx.cpp.o"}


@needs_objects
@pytest.mark.parametrize("isa", ISAS)
def test_code_of_an_instruction_set_stays_in_its_namespace(isa: str) -> None:
    """The linker keeps one copy of a weak symbol. Were it one for AVX-512, every processor would
    run that copy; so a function that other objects can see must have the namespace in its name."""
    own = f"{len(isa)}{isa}"  # as it is mangled
    for path in objects(f"encdec_kernels_{isa}"):
        for line in tool("nm", "--defined-only", str(path)).splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind not in "TWi" or own in name, f"{path.name} lends {name} to other objects"


@needs_objects
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_run_nothing_when_the_library_is_loaded(isa: str) -> None:
    """A static initializer would run on every processor, before anything could ask which it is."""
    for path in objects(f"encdec_kernels_{isa}"):
        sections = tool("objdump", "-h", str(path))
        assert ".init_array" not in sections and ".ctors" not in sections, path.name


@needs_objects
@pytest.mark.parametrize("isa", ISAS)
def test_loops_of_the_product_start_at_a_cache_line(isa: str) -> None:
    """Across one line of decoded instructions more, a tile of few rows is a fifth slower."""
    product = re.compile(r"^v(fmadd|pmadd|dpbf16|pdpbusd)")
    path = next(p for p in objects(f"encdec_kernels_{isa}") if p.name == "gemm_cpu.cpp.o")
    starts = [
        start for start, body in inner_loops(path) if sum(map(bool, map(product.match, body))) > 1
    ]
    assert len(starts) > 20
    assert not [hex(start) for start in starts if start % 64]


@needs_module
def test_the_core_exports_only_its_own_names() -> None:
    for line in tool(
        "nm", "-DC", "--defined-only", str(PACKAGE / "lib" / "libencdec_core.so")
    ).splitlines():
        name = line.split(maxsplit=2)[2]
        assert re.match(r"((typeinfo( name)?|vtable) for |void )?encdec::", name), name


@needs_module
def test_libraries_name_no_folder_of_this_machine() -> None:
    for path in [*PACKAGE.glob("_C*.so"), *PACKAGE.glob("lib/*.so")]:
        for line in tool("readelf", "-d", str(path)).splitlines():
            if "PATH" in line:
                folders = line.split("[")[1].rstrip("]").split(":")
                assert all(folder.startswith("$ORIGIN") for folder in folders), line
            if "NEEDED" in line:
                assert "/" not in line, line


@needs_module
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    assert library.extension is not None
    if isa not in library.extension.cpu_info()["isas"]:
        pytest.skip(f"this processor has no {isa}")
    result = run([sys.executable, "-c", LSTM_SCRIPT], ENCDEC_FAST_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa, "cpu"]


CHOOSE_SCRIPT = f"""
import glob, importlib.util
spec = importlib.util.spec_from_file_location("_C", glob.glob({str(PACKAGE / "_C*.so")!r})[0])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    print("chosen", module.chosen_isa())
except RuntimeError as error:
    print(error)
"""


@needs_module
def test_an_unknown_instruction_set_names_the_valid_ones() -> None:
    result = run([sys.executable, "-c", CHOOSE_SCRIPT], ENCDEC_FAST_ISA="sse9")
    assert result.stdout.startswith("ENCDEC_FAST_ISA=sse9: unknown instruction set")
    assert ", ".join(ALL_ISAS) in result.stdout


@needs_qemu
@needs_module
@pytest.mark.parametrize(
    ("cpu", "forced", "answer"),
    [
        ("Haswell", "", r"chosen avx2$"),
        ("Haswell", "avx512", r"ENCDEC_FAST_ISA=avx512: .*does not support it; it supports avx2$"),
        ("Nehalem", "", r"the kernels of encdec_fast need a processor with AVX2"),
        ("Nehalem", "avx2", r"ENCDEC_FAST_ISA=avx2: .*it supports none of them$"),
    ],
)
def test_the_choice_on_an_older_processor(cpu: str, forced: str, answer: str) -> None:
    command = [HASWELL[0], "-cpu", cpu, sys.executable, "-c", CHOOSE_SCRIPT]
    result = run(command, ENCDEC_FAST_ISA=forced)
    assert re.match(answer, result.stdout.strip()), result.stdout + result.stderr


def cpp_programs() -> list[Path]:
    listed = BUILD / "tests" / "cpp" / "CTestTestfile.cmake"
    text = listed.read_text() if listed.exists() else ""
    names = re.findall(r"^add_test\(\W*(\w+)", text, re.MULTILINE)
    # What is a GPU's does not depend on the processor that plays it.
    return [listed.parent / name for name in names if not name.endswith("_gpu_test")]


@needs_qemu
@pytest.mark.parametrize("program", cpp_programs(), ids=lambda path: path.name)
def test_cpp_tests_on_a_processor_without_avx512(program: Path) -> None:
    if not program.exists():
        pytest.skip("the C++ tests are not built: `make test` builds them")
    result = run([*HASWELL, str(program)], timeout=600, ENCDEC_FAST_ISA="")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    needs_avx512 = re.search("_avx512(_bf16)?$", program.name) is not None
    assert result.stdout.startswith("skipped: ") == needs_avx512


@needs_qemu
@needs_module
def test_the_package_on_a_processor_without_avx512() -> None:
    command = [*HASWELL, sys.executable, "-c", LSTM_SCRIPT]
    path = os.pathsep.join(p for p in sys.path if p)  # emulated, Python does not find its venv
    result = run(command, timeout=600, PYTHONPATH=path, ENCDEC_FAST_ISA="", OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["avx2", "cpu"]


@pytest.mark.parametrize("damage", ["missing", "garbage", "foreign"])
def test_without_its_libraries_the_package_runs_on_torch(damage: str, tmp_path: Path) -> None:
    copy = tmp_path / "encdec_fast"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    reason = "the file does not exist"
    if damage != "missing":
        (copy / "lib").mkdir()
        broken = copy / "lib" / "libencdec_ops.so"
        broken.write_bytes(b"not a library")
        reason = "Could not load this library|invalid ELF header|file too short"
    if damage == "foreign":  # a library that loads, but is another one
        core = PACKAGE / "lib" / "libencdec_core.so"
        if not core.exists():
            pytest.skip("the core is not built")
        shutil.copy(core, broken)
        reason = "it lacks "
    python = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path)}
    where = run([sys.executable, "-c", "import encdec_fast; print(encdec_fast.__file__)"], **python)
    assert where.stdout.strip() == str(copy / "__init__.py"), where.stderr
    result = run([sys.executable, "-c", LSTM_SCRIPT], **python)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "torch"
    result = run([sys.executable, "-m", "encdec_fast", "info"], COLUMNS="300", **python)
    assert result.returncode == 1
    assert re.search(rf"why +.*({reason})", result.stdout), result.stdout
    assert "what to do" in result.stdout


@needs_module
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    result = run([*command, "-w", str(tmp_path), str(ROOT)], timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in ("_C.pyi", "py.typed", "cli.py", "triton_kernels/__init__.py"):
        assert f"encdec_fast/{wanted}" in names
    for path in [*PACKAGE.glob("_C*.so"), *PACKAGE.glob("lib/*.so")]:
        assert str(path.relative_to(PACKAGE.parent)) in names
    foreign = {n for n in names if not re.match(r"encdec_fast(/|-[\d.]+\.dist-info/)", n)}
    assert not foreign


def test_metadata_and_sdist_need_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    script = (
        "import runpy, sys; sys.modules['torch'] = None; sys.modules['pybind11'] = None;"
        f"sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', {str(tmp_path)!r},"
        f" 'sdist', '--dist-dir', {str(tmp_path)!r}];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run([sys.executable, "-c", script], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for wanted in ("CMakeLists.txt", "cmake/isa.cmake", "csrc/core/cpu_features.cpp", "LICENSE"):
        assert wanted in names
    assert {"encdec_fast/cli.py", "triton_kernels/__init__.py", "requirements/build.txt"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith("build/")]


@pytest.mark.parametrize(
    ("value", "message"),
    [("ON", "ENCDEC_CUDA=ON needs nvcc"), ("MAYBE", "must be AUTO, ON or OFF")],
)
def test_cuda_that_cannot_be_built_is_an_error(value: str, message: str, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake in PATH")
    options = [f"-DENCDEC_CUDA={value}", "-DENCDEC_BUILD_PYTHON=OFF", "-G", "Ninja"]
    result = run([cmake, "-S", str(ROOT), "-B", str(tmp_path), *options], CUDACXX="/no/such/nvcc")
    assert result.returncode != 0
    assert message in re.sub(r"\s+", " ", result.stderr)
