"""torch's own modules: float32, bfloat16, float64, dynamic int8, packed sequences, training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import DType
from benchmarks.peers.base import Contender, Offer, dtypes_to_run, package_version, variant_of
from benchmarks.workload import Workload, named_gradients, named_outputs


def inference_call(module: nn.Module, *inputs: Any) -> Callable[[], object]:
    """A call without gradients.

    inference_mode is entered inside the call, where a user enters it; it costs well under 1 µs.
    """

    def call() -> object:
        with torch.inference_mode():
            return module(*inputs)

    return call


def training_call(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """A forward and a backward pass, with fresh gradients as after `zero_grad()`."""
    leaves = [x, *module.parameters()]

    def call() -> object:
        for leaf in leaves:
            leaf.grad = None
        output = module(x)[0]
        output.backward(grad)
        return output

    return call


def plain_outputs(result: Any) -> dict[str, Tensor]:
    """Name the results of a module called with a tensor."""
    return named_outputs(*result)


def packed_outputs(time: int) -> Callable[[Any], dict[str, Tensor]]:
    """Name the results of a module called with a PackedSequence, padded with zeros to `time`."""

    def outputs(result: Any) -> dict[str, Tensor]:
        packed, state = result
        padded, _ = pad_packed_sequence(packed, total_length=time)
        return named_outputs(padded, state)

    return outputs


def pack(x: Tensor, work: Workload) -> PackedSequence:
    """The input as a PackedSequence, made before anything is timed."""
    lengths = work.lengths
    assert lengths is not None
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


def quantize_dynamic(module: nn.RNNBase) -> nn.Module:
    """torch's dynamic int8 module, for every cell that it quantizes."""
    # The function replaces children only, hence the container.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert: Any = torch.ao.quantization.quantize_dynamic
        quantized: nn.Module = convert(nn.Sequential(module), {nn.LSTM, nn.GRU}, torch.qint8)[0]
    return quantized


class TorchEager:
    """torch's nn.LSTM, nn.GRU and nn.RNN."""

    name = "torch"

    def version(self) -> str | None:
        return package_version("torch")

    def offer(self, work: Workload, threads: int) -> Offer:
        if work.case.training:
            return Offer([self._training(work)])
        if work.case.lengths:
            return Offer(self._lengths(work))
        offer = Offer()
        for dtype in dtypes_to_run(work):
            module: nn.Module = work.module_in(dtype)
            if dtype == "int8":
                reason = self._why_not_int8(work)
                if reason:
                    offer.absent[self.name] = reason
                    continue
                module = quantize_dynamic(work.module_in(dtype))
            offer.contenders.append(self._inference(work, dtype, module))
        return offer

    def _why_not_int8(self, work: Workload) -> str | None:
        if not hasattr(torch.ao, "quantization"):
            return "this torch has no dynamic int8 quantization"
        if work.case.cell == "rnn":
            return "torch's dynamic int8 covers LSTM and GRU only"
        return None

    def _inference(self, work: Workload, dtype: DType, module: nn.Module) -> Contender:
        return Contender(
            peer=self.name,
            dtype=dtype,
            call=inference_call(module, work.x_in(dtype)),
            outputs=plain_outputs,
            tokens=work.case.tokens,
            variant=variant_of(dtype, work),
        )

    def _training(self, work: Workload) -> Contender:
        dtype = work.case.dtype
        module, x = work.module_in(dtype), work.x_in(dtype).requires_grad_()
        assert work.grad is not None
        return Contender(
            peer=self.name,
            dtype=dtype,
            call=training_call(module, x, work.grad.to(x.dtype)),
            outputs=lambda output: named_gradients(module, x, output),
            tokens=work.case.tokens,
        )

    def _lengths(self, work: Workload) -> list[Contender]:
        case, module, x = work.case, work.module_in(work.case.dtype), work.x_in(work.case.dtype)
        return [
            Contender(
                peer=self.name,
                dtype=case.dtype,
                call=inference_call(module, pack(x, work)),
                outputs=packed_outputs(case.time),
                tokens=case.tokens,
                variant="packed",
            ),
            Contender(
                peer=self.name,
                dtype=case.dtype,
                call=inference_call(module, x),
                outputs=plain_outputs,
                tokens=case.batch * case.time,
                variant="equal",
                full=True,
            ),
        ]
