"""Many small launches in one: captured as a CUDA graph when the same ones come again.

A graph holds the addresses of the tensors that it was captured with. So each has tensors of its
own; a call copies what it is given into them, replays, and copies back what the kernels wrote.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from encdec_fast.backends.locks import ForkSafeLock

Tensors: TypeAlias = Sequence[Tensor | None]
Launch: TypeAlias = Callable[[Tensors], None]

_MOST = 16  # graphs that are kept; each holds its tensors
_recording = ForkSafeLock()


def record(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what `launch` does, without doing it; the result does it. It was done once before:
    nothing can be compiled while it is recorded."""
    # One at a time in the process: a capture begins by waiting for the device, which breaks others.
    with _recording.current:
        graph = torch.cuda.CUDAGraph()
        # A stream of this device, and no stop for what other threads do meanwhile.
        stream = torch.cuda.Stream(device)
        # Streams come again, and cuBLAS keeps a workspace for each: one that lies in another graph
        # would go with that.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                launch()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


def capture(launch: Launch, tensors: Tensors, device: torch.device) -> Callable[[], None]:
    """Record what `launch` does with these tensors; the result does it again."""
    launch(tensors)  # compiled for these very tensors
    return record(lambda: launch(tensors), device)


class Replays:
    """The graphs of one kind of launches, the latest used ones."""

    def __init__(self) -> None:
        # None: seen once.
        self._kept: OrderedDict[Hashable, tuple[Tensors, Callable[[], None]] | None] = OrderedDict()
        self._lock = ForkSafeLock()

    def run(
        self,
        kind: Hashable,
        tensors: Tensors,
        read: Sequence[int],
        written: Sequence[int],
        launch: Launch,
    ) -> None:
        """Do what `launch(tensors)` does.

        kind: whatever shapes the launches beside the tensors' sizes. read, written: the numbers of
        the tensors whose contents matter before and after. The first call of a kind launches,
        because many kinds never come again.
        """
        device = next(t for t in tensors if t is not None).device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        sizes = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
        key = (kind, sizes, device, stream)
        with self._lock.current:  # from copy to copy: the tensors belong to one call at a time
            if key not in self._kept:
                self._kept[key] = None
                if len(self._kept) > _MOST:
                    self._kept.popitem(last=False)
                launch(tensors)
                return
            self._kept.move_to_end(key)
            kept = self._kept[key]
            if kept is None:
                # Not inference tensors, which could be written in inference mode only.
                with torch.inference_mode(False):
                    own = [None if t is None else t.clone() for t in tensors]
                kept = self._kept[key] = own, capture(launch, own, device)
            mine, replay = kept
            _copy(read, tensors, mine)
            replay()
            _copy(written, mine, tensors)


def _copy(numbers: Sequence[int], source: Tensors, to: Tensors) -> None:
    pairs = [(to[i], source[i]) for i in numbers if source[i] is not None]
    torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])  # in one launch for a dtype
