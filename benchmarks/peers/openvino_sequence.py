"""OpenVINO: LSTMSequence, GRUSequence and RNNSequence on its CPU plugin.

The sequences are batch-major, OpenVINO's own layout, so that no transpose is timed. Shapes are
static, the hint is latency, and the input stays in one buffer that the request owns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Cell, DType
from benchmarks.peers.base import (
    Contender,
    Offer,
    dtypes_to_run,
    not_installed,
    optional,
    package_version,
    variant_of,
)
from benchmarks.peers.onnx_runtime import Array, reorder
from benchmarks.workload import Workload

openvino: Any = optional("openvino")

# OpenVINO has f i c o and z r h; torch has i f g o and r z n.
GATE_ORDER: dict[Cell, tuple[int, ...]] = {"lstm": (1, 0, 2, 3), "gru": (1, 0, 2), "rnn": (0,)}
PRECISION: dict[DType, str] = {"float32": "f32", "bfloat16": "bf16"}


def sequence_weights(module: nn.RNNBase, cell: Cell) -> tuple[Array, Array, Array]:
    """W `(1, G*H, I)`, R `(1, G*H, H)` and B, which sums the biases that may be summed."""
    order = GATE_ORDER[cell]
    input_bias, hidden_bias = (
        reorder(module, "bias_ih_l0", order),
        reorder(module, "bias_hh_l0", order),
    )
    bias = input_bias + hidden_bias
    if cell == "gru":
        # The reset gate multiplies the hidden bias of the new gate: that one stays apart.
        size = module.hidden_size
        bias = np.concatenate([bias[: 2 * size], input_bias[2 * size :], hidden_bias[2 * size :]])
    weights = (reorder(module, "weight_ih_l0", order), reorder(module, "weight_hh_l0", order), bias)
    return weights[0][None], weights[1][None], weights[2][None]


@cache
def openvino_capabilities() -> tuple[str, ...]:
    """What OpenVINO's CPU plugin can compute in; elsewhere it would quietly use float32."""
    return tuple(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def build_model(work: Workload) -> Any:
    """A model with one sequence operator and the case's static shapes."""
    case, ops = work.case, openvino.opset15
    weight_ih, weight_hh, bias = sequence_weights(work.module, case.cell)
    x = ops.parameter([case.batch, case.time, case.input], np.float32, name="x")
    zeros = np.zeros((case.batch, 1, case.hidden), np.float32)
    parameters = [x]
    if case.lengths:
        lengths = ops.parameter([case.batch], np.int32, name="lengths")
        parameters.append(lengths)
    else:
        lengths = np.full(case.batch, case.time, np.int32)
    tail = (lengths, weight_ih, weight_hh, bias, case.hidden, "FORWARD")
    if case.cell == "lstm":
        node = ops.lstm_sequence(x, zeros, zeros, *tail)
    elif case.cell == "gru":
        node = ops.gru_sequence(x, zeros, *tail, linear_before_reset=True)
    else:
        node = ops.rnn_sequence(x, zeros, *tail, activations=["tanh"])
    # A model's results are float32 whatever the precision inside.
    return openvino.Model(node.outputs(), parameters, "recurrent")


def request_call(work: Workload, dtype: DType, threads: int) -> Callable[[], object]:
    """A call of an inference request whose inputs are set once."""
    core = openvino.Core()
    compiled = core.compile_model(
        build_model(work),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISION[dtype],
        },
    )
    request = compiled.create_infer_request()
    x = np.ascontiguousarray(work.x.float().transpose(0, 1).numpy())
    request.set_tensor(compiled.inputs[0], openvino.Tensor(x))
    if work.case.lengths:
        lengths = np.array(work.case.lengths, np.int32)
        request.set_tensor(compiled.inputs[1], openvino.Tensor(lengths))

    def call() -> object:
        # share_outputs hands out views of the request's buffers instead of copies.
        request.infer(share_outputs=True)
        return request

    return call


def to_torch(request: Any) -> dict[str, Tensor]:
    """The request's outputs as tensors, `(T, B, H)` and `(1, B, H)`."""
    names = ("output", "h_n", "c_n")
    arrays = [np.array(tensor.data) for tensor in request.output_tensors]
    found = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=False)}
    found["output"] = found["output"].squeeze(1).transpose(0, 1)
    return {
        name: tensor if name == "output" else tensor.transpose(0, 1)
        for name, tensor in found.items()
    }


class OpenVino:
    """OpenVINO on the CPU: float32, and bfloat16 through its precision hint."""

    name = "openvino"

    def version(self) -> str | None:
        return package_version("openvino")

    def _why_not(self, work: Workload, dtype: DType) -> str | None:
        if openvino is None:
            return not_installed("openvino")
        if work.case.training:
            return "OpenVINO does not train"
        if dtype not in PRECISION:
            return f"OpenVINO's CPU plugin has no {dtype} sequence without a quantized model"
        if dtype == "bfloat16" and "BF16" not in openvino_capabilities():
            return "OpenVINO has no bfloat16 on this CPU"
        return None

    def offer(self, work: Workload, threads: int) -> Offer:
        offer = Offer()
        for dtype in dtypes_to_run(work):
            reason = self._why_not(work, dtype)
            if reason:
                offer.absent[f"{self.name} {variant_of(dtype, work)}".strip()] = reason
                continue
            offer.contenders.append(
                Contender(
                    peer=self.name,
                    dtype=dtype,
                    call=request_call(work, dtype, threads),
                    outputs=to_torch,
                    tokens=work.case.tokens,
                    variant="lengths" if work.case.lengths else variant_of(dtype, work),
                )
            )
        return offer
