"""linear on packed weights: the op on every backend, and the module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_as_good, assert_same_gradients, error, poison, two_threads
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.utils import prune

import encdec_fast
from encdec_fast import BackendRefused, explain, use_backend
from encdec_fast.ops import linear
from encdec_fast.ops.linear import reference, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# leading sizes, N, K
SHAPES = {
    "one number": ((1,), 1, 1),
    "one row": ((1,), 40, 33),
    "a vector": ((), 17, 64),
    "odd": ((3, 5), 19, 7),
    "many rows": ((150,), 70, 129),
    "long": ((9,), 33, 1300),
    "wide": ((2, 13), 300, 48),
    "large": ((64,), 512, 512),
}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {},
    "no bias": {"bias": False},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "silu": {"activation": "silu"},
    "residual": {"residual": True},
    "layer norm": {"norm": "layer", "norm_weight": True, "norm_bias": True},
    "plain layer norm": {"norm": "layer", "norm_eps": 1e-2},
    "rms norm": {"norm": "rms", "norm_weight": True},
    "everything": {
        "activation": "silu",
        "residual": True,
        "norm": "rms",
        "norm_weight": True,
        "norm_bias": True,
    },
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(
    shape: tuple[tuple[int, ...], int, int], options: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, the other options) of a call."""
    leading, N, K = shape
    tensors = {"input": torch.randn(*leading, K), "weight": torch.randn(N, K) / K**0.5}
    rest = dict(options)
    sizes = {"bias": (N,), "residual": (*leading, N), "norm_weight": (N,), "norm_bias": (N,)}
    for name, size in sizes.items():
        if rest.pop(name, name == "bias"):
            tensors[name] = torch.randn(size)
    return {name: t.to(dtype) for name, t in tensors.items()}, rest


def cast(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: t.to(dtype, copy=True) for name, t in tensors.items()}


@ALL_SHAPES
@ALL_OPTIONS
@ALL_DTYPES
def test_forward(
    shape: Any, options: dict[str, Any], dtype: torch.dtype, other_backend: str
) -> None:
    tensors, rest = make(shape, options, dtype)
    with torch.no_grad(), two_threads():
        truth = reference(**cast(tensors, torch.float64), **rest)
        with use_backend("torch"):
            theirs = linear(**tensors, **rest)
        with use_backend(other_backend):
            poison()
            found = linear(**tensors, **rest)
    assert_as_good([found], [theirs], [truth], 2.0)


@ALL_OPTIONS
def test_gradients_are_those_of_torch(options: dict[str, Any]) -> None:
    tensors, rest = make(SHAPES["odd"], options, torch.float64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    found = linear(**leaves, **rest)
    expected = reference(**leaves, **rest)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), list(leaves.values())),
        torch.autograd.grad(expected.square().sum(), list(leaves.values())),
    )


@ALL_SHAPES
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
def test_weight_dtype(shape: Any, weight_dtype: Any, native: None) -> None:
    """As good as torch's own product of that kind."""
    tensors, _ = make(shape, {}, torch.float32)
    truth = reference(**cast(tensors, torch.float64))
    with torch.no_grad():
        found = linear(**tensors, weight_dtype=weight_dtype)
        if weight_dtype == torch.bfloat16:
            theirs = reference(**cast(tensors, torch.bfloat16)).float()
        else:
            module = nn.Linear(shape[2], shape[1])
            module.weight.copy_(tensors["weight"])
            module.bias.copy_(tensors["bias"])
            root = nn.Sequential(module)
            quantized = torch.ao.quantization.quantize_dynamic(root, {nn.Linear})
            theirs = quantized(tensors["input"].reshape(-1, shape[2])).view(found.shape)
    assert error(found, truth) <= error(theirs, truth) + 1e-3


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_over_their_range(activation: str, native: None) -> None:
    """Every magnitude, both signs, infinities and NaN."""
    x = torch.cat([torch.logspace(-38, 38, 4001), torch.tensor([0.0, torch.inf])])
    x = torch.cat([x, -x, torch.tensor([torch.nan])]).unsqueeze(1)
    one = torch.ones(1, 1)
    found = linear(x, one, activation=activation)
    truth = reference(x.double(), one.double(), activation=activation)
    # torch's own gelu makes NaN of +infinity: the formula is the judge.
    single = truth.float()
    assert torch.equal(found.isnan(), single.isnan())
    finite = single.isfinite()
    assert torch.equal(found[~finite].nan_to_num(7.0), single[~finite].nan_to_num(7.0))
    off = (found[finite] - truth[finite]).abs()
    assert (off <= 4e-7 * truth[finite].abs() + 4e-7 * x[finite].abs().clamp(max=1)).all()


def test_nan_and_infinity_stay_in_their_row(native: None) -> None:
    tensors, _ = make(((6,), 40, 33), {}, torch.float32)
    for weight_dtype in (None, torch.bfloat16, "int8"):
        clean = linear(**tensors, weight_dtype=weight_dtype)
        for bad in (torch.nan, torch.inf):
            spoiled = {**tensors, "input": tensors["input"].clone()}
            spoiled["input"][2, 5] = bad
            found = linear(**spoiled, weight_dtype=weight_dtype)
            assert not found[2].isfinite().any()
            others = [0, 1, 3, 4, 5]
            assert torch.equal(found[others], clean[others])


def test_the_same_bits_on_any_number_of_threads(native: None) -> None:
    tensors, rest = make(((70,), 200, 100), OPTIONS["everything"], torch.float32)
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(linear(**tensors, **rest))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_rows_do_not_see_each_other(native: None) -> None:
    """A batch gives what its rows give alone, up to the order of a sum."""
    tensors, rest = make(((31,), 96, 200), OPTIONS["everything"], torch.float32)
    together = linear(**tensors, **rest)
    for row in (0, 13, 30):
        own = {**tensors, "input": tensors["input"][row], "residual": tensors["residual"][row]}
        torch.testing.assert_close(linear(**own, **rest), together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [512, 544, 530])
@pytest.mark.parametrize("options", ["bias", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_of_more_than_a_megabyte(
    width: int, options: str, dtype: torch.dtype, native: None
) -> None:
    """They are written past the caches where rows begin lines, and the same as small ones."""
    tensors, rest = make(((1100,), width, 96), OPTIONS[options], dtype)
    with two_threads():
        poison()
        together = linear(**tensors, **rest)
        for first in range(0, 1100, 220):
            own = {
                name: t[first : first + 220] if name in ("input", "residual") else t
                for name, t in tensors.items()
            }
            assert torch.equal(linear(**own, **rest), together[first : first + 220])


def test_layouts(other_backend: str) -> None:
    tensors, _ = make(((4, 6), 20, 24), {"residual": True}, torch.float32)
    odd = {
        "input": tensors["input"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": tensors["weight"].t().contiguous().t(),
        "bias": torch.stack([tensors["bias"]] * 2, dim=1)[:, 0],
        "residual": tensors["residual"][:1].expand(4, -1, -1),
    }
    whole = {name: t.contiguous() for name, t in odd.items()}
    with use_backend(other_backend):
        torch.testing.assert_close(linear(**odd), linear(**whole))
        spread = torch.randn(1, 24).expand(5, 24)
        torch.testing.assert_close(
            linear(spread, odd["weight"]), linear(spread.contiguous(), whole["weight"])
        )


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)], ids=str)
def test_no_rows(leading: tuple[int, ...], other_backend: str) -> None:
    tensors, rest = make((leading, 5, 4), OPTIONS["everything"], torch.float32)
    with use_backend(other_backend):
        assert linear(**tensors, **rest).shape == (*leading, 5)


BAD: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "features": ({"input": torch.randn(3, 5)}, RuntimeError),
    "dtype": ({"input": torch.randn(3, 4).double()}, RuntimeError),
    "integers": ({"input": torch.ones(3, 4, dtype=torch.int64)}, RuntimeError),
    "bias": ({"bias": torch.randn(7)}, RuntimeError),
    "residual": ({"residual": torch.randn(3, 7)}, RuntimeError),
    "norm weight": ({"norm": "layer", "norm_weight": torch.randn(7)}, RuntimeError),
    "device": ({"input": torch.randn(3, 4, device="meta")}, RuntimeError),
    "activation": ({"activation": "tanh"}, ValueError),
    "norm": ({"norm": "batch"}, ValueError),
    "weight dtype": ({"weight_dtype": torch.float16}, ValueError),
}


@pytest.mark.parametrize(("changed", "kind"), BAD.values(), ids=BAD)
def test_bad_input(changed: dict[str, Any], kind: type[Exception]) -> None:
    tensors, _ = make(((3,), 6, 4), {}, torch.float32)
    with pytest.raises(kind):
        linear(**{**tensors, **changed})


def test_weight_dtype_with_a_gradient() -> None:
    module = encdec_fast.nn.Linear(4, 6)
    module.weight_dtype = "int8"
    with pytest.raises(RuntimeError, match="no_grad"):
        module(torch.randn(3, 4))


def test_opcheck() -> None:
    tensors, _ = make(((3,), 6, 4), OPTIONS["everything"], torch.float32)
    names = ("input", "weight", "bias", "residual", "norm_weight", "norm_bias")
    arguments = (*(tensors[name] for name in names), "silu", "rms", 1e-5, "")
    opcheck(torch.ops.encdec_fast.linear, arguments)
    few = {name: t[1:5] for name, t in tensors.items() if name in ("bias", "norm_weight")}
    arguments = (tensors["input"], tensors["weight"], few["bias"], None, few["norm_weight"], None)
    opcheck(torch.ops.encdec_fast.linear, (*arguments, "", "rms", 1e-5, "", [1, 5]))


@pytest.mark.parametrize("weight_dtype", ["", "bfloat16", "int8"])
def test_rows_of_a_weight(weight_dtype: str, other_backend: str) -> None:
    """A product with some rows of a parameter, which are packed once."""
    weight, bias, x = torch.randn(30, 8), torch.randn(13), torch.randn(5, 8)

    def expected() -> Tensor:
        return linear(x, weight[7:20].clone(), bias, weight_dtype=weight_dtype or None)

    with torch.no_grad(), use_backend(other_backend):
        for _ in range(2):
            found = run(x, weight, bias, weight_dtype=weight_dtype, rows=(7, 20))
            torch.testing.assert_close(found, expected())
        weight[9] = 0
        found = run(x, weight, bias, weight_dtype=weight_dtype, rows=(7, 20))
        torch.testing.assert_close(found, expected())
        assert torch.equal(found[:, 2], bias[2].expand(5))


def test_gradients_of_rows() -> None:
    weight = torch.randn(9, 4, requires_grad=True)
    x = torch.randn(3, 4)
    run(x, weight, None, rows=(2, 5)).sum().backward()
    expected = torch.zeros(9, 4)
    expected[2:5] = x.sum(0)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad: bool) -> None:
    module = nn.Sequential(encdec_fast.nn.Linear(5, 7), nn.ReLU(), encdec_fast.nn.Linear(7, 3))
    x = torch.randn(4, 5, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected = module(x)
        found = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    if grad:
        assert_same_gradients(found, expected, module, [x])


def test_export_with_dynamic_rows() -> None:
    module = encdec_fast.nn.Linear(5, 7)
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        exported = torch.export.export(module, (torch.randn(4, 5),), dynamic_shapes=({0: rows},))
        x = torch.randn(9, 5)
        torch.testing.assert_close(exported.module()(x), module(x))


def test_explain(native: None) -> None:
    module = encdec_fast.nn.Linear(5, 7)
    x = torch.randn(4, 5)
    with torch.no_grad():
        assert explain(module, x).backend == "cpu"
        assert "M=4 N=7 K=5" in str(explain(module, x))
    assert explain(module, x).backend == "torch"
    assert "gradient" in explain(module, x).reasons["cpu"][0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert explain(module, x).backend == "torch"
        assert module(x).dtype == torch.bfloat16


def test_module_is_a_drop_in() -> None:
    torch.manual_seed(3)
    theirs = nn.Linear(5, 7)
    torch.manual_seed(3)
    ours = encdec_fast.nn.Linear(5, 7)
    assert isinstance(ours, nn.Linear)
    for (name, a), (other, b) in zip(
        theirs.state_dict().items(), ours.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    x = torch.randn(3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))


def change_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


def change_data(weight: Tensor) -> None:
    weight.data.add_(1)


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data + 1


def step(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


@pytest.mark.parametrize("change", [change_in_place, change_data, replace_data, step])
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_a_changed_weight_is_never_stale(change: Any, weight_dtype: Any, native: None) -> None:
    module = encdec_fast.nn.Linear(40, 70)
    module.weight_dtype = weight_dtype
    x = torch.randn(3, 40)
    with torch.no_grad():
        before = module(x)
    change(module.weight)
    with torch.no_grad():
        after = module(x)
        fresh = copy.deepcopy(module)(x)
    assert not torch.allclose(before, after)
    assert torch.equal(after, fresh)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_parameters_that_lie_elsewhere(part: str, native: None) -> None:
    """Pruning keeps a parameter by another name, and what is left of it as an attribute."""
    module, plain = encdec_fast.nn.Linear(40, 30), nn.Linear(40, 30)
    plain.load_state_dict(module.state_dict())
    for own in (module, plain):
        prune.l1_unstructured(own, part, amount=0.5)
    x = torch.randn(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(x))


def test_optimize_swaps_it() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    expected = model(x)
    assert encdec_fast.optimize(model) is model
    assert type(model[0]) is encdec_fast.nn.Linear
    torch.testing.assert_close(model(x), expected)
    encdec_fast.restore(model)
    assert type(model[0]) is nn.Linear


# Training.

TRAINED = {
    "plain": ((150,), 130, 140),
    "leading sizes": ((3, 50), 129, 145),
    "large": ((4, 300), 256, 192),
}


@pytest.mark.parametrize("shape", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("options", [{}, {"bias": False}, OPTIONS["everything"]], ids=str)
def test_gradients_of_large_products(shape: Any, options: dict[str, Any], native: None) -> None:
    tensors, others = make(shape, options, torch.float32)

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        own = {n: t.detach().to(dtype, copy=True).requires_grad_() for n, t in tensors.items()}
        y = function(**own, **others)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [y.detach(), *torch.autograd.grad((y * seed).sum(), list(own.values()))]

    with two_threads(), use_backend("cpu"):
        poison()
        found = gradients(linear, torch.float32)
    theirs, truth = gradients(reference, torch.float32), gradients(reference, torch.float64)
    assert_as_good(found, theirs, truth, 3.0)


def test_what_trains_where(native: None) -> None:
    x = torch.randn(200, 128, requires_grad=True)
    module = encdec_fast.nn.Linear(128, 128)
    assert explain(module, x).backend == "cpu"
    assert "_Product" in str(module(x).grad_fn)
    assert explain(module, x[:8]).backend == "torch"
    for dtype in (torch.float64, torch.bfloat16):
        assert explain(module.to(dtype), x.to(dtype)).backend == "torch"


def test_double_backward_of_a_large_product(native: None) -> None:
    leaves = [torch.randn(n, requires_grad=True) for n in ((130, 128), (129, 128), (129,))]

    def second(function: Any) -> list[Tensor]:
        (y,) = (function(*leaves),)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    with use_backend("cpu"):
        found = second(linear)
    for a, b in zip(found, second(nn.functional.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-1)


def test_gradients_that_are_not_asked_for(native: None) -> None:
    x, w, b = torch.randn(200, 128), torch.randn(140, 128), torch.randn(140)
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        for tensor, flag in zip((x, w, b), wanted, strict=True):
            tensor.requires_grad_(flag)
        leaf = (x, w, b)[wanted.index(True)]
        (found,) = torch.autograd.grad(linear(x, w, b).square().sum(), leaf)
        (expected,) = torch.autograd.grad(nn.functional.linear(x, w, b).square().sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


FOLLOWED = {
    name: options for name, options in OPTIONS.items() if {"activation", "norm"} & {*options}
}
SMALL = {name: SHAPES[name] for name in ("one number", "one row", "a vector", "odd", "many rows")}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("options", FOLLOWED.values(), ids=FOLLOWED)
@ALL_DTYPES
def test_triton(shape: Any, options: dict[str, Any], dtype: torch.dtype, interpreter: None) -> None:
    """What follows the product, and its gradients, by Triton's kernels."""
    tensors, rest = make(shape, options, dtype)
    seed = torch.randn(*shape[0], shape[1])

    def run_in(dtype: torch.dtype) -> list[Tensor]:
        own = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        result = linear(**own, **rest)
        assert result.dtype == dtype
        loss = (result * seed.to(dtype)).sum()
        return [result.detach(), *torch.autograd.grad(loss, list(own.values()))]

    with use_backend("torch"):
        theirs, truth = run_in(dtype), run_in(torch.float64)
    with use_backend("triton"):
        poison()
        found = run_in(dtype)
    # Where the sum is near zero, rounding decides on which side of relu's edge a number is.
    edge = options.get("activation") == "relu" and dtype != torch.float32
    assert_as_good(found, theirs, truth, 3.0, mean=edge)


def test_triton_twice(interpreter: None) -> None:
    """The gradients can be differentiated, and a part of the tensors may need none."""
    tensors, rest = make(SHAPES["odd"], OPTIONS["everything"], torch.float32)

    def twice(**own: Tensor) -> list[Tensor]:
        leaves = [t for t in own.values() if t.requires_grad]
        (first,) = torch.autograd.grad(
            linear(**own, **rest).pow(3).sum(), [own["input"]], create_graph=True
        )
        return list(torch.autograd.grad(first.square().sum(), leaves))

    for frozen in ((), ("bias", "norm_weight"), ("residual",)):
        own = {n: t.clone().requires_grad_(n not in frozen) for n, t in tensors.items()}
        wide = {n: t.detach().double().requires_grad_(n not in frozen) for n, t in own.items()}
        with use_backend("triton"):
            found = twice(**own)
        with use_backend("reference"):
            truth = twice(**wide)
        for one, other in zip(found, truth, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_triton_refuses(interpreter: None) -> None:
    """What it has no kernel for, in words."""
    tensors, _ = make(SHAPES["odd"], {}, torch.float32)
    wide = torch.randn(2049, 7)
    calls: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "nothing follows": (tensors, {}),
        "held in int8": (tensors, {"activation": "relu", "weight_dtype": "int8"}),
        "2048 features": ({"input": tensors["input"], "weight": wide}, {"norm": "rms"}),
    }
    for reason, (given, rest) in calls.items():
        with torch.no_grad(), use_backend("triton"), pytest.raises(BackendRefused, match=reason):
            linear(**given, **rest)
    with torch.no_grad(), use_backend("triton"):
        linear(tensors["input"], wide, activation="relu")
        assert explain(linear, **tensors, activation="relu").backend == "triton"


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_gradcheck(activation: str | None, norm: str | None) -> None:
    shapes = (3, 4), (5, 4), (5,), (3, 5), (5,), (5,)  # input, weight, bias, residual, a norm's two
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if norm is None:
        given = given[:4]

    def function(
        input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *own: Tensor
    ) -> Tensor:
        scale, shift = own or (None, None)
        options: dict[str, Any] = {"activation": activation, "norm": norm, "residual": residual}
        return linear(input, weight, bias, **options, norm_weight=scale, norm_bias=shift)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)
