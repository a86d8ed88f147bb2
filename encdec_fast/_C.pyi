"""Types of the compiled module (csrc/python/)."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    flags: str
    cuda: bool
    cuda_version: str

class CpuInfo(TypedDict):
    model: str
    features: list[str]
    isas: list[str]
    cores: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int

def build_info() -> BuildInfo: ...
def cpu_info() -> CpuInfo: ...
def chosen_isa() -> str: ...
def measure_peak(format: str, threads: int) -> float: ...
def measure_read_bandwidth(bytes_per_thread: int, threads: int) -> float: ...
def measure_barrier(threads: int) -> float: ...
def rnn_plan(
    cell: int,
    steps: int,
    rows: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    output_size: int,
    directions: int,
    format: str,
    threads: int,
) -> str: ...
def rnn_gpu_plan(
    cell: int,
    format: str,
    backward: bool,
    batch: int,
    hidden_size: int,
    directions: int,
    layers: int,
    capability: int,
    processors: int,
    shared_bytes: int,
    clusters: Sequence[int],
) -> tuple[list[int], int, float, str, str]: ...

# The generation engine (csrc/python/generation.cpp). A matrix: (address, dtype, rows, columns,
# elements from row to row).
_Matrix = tuple[int, int, int, int, int]
_Hypothesis = tuple[list[int], float, list[float], bytes]

class Options:
    def __init__(self, options: dict[str, Any]) -> None: ...

class TransformerModel:
    def __init__(
        self,
        sizes: dict[str, Any],
        layers: list[dict[str, Any]],
        watched: list[_Matrix],
        format: int,
        threads: int,
    ) -> None: ...
    def fresh(self) -> bool: ...
    @property
    def bytes(self) -> int: ...

class RecurrentModel:
    def __init__(
        self,
        sizes: dict[str, Any],
        layers: list[dict[str, Any]],
        watched: list[_Matrix],
        format: int,
        threads: int,
    ) -> None: ...
    def fresh(self) -> bool: ...
    @property
    def bytes(self) -> int: ...

class Shortlist:
    def __init__(
        self, rows: tuple[_Matrix, int], tokens: Sequence[int], format: int, threads: int
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class Decoder: ...

class TransformerDecoder(Decoder):
    def __init__(self, model: TransformerModel) -> None: ...
    def restrict(self, shortlist: Shortlist | None) -> None: ...
    def begin(
        self, memory: int, B: int, S: int, lengths: list[int], rows: int, limit: int, threads: int
    ) -> None: ...

class RecurrentDecoder(Decoder):
    def __init__(self, model: RecurrentModel) -> None: ...
    def restrict(self, shortlist: Shortlist | None) -> None: ...
    def begin(
        self,
        B: int,
        S: int,
        h: int,
        c: int,
        context: int,
        memory: int,
        lengths: list[int],
        rows: int,
        threads: int,
    ) -> None: ...

class PythonDecoder(Decoder):
    def __init__(
        self,
        step: Callable[..., None],
        vocabulary: int,
        attention_size: int,
        lengths: list[int],
    ) -> None: ...

def search(
    decoder: Decoder,
    requests: Sequence[tuple[Sequence[int], Sequence[int], int]],
    options: Options,
    seed: int,
    need_attention: bool,
    threads: int,
    finished: Callable[[int], None] | None,
    written: Callable[[int, list[int]], None] | None,
    timing: dict[str, Any] | None,
) -> list[list[_Hypothesis]]: ...
