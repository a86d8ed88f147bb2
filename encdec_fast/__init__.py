"""Fast kernels for encoder-decoder models inside PyTorch."""

from encdec_fast import nn, ops
from encdec_fast._version import __version__
from encdec_fast.backends import BackendRefused, explain, use_backend
from encdec_fast.generation import GenerationConfig, generate
from encdec_fast.nn import optimization_report, optimize, restore
from encdec_fast.ops import repack

__all__ = [
    "BackendRefused",
    "GenerationConfig",
    "__version__",
    "explain",
    "generate",
    "nn",
    "ops",
    "optimization_report",
    "optimize",
    "repack",
    "restore",
    "use_backend",
]
