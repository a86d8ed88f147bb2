"""Many small launches in one: captured as a CUDA graph when the same ones come again.

A graph holds the addresses of the tensors that it was captured with. So each has tensors of its
own; a call copies what it is given into them, replays, and copies back what the kernels wrote.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor | None]
Launch: TypeAlias = Callable[[Tensors], None]

_MOST = 16  # graphs that are kept; each holds its tensors


def capture(launch: Launch, tensors: Tensors) -> Callable[[], None]:
    """Record what `launch` does with these tensors; the result does it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(tensors)
    return graph.replay


class Replays:
    """The graphs of one kind of launches, the latest used ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[list[Tensor | None], Callable[[], None]] | None]
        self._kept = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self,
        key: Hashable,
        tensors: Tensors,
        read: Sequence[int],
        written: Sequence[int],
        launch: Launch,
    ) -> None:
        """Do what `launch(tensors)` does.

        key: whatever shapes the launches beside the tensors' sizes. read, written: the numbers of
        the tensors whose contents matter before and after. The first call of a kind launches,
        because many kinds never come again, and because a kernel must be compiled before it can be
        captured.
        """
        first = next(t for t in tensors if t is not None)
        stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
        sizes = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
        whole = (key, sizes, first.device, stream)
        with self._lock:  # from copy to copy: the tensors belong to one call at a time
            if whole not in self._kept:
                self._kept[whole] = None
                if len(self._kept) > _MOST:
                    self._kept.popitem(last=False)
                launch(tensors)
                return
            self._kept.move_to_end(whole)
            kept = self._kept[whole]
            if kept is None:
                own = [None if t is None else t.clone() for t in tensors]
                kept = self._kept[whole] = own, capture(launch, own)
            own, replay = kept
            _copy(read, tensors, own)
            replay()
            _copy(written, own, tensors)


def _copy(numbers: Sequence[int], source: Tensors, to: Tensors) -> None:
    for i in numbers:
        there, here = source[i], to[i]
        if there is not None and here is not None:
            here.copy_(there)
