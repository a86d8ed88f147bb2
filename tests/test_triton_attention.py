"""What Triton's attention has beyond what every backend is tested for in test_attention*.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import skip_without_triton
from test_attention import make
from torch import Tensor

from encdec_fast import explain, use_backend
from encdec_fast.backends import BackendRefused, select
from encdec_fast.ops import _triton, attention
from encdec_fast.ops.attention import BACKENDS, AttentionCall, reference


def launched(given: dict[str, Any], **changed: Any) -> Any:
    """The launcher's own call of the op's arguments."""
    options = {"bias": None, "lengths": given.get("memory_lengths"), "mask": None, "seed": None}
    options |= {"causal": False, "scale": given["query"].shape[3] ** -0.5, "dropout": 0.0}
    tensors = (given["query"], given["key"], given["value"])
    return _triton.kernels("attention").call_of(*tensors, **options | changed)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_keys_in_parts(heads: tuple[int, int], causal: bool, interpreter: None) -> None:
    """A decode step over a long memory: parts of the keys that are joined, some of them empty."""
    kernels = _triton.kernels("attention")
    given = make((4, *heads, 3, 700, 24, 40), "lengths", torch.float32)
    given["memory_lengths"][:] = torch.tensor([700, 1, 0, 333])
    call = launched(given, causal=causal)
    tile = _triton.kernels("attention_tiles").tile_of("forward", torch.float32, False, 64)
    assert kernels.parts_of(call, tile) > 1
    output, weights, _ = kernels.forward(call, True, False, False)
    expected = reference(**given, causal=causal)
    torch.testing.assert_close(output, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


def test_lengths_that_nobody_checked(interpreter: None) -> None:
    """On a GPU their values are not read before the launch: the kernels stay inside the memory."""
    kernels = _triton.kernels("attention")
    given = make((3, 2, 2, 5, 20, 8, 8), "none", torch.float32)
    found = kernels.forward(
        launched(given, lengths=torch.tensor([-7, 21, 2**40])), True, False, False
    )
    expected = reference(**given, memory_lengths=torch.tensor([0, 20, 20]))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same numbers, the last of a dimension 2**31 of them behind the first: 4 GB of addresses,
    of which a few pages are used.
    """
    strides = list(tensor.stride())
    strides[dim] = 2**31 // (tensor.shape[dim] - 1) + 8
    size = sum(stride * (n - 1) for stride, n in zip(strides, tensor.shape, strict=True)) + 1
    return torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["sentences", "heads", "rows"])
def test_offsets_beyond_32_bits(dim: int, interpreter: None) -> None:
    given = make((2, 2, 2, 3, 5, 8, 8), "none", torch.bfloat16)
    bias = torch.randn(2, 2, 3, 5).bfloat16()
    leaves = [given["query"], given["key"], given["value"], bias]

    def run(*own: Tensor) -> list[Tensor]:
        named = dict(zip(("query", "key", "value", "bias"), own, strict=True))
        with use_backend("triton"):
            output = attention(**named)
            return [output, *torch.autograd.grad(output.float().square().sum(), own)]

    near = run(*(t.clone().requires_grad_() for t in leaves))
    far = run(*(far_apart(t, dim).requires_grad_() for t in leaves))
    for one, other in zip(near, far, strict=True):
        assert torch.equal(one, other)


def test_explain_and_refusals(interpreter: None) -> None:
    given = make((1, 2, 2, 3, 4, 8, 8), "everything", torch.float32)
    with use_backend("triton"):
        assert explain(attention, **given, need_weights=True).backend == "triton"
        wide = make((1, 1, 1, 2, 3, 257, 4), "none", torch.float32)
        with pytest.raises(BackendRefused, match="256 numbers"):
            attention(**wide)
        with pytest.raises(BackendRefused, match="float64"):
            attention(**make((1, 1, 1, 2, 3, 8, 8), "none", torch.float64))
    assert explain(attention, **given).backend != "triton"


def test_what_a_gpu_gets() -> None:
    """torch's kernels where they take the very call, Triton's for others, or where asked for."""
    skip_without_triton()
    plain = AttentionCall(
        torch.float16, "cuda", False, True, 1.0, 0.0, False, False, "", plain=True
    )
    assert select(BACKENDS, plain).name == "torch"
    for others in ({"plain": False}, {"need_weights": True}, {"training": True, "dropout_p": 0.1}):
        assert select(BACKENDS, plain._replace(**others)).name == "triton"
    with use_backend("triton"):
        assert select(BACKENDS, plain).name == "triton"


def test_every_tile_is_there() -> None:
    """For each kernel, precision and width that launchers ask for."""
    skip_without_triton()
    tiles = _triton.kernels("attention_tiles").TILES
    assert set(tiles) == {"forward", "queries", "keys", "bias"}
    for name, table in tiles.items():
        kinds = {"masked"} if name == "bias" else {"plain", "masked"}
        assert set(table) == {(p, kind) for p in ("half", "float") for kind in kinds}
        assert all(set(widths) == {64, 128, 256} for widths in table.values())
