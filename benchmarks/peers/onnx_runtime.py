"""ONNX Runtime: its fused LSTM, GRU and RNN kernels, fed through bound buffers.

The model holds one node, time-major as torch's modules are. Inputs and outputs are bound once, so
that a call costs what the kernel and the session cost, not a copy through Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
from benchmarks.workload import Workload

onnx: Any = optional("onnx")
onnxruntime: Any = optional("onnxruntime")

Array = NDArray[Any]

# Rows of torch's weights, gate by gate, in the order of the ONNX operators:
# torch has i f g o and r z n; ONNX has i o f c and z r h.
GATE_ORDER: dict[Cell, tuple[int, ...]] = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
RESULTS: dict[Cell, tuple[str, ...]] = {
    "lstm": ("output", "h_n", "c_n"),
    "gru": ("output", "h_n"),
    "rnn": ("output", "h_n"),
}


def reorder(module: nn.RNNBase, name: str, order: tuple[int, ...]) -> Array:
    """The rows of a module's weight or bias, moved gate by gate."""
    parameter: Tensor = getattr(module, name)
    gates = parameter.detach().float().chunk(len(order))
    return torch.cat([gates[index] for index in order]).numpy()


def onnx_weights(module: nn.RNNBase, cell: Cell) -> dict[str, Array]:
    """W `(1, G*H, I)`, R `(1, G*H, H)` and B `(1, 2*G*H)` of an ONNX recurrent operator."""
    order = GATE_ORDER[cell]
    biases = [reorder(module, "bias_ih_l0", order), reorder(module, "bias_hh_l0", order)]
    return {
        "W": reorder(module, "weight_ih_l0", order)[None],
        "R": reorder(module, "weight_hh_l0", order)[None],
        "B": np.concatenate(biases)[None],
    }


def largest_weight() -> int:
    """The largest quantized weight: 7 bits where products of bytes saturate, as ONNX Runtime's
    documentation asks for (`reduce_range`)."""
    return 127 if torch.cpu._is_vnni_supported() else 63


def quantize_rows(weight: Array) -> tuple[Array, Array]:
    """Symmetric int8 per output row, laid out as DynamicQuantizeLSTM wants it: `(1, I, 4*H)`."""
    largest = largest_weight()
    scale = np.abs(weight).max(axis=2) / largest  # (1, 4*H)
    scale = np.maximum(scale, 1e-12).astype(np.float32)
    rounded = np.rint(weight / scale[:, :, None]).clip(-largest, largest).astype(np.int8)
    return np.ascontiguousarray(rounded.transpose(0, 2, 1)), scale


def _node(work: Workload, weights: dict[str, Array], int8: bool) -> tuple[Any, dict[str, Array]]:
    case = work.case
    lengths = "lengths" if case.lengths else ""
    attributes: dict[str, Any] = {"hidden_size": case.hidden}
    outputs = list(RESULTS[case.cell])
    if not int8:
        if case.cell == "gru":
            attributes["linear_before_reset"] = 1
        inputs = ["x", "W", "R", "B", lengths]
        return onnx.helper.make_node(case.cell.upper(), inputs, outputs, **attributes), weights
    constants = {"B": weights["B"]}
    for name in ("W", "R"):
        constants[name], constants[f"{name}_scale"] = quantize_rows(weights[name])
        constants[f"{name}_zero"] = np.zeros_like(constants[f"{name}_scale"], np.int8)
    inputs = ["x", "W", "R", "B", lengths, "", "", ""]
    inputs += ["W_scale", "W_zero", "R_scale", "R_zero"]
    node = onnx.helper.make_node(
        "DynamicQuantizeLSTM", inputs, outputs, domain="com.microsoft", **attributes
    )
    return node, constants


def build_model(work: Workload, int8: bool) -> bytes:
    """A serialized model of one recurrent node with the case's static shapes."""
    case = work.case
    node, constants = _node(work, onnx_weights(work.module, case.cell), int8)
    float_type, int_type = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    state = [1, case.batch, case.hidden]
    shapes = {"output": [case.time, 1, case.batch, case.hidden], "h_n": state, "c_n": state}
    info = onnx.helper.make_tensor_value_info
    inputs = [info("x", float_type, [case.time, case.batch, case.input])]
    if case.lengths:
        inputs.append(info("lengths", int_type, [case.batch]))
    graph = onnx.helper.make_graph(
        [node],
        "recurrent",
        inputs,
        [info(name, float_type, shapes[name]) for name in RESULTS[case.cell]],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 14), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())


def bound_call(model: bytes, work: Workload, threads: int) -> tuple[Callable[[], object], Any]:
    """A call of a session whose inputs and outputs are bound, and the bound outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    inputs: dict[str, Array] = {"x": work.x.float().numpy()}
    if work.case.lengths:
        inputs["lengths"] = np.array(work.case.lengths, np.int32)
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    results: dict[str, Any] = {}
    for result in session.get_outputs():
        empty = np.empty(result.shape, np.float32)
        results[result.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        binding.bind_ortvalue_output(result.name, results[result.name])

    def call() -> object:
        session.run_with_iobinding(binding)
        return results

    return call, results


def to_torch(results: Any) -> dict[str, Tensor]:
    """The bound outputs as tensors, `(T, B, H)` and `(1, B, H)`."""
    found = {name: torch.from_numpy(np.array(value.numpy())) for name, value in results.items()}
    found["output"] = found["output"].squeeze(1)
    return found


class OnnxRuntime:
    """ONNX Runtime on the CPU: float32, and int8 for the LSTM."""

    name = "onnxruntime"

    def version(self) -> str | None:
        return package_version("onnxruntime")

    def _why_not(self, work: Workload, dtype: DType) -> str | None:
        if onnxruntime is None:
            return not_installed("onnxruntime")
        if onnx is None:
            return not_installed("onnx")
        if work.case.training:
            return "ONNX Runtime does not train"
        if dtype == "int8" and work.case.cell != "lstm":
            return "ONNX Runtime's int8 covers the LSTM only"
        if dtype not in ("float32", "int8"):
            return f"ONNX Runtime has no {dtype} recurrent kernel on the CPU"
        return None

    def offer(self, work: Workload, threads: int) -> Offer:
        offer = Offer()
        for dtype in dtypes_to_run(work):
            reason = self._why_not(work, dtype)
            if reason:
                offer.absent[f"{self.name} {variant_of(dtype, work)}".strip()] = reason
                continue
            call, _ = bound_call(build_model(work, dtype == "int8"), work, threads)
            offer.contenders.append(
                Contender(
                    peer=self.name,
                    dtype=dtype,
                    call=call,
                    outputs=to_torch,
                    tokens=work.case.tokens,
                    variant="lengths" if work.case.lengths else variant_of(dtype, work),
                )
            )
        return offer
