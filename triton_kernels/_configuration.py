"""What a kernel is compiled for, so that it can be compiled where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

# As Triton names the types of what a pointer points to.
TYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Configuration:
    """A kernel with everything that shapes its code.

    kernel: the jitted function. types: of its arguments, as Triton writes them ("*fp32", "i32");
    constants: the values of those that are part of the code. absent: names of tensors that are not
    there. aligned: names of numbers that are multiples of 16, as strides mostly are: then a
    thread loads several numbers at once. stages: of the pipeline of its loop. registers:
    that a thread may have, where it is not the compiler's choice. tensor_cores: whether its
    products are for them. default: False for those that few calls take.
    """

    kernel: Any
    dtype: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    tensor_cores: bool = False
    absent: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    stages: int = 3
    registers: int | None = None
    default: bool = True

    @property
    def name(self) -> str:
        plain = " plain" if self.absent else ""
        return f"{self.kernel.__name__} {self.dtype}{plain}"

    def plain(self, *absent: str) -> Configuration:
        """The same without these tensors."""
        return replace(self, absent=absent)
