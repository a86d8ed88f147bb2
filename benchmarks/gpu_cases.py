"""What `gpu_check` compares and times: ops with their options, at odd small and at large sizes.

A case is a function of differentiable tensors (leaves). Its leaves are made on the CPU in float64
and then brought to a device and a dtype, so that every contender starts from the same numbers.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from encdec_fast import ops, use_backend

Run = Callable[..., Any]


@dataclass(frozen=True)
class GpuCase:
    """op, name: what it is. shapes: of the leaves. run: leaves -> a tensor or several.

    peers: by name, functions of the same leaves that give the same results. numbers_moved: of what
    is bound by memory, the numbers that it reads and writes at least. bars: (peer, how many times
    faster than the fastest whose name begins so) or ("copy", part of a copy's bandwidth), or
    ("<peer> alone", the same where no other peer with that first word takes the call). trains:
    whether it has gradients, which are then part of what is compared and timed. backend: whose
    kernels. around: entered while they run. judge: the backend that others must agree with before
    they are timed.
    """

    op: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    run: Run
    peers: dict[str, Run] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    numbers_moved: int = 0
    bars: tuple[tuple[str, float], ...] = ()
    trains: bool = True
    backend: str = "triton"
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    judge: str = "reference"

    @property
    def id(self) -> str:
        return f"{self.op}, {self.name}"

    def leaves(self, seed: int = 0, device: torch.device | None = None) -> list[Tensor]:
        """Numbers from a seed: float64 on the CPU, or float32 on the device, for large ones."""
        generator = torch.Generator("cpu" if device is None else device).manual_seed(seed)
        dtype = torch.float64 if device is None else torch.float32
        return [
            torch.randn(shape, generator=generator, dtype=dtype, device=device)
            for shape in self.shapes
        ]


def recurrent(kind: str, T: int, B: int, I: int, H: int, both: bool, **options: Any) -> GpuCase:
    gates, directions = {"lstm": 4, "gru": 3, "rnn": 1}[kind], 2 if both else 1
    own = ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))
    states = (2 if kind == "lstm" else 1) * ((directions, B, H),) if options.pop("states") else ()
    count = 4 * directions

    def run(x: Tensor, *rest: Tensor) -> list[Tensor]:
        weights = [w * H**-0.5 for w in rest[:count]]
        given = rest[count:]
        hx: Any = (given if len(given) > 1 else given[0]) if given else None
        output, state = getattr(ops, kind)(x, hx, weights, bidirectional=both, **options)
        return [output, *(state if isinstance(state, tuple) else (state,))]

    def torchs(*leaves: Tensor) -> list[Tensor]:
        with use_backend("torch"):
            return run(*leaves)

    said = ", ".join([f"T={T} B={B} I={I} H={H}", *(["both directions"] if both else []), *options])

    def flash(turned: bool) -> Run:
        def call(x: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor) -> Tensor:
            return _flash_rnn(x, w_ih * H**-0.5, w_hh * H**-0.5, biases, turned)

        return call

    peers: dict[str, Run] = {"torch": torchs}
    plain = kind == "lstm" and not both and not states and not options
    if plain and importlib.util.find_spec("flashrnn") is not None:
        # It says nowhere which dimension of its matrices is the state's: the wrong one disagrees.
        peers |= {
            f"FlashRNN{' turned' if turned else ''}": flash(turned) for turned in (False, True)
        }
    shapes = ((T, B, I), *own * directions, *states)
    bars = (("torch", 1.0),) if kind == "gru" or "lengths" in options else ()
    return GpuCase(kind, said, shapes, run, peers, bars=bars)


def _flash_rnn(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, biases: Sequence[Tensor], turned: bool
) -> list[Tensor]:
    """FlashRNN's fused kernel behind torch's input product: the output, and the last h and c."""
    T, B, _ = x.shape
    H = w_hh.shape[1]
    product = F.linear(x, w_ih, (biases[0] + biases[1]) * H**-0.5)
    gates = product.view(T, B, 4, 1, H).transpose(0, 1)
    matrices = w_hh.view(4, 1, H, H)
    matrices = matrices.transpose(2, 3) if turned else matrices
    zeros = x.new_zeros(4, 1, H)
    flashrnn = importlib.import_module("flashrnn").flashrnn
    states, _ = flashrnn(
        gates.contiguous(), matrices.contiguous(), zeros, function="lstm", backend="cuda_fused"
    )
    h, c = states[0][:, :, 0].transpose(0, 1), states[1][:, :, 0].transpose(0, 1)
    return [h, h[-1:], c[-1:]]


def lengths_of(most: int, count: int) -> list[int]:
    """From 1 to `most`, in no order, with both."""
    return [most, 1, *(1 + (7 * i * i + 3 * i) % most for i in range(count - 2))][:count]


def _attention(
    name: str, B: int, H: int, G: int, Tq: int, S: int, D: int, **options: Any
) -> GpuCase:
    bias = options.pop("bias", False)
    shapes = [(B, H, Tq, D), (B, G, S, D), (B, G, S, D), *([(1, H, Tq, S)] if bias else [])]

    def run(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Any:
        return ops.attention(q, k, v, bias=own[0] if own else None, **options)

    def sdpa(backend: SDPBackend) -> Run:
        lengths = options.get("memory_lengths")

        def call(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
            mask: Tensor | None = own[0] if own else None
            if lengths is not None:
                n = torch.tensor(lengths, device=q.device)
                mask = (torch.arange(S, device=q.device) < n[:, None])[:, None, None]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=options.get("causal", False), enable_gqa=G != H
                )

        return call

    peers: dict[str, Run] = {}
    if not options.get("need_weights"):
        peers = {
            f"SDPA {backend.name.lower()}": sdpa(backend)
            for backend in (
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.MATH,
            )
        }
    said = f"{name}, B={B} H={H} G={G} Tq={Tq} S={S} D={D}"
    bars = (("SDPA", 0.9), ("SDPA math alone", 2.0)) if peers else ()
    return GpuCase("attention", said, tuple(shapes), run, peers, bars=bars)


def _additive(name: str, B: int, Tq: int, S: int, A: int, **options: Any) -> GpuCase:
    shapes = ((B, Tq, A), (B, S, A), (B, S, A), (A,))

    def run(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Any:
        return ops.additive_attention(q, k, v, w * A**-0.5, **options)

    def eager(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        scores = torch.tanh(q.unsqueeze(2) + k.unsqueeze(1)) @ (w * A**-0.5)
        return scores.softmax(-1) @ v

    peers: dict[str, Run] = {"torch": eager, "torch.compile": torch.compile(eager)}
    peers = peers if not options else {}
    bars = (("torch", 8.0), ("torch.compile", 3.0)) if peers else ()
    said = f"{name}, B={B} Tq={Tq} S={S} A={A}"
    return GpuCase("additive_attention", said, shapes, run, peers, bars=bars)


def _linear(M: int, N: int, K: int, activation: str | None, norm: str | None) -> GpuCase:
    """Bias and activation, or bias, residual and norm."""
    shapes = ((M, K), (N, K), (N,), *([(M, N), (N,), (N,)] if norm else []))

    def run(x: Tensor, weight: Tensor, bias: Tensor, *own: Tensor) -> Tensor:
        residual, norm_weight, norm_bias = own or (None, None, None)
        return ops.linear(
            x,
            weight * K**-0.5,
            bias,
            activation=activation,
            residual=residual,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
        )

    def torchs(*leaves: Tensor) -> Tensor:
        with use_backend("torch"):
            found: Tensor = run(*leaves)
            return found

    said = f"{activation or norm}, M={M} N={N} K={K}"
    return GpuCase("linear", said, shapes, run, {"torch": torchs})


def _bridge(M: int, H: int, C: int) -> GpuCase:
    shapes = ((M, H), (M, C), (H, H + C), (H, C), (H,))

    def run(s: Tensor, c: Tensor, gate: Tensor, candidate: Tensor, bias: Tensor) -> Tensor:
        scale = (H + C) ** -0.5
        return ops.gated_bridge(s, c, gate * scale, candidate * scale, bias)

    return GpuCase("gated_bridge", f"M={M} H={H} C={C}", shapes, run)


def _cross_entropy(N: int, V: int, smoothing: float) -> GpuCase:
    def target(device: torch.device) -> Tensor:
        found = torch.arange(N, device=device) * 7919 % V
        return torch.where(torch.arange(N, device=device) % 5 == 4, -100, found)

    def run(logits: Tensor) -> Tensor:
        return ops.cross_entropy(logits, target(logits.device), label_smoothing=smoothing)

    def torchs(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target(logits.device), label_smoothing=smoothing)

    peers = {"torch": torchs, "torch.compile": torch.compile(torchs)}
    moved = 3 * N * V  # read twice, written once
    said = f"smoothing {smoothing}, N={N} V={V}"
    return GpuCase(
        "cross_entropy", said, ((N, V),), run, peers, numbers_moved=moved, bars=(("copy", 0.8),)
    )


def _add_norm(M: int, N: int, norm: str, residual: bool = True) -> GpuCase:
    shapes = ((M, N), *([(M, N)] if residual else []), (N,), (N,))

    def run(x: Tensor, *rest: Tensor) -> Any:
        other = rest[0] if residual else None
        return ops.add_norm(x, other, *rest[-2:], norm=norm)

    def torchs(x: Tensor, *rest: Tensor) -> Any:
        total = x + rest[0] if residual else x
        weight, bias = rest[-2:]
        if norm == "layer":
            output = F.layer_norm(total, (N,), weight, bias)
        else:
            output = F.rms_norm(total, (N,), weight, 1e-5) + bias
        return (output, total) if residual else output

    peers = {"torch": torchs, "torch.compile": torch.compile(torchs)}
    moved = (10 if residual else 5) * M * N  # forward and backward, each tensor once in each
    said = f"{norm}{'' if residual else ' alone'}, M={M} N={N}"
    return GpuCase("add_norm", said, shapes, run, peers, numbers_moved=moved, bars=(("copy", 0.8),))


def _log_softmax_topk(N: int, V: int, k: int) -> GpuCase:
    def run(logits: Tensor) -> Tensor:
        values: Tensor = ops.log_softmax_topk(logits, k)[0]
        return values.to(logits.dtype)

    def torchs(logits: Tensor) -> Tensor:
        return logits.float().log_softmax(1).topk(k, dim=1).values.to(logits.dtype)

    peers = {"torch": torchs, "torch.compile": torch.compile(torchs)}
    return GpuCase(
        "log_softmax_topk",
        f"N={N} V={V} k={k}",
        ((N, V),),
        run,
        peers,
        numbers_moved=N * V,
        bars=(("copy", 0.8),),
        trains=False,
    )


def _cached_attention(R: int, H: int, D: int, P: int, place: int, bias: bool = False) -> GpuCase:
    """The hypotheses of a search whose rows were mixed at every step."""
    shapes = ((R, 3, H, D), (P, R, H, D), (P, R, H, D), *([(H, P)] if bias else []))

    def given(device: torch.device) -> tuple[Tensor, Tensor]:
        rows = torch.arange(R * P, device=device).view(R, P) * 7 % R
        return rows.to(torch.int32), torch.full((R,), place, device=device)

    def run(new: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        rows, places = given(new.device)
        found: Tensor = ops.cached_attention(*new.unbind(1), keys, values, rows, places, *own)
        return found

    def torchs(new: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        """The rows gathered into caches of their own, and then SDPA."""
        rows, _ = given(new.device)
        query, key, value = new.unbind(1)
        steps, at = torch.arange(place, device=new.device), rows[:, :place].long()
        k, v = (
            torch.cat([cache[steps, at], last.unsqueeze(1)], 1).transpose(1, 2)
            for cache, last in ((keys, key), (values, value))
        )
        mask = own[0][None, :, None, : place + 1].expand(R, -1, -1, -1) if own else None
        return F.scaled_dot_product_attention(query.unsqueeze(2), k, v, mask).squeeze(2)

    said = f"R={R} H={H} D={D} place {place}{' bias' if bias else ''}"
    return GpuCase("cached_attention", said, shapes, run, {"torch": torchs}, trains=False)


def parity_cases() -> Iterator[GpuCase]:
    """Every op with its options, at sizes that fill no tile and at some that do."""
    for kind in ("lstm", "gru", "rnn"):
        yield recurrent(kind, 5, 3, 4, 33, False, states=False)
        yield recurrent(kind, 6, 19, 16, 64, True, states=True, lengths=lengths_of(6, 19))
    yield recurrent("lstm", 3, 70, 8, 16, False, states=True, lengths=lengths_of(3, 70))
    lengths = lengths_of(70, 2)
    sizes = (2, 4, 2, 33, 70, 40)
    yield _attention("all keys", *sizes)
    yield _attention("lengths", *sizes, memory_lengths=lengths)
    yield _attention("bias", *sizes, bias=True)
    yield _attention("causal", 2, 4, 4, 65, 65, 64, causal=True)
    yield _attention("weights", *sizes, need_weights=True, memory_lengths=lengths)
    yield _attention("mean weights", *sizes, need_weights=True, average_weights=True)
    yield _attention("one query", 2, 4, 2, 1, 300, 64, memory_lengths=lengths_of(300, 2))
    yield _additive("all keys", 2, 5, 33, 40)
    yield _additive("lengths", 2, 5, 33, 40, memory_lengths=lengths_of(33, 2))
    yield _additive("weights", 2, 5, 33, 64, need_weights=True)
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        yield _linear(5, 40, 17, activation, None)
    for norm in ("layer", "rms"):
        yield _linear(5, 40, 17, None, norm)
    yield _bridge(7, 40, 24)
    yield _cross_entropy(6, 5000, 0.1)
    yield _cross_entropy(6, 33, 0.0)
    for norm in ("layer", "rms"):
        yield _add_norm(9, 40, norm)
        yield _add_norm(3, 2048, norm, residual=False)
    yield _log_softmax_topk(5, 33, 4)
    yield _log_softmax_topk(3, 5000, 10)
    yield _cached_attention(5, 2, 24, 40, 37)
    yield _cached_attention(3, 2, 64, 9, 8, bias=True)


def speed_cases() -> Iterator[GpuCase]:
    """The sizes of the bars."""
    yield _additive("all keys", 64, 64, 256, 512)
    for D in (64, 128):
        yield _attention("all keys", 16, 16, 16, 512, 512, D)
        yield _attention("lengths", 16, 16, 16, 512, 512, D, memory_lengths=lengths_of(512, 16))
        yield _attention("bias", 16, 16, 16, 512, 512, D, bias=True)
    yield _attention("one query", 32, 16, 16, 1, 1024, 64, memory_lengths=lengths_of(1024, 32))
    for kind, H in (("gru", 128), ("gru", 512), ("lstm", 128), ("lstm", 512)):
        yield recurrent(kind, 50, 32, H, H, False, states=False)
        yield recurrent(kind, 50, 32, H, H, False, states=False, lengths=lengths_of(50, 32))
    yield _linear(8192, 2048, 512, "gelu", None)
    yield _linear(8192, 512, 2048, None, "layer")
    yield _bridge(4096, 512, 512)
    yield _cross_entropy(4096, 32000, 0.1)
    yield _add_norm(16384, 512, "layer")
    yield _add_norm(16384, 1024, "rms")
    yield _log_softmax_topk(128, 32000, 8)
    yield _cached_attention(128, 8, 64, 64, 48)


def on(
    device: torch.device, dtype: torch.dtype, leaves: Sequence[Tensor], trains: bool = True
) -> list[Tensor]:
    """Copies of the leaves, which ask for gradients where a case trains."""
    return [leaf.to(device, dtype, copy=True).requires_grad_(trains) for leaf in leaves]
