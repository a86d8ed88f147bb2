"""Wheels: their names and metadata, the scripts that build and try them, and docs/install.md."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import encdec_fast
from encdec_fast.backends import library

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wheel = script("wheel")
smoke = script("wheel_smoke")
check_abi = script("check_abi")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return found


def test_a_wheel_asks_for_a_torch_that_its_name_does_not_hold(project: dict[str, Any]) -> None:
    assert project["project"]["name"] == "encdec_fast"
    assert project["project"]["dependencies"] == ["torch>=2.10"]
    assert project["project"]["requires-python"] == ">=3.10"


@pytest.mark.parametrize(("local", "suffix"), [(None, ""), ("", ""), ("cu130", "+cu130")])
def test_the_version_has_a_local_part_where_one_is_given(local: str | None, suffix: str) -> None:
    pytest.importorskip("setuptools")
    environment = {k: v for k, v in os.environ.items() if k != "ENCDEC_FAST_LOCAL_VERSION"}
    if local is not None:
        environment["ENCDEC_FAST_LOCAL_VERSION"] = local
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.split()[-1] == encdec_fast.__version__ + suffix, result.stderr


def test_cibuildwheel_makes_what_there_are_kernels_for(project: dict[str, Any]) -> None:
    table = project["tool"]["cibuildwheel"]
    assert table["build"] == [f"cp3{minor}-*" for minor in range(10, 15)]
    assert table["linux"]["archs"] == ["x86_64"]
    assert "x86-64 only" in (ROOT / "CMakeLists.txt").read_text()
    for arch in ("x86_64", "aarch64"):
        assert table["linux"][f"manylinux-{arch}-image"] == "manylinux_2_28"
    assert "-DENCDEC_CUDA=OFF" in table["environment"]["ENCDEC_FAST_CMAKE_ARGS"]
    for path in re.findall(r"(?:requirements|scripts)/[\w.]+", str(table)):
        assert (ROOT / path).exists(), path


def test_both_ways_to_repair_leave_out_the_same_libraries(project: dict[str, Any]) -> None:
    command = project["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    excluded = re.findall(r"--exclude='?([^' ]+)", command)
    assert tuple(excluded) == wheel.EXCLUDED
    assert "\n" not in command


def test_wheels_are_tried_beside_the_oldest_and_the_newest_torch() -> None:
    text = (ROOT / "Makefile").read_text()
    (newest,) = re.findall(r"\$\(TORCH\),torch==([\d.]+)\)", text)
    (needed,) = re.findall(r"^wheel-test: (.*) ##", text, re.MULTILINE)
    assert re.findall(r"build/abi-([\d.]+)/\.done", needed) == ["2.10.0", newest]


@pytest.mark.parametrize(("release", "local"), [("13.0", "cu130"), ("12.8", "cu128")])
def test_the_local_version_is_that_of_nvcc(release: str, local: str) -> None:
    said = f"nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {release}, V1\n"
    assert wheel.local_version(said) == local


def test_an_nvcc_without_a_release_is_an_error() -> None:
    with pytest.raises(SystemExit, match="names no release of CUDA: hello"):
        wheel.local_version("hello\n")


def test_without_nvcc_a_cuda_wheel_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    with pytest.raises(SystemExit, match=r"^A CUDA wheel needs nvcc.*$"):
        wheel.main(["cuda"])


def test_sizes_name_the_libraries_the_largest_first(tmp_path: Path) -> None:
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, size in (("a/small.so", 1), ("a/large.so.1", 3), ("a/text.py", 5)):
            archive.writestr(name, bytes(size << 20))
    lines = [line.split() for line in wheel.sizes(path)]
    assert lines == [
        ["9.00", "MiB", "some.whl"],
        ["3.00", "MiB", "a/large.so.1"],
        ["1.00", "MiB", "a/small.so"],
    ]


@pytest.mark.parametrize("arguments", [[], ["gpu"], ["test"], ["cpu", "cuda"]])
def test_wrong_usage_of_the_scripts_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert wheel.main(arguments) == 2
    assert "usage: wheel.py" in capsys.readouterr().err
    assert check_abi.main([]) == 2
    assert "usage: check_abi.py" in capsys.readouterr().err


def test_where_there_is_no_wheel_to_try_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encdec_fast-0.1.0-cp39-cp39-linux_x86_64.whl").touch()  # of another Python
    monkeypatch.setattr(wheel, "DIST", tmp_path)
    with pytest.raises(SystemExit, match="There is no wheel for cp3"):
        wheel.main(["test", sys.executable])


CHAIN = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
OSError: libtorch_cuda.so: cannot open shared object file

The above exception was the direct cause of the following exception:

OSError: Could not load this library: x.so
"""


@pytest.mark.parametrize(
    ("ended", "holds", "said"),
    [
        ((0, "loads\n", "a warning\n"), True, "loads"),
        ((1, "", CHAIN), False, "OSError: libtorch_cuda.so: cannot open shared object file"),
        ((1, "", "AssertionError\n"), False, "AssertionError"),
        ((3, "", ""), False, "exit code 3"),
        ((-11, "", ""), False, "the process was ended by signal 11"),
    ],
)
def test_the_verdict_on_an_abi_is_one_line(
    ended: tuple[int, str, str], holds: bool, said: str
) -> None:
    assert check_abi.verdict(*ended) == (holds, said)


@pytest.mark.skipif(library.extension is None, reason="the compiled module is not built")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "attention", "optimize"])
def test_what_wheels_are_tried_with_holds_here(name: str) -> None:
    assert "agree" in smoke.CHECKS[name]()


def test_a_failed_check_of_a_wheel_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(smoke, "CHECKS", {"one": broken, "two": lambda: "fine"})
    assert smoke.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "  FAILED  one: RuntimeError: no such thing",
        "  ok      two: fine",
    ]


SOURCES = [
    *(ROOT / name for name in ("CMakeLists.txt", "Makefile", "setup.py")),
    *sorted((ROOT / "cmake").glob("*.cmake")),
    *sorted((ROOT / "scripts").glob("*.py")),
    ROOT / "encdec_fast" / "backends" / "library.py",
    ROOT / "encdec_fast" / "cli.py",
    ROOT / "csrc" / "core" / "cpu_features.cpp",
]
# What begins an error message in them. Fields in braces may hold quotation marks of their own.
STRING = r'f?"((?:[^"{}]|\{[^{}]*\})*)"'
ERRORS = [
    rf"FATAL_ERROR {STRING}",
    rf"(?:SystemExit|sys\.exit)\( ?{STRING}",
    rf"(?:False, |reason = ){STRING}",
    r'echo "([^"]*)" >&2',
]


def joined(path: Path) -> str:
    """A source on one line, with strings that it continues on another line in one piece."""
    return re.sub(r'" f?"', "", re.sub(r"\s+", " ", path.read_text()))


def documented() -> list[list[str]]:
    """The messages of the project's own in docs/install.md, in the pieces that do not differ."""
    text = (ROOT / "docs" / "install.md").read_text()
    own = text.split("## Messages", 1)[1].split("### Of pip", 1)[0]
    messages = re.findall(r"^\| `(.+?)` \| ", own, re.MULTILINE)
    return [[piece.strip() for piece in m.split("…") if len(piece) > 3] for m in messages]


@pytest.mark.parametrize("pieces", documented(), ids=lambda pieces: pieces[0])
def test_a_documented_message_is_one_of_the_sources(pieces: list[str]) -> None:
    assert any(all(piece in joined(path) for piece in pieces) for path in SOURCES), pieces


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_message_of_the_sources_is_documented(path: Path) -> None:
    for pattern in ERRORS:
        for message in re.findall(pattern, joined(path)):
            assert any(all(piece in message for piece in row) for row in documented()), message


def test_the_documented_targets_and_options_exist() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    sources = "".join(path.read_text() for path in SOURCES)
    for name in set(re.findall(r"ENCDEC_[A-Z_]+", text)) - {"ENCDEC_FAST_BACKEND"}:
        assert name in sources, name
