"""ops.log_softmax_topk: values and classes against float64, ties, infinities, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from encdec_fast import BackendRefused, explain, ops, use_backend
from encdec_fast.ops import log_softmax_topk

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# N, V, k, M: rows, classes, how many are kept, rows of `forbidden` (0: none)
SHAPES = pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 0), (3, 7, 7, 1), (4, 130, 8, 2), (6, 4097, 10, 6), (2, 2048, 64, 1), (0, 5, 2, 0)],
    ids=str,
)


@pytest.fixture(params=["triton", "reference"])
def name(request: pytest.FixtureRequest) -> str:
    """Every backend of this op."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    found: str = request.param
    return found


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int, Tensor | None]:
    """Logits of which some are equal, k, and what is forbidden."""
    N, V, k, M = shape
    logits = (4 * torch.randn(N, V)).round(decimals=1).to(dtype)
    return logits, k, torch.rand(M, V) < 0.3 if M else None


def exactly(logits: Tensor, forbidden: Tensor | None, renormalize: bool) -> tuple[Tensor, Tensor]:
    """All log probabilities in float64, and the sums, each row by itself."""
    rows, sums = [], []
    for i, row in enumerate(logits.double()):
        left = row.clone()
        if forbidden is not None:
            left[forbidden[i * len(forbidden) // len(logits)]] = -torch.inf
        sums.append((left if renormalize else row).logsumexp(0))
        rows.append(left - sums[-1])
    return torch.stack(rows), torch.stack(sums)


@DTYPES
@SHAPES
@pytest.mark.parametrize("renormalize", [False, True])
def test_values(shape: tuple[int, ...], dtype: torch.dtype, renormalize: bool, name: str) -> None:
    """Of float32 sums over V numbers: 1e-6 of the largest; classes exactly, the first of equals."""
    logits, k, forbidden = make(shape, dtype)
    with use_backend(name):
        values, classes, sums = log_softmax_topk(logits, k, forbidden, renormalize=renormalize)
    assert values.shape == classes.shape == (shape[0], k) and sums.shape == (shape[0],)
    assert values.dtype == sums.dtype == torch.float32 and classes.dtype == torch.int64
    if shape[0] == 0:
        return
    exact, exact_sums = exactly(logits, forbidden, renormalize)
    best = exact.sort(stable=True, dim=1, descending=True)
    assert torch.equal(classes, best.indices[:, :k])
    torch.testing.assert_close(values.double(), best.values[:, :k], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-6, atol=2e-6)


def test_large_logits(name: str) -> None:
    """What all logits of a row have in common costs no digits beyond their own."""
    logits = torch.randn(4, 300) + 1e4
    exact, _ = exactly(logits, None, False)
    with use_backend(name):
        values, classes, _ = log_softmax_topk(logits, 3)
    own = logits.double() - logits.double().max(1, keepdim=True).values
    truth = own - own.logsumexp(1, keepdim=True)
    torch.testing.assert_close(exact, truth)
    if name == "triton":  # the reference subtracts the whole sum, which has float32's digits
        torch.testing.assert_close(values.double(), truth.gather(1, classes), rtol=1e-5, atol=1e-5)


def test_infinities(name: str) -> None:
    """-inf has no part; NaN and +inf make the row's sum NaN, and no other's."""
    logits = torch.randn(5, 9)
    logits[0, 2], logits[1] = -torch.inf, -torch.inf
    logits[2, 3], logits[3, 4] = torch.nan, torch.inf
    with use_backend(name):
        values, classes, sums = log_softmax_topk(logits, 9)
        assert sums.isnan().tolist() == [False, False, True, True, False]
        assert values[0, -1] == values[1].max() == -torch.inf and classes[0, -1] == 2
        assert classes.min() == 0 and classes.max() == 8
        torch.testing.assert_close(values[4].exp().sum(), torch.tensor(1.0))
        none = torch.ones(1, 9, dtype=torch.bool)
        for renormalize in (False, True):
            values, classes, _ = log_softmax_topk(logits[4:], 2, none, renormalize=renormalize)
            assert values.tolist() == [[-torch.inf] * 2] and classes.tolist() == [[0, 1]]


def test_zeros_are_equal(name: str) -> None:
    with use_backend(name):
        assert log_softmax_topk(torch.tensor([[-0.0, 0.0, -0.0]]), 3)[1].tolist() == [[0, 1, 2]]


def test_strided_logits(name: str) -> None:
    logits = torch.randn(8, 6).t()
    with use_backend(name):
        found = log_softmax_topk(logits, 2)
        for a, b in zip(found, log_softmax_topk(logits.contiguous(), 2), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients() -> None:
    """By the reference, where one is needed; the kernel has none."""
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    forbidden = torch.zeros(1, 5, dtype=torch.bool)
    forbidden[0, 1] = True
    assert torch.autograd.gradcheck(lambda x: log_softmax_topk(x, 2, forbidden)[0], logits)
    logits = logits.detach().float().requires_grad_()
    assert "gradient" in str(explain(log_softmax_topk, logits, 2))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"logits": torch.randn(5)}, "logits must be"),
    "integers": ({"logits": torch.ones(2, 5, dtype=torch.int64)}, "floating-point"),
    "no k": ({"k": 0}, "k must be from 1 to the 5 classes"),
    "large k": ({"k": 6}, "k must be from 1 to the 5 classes"),
    "bytes": ({"forbidden": torch.zeros(2, 5, dtype=torch.uint8)}, "forbidden must be bool"),
    "device": ({"forbidden": torch.zeros(2, 5, dtype=torch.bool, device="meta")}, "on meta"),
    "classes": ({"forbidden": torch.zeros(2, 4, dtype=torch.bool)}, "forbidden must be"),
    "rows": ({"forbidden": torch.zeros(3, 5, dtype=torch.bool)}, "forbidden must be"),
    "no rows": ({"forbidden": torch.zeros(0, 5, dtype=torch.bool)}, "forbidden must be"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str, name: str) -> None:
    changed, says = BAD[bad]
    given = {"logits": torch.randn(2, 5), "k": 2, **changed}
    with use_backend(name), pytest.raises(RuntimeError, match=says):
        log_softmax_topk(**given)


def test_explain_and_refusals(interpreter: None) -> None:
    logits = torch.randn(2, 300)
    assert explain(log_softmax_topk, logits, 2).backend == "reference"
    with use_backend("triton"):
        assert explain(log_softmax_topk, logits, 2).backend == "triton"
        with pytest.raises(BackendRefused, match="at most 64"):
            log_softmax_topk(logits, 65)
        with pytest.raises(BackendRefused, match="it keeps at most 16, not 17"):
            log_softmax_topk(torch.zeros(1, 2048 * 512), 17)
        with pytest.raises(BackendRefused, match="float64"):
            log_softmax_topk(logits.double(), 2)


def test_op(name: str) -> None:
    logits, k, forbidden = make((4, 9, 3, 2), torch.float32)
    with use_backend(name):
        op = torch.ops.encdec_fast.log_softmax_topk.default
        opcheck(op, (logits, k, forbidden, True))
        opcheck(op, (logits, k, None, False))


def test_compile() -> None:
    logits, k, forbidden = make((4, 9, 3, 2), torch.float32)
    compiled = torch.compile(log_softmax_topk, fullgraph=True)
    for a, b in zip(
        compiled(logits, k, forbidden), log_softmax_topk(logits, k, forbidden), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_offsets_beyond_32_bits(interpreter: None) -> None:
    """Three rows of 2**30 classes, of which the first part of each is looked at."""
    kernels = ops._triton.kernels("log_softmax_topk")
    N, V, k, size = 3, 2**30, 2, 128
    logits = torch.empty(N, V, dtype=torch.bfloat16)
    logits[:, :size] = torch.randn(N, size)
    keys, sums = torch.empty(N, 1, k, dtype=torch.int64), torch.empty(N, 1, 2)
    constants = {"COUNTED": True, "K": k, "CLASSES": size}
    kernels.part_kernel[N, 1](logits, None, keys, sums, V, 1, **constants)
    values, log_sums = torch.empty(N, k), torch.empty(N)
    classes = torch.empty(N, k, dtype=torch.int64)
    held = {"K": k, "PARTS": 1, "KEYS": 32}
    kernels.join_kernel[N,](keys, sums, values, classes, log_sums, 1, **held)
    expected = log_softmax_topk(logits[:, :size].contiguous(), k)
    for found, true in zip((values, classes, log_sums), expected, strict=True):
        torch.testing.assert_close(found, true)
