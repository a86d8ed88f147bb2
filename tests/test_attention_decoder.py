"""The attention decoder over a known target: the op on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_as_good, poison, two_threads
from test_additive_attention import bound as additive_bound
from torch import Tensor
from torch.library import opcheck

from encdec_fast import explain, use_backend
from encdec_fast.ops import attention_decoder
from encdec_fast.ops.attention_decoder import GATES, reference

DTYPES = [torch.float32, torch.bfloat16]
# B, T, S, I, H, A, M
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 1, 1),
    "even": (2, 3, 4, 2, 6, 4, 8),
    "odd": (3, 4, 7, 5, 19, 11, 13),
    "one sentence": (1, 6, 30, 16, 32, 24, 20),
    "larger": (5, 9, 50, 33, 70, 48, 66),
    "whole blocks": (5, 4, 9, 20, 64, 32, 32),
    "long": (2, 40, 20, 16, 34, 32, 16),
}
CELLS = pytest.mark.parametrize("cell", ["lstm", "gru"])
KINDS = ("additive", "general", "dot", "output", "coverage", "location", "location over all")
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(
    shape: tuple[int, ...], cell: str, kind: str, dtype: torch.dtype, grad: bool = False
) -> dict[str, Any]:
    """The op's arguments."""
    B, T, S, I, H, A, M = shape
    located = kind.startswith("location")
    A = H if kind == "dot" else max(A, S) if located else A
    F = M + 3 if kind == "output" else M
    G = GATES[cell]
    sizes = {
        "input": (B, T, I),
        "h0": (B, H),
        "c0": (B, H),
        "context0": (B, F),
        "keys": (B, S, A),
        "values": (B, S, M),
        "weight_ih": (G * H, I + F),
        "weight_hh": (G * H, H),
        "bias_ih": (G * H,),
        "bias_hh": (G * H,),
        "query_weight": (A, H),
        "score_weight": (A,),
        "positions": (B, T, A),
        "output_weight": (F, M + H),
        "coverage": (B, S),
        "coverage_weight": (A,),
    }
    given: dict[str, Any] = {}
    for name, size in sizes.items():
        scale = size[-1] ** -0.5 if "weight" in name and name != "score_weight" else 1.0
        given[name] = (torch.randn(size) * scale).to(dtype).requires_grad_(grad)
    if cell == "gru":
        given["c0"] = None
    if kind == "dot":
        del given["query_weight"]
    if kind != "coverage":
        del given["coverage"], given["coverage_weight"]
    if kind not in ("additive", "coverage"):
        del given["score_weight"]
        given["scale"] = 0.4
    if kind != "output":
        del given["output_weight"]
    if located:
        given["keys"] = None
        given["context0"].requires_grad_(False)  # nothing reads it
    else:
        del given["positions"]
    lengths = torch.randint(0, S + 1, (B,))
    lengths[-1] = S
    given["memory_lengths"] = None if kind == "location over all" else lengths
    return {**given, "cell": cell}


def bound(given: dict[str, Any]) -> float:
    """What the stated error of tanh makes of the weights (test_additive_attention.py)."""
    return additive_bound(given) if "score_weight" in given else 0.0


def copy(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for name, t in given.items()
    }


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]


def gradients(results: Any, given: dict[str, Any], seeds: list[Tensor]) -> list[Tensor]:
    total = sum((r * s.to(r.dtype)).sum() for r, s in zip(results, seeds, strict=True))
    return list(torch.autograd.grad(total, leaves(given)))


@ALL_SHAPES
@CELLS
@ALL_KINDS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_forward(shape: Any, cell: str, kind: str, dtype: torch.dtype, native: None) -> None:
    given = make(shape, cell, kind, dtype)
    with torch.no_grad(), two_threads():
        truth, theirs = reference(**copy(given, torch.float64)), reference(**given)
        with use_backend("cpu"):
            poison()
            found = attention_decoder(**given, need_weights=True)
            output, c_n = attention_decoder(**given)
    assert torch.equal(output, found[0]) and torch.equal(c_n, found[1])
    assert_as_good(list(found), list(theirs), list(truth), 2.0, relative=bound(given))


@ALL_SHAPES
@CELLS
@ALL_KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(shape: Any, cell: str, kind: str, dtype: torch.dtype, native: None) -> None:
    given = make(shape, cell, kind, dtype, grad=True)
    theirs, truth = copy(given, dtype), copy(given, torch.float64)
    expected, exact = reference(**theirs), reference(**truth)
    seeds = [torch.randn(result.shape) for result in exact]
    with two_threads(), use_backend("cpu"):
        poison()
        found = attention_decoder(**given, need_weights=True)
        ours = gradients(found, given, seeds)
    assert_as_good(
        ours,
        gradients(expected, theirs, seeds),
        gradients(exact, truth, seeds),
        3.0,
        relative=bound(given),
    )


@CELLS
@ALL_KINDS
@pytest.mark.parametrize("part", [0, 1, 2])
def test_gradient_of_one_result(cell: str, kind: str, part: int, native: None) -> None:
    if cell == "gru" and part == 1:
        pytest.skip("a GRU has no c")
    given = make(SHAPES["odd"], cell, kind, torch.float32, grad=True)
    truth = copy(given, torch.float64)
    seed = torch.randn(reference(**truth)[part].shape)
    found = attention_decoder(**given, need_weights=True)[part]
    exact = reference(**truth)[part]
    for a, b in zip(
        torch.autograd.grad((found * seed).sum(), leaves(given), allow_unused=True),
        torch.autograd.grad((exact * seed).sum(), leaves(truth), allow_unused=True),
        strict=True,
    ):
        b = torch.zeros(()) if b is None else b
        torch.testing.assert_close(a.double(), b.double().expand(a.shape), rtol=1e-4, atol=1e-5)


def test_numbers_too_large_for_factors(native: None) -> None:
    """Keys and queries beyond the range of e^2q e^2k: the sum takes the product's place."""
    given = make(SHAPES["larger"], "lstm", "additive", torch.float32, grad=True)
    with torch.no_grad():
        given["keys"][1] *= 40
        given["query_weight"] *= 60
    theirs, truth = copy(given, torch.float32), copy(given, torch.float64)
    found = attention_decoder(**given, need_weights=True)
    expected, exact = reference(**theirs), reference(**truth)
    assert_as_good(list(found), list(expected), list(exact), 2.0, relative=bound(given))
    seeds = [torch.randn(result.shape) for result in exact]
    assert_as_good(
        gradients(found, given, seeds),
        gradients(expected, theirs, seeds),
        gradients(exact, truth, seeds),
        3.0,
        relative=bound(given),
    )


@CELLS
@ALL_KINDS
def test_gradcheck(cell: str, kind: str) -> None:
    given = make((2, 3, 4, 2, 3, 3, 2), cell, kind, torch.float64, grad=True)
    names = [name for name, t in given.items() if isinstance(t, Tensor) and t.requires_grad]

    def function(*tensors: Tensor) -> Any:
        named = {**given, **dict(zip(names, tensors, strict=True))}
        found = attention_decoder(**named, need_weights=True)
        return found if cell == "lstm" else found[::2]

    assert torch.autograd.gradcheck(function, leaves(given))
    assert torch.autograd.gradgradcheck(function, leaves(given))


@CELLS
def test_double_backward(cell: str, native: None) -> None:
    given = make(SHAPES["even"], cell, "additive", torch.float32, grad=True)

    def second(call: Any) -> list[Tensor]:
        first = torch.autograd.grad(
            sum(r.square().sum() for r in call(**given)[:2]), leaves(given), create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves(given)))

    for a, b in zip(second(attention_decoder), second(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@CELLS
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["additive", "dot", "output", "coverage", "location"])
def test_opcheck(cell: str, grad: bool, kind: str) -> None:
    given = make(SHAPES["even"], cell, kind, torch.float32, grad=grad)
    order = [*list(make(SHAPES["even"], cell, "additive", torch.float32))[:12]]
    order += ["positions", "output_weight", "coverage", "coverage_weight", "memory_lengths"]
    tensors = [given.get(name) for name in order]
    ops = torch.ops.encdec_fast
    op = ops.attention_decoder_train if grad else ops.attention_decoder
    opcheck(op, (*tensors, cell, 0.4, True))


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad: bool) -> None:
    given = make(SHAPES["even"], "lstm", "additive", torch.float32, grad=grad)
    compiled = torch.compile(
        lambda **t: attention_decoder(**t), fullgraph=True, backend="aot_eager"
    )
    found, expected = compiled(**given), attention_decoder(**given)
    torch.testing.assert_close(found, expected)
    if grad:
        seeds = [torch.randn_like(r) for r in expected]
        ours, theirs = (gradients(r, given, seeds) for r in (found, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_the_same_numbers_on_any_number_of_threads(native: None) -> None:
    given = make(SHAPES["larger"], "lstm", "additive", torch.float32, grad=True)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results = attention_decoder(**given)
        found.append([*results, *gradients(results, given, [torch.ones_like(r) for r in results])])
    torch.set_num_threads(1)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@CELLS
@ALL_KINDS
def test_sentences_one_at_a_time(cell: str, kind: str, native: None) -> None:
    given = make(SHAPES["larger"], cell, kind, torch.float32)
    output, _ = attention_decoder(**given)
    rows = ("input", "h0", "c0", "context0", "keys", "values", "positions", "coverage")
    lengths = given["memory_lengths"]
    for b, n in enumerate([SHAPES["larger"][2]] * len(output) if lengths is None else lengths):
        own = dict(given, memory_lengths=None)
        for name in rows:
            own[name] = None if given.get(name) is None else given[name][b : b + 1]
        own["values"] = own["values"][:, :n]
        if kind == "location":  # without lengths the softmax goes over all positions
            own["memory_lengths"] = [int(n)]
        elif own["keys"] is not None:
            own["keys"] = own["keys"][:, :n]
        if own["coverage"] is not None:
            own["coverage"] = own["coverage"][:, :n]
        torch.testing.assert_close(
            attention_decoder(**own)[0], output[b : b + 1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["additive", "output", "coverage", "location"])
def test_padding_is_not_read(kind: str, native: None) -> None:
    given = make(SHAPES["larger"], "lstm", kind, torch.float32, grad=True)
    padding = torch.arange(SHAPES["larger"][2]) >= given["memory_lengths"].unsqueeze(1)
    found = []
    for fill in (0.0, torch.nan):
        spoiled = copy(given, torch.float32)
        with torch.no_grad():
            for part in ("keys", "values", "coverage"):
                if spoiled.get(part) is not None:
                    spoiled[part][padding] = fill
        results = attention_decoder(**spoiled)
        found.append(
            [*results, *gradients(results, spoiled, [torch.ones_like(r) for r in results])]
        )
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("kind", ["additive", "dot", "coverage", "location"])
def test_nothing_there(sizes: tuple[int, ...], kind: str) -> None:
    given = make((*sizes, 5, 6, 7, 8), "lstm", kind, torch.float32, grad=True) if sizes[0] else None
    if given is None:
        given = make((1, *sizes[1:], 5, 6, 7, 8), "lstm", kind, torch.float32, grad=True)
        for name in ("input", "h0", "c0", "context0", "keys", "values", "positions", "coverage"):
            if given.get(name) is not None:
                needed = given[name].requires_grad
                given[name] = given[name][:0].detach().requires_grad_(needed)
        given["memory_lengths"] = None
    found = []
    for backend in (None, "reference"):
        with use_backend(backend):
            output, c_n = results = attention_decoder(**given)
            found.append([*results, *gradients(results, given, [torch.ones(())] * 2)])
    assert output.shape == (sizes[0], sizes[1], 6 + 8)
    assert c_n.shape == (sizes[0], 6)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if sizes[2] == 0:
        assert not found[0][0][..., 6:].any()  # the context of an empty memory


def test_explain(native: None) -> None:
    given = make(SHAPES["even"], "gru", "general", torch.float32)
    found = explain(attention_decoder, **given)
    assert found.backend == "cpu" and "gru B=2 T=3" in str(found)
    given["input"].requires_grad_()
    assert explain(attention_decoder, **given).backend == "cpu"
    half = copy(given, torch.float16)
    assert explain(attention_decoder, **half).backend == "reference"


@ALL_KINDS
def test_autocast(kind: str) -> None:
    given = make(SHAPES["odd"], "lstm", kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_decoder(**given)
        assert attention_decoder(**copy(given, torch.float64))[0].dtype == torch.float64
    rounded = attention_decoder(**copy(given, torch.bfloat16))
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], rounded[0])


BAD: dict[str, dict[str, Any]] = {
    "rank": {"input": torch.randn(2, 5)},
    "batch": {"h0": torch.randn(3, 6)},
    "context": {"context0": torch.randn(2, 9)},
    "keys": {"keys": torch.randn(2, 4, 9)},
    "keys and values": {"values": torch.randn(2, 5, 8)},
    "no c0": {"c0": None},
    "weight_ih": {"weight_ih": torch.randn(24, 5)},
    "weight_hh": {"weight_hh": torch.randn(18, 6)},
    "one bias": {"bias_ih": None},
    "query_weight": {"query_weight": torch.randn(6, 7)},
    "no query_weight": {"query_weight": None},
    "score_weight": {"score_weight": torch.randn(6)},
    "dtype": {"values": torch.randn(2, 4, 8).double()},
    "device": {"values": torch.randn(2, 4, 8, device="meta")},
    "length": {"memory_lengths": [5, 4]},
    "negative length": {"memory_lengths": [-1, 4]},
    "few lengths": {"memory_lengths": [4]},
    "keys and positions": {"positions": torch.randn(2, 3, 7)},
    "neither": {"keys": None},
    "positions and score_weight": {"keys": None, "positions": torch.randn(2, 3, 7)},
    "output_weight": {"output_weight": torch.randn(8, 13)},
    "coverage": {"coverage": torch.randn(2, 5), "coverage_weight": torch.randn(7)},
    "coverage_weight": {"coverage": torch.randn(2, 4), "coverage_weight": torch.randn(6)},
    "coverage alone": {"coverage": torch.randn(2, 4)},
    "coverage without score_weight": {
        "coverage": torch.randn(2, 4),
        "coverage_weight": torch.randn(7),
        "score_weight": None,
    },
}
BAD_POSITIONS: dict[str, dict[str, Any]] = {
    "rank": {"positions": torch.randn(2, 7)},
    "steps": {"positions": torch.randn(2, 4, 7)},
    "few positions": {"positions": torch.randn(2, 3, 3), "query_weight": torch.randn(3, 6)},
    "query_weight": {"query_weight": torch.randn(6, 6)},
    "no query_weight": {"query_weight": None},
    "output_weight": {"output_weight": torch.randn(8, 14)},
}


@pytest.mark.parametrize("changed", BAD.values(), ids=BAD)
def test_bad_input(changed: dict[str, Any]) -> None:
    given = make((2, 3, 4, 5, 6, 7, 8), "lstm", "additive", torch.float32)
    with pytest.raises(RuntimeError, match=r"attention_decoder|memory_lengths"):
        attention_decoder(**{**given, **changed})
    with pytest.raises(ValueError, match="cell"):
        attention_decoder(**{**given, "cell": "rnn"})


@pytest.mark.parametrize("changed", BAD_POSITIONS.values(), ids=BAD_POSITIONS)
def test_bad_positions(changed: dict[str, Any]) -> None:
    given = make((2, 3, 4, 5, 6, 7, 8), "lstm", "location", torch.float32)
    with pytest.raises(RuntimeError, match=r"attention_decoder: "):
        attention_decoder(**{**given, **changed})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_results_lie_as_their_shapes_say(kind: str, grad: bool, native: None) -> None:
    """With fewer keys than positions, too: a graph is made for whole tensors."""
    given = make((2, 3, 4, 5, 16, 9, 7), "lstm", kind, torch.float32, grad=grad)
    assert all(t.is_contiguous() for t in attention_decoder(**given, need_weights=True))


def test_the_raw_op_checks_too(native: None) -> None:
    """What the public function refuses is not read past its end below it either."""
    given = make((2, 3, 4, 5, 6, 7, 8), "lstm", "location", torch.float32)
    names = ("input", "h0", "c0", "context0", "keys", "values", "weight_ih", "weight_hh")
    names += ("bias_ih", "bias_hh", "query_weight", "score_weight", "positions", "output_weight")
    names += ("coverage", "coverage_weight", "memory_lengths")
    given["output_weight"] = torch.randn(8, 14)
    with pytest.raises(RuntimeError, match="positions go with query_weight alone"):
        torch.ops.encdec_fast_cpu.attention_decoder_forward(
            0, *(given.get(name) for name in names), 1.0, False
        )
