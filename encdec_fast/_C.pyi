"""Types of the compiled module (csrc/python/module.cpp)."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    flags: str
    cuda: bool

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
