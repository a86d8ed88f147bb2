"""One small adapter per peer. A peer that is not installed says so and is left out."""

from __future__ import annotations

from benchmarks.peers.base import Contender, Offer, Peer
from benchmarks.peers.onnx_runtime import OnnxRuntime
from benchmarks.peers.openvino_sequence import OpenVino
from benchmarks.peers.ours import EncdecFast
from benchmarks.peers.torch_eager import TorchEager

__all__ = ["Contender", "Offer", "Peer", "all_peers"]


def all_peers() -> list[Peer]:
    """Every peer, in the order of the tables' columns."""
    return [TorchEager(), OnnxRuntime(), OpenVino(), EncdecFast()]
