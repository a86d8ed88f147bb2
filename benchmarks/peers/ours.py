"""encdec_fast: its modules as `encdec_fast.optimize` makes them, and its C++ call alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Cell, DType
from benchmarks.peers.base import Contender, Offer, package_version
from benchmarks.peers.torch_eager import (
    inference_call,
    pack,
    packed_outputs,
    plain_outputs,
    training_call,
)
from benchmarks.workload import Workload, named_gradients

try:
    encdec_fast: Any = importlib.import_module("encdec_fast")
    import_problem = ""
except ImportError as error:
    encdec_fast = None
    import_problem = f"encdec_fast cannot be imported: {error}"


# How the C++ ops number the formats of packed weights.
PACKED_FORMATS: dict[DType, int] = {"float32": 0, "bfloat16": 1, "int8": 3}


class NotOptimized(Exception):
    """optimize() left the module as it was."""


def why_absent() -> str | None:
    """Why there is no encdec_fast to measure, or None if there is."""
    if encdec_fast is None:
        return import_problem
    return None if hasattr(encdec_fast, "optimize") else "this encdec_fast has no optimize()"


def optimized(module: nn.RNNBase, dtype: DType) -> nn.Module:
    """The module that a user of `optimize` gets."""
    # The container makes this the usual case: a part of a model is swapped, not the root.
    weight_dtype = "int8" if dtype == "int8" else None
    result = encdec_fast.optimize(nn.Sequential(module), weight_dtype=weight_dtype)[0]
    if not type(result).__module__.startswith("encdec_fast"):
        raise NotOptimized(f"optimize left {type(module).__name__} as it was")
    assert isinstance(result, nn.Module)
    return result


def kernel_call(module: nn.RNNBase, x: Tensor, cell: Cell, dtype: DType) -> Callable[[], object]:
    """The C++ call under the module on the module's own packed weights, without what selects it."""
    numbers = importlib.import_module("encdec_fast.ops._call").CELLS
    kind = "rnn_tanh" if cell == "rnn" else cell
    weights = list(module._flat_weights)
    kept = importlib.import_module("encdec_fast.ops._packing").kept
    make_pack = importlib.import_module("encdec_fast.ops._cpu").make_pack
    blobs = [kept(kind, weights, PACKED_FORMATS[dtype], make_pack)]
    forward = torch.ops.encdec_fast_cpu.rnn_forward.default

    def call() -> object:
        with torch.inference_mode():
            return forward(
                numbers[kind], x, weights, blobs, None, None, None, None, False, False, False
            )

    return call


def kernel_outputs(result: Any) -> dict[str, Tensor]:
    """Name the results of the C++ call; it returns none if it refuses the packed weights."""
    return dict(zip(("output", "h_n", "c_n"), result, strict=False))


class EncdecFast:
    """encdec_fast.nn.LSTM, GRU and RNN."""

    name = "encdec_fast"

    def version(self) -> str | None:
        if encdec_fast is None:
            return None
        return getattr(encdec_fast, "__version__", None) or package_version("encdec_fast")

    def offer(self, work: Workload, threads: int) -> Offer:
        reason = why_absent()
        if reason:
            return Offer(absent={self.name: reason})
        try:
            module = optimized(work.module_in(work.case.dtype), work.case.dtype)
        except NotOptimized as problem:
            return Offer(absent={self.name: str(problem)})
        offer = Offer(self._contenders(work, module))
        if work.case.suite in ("grid", "overhead"):
            self._kernel(work, module, offer)
        return offer

    def _contenders(self, work: Workload, module: nn.Module) -> list[Contender]:
        case, x = work.case, work.x_in(work.case.dtype)
        if case.training:
            assert work.grad is not None
            x.requires_grad_()
            return [
                self._contender(
                    work,
                    training_call(module, x, work.grad.to(x.dtype)),
                    outputs=lambda output: named_gradients(module, x, output),
                )
            ]
        if case.lengths:
            return self._lengths(work, module, x)
        return [self._contender(work, inference_call(module, x))]

    def _kernel(self, work: Workload, module: nn.Module, offer: Offer) -> None:
        case, variant = work.case, "C++ call"
        try:
            assert isinstance(module, nn.RNNBase)
            call = kernel_call(module, work.x_in(case.dtype), case.cell, case.dtype)
        except Exception as error:  # its names are not public: the module is measured without it
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            offer.absent[f"{self.name} {variant}"] = reason
            return
        offer.contenders.append(
            self._contender(work, call, variant=variant, role="kernel", outputs=kernel_outputs)
        )

    def _lengths(self, work: Workload, module: nn.Module, x: Tensor) -> list[Contender]:
        lengths = work.lengths

        def with_lengths() -> object:
            with torch.inference_mode():
                return module(x, lengths=lengths)

        return [
            self._contender(work, with_lengths, variant="lengths"),
            self._contender(
                work,
                inference_call(module, pack(x, work)),
                variant="packed",
                outputs=packed_outputs(work.case.time),
            ),
            self._contender(work, inference_call(module, x), variant="equal", full=True),
        ]

    def _contender(
        self,
        work: Workload,
        call: Callable[[], object],
        variant: str = "",
        role: str = "ours",
        outputs: Callable[[Any], dict[str, Tensor]] = plain_outputs,
        full: bool = False,
    ) -> Contender:
        case = work.case
        return Contender(
            peer=self.name,
            dtype=case.dtype,
            call=call,
            outputs=outputs,
            tokens=case.batch * case.time if full else case.tokens,
            variant=variant,
            role=role,
            full=full,
        )
