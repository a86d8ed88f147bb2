"""python -m encdec_fast: what it prints, in which form, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import encdec_fast
from encdec_fast import cli
from encdec_fast.backends import library

ALL_ISAS = ["avx2", "avx512", "avx512_bf16", "avx512_amx"]


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "encdec_fast", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_info_as_json_says_what_runs_here() -> None:
    result = run_cli("info", "--json", ENCDEC_FAST_ISA="")
    facts = json.loads(result.stdout)
    assert facts["versions"]["encdec_fast"] == encdec_fast.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["model"]
    assert facts["threads"]["torch"] >= 1
    assert {lib["name"] for lib in facts["libraries"]} == {s.name for s in library.status()}
    assert result.returncode == (0 if facts["ok"] else 1), result.stderr
    for lib in facts["libraries"]:
        assert lib["loaded"] or (lib["reason"] and lib["hint"]), lib
    if facts["isa"]["chosen"] is not None:
        assert facts["isa"]["chosen"] == facts["cpu"]["isas"][-1], "the newest that there is"


@pytest.mark.parametrize("with_rich", [True, False], ids=["rich", "plain"])
def test_info_prints_the_same_facts_with_and_without_rich(
    with_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    code = cli.main(["info"])
    printed = capsys.readouterr().out
    facts = cli.collect()
    assert code == (0 if facts.ok else 1)
    for wanted in ("Versions", "Processor", "Compiled libraries", "instruction set", "threads"):
        assert wanted in printed
    assert facts.cpu["model"] in printed
    assert torch.__version__ in printed
    for lib in facts.libraries:
        assert lib.name in printed


def test_a_library_that_did_not_load_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = library.LibraryStatus("libsome", "/lib/libsome.so", False, "made of [red]", "bake it")
    monkeypatch.setattr(library, "status", lambda: [broken])
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["info"]) == 1
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "libsome NOT LOADED (/lib/libsome.so)" in printed
    assert "why made of [red]" in printed, "markup in a message is text"
    assert "what to do bake it" in printed
    assert "torch's own kernels" in printed


def test_without_the_compiled_module_the_processor_is_still_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "extension", None)
    facts = cli.collect()
    assert facts.cpu["model"]
    assert facts.isa["chosen"] is None
    assert not facts.ok


@pytest.mark.skipif(library.extension is None, reason="the compiled module is not built")
def test_an_unknown_instruction_set_is_an_error_that_names_the_valid_ones() -> None:
    result = run_cli("info", "--json", ENCDEC_FAST_ISA="avx1024")
    facts = json.loads(result.stdout)
    assert result.returncode == 1
    assert facts["isa"]["chosen"] is None
    for name in ("avx1024", *ALL_ISAS):
        assert name in facts["isa"]["error"]


def test_help_and_version() -> None:
    result = run_cli("--help")
    assert result.returncode == 0
    assert "info" in result.stdout
    result = run_cli("info", "--help")
    assert result.returncode == 0
    assert "exit codes" in result.stdout
    result = run_cli("--version")
    assert result.stdout.strip() == f"encdec_fast {encdec_fast.__version__}"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["info", "--yaml"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run_cli(*arguments)
    assert result.returncode == 2
    assert "usage: python -m encdec_fast" in result.stderr
