"""generate of optimized transformers models on the GPU's engine, on the CPU: the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import test_transformers as shared
from test_transformers import ALL_MODELS, PAIRS, arguments, generate, optimized, quiet, ties

from encdec_fast import use_backend
from encdec_fast.backends import Backend
from encdec_fast.generation.device import run
from encdec_fast.integrations import transformers as integration

pytestmark = [
    pytest.mark.usefixtures("native", "quiet"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]
EACH = PAIRS[::3]
BACKENDS = integration.BACKENDS
__all__ = ["quiet"]


def forget() -> None:
    """What was found by another engine."""
    for kept in (shared.both, shared.ties, shared.found_exactly, shared.plain):
        kept.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def on_the_device() -> Iterator[None]:
    """The GPU's engine stands for the CPU's."""
    here = Backend("cpu", lambda search, prepared: search.run(prepared, run), BACKENDS[1].why_not)
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "BACKENDS", (here, *BACKENDS[2:]))
        yield
    forget()


@pytest.mark.parametrize(("model", "case"), EACH)
def test_same_tokens(model: str, case: str) -> None:
    ties(model, case)


def test_ties_are_rare() -> None:
    every = [ties(model, case) for model, case in EACH]
    assert sum(count for _, count in every) <= 0.01 * sum(total for total, _ in every)


@ALL_MODELS
def test_on_triton(model: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search's ops on Triton's kernels; the encoder has products, which are torch's."""

    def on_triton(search: Any, prepared: Any) -> Any:
        with use_backend("triton"):
            return search.run(prepared, run)

    given, _, _ = arguments(model, {"num_beams": 2, "max_new_tokens": 3})
    expected = generate(optimized(model), **given)
    monkeypatch.setattr(integration, "BACKENDS", (Backend("cpu", on_triton, lambda call: []),))
    assert generate(optimized(model), **given).sequences.tolist() == expected.sequences.tolist()


def test_explain(interpreter: None) -> None:
    """It says why the GPU's engine does not run here, and what else speaks against it."""
    call = integration.Call("a model", (), "cuda", "float32")
    assert BACKENDS[0].name == "triton" and not BACKENDS[0].why_not(call)
    assert "on cuda" in BACKENDS[1].why_not(call)[0]
    assert "for the CPU" in BACKENDS[0].why_not(call._replace(weight_dtype="int8"))[0]
    assert BACKENDS[0].why_not(call._replace(device="cpu"))
    assert BACKENDS[0].why_not(call._replace(reasons=("a hook",))) == ["a hook"]


def test_a_reason_is_always_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where neither engine runs, as on a GPU without Triton, the log says why."""
    refusing = [
        Backend(name, lambda search, prepared: None, lambda call, name=name: [f"no {name} here"])
        for name in ("triton", "cpu")
    ]
    monkeypatch.setattr(integration, "BACKENDS", (*refusing, BACKENDS[-1]))
    given, _, _ = arguments("bart", {"max_new_tokens": 3})
    generate(optimized("bart"), **given)
    assert "triton: no triton here; cpu: no cpu here" in caplog.text
