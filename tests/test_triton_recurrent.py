"""What is Triton's own of lstm, gru and rnn; their other tests run on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_without_triton
from helpers import CASES, KINDS, OURS, Case, make_data, make_modules
from recurrent_checks import check_gradients
from torch import Tensor

import encdec_fast
from encdec_fast import explain, use_backend
from encdec_fast.backends import library, select
from encdec_fast.ops import _triton, lstm
from encdec_fast.ops._call import RecurrentCall
from encdec_fast.ops.lstm import BACKENDS

ALL = pytest.mark.parametrize("kind", KINDS)
PLANS = pytest.mark.parametrize("in_one", [True, False], ids=["one launch", "steps"])


def choose(monkeypatch: pytest.MonkeyPatch, in_one: bool) -> list[int]:
    """All calls go one way; the list receives each launch's number of steps."""
    kernels = _triton.kernels("recurrent")
    counts: list[int] = []

    def watched(kernel: Any) -> Any:
        class Watched:
            arg_names = kernel.arg_names

            def __getitem__(self, grid: Any) -> Any:
                def launch(*args: Any, **constants: Any) -> None:
                    named = dict(zip(kernel.arg_names, args, strict=False))
                    counts.append(named["count"])
                    assert grid[0] == 1 or not in_one
                    kernel[grid](*args, **constants)

                return launch

        return Watched()

    monkeypatch.setattr(kernels, "whole", lambda *sizes: in_one)
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, watched(getattr(kernels, name)))
    return counts


@ALL
@PLANS
@pytest.mark.parametrize("name", ["large", "states", "lengths, everything", "packed, everything"])
def test_plans(
    kind: str, name: str, in_one: bool, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways through the steps are right, in forward and backward, and are those asked for."""
    counts = choose(monkeypatch, in_one)
    case = CASES[name]
    check_gradients(kind, case, torch.float32, "triton")
    layers = case.options.get("num_layers", 1)
    if in_one:
        assert len(counts) == 2 * layers
        assert sum(counts) >= 2 * layers * (case.T - 1)
    else:
        assert set(counts) == {1}
        assert len(counts) >= 2 * layers * (case.T - 1)


@PLANS
def test_more_sequences_than_a_program_has(
    in_one: bool, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, in_one)
    case = Case(T=3, B=70, I=3, H=5, ragged="lengths", states=True)
    check_gradients("lstm", case, torch.float32, "triton")


@ALL
@pytest.mark.parametrize("name", ["everything", "lengths, everything", "packed, everything"])
def test_replays(kind: str, name: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's tensors carry nothing over from call to call; a stand-in launches in its place."""
    counts = choose(monkeypatch, False)
    captured: list[int] = []

    def capture(launch: Any, tensors: Any, device: torch.device) -> Any:
        captured.append(len(counts))
        return lambda: launch(tensors)

    kernels, replay = _triton.kernels("recurrent"), _triton.kernels("_replay")
    monkeypatch.setattr(kernels, "_REPLAYS", replay.Replays())
    monkeypatch.setattr(kernels, "_can_capture", lambda tensor: True)
    monkeypatch.setattr(replay, "capture", capture)
    for _ in range(3):
        check_gradients(kind, CASES[name], torch.float32, "triton")
    # Forward and backward, the same for both layers; packed data mostly has another size each time.
    assert len(captured) == 2 or (CASES[name].ragged == "packed" and len(captured) in (4, 6))


def test_a_replay_serves_other_modes(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were made in inference mode could be written nowhere else."""
    replay = _triton.kernels("_replay")
    monkeypatch.setattr(replay, "capture", lambda launch, own, device: lambda: launch(own))
    replays = replay.Replays()

    def double(tensors: Any) -> None:
        torch.mul(tensors[0], 2, out=tensors[1])

    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for value in (1.0, 2.0, 3.0):
            with mode():
                given, to = torch.full((2,), value), torch.zeros(2)
                replays.run("", (given, to), [0], [1], double)
                assert to.tolist() == [2 * value] * 2


@ALL
def test_gradients_in_float16(kind: str, interpreter: None) -> None:
    """torch has none on the CPU: as close to float32's as numbers of 11 bits allow."""
    case = CASES["lengths, everything"]
    truth, _, ours = make_modules(kind, case, torch.float16)
    data = make_data(kind, case, torch.float16, grad=True)
    found = []
    for module, dtype in ((truth, torch.float64), (ours, torch.float16)):
        own = data.to(dtype)
        with use_backend("triton" if dtype == torch.float16 else "reference"):
            output = encdec_fast.optimize(module)(own.input, own.hx, lengths=own.lengths)[0]
            of_what = [*own.leaves(), *module.parameters()]
            found.append(torch.autograd.grad(output.double().square().sum(), of_what))
    for exact, grad in zip(*found, strict=True):
        assert grad.dtype == torch.float16
        assert (grad.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_results_are_the_same_every_time(interpreter: None) -> None:
    module = OURS["lstm"](5, 20, bidirectional=True)
    x = torch.randn(4, 18, 5)
    with use_backend("triton"):
        first, second = (
            torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_offsets_beyond_32_bits(kind: str, interpreter: None, tmp_path: Path) -> None:
    """The rows of the second step lie 2^31 numbers behind those of the first, in every tensor."""
    kernels = _triton.kernels("recurrent")
    H, B, T = 16, 3, 2
    gates = kernels.GATES[kernels.CELLS[kind]]
    segments = kernels.SEGMENTS[kernels.CELLS[kind]]
    weight = torch.randn(1, gates * H, H)
    given, of_output = torch.randn(T, B, gates * H), torch.randn(T, B, H)
    found = []
    for gap in (B, 2**31 // H):
        rows = gap + B
        widths = (gates * H, H, H, 4 * H, H, segments * H, H)
        # In files with holes: only what is touched takes room.
        products, output, cells, saved, grad_output, grads, previous = (
            torch.from_file(
                str(tmp_path / f"{gap} {i}"), shared=True, size=rows * width, dtype=torch.float32
            ).view(rows, width)
            for i, width in enumerate(widths)
        )

        def both(tensor: Tensor, gap: int = gap) -> Tensor:
            return torch.stack([tensor[:B], tensor[gap : gap + B]])

        for t in range(T):
            products[t * gap : t * gap + B] = given[t]
            grad_output[t * gap : t * gap + B] = of_output[t]
        starts = torch.tensor([0, gap])
        lengths = torch.full((B,), T, dtype=torch.int32)
        walk = kernels.Walk(T, B, rows, 0, 0, lengths, starts, None)
        c = torch.zeros(1, B, H) if kind == "lstm" else None
        states, h_n = torch.zeros(2, 1, B, H), torch.empty(1, B, H)
        own_cells = cells if kind == "lstm" else None
        tensors = (products, weight, None, states, c, output, own_cells, saved, h_n)
        kernels.forward(kind, *tensors, walk, True)
        carry = torch.zeros(1, B, H)
        of_what = (grad_output, None, None, weight, saved, output, own_cells, None, None)
        kernels.backward(kind, *of_what, grads, previous, carry, None, walk, True)
        found.append([both(output), both(grads), both(previous), h_n, carry])
    for near, other in zip(*found, strict=True):
        assert torch.equal(near, other)


def test_lengths_are_clamped(interpreter: None) -> None:
    """Lengths on a device are not looked at: what they say, nothing outside is read or written."""
    kernels = _triton.kernels("recurrent")
    H, B, T = 4, 2, 3
    output = torch.full((T * B, H), torch.nan)
    lengths = torch.tensor([99, -7], dtype=torch.int32)
    walk = kernels.Walk(T, B, T * B, B, 1, lengths, None, None)
    products, weight = torch.randn(T * B, H), torch.randn(1, H, H)
    states, h_n = torch.zeros(2, 1, B, H), torch.zeros(1, B, H)
    tensors = (products, weight, None, states, None, output, None, None, h_n)
    kernels.forward("rnn_tanh", *tensors, walk, True)
    by_sequence = output.view(T, B, H)
    assert not by_sequence[:, 0].isnan().any()
    assert by_sequence[:, 1].isnan().all()


def test_explain(interpreter: None) -> None:
    module, x = OURS["lstm"](8, 16), torch.randn(4, 3, 8)
    with use_backend("triton"):
        assert "all steps in one launch" in str(explain(module, x))
        wide = OURS["gru"](8, 600)
        assert "a launch for each step" in str(explain(wide, x))
        for refused, why in ((OURS["lstm"](8, 16, proj_size=4), "proj_size"),):
            with pytest.raises(encdec_fast.BackendRefused, match=why):
                refused(x)
        with pytest.raises(encdec_fast.BackendRefused, match="float64"):
            module.double()(x.double())
        with pytest.raises(encdec_fast.BackendRefused, match="int8"), torch.no_grad():
            lstm(x, None, list(OURS["lstm"](8, 16).parameters()), weight_dtype="int8")
    assert explain(OURS["lstm"](8, 16), x).backend != "triton"


def test_what_a_gpu_gets() -> None:
    """torch's kernel where it takes the call, ours for others, or where asked for."""
    skip_without_triton()
    flags = (True, False, False, False, "", "", "", False)
    call = RecurrentCall("lstm", torch.float16, "cuda", False, 4, *flags[1:])
    assert select(BACKENDS, call).name == "torch"
    ours = "triton" if library.cuda_reasons("cuda", False) else "cuda"
    assert select(BACKENDS, call._replace(cell_states=True)).name == ours
    with use_backend("triton"):
        assert select(BACKENDS, call).name == "triton"


def test_every_tile_is_there() -> None:
    skip_without_triton()
    tiles = _triton.kernels("recurrent").TILES
    names, precisions = ("forward", "backward"), ("half", "float")
    assert set(tiles) == {
        f"recurrent {name}, {precision}, {rows} sequences"
        for name in names
        for precision in precisions
        for rows in (16, 32, 64)
    }
