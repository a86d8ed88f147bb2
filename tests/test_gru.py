"""ops.gru and nn.GRU: values, gradients, lengths."""

from __future__ import annotations

import pytest
import recurrent_checks as checks
import torch
from conftest import provided, skip_without_native
from helpers import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = ["", "lengths", "packed"]


@pytest.fixture(params=["cuda", "cpu", "triton", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return provided(request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case: Case, dtype: torch.dtype, backend: str) -> None:
    checks.check_forward("gru", case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    checks.check_gradients("gru", case, dtype, backend)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference(case: Case) -> None:
    checks.check_reference("gru", case)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weight_dtype(case: Case, weight_dtype: torch.dtype | str, other_backend: str) -> None:
    checks.check_weight_dtype("gru", case, weight_dtype, other_backend)


@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 12), B=st.integers(1, 20), H=st.integers(1, 40), seed=st.integers(0, 99))
def test_rows(T: int, B: int, H: int, seed: int) -> None:
    skip_without_native()
    checks.check_rows("gru", T, B, H, seed, "cpu", grad=bool(seed % 2))


def test_padding_is_not_read(backend: str) -> None:
    checks.check_padding_is_not_read("gru", backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_keep_their_nan(backend: str, dtype: torch.dtype) -> None:
    checks.check_rows_keep_their_nan("gru", backend, dtype)


@pytest.mark.parametrize("ragged", RAGGED)
def test_op(ragged: str, native: None) -> None:
    checks.check_op("gru", ragged, "cpu")


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("ragged", RAGGED)
def test_op_gradients(ragged: str, name: str) -> None:
    checks.check_op_gradients("gru", ragged, name)


def test_double_backward(backend: str) -> None:
    checks.check_double_backward("gru", backend)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_function(case: Case) -> None:
    if case.ragged == "packed":
        pytest.skip("a function takes packed data and batch_sizes")
    checks.check_function("gru", case)


def test_runs_on(backend: str) -> None:
    checks.check_runs_on("gru", backend)


def test_one_sequence_alone(native: None) -> None:
    checks.check_alone("gru")


def test_sequences_over_threads(native: None) -> None:
    checks.check_apart("gru")
