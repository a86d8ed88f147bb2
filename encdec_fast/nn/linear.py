"""A drop-in torch.nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Description
from encdec_fast.ops._call import weight_dtype_name
from encdec_fast.ops.linear import describe, run


class Linear(torch.nn.Linear):
    """torch.nn.Linear on packed weights where no gradient is needed; with one it is torch's own.

    weight_dtype: None, torch.bfloat16 or "int8", the dtype in which inference holds the weight;
    the parameter keeps its own. RuntimeError where a gradient is needed.
    """

    weight_dtype: torch.dtype | str | None = None

    def forward(self, input: Tensor) -> Tensor:
        dtype = weight_dtype_name(self.weight_dtype, training=False)  # `run` knows of training
        # `self.weight` is a failed lookup and a call in Python, which small products feel.
        # Pruning, a parametrization or a replica has it elsewhere.
        own = self._parameters
        if "weight" not in own or "bias" not in own:
            return run(input, self.weight, self.bias, weight_dtype=dtype)
        weight = own["weight"]
        assert weight is not None  # torch's Linear always has one
        return run(input, weight, own["bias"], weight_dtype=dtype)

    def _encdec_fast_describe(self, input: Tensor) -> Description:
        """What `explain` asks of a module."""
        options: dict[str, Any] = {"weight_dtype": self.weight_dtype}
        return describe(input, self.weight, self.bias, **options)
