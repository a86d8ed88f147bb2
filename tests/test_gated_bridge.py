"""The gated bridge: the op on every backend."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from helpers import assert_as_good, error, poison, two_threads
from hypothesis import strategies
from torch import Tensor
from torch.library import opcheck

from encdec_fast import explain, use_backend
from encdec_fast.backends import BackendRefused
from encdec_fast.ops import gated_bridge
from encdec_fast.ops.gated_bridge import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# leading sizes, H, C
SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "one number": ((1,), 1, 1),
    "a vector": ((), 17, 5),
    "one row": ((1,), 40, 33),
    "odd": ((3, 5), 19, 7),
    "many rows": ((150,), 70, 129),
    "layers": ((2, 9), 33, 64),
    "long": ((6,), 31, 1300),
    "large": ((64,), 256, 512),
}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Shape = tuple[tuple[int, ...], int, int]


@pytest.fixture(params=["cpu", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "reference":
        request.getfixturevalue({"cpu": "native", "triton": "interpreter"}[request.param])
    name: str = request.param
    return name


def small_enough(backend: str, shape: Shape) -> None:
    """Triton's interpreter takes a second for what a kernel does in a microsecond."""
    if backend == "triton" and shape in (SHAPES["large"], SHAPES["long"]):
        pytest.skip("too large for Triton's interpreter")


def make(
    shape: Shape, dtype: torch.dtype = torch.float32, *, bias: bool = True, grad: bool = False
) -> dict[str, Tensor]:
    """The op's tensors."""
    leading, H, C = shape
    tensors = {
        "state": torch.randn(*leading, H),
        "context": torch.randn(*leading, C),
        "gate_weight": torch.randn(H, H + C) / (H + C) ** 0.5,
        "context_weight": torch.randn(H, C) / C**0.5,
    }
    if bias:
        tensors["gate_bias"] = torch.randn(H)
    return {name: t.to(dtype).requires_grad_(grad) for name, t in tensors.items()}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }


@ALL_SHAPES
@ALL_DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_forward(shape: Shape, dtype: torch.dtype, bias: bool, backend: str) -> None:
    small_enough(backend, shape)
    given = make(shape, dtype, bias=bias)
    with torch.no_grad(), two_threads():
        truth, theirs = reference(**cast(given, torch.float64)), reference(**given)
        with use_backend(backend):
            poison()
            found = gated_bridge(**given)
    assert_as_good([found], [theirs], [truth], 2.0)


def gradients(function: Any, given: dict[str, Tensor], seed: Tensor) -> list[Tensor]:
    result = function(**given)
    return [result, *torch.autograd.grad((result * seed).sum(), list(given.values()))]


@ALL_SHAPES
@ALL_DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(shape: Shape, dtype: torch.dtype, bias: bool, backend: str) -> None:
    small_enough(backend, shape)
    given = make(shape, dtype, bias=bias, grad=True)
    seed = torch.randn_like(given["state"])
    truth = gradients(reference, cast(given, torch.float64), seed.double())
    theirs = gradients(reference, cast(given, dtype), seed)
    with use_backend(backend), two_threads():
        poison()
        found = gradients(gated_bridge, given, seed)
    assert_as_good(found, theirs, truth, 3.0)


@ALL_SHAPES
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
def test_weight_dtype(shape: Shape, weight_dtype: Any, backend: str) -> None:
    """As good as the rounded weights allow; int8 rounds each state and context as well."""
    given = make(shape)
    if backend == "triton":
        with torch.no_grad(), use_backend(backend), pytest.raises(BackendRefused, match="held in"):
            gated_bridge(**given, weight_dtype=weight_dtype)
        return
    truth = reference(**cast(given, torch.float64))
    with torch.no_grad(), use_backend("reference"):
        rounded = gated_bridge(**given, weight_dtype=weight_dtype)
    with torch.no_grad(), use_backend(backend), two_threads():
        found = gated_bridge(**given, weight_dtype=weight_dtype)
    # The kernel rounds the rows too: each product has as much error again.
    assert error(found, truth) <= 2 * error(rounded, truth) + 0.01
    assert error(found, truth, mean=True) <= 2 * error(rounded, truth, mean=True) + 0.003


def test_gates_that_saturate(native: None) -> None:
    given = make(((4,), 20, 12))
    for scale in (30.0, 1e3, 1e30):
        large = {**given, "gate_weight": given["gate_weight"] * scale}
        large["context_weight"] = given["context_weight"] * scale
        found, truth = gated_bridge(**large), reference(**cast(large, torch.float64))
        assert_as_good([found], [reference(**large)], [truth], 2.0)


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("name", ["state", "context"])
def test_nan_stays_in_its_row(weight_dtype: Any, name: str, native: None) -> None:
    given = make(((6,), 40, 33))
    clean = gated_bridge(**given, weight_dtype=weight_dtype)
    spoiled = {**given, name: given[name].clone()}
    spoiled[name][2, 5] = torch.nan
    found = gated_bridge(**spoiled, weight_dtype=weight_dtype)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], clean[others])


def test_the_same_bits_on_any_number_of_threads(native: None) -> None:
    for shape in (((70,), 200, 100), ((3,), 300, 500), ((500,), 65, 64)):
        given, found = make(shape, grad=True), []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append([gated_bridge(**given), gated_bridge(**given, weight_dtype="int8")])
            found[-1].append(gated_bridge(**given))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@hypothesis.given(
    rows=strategies.integers(0, 70),
    H=strategies.integers(1, 90),
    C=strategies.integers(1, 90),
    seed=strategies.integers(0, 2**31),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_rows_do_not_see_each_other(rows: int, H: int, C: int, seed: int) -> None:
    """A batch gives what its rows give alone, up to the order of a sum."""
    torch.manual_seed(seed)
    given = make(((rows,), H, C))
    together = gated_bridge(**given)
    for row in range(0, rows, 7):
        own = {**given, "state": given["state"][row], "context": given["context"][row]}
        torch.testing.assert_close(gated_bridge(**own), together[row], rtol=1e-5, atol=1e-5)


def test_layouts(backend: str) -> None:
    given = make(((4, 6), 20, 24))
    odd = {
        "state": given["state"].transpose(0, 1).contiguous().transpose(0, 1),
        "context": given["context"][:1].expand(4, -1, -1),
        "gate_weight": given["gate_weight"].t().contiguous().t(),
        "context_weight": torch.cat([given["context_weight"]] * 2, dim=1)[:, 24:],
        "gate_bias": torch.stack([given["gate_bias"]] * 2, dim=1)[:, 0],
    }
    whole = {name: t.contiguous() for name, t in odd.items()}
    seed = torch.randn(1, 1, 20).expand(4, 6, 20)
    with use_backend(backend):
        torch.testing.assert_close(gated_bridge(**odd), gated_bridge(**whole))
        found = gradients(gated_bridge, {n: t.requires_grad_() for n, t in odd.items()}, seed)
    expected = gradients(reference, {n: t.requires_grad_() for n, t in whole.items()}, seed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)], ids=str)
def test_no_rows(leading: tuple[int, ...], backend: str) -> None:
    given = make((leading, 5, 4), grad=True)
    with use_backend(backend):
        with torch.no_grad():
            assert gated_bridge(**given).shape == (*leading, 5)
        result = gated_bridge(**given)
    assert result.shape == (*leading, 5)
    assert not any(g.any() for g in torch.autograd.grad(result.sum(), list(given.values())))


def test_gradcheck() -> None:
    for bias in (True, False):
        given = make(((2, 2), 3, 2), torch.float64, bias=bias, grad=True)
        assert torch.autograd.gradcheck(gated_bridge, tuple(given.values()))
        assert torch.autograd.gradgradcheck(gated_bridge, tuple(given.values()))


def test_double_backward(backend: str) -> None:
    given = make(((4,), 9, 6), grad=True)

    def second(function: Any) -> list[Tensor]:
        first = torch.autograd.grad(
            function(**given).square().sum(), list(given.values()), create_graph=True
        )
        total = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(total, list(given.values())))

    with use_backend(backend):
        found = second(gated_bridge)
    torch.testing.assert_close(found, second(reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(bias: bool, grad: bool) -> None:
    tensors = list(make(((3,), 6, 4), bias=bias, grad=grad).values())
    arguments = (*tensors, *([] if bias else [None]), "")
    ops = torch.ops.encdec_fast
    opcheck(ops.gated_bridge_train if grad else ops.gated_bridge, arguments)


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad: bool) -> None:
    given = make(((3, 4), 6, 5), grad=grad)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(gated_bridge, fullgraph=True, backend="aot_eager")
        found, expected = compiled(**given), gated_bridge(**given)
    torch.testing.assert_close(found, expected)
    if grad:
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), list(given.values())),
            torch.autograd.grad(expected.square().sum(), list(given.values())),
        )


def test_vmap_and_forward_mode() -> None:
    given = make(((3,), 6, 4))
    state, rest = given.pop("state"), given
    many = torch.randn(5, *state.shape)
    found = torch.func.vmap(lambda s: gated_bridge(s, **rest))(many)
    for one, s in zip(found, many, strict=True):
        torch.testing.assert_close(one, gated_bridge(s, **rest))
    one = torch.ones_like(state)
    _, slope = torch.func.jvp(lambda s: gated_bridge(s, **rest), (state,), (one,))
    _, expected = torch.func.jvp(lambda s: reference(s, **rest), (state,), (one,))
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    given = make(((3,), 6, 4), grad=grad)
    with torch.autocast("cpu", torch.bfloat16):
        result = gated_bridge(**given)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), gated_bridge(**given), rtol=0.05, atol=0.05)
    if grad:
        grads = torch.autograd.grad(result.float().sum(), list(given.values()))
        assert all(g.dtype == torch.float32 for g in grads)


def test_explain(native: None) -> None:
    given = make(((2, 3), 6, 4))
    found = explain(gated_bridge, **given)
    assert found.backend == "cpu"
    assert "M=6 H=6 C=4" in str(found)
    assert "inference" in str(found)
    double = explain(gated_bridge, **cast(given, torch.float64))
    assert double.backend == "reference"
    assert "float64" in double.reasons["cpu"][0]
    training = explain(gated_bridge, **make(((2,), 6, 4), grad=True))
    assert training.backend == "cpu"
    assert "training" in str(training)
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(gated_bridge, **given).backend == "reference"


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number": ({"state": torch.tensor(1.0)}, RuntimeError, "state must have features"),
    "no features": ({"context": torch.randn(3, 0)}, RuntimeError, "context must have features"),
    "rows": ({"context": torch.randn(2, 4)}, RuntimeError, "context must have shape"),
    "dimensions": ({"context": torch.randn(4)}, RuntimeError, "context must have shape"),
    "gate": ({"gate_weight": torch.randn(6, 9)}, RuntimeError, "gate_weight must have shape"),
    "gate rank": ({"gate_weight": torch.randn(60)}, RuntimeError, "gate_weight must have shape"),
    "candidate": (
        {"context_weight": torch.randn(4, 6)},
        RuntimeError,
        r"context_weight must have shape \(6, 4\)",
    ),
    "bias": ({"gate_bias": torch.randn(7)}, RuntimeError, "gate_bias must have shape"),
    "dtype": ({"context": torch.randn(3, 4).double()}, RuntimeError, "must be torch.float32"),
    "weight in another dtype": (
        {"gate_weight": torch.randn(6, 10).bfloat16()},
        RuntimeError,
        "gate_weight must be torch.float32",
    ),
    "device": ({"context": torch.randn(3, 4, device="meta")}, RuntimeError, "on cpu"),
    "integers": ({"state": torch.ones(3, 6, dtype=torch.int64)}, RuntimeError, "floating-point"),
    "weight dtype": ({"weight_dtype": torch.float16}, ValueError, "weight_dtype must be"),
}


@pytest.mark.parametrize(("changed", "kind", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(
    changed: dict[str, Any], kind: type[Exception], message: str, grad: bool
) -> None:
    given = make(((3,), 6, 4), grad=grad)
    with pytest.raises(kind, match=message):
        gated_bridge(**{**given, **changed})


def test_weight_dtype_with_a_gradient() -> None:
    with pytest.raises(RuntimeError, match="no_grad"):
        gated_bridge(**make(((3,), 6, 4), grad=True), weight_dtype="int8")


def change_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


def change_data(weight: Tensor) -> None:
    weight.data.add_(1)


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data + 1


@pytest.mark.parametrize("change", [change_in_place, change_data, replace_data])
@pytest.mark.parametrize("name", ["gate_weight", "context_weight", "gate_bias"])
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_a_changed_weight_is_never_stale(
    change: Any, name: str, weight_dtype: Any, native: None
) -> None:
    given = make(((3,), 40, 20))
    before = gated_bridge(**given, weight_dtype=weight_dtype)
    change(given[name])
    after = gated_bridge(**given, weight_dtype=weight_dtype)
    fresh = gated_bridge(**cast(given, torch.float32), weight_dtype=weight_dtype)
    assert not torch.allclose(before, after)
    assert torch.equal(after, fresh)


def test_a_pack_of_something_else_is_refused(native: None) -> None:
    given = make(((3,), 6, 4))
    forward = torch.ops.encdec_fast_cpu.bridge_forward
    for block in (torch.zeros(8, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="not the packed weights"):
            forward(*list(given.values())[:4], block, None, False)
    pack = torch.ops.encdec_fast_cpu.bridge_pack
    for gate in (torch.randn(6, 9), torch.randn(6), torch.randn(6, 10).bfloat16()):
        with pytest.raises(RuntimeError, match="gate_weight must be"):
            pack(gate, given["context_weight"], 0)
