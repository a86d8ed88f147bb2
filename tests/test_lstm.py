"""ops.lstm and nn.LSTM: values, gradients, lengths, cell states, projections."""

from __future__ import annotations

from typing import Any

import pytest
import recurrent_checks as checks
import torch
from conftest import provided, skip_without_native
from helpers import CASES, PROJECTED, Case, call, make_data, make_modules, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_packed_sequence

import encdec_fast
from encdec_fast import use_backend
from encdec_fast.ops import _recurrent_cuda

ALL = {**CASES, **PROJECTED}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = ["", "lengths", "packed"]


@pytest.fixture(params=["cuda", "cpu", "triton", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return provided(request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_forward(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend in ("cuda", "triton") and case in PROJECTED.values():
        with pytest.raises(encdec_fast.BackendRefused, match="proj_size"):
            checks.check_forward("lstm", case, dtype, backend)
        return
    checks.check_forward("lstm", case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    checks.check_gradients("lstm", case, dtype, backend)


@pytest.mark.parametrize("case", PROJECTED.values(), ids=PROJECTED)
def test_gradients_of_projections(case: Case) -> None:
    checks.check_gradients("lstm", case, torch.float32, "torch")


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_reference(case: Case) -> None:
    checks.check_reference("lstm", case)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_weight_dtype(case: Case, weight_dtype: torch.dtype | str, other_backend: str) -> None:
    checks.check_weight_dtype("lstm", case, weight_dtype, other_backend)


@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 12), B=st.integers(1, 20), H=st.integers(1, 40), seed=st.integers(0, 99))
def test_rows(T: int, B: int, H: int, seed: int) -> None:
    skip_without_native()
    checks.check_rows("lstm", T, B, H, seed, "cpu", grad=bool(seed % 2))


def test_padding_is_not_read(backend: str) -> None:
    checks.check_padding_is_not_read("lstm", backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_keep_their_nan(backend: str, dtype: torch.dtype) -> None:
    checks.check_rows_keep_their_nan("lstm", backend, dtype)


@pytest.mark.parametrize("ragged", RAGGED)
def test_op(ragged: str, native: None) -> None:
    checks.check_op("lstm", ragged, "cpu")


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("ragged", RAGGED)
def test_op_gradients(ragged: str, name: str) -> None:
    checks.check_op_gradients("lstm", ragged, name)


def test_double_backward(backend: str) -> None:
    checks.check_double_backward("lstm", backend)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_function(case: Case) -> None:
    if case.ragged == "packed":
        pytest.skip("a function takes packed data and batch_sizes")
    checks.check_function("lstm", case)


def test_runs_on(backend: str) -> None:
    checks.check_runs_on("lstm", backend)


def test_one_sequence_alone(native: None) -> None:
    checks.check_alone("lstm")


def test_sequences_over_threads(native: None) -> None:
    checks.check_apart("lstm")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["plain", "everything", "lengths, everything", "packed"])
def test_cell_states(name: str, grad: bool, backend: str) -> None:
    """Every c_t is the c_n of the sequence that ends there."""
    if backend == "torch":
        pytest.skip("torch's kernel does not return the cell states")
    case = CASES[name]
    _, _, module = make_modules("lstm", case, torch.float32)
    data = make_data("lstm", case, torch.float32)
    last = module.num_layers - 1
    with use_backend(backend), torch.set_grad_enabled(grad):
        poison()
        if case.ragged == "packed":
            sequence = torch.nn.utils.rnn.pack_padded_sequence(
                data.input, data.lengths, enforce_sorted=False
            )
            output, (_, c_n), cells = module(sequence, data.hx, return_cell_states=True)
            cells, _ = pad_packed_sequence(cells, total_length=case.T)
            output, _ = pad_packed_sequence(output, total_length=case.T)
        else:
            output, (_h_n, c_n), cells = module(
                data.input, data.hx, lengths=data.lengths, return_cell_states=True
            )
        plain = call(module, case, data)
    assert torch.equal(output, plain[0])
    assert torch.equal(c_n, plain[2])
    if case.batch_first:
        cells = cells.transpose(0, 1)
    lengths = [case.T] * case.B if data.lengths is None else data.lengths.tolist()
    directions = 2 if module.bidirectional else 1
    for row, steps in enumerate(lengths):
        first = c_n[last * directions, row]
        assert torch.equal(cells[steps - 1, row, : case.H], first)
        if directions == 2:
            assert torch.equal(cells[0, row, case.H :], c_n[-1, row])
        assert not cells[steps:, row].any()


def test_gradient_through_cell_states(backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch's kernel does not return the cell states")
    found = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        torch.manual_seed(1)
        module = encdec_fast.nn.LSTM(3, 5, bidirectional=True).to(dtype)
        x = torch.randn(4, 2, 3).to(dtype).requires_grad_()
        with use_backend(name):
            _, _, cells = module(x, return_cell_states=True)
            found.append(torch.autograd.grad(cells.square().sum(), [x, *module.parameters()]))
    for exact, result in zip(*found, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


def test_cell_states_where_only_torch_can_run() -> None:
    """float64 with cell states: neither the cpu backend nor torch's kernel; the reference."""
    module = encdec_fast.nn.LSTM(3, 5).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    explanation = encdec_fast.explain(module, x, return_cell_states=True)
    assert explanation.backend == "reference"
    assert "cell states" in str(explanation)
    assert module(x, return_cell_states=True)[2].shape == (4, 2, 5)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["layers", "lengths", "packed"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_layers_that_share_a_launch(
    kind: str, name: str, batch_first: bool, cuda_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers in one launch of the cuda backend, beside the reference in float64."""
    limits = _recurrent_cuda.ON_CPU._replace(processors=30)
    monkeypatch.setattr(_recurrent_cuda, "limits", lambda device: limits)
    launches: list[int] = []
    run = _recurrent_cuda.run

    def watched(*args: Any) -> Any:
        launches.append(len(args[-1]))
        return run(*args)

    monkeypatch.setattr(_recurrent_cuda, "run", watched)
    words = {"num_layers": 3, "batch_first": batch_first}
    ragged = "" if name == "layers" else name
    case = Case(T=6, B=5, I=9, H=33, ragged=ragged, states=True, options=words)
    if not ragged:
        module = make_modules(kind, case, torch.float32)[2].requires_grad_(False)
        with use_backend("cuda"):
            shape = (5, 6, 9) if batch_first else (6, 5, 9)
            said = str(encdec_fast.explain(module, torch.randn(shape)))
        assert "3 layers at once" in said
    checks.check_forward(kind, case, torch.float32, "cuda")
    assert launches == [2]
