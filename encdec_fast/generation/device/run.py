"""Searches on the device: the first step runs as it is, then a graph of it is replayed.

The host looks at the results every few steps. What a search needs on the device, a session, is kept
with its graph for the next call of the same sizes.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import requested_backend
from encdec_fast.backends.locks import ForkSafeLock
from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.decoders import Decoder, RecurrentDecoder
from encdec_fast.generation.device.recurrent import RecurrentSteps
from encdec_fast.generation.device.search import Search, Sizes
from encdec_fast.generation.device.transformer import TransformerSteps
from encdec_fast.generation.device.weights import Weights
from encdec_fast.generation.engine import (
    Encoded,
    Request,
    Stream,
    check_encoded,
    count_rows,
    traces_of,
)
from encdec_fast.generation.result import Hypothesis
from encdec_fast.ops import _triton

STEPS = 8  # between two looks of the host
KEPT = 4  # sessions of a model
ALIGNED = 16  # source lengths are rounded up to it, so that fewer sessions serve more calls
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def why_not(device: str, weight_dtype: str) -> list[str]:
    """Reasons against a search on the device that a model is on, with weights held in a dtype."""
    reasons = []
    if weight_dtype not in DTYPES:
        reasons.append(f"weights in {weight_dtype} are for the CPU")
    return reasons + _triton.unfit_device(device)


class Session:
    """What one search at a time has on the device, and the graph of its step.

    steps: `begin(encoded)` and `step(tokens, parents, position, ancestors)` of a decoder.
    """

    def __init__(self, search: Search, steps: Any) -> None:
        self.search, self.steps = search, steps
        # Where tensors' values are checked, they are read, which a capture does not allow.
        checks = os.environ.get("ENCDEC_FAST_CHECK") == "1"
        self.captures = search.device.type == "cuda" and not checks
        self.replay: Callable[[], None] | None = None

    @classmethod
    def of(
        cls, decoder: Decoder, config: GenerationConfig, sizes: Sizes, S: int, dtype: torch.dtype
    ) -> Session:
        """S: positions of the memory."""
        device = decoder.output.weight.device
        weights, B, K, needs = Weights(decoder, dtype, device), sizes.B, sizes.K, sizes.S > 0
        steps: RecurrentSteps | TransformerSteps
        if isinstance(decoder, RecurrentDecoder):
            steps = RecurrentSteps(decoder, weights, B, K, S, needs)
        else:
            steps = TransformerSteps(decoder, weights, B, K, S, sizes.L, needs)
        return cls(Search(config, sizes, device), steps)

    def step(self) -> None:
        """Feed the next tokens and choose those after them."""
        search = self.search
        taken = self.steps.step(
            search.next_tokens, search.parents, search.position[:1], search.ancestors
        )
        search.advance(*taken)

    def take(self) -> None:
        """A step: as it is where it is the first one ever, so that all its kernels are compiled."""
        if self.replay is not None:
            self.replay()
            return
        self.step()
        if self.captures:
            self.replay = _triton.kernels("_replay").record(self.step, self.search.device)


_sessions: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Session]] = weakref.WeakKeyDictionary()
_lock = ForkSafeLock()


def _key(decoder: Decoder, config: GenerationConfig, *sizes: Any) -> Any:
    """What a session can be used again for: everything that its launches depend on."""
    # The weights' counters do not matter: they are read where they lie, or copied anew.
    traces = [t[0] if isinstance(t, tuple) else t for t in traces_of(decoder)]
    options = repr(astuple(config.replace(seed=None, max_time=None, max_batch_tokens=None)))
    return repr(traces), options, sizes, requested_backend()


def _session(
    owner: Any,
    decoder: Decoder,
    config: GenerationConfig,
    sizes: Sizes,
    S: int,
    dtype: torch.dtype,
) -> tuple[Any, Session]:
    key = _key(decoder, config, sizes, S, dtype)
    with _lock.current:
        found = _sessions.setdefault(owner, OrderedDict()).pop(key, None)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = Session.of(decoder, config, sizes, S, dtype)
    return key, found


def _put_back(owner: Any, key: Any, session: Session) -> None:
    with _lock.current:
        kept = _sessions.setdefault(owner, OrderedDict())
        kept[key] = session
        while len(kept) > KEPT:
            kept.popitem(last=False)


def _spread(encoded: Encoded, draws: int) -> Encoded:
    """Each draw as a sentence of its own."""

    def many(tensor: Tensor | None, dim: int) -> Tensor | None:
        return None if tensor is None else tensor.repeat_interleave(draws, dim)

    states = encoded.states
    if isinstance(states, tuple):
        states = tuple(many(state, 1) for state in states)
    elif states is not None:
        states = many(states, 1)
    lengths = [n for n in encoded.lengths for _ in range(draws)]
    return Encoded(many(encoded.memory, 0), lengths, states, many(encoded.context, 0))


def _padded_source(decoder: Decoder, S: int) -> int:
    most = decoder.max_source_length
    whole = -(-S // ALIGNED) * ALIGNED
    return whole if most is None else min(whole, most)


def _common(paths: list[list[int]]) -> list[int]:
    """What all of them begin with."""
    columns = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*paths, strict=False))
    return [tokens[0] for tokens in columns]


class _Watch:
    """What the host tells of a search while it runs: sentences that ended, tokens that are sure."""

    def __init__(
        self,
        search: Search,
        requests: Sequence[Request],
        draws: int,
        finished: Callable[[int], None] | None,
        written: Stream | None,
    ) -> None:
        self.search, self.requests, self.draws = search, requests, draws
        self.finished, self.written = finished, written
        self.open = [True] * len(requests)
        self.streamed = [0] * len(requests)

    def look(self) -> bool:
        """Whether any hypothesis is open. RuntimeError where scores are no numbers."""
        failed = int(self.search.failed)
        if failed:
            raise RuntimeError(f"the decoder's scores of token {failed} are NaN or infinite")
        now: list[list[bool]] = self.search.open.tolist()
        if self.written is not None:
            self._stream(now)
        for b, rows in enumerate(now):
            if self.open[b] and not any(rows):
                self.open[b] = False
                if self.finished is not None and b % self.draws == 0:
                    self.finished(b // self.draws)
        return any(self.open)

    def _stream(self, now: list[list[bool]]) -> None:
        found, last = self.search.read(), int(self.search.position[0])
        for b, request in enumerate(self.requests):
            if not self.open[b]:
                continue
            prompt = request.prompt
            if any(now[b]):
                paths = self.search.paths(found, b, len(prompt), last, now[b])
            else:  # what is returned first
                best = self.search.hypotheses(found, b, prompt, 1, 0)
                paths = [hypothesis.tokens[len(prompt) :] for hypothesis in best]
            sure = _common(paths)
            if len(sure) > self.streamed[b]:
                assert self.written is not None
                self.written(b // self.draws, sure[self.streamed[b] :])
                self.streamed[b] = len(sure)


def run(
    owner: Any,
    decoder: Decoder,
    encoded: Encoded,
    requests: Sequence[Request],
    config: GenerationConfig,
    *,
    weight_dtype: str,
    seed: int,
    need_attention: bool = False,
    finished: Callable[[int], None] | None = None,
    written: Stream | None = None,
    timing: dict[str, Any] | None = None,
) -> list[list[Hypothesis]]:
    """Search for the targets of a batch; arguments and results are those of `engine.run`."""
    count_rows(len(requests), config)
    check_encoded(decoder, encoded, len(requests))
    shown = 0 if encoded.memory is None else encoded.memory.shape[1]
    S = _padded_source(decoder, shown)
    attends = decoder.attends and (need_attention or config.coverage_penalty > 0)
    sizes = sizes_of(requests, config, S if attends else 0, decoder.output.weight.shape[0])
    key, session = _session(owner, decoder, config, sizes, S, DTYPES[weight_dtype])
    with torch.cuda.device_of(session.search.sums), torch.no_grad():
        results = drive(
            *(session, encoded, requests, config, seed),
            shown=shown if need_attention else 0,
            finished=finished,
            written=written,
            timing=timing,
        )
    _put_back(owner, key, session)
    return results


def sizes_of(requests: Sequence[Request], config: GenerationConfig, S: int, V: int) -> Sizes:
    """Of a search for these; S: of the attention that is kept, or 0."""
    soft = config.prefix_bias is not None
    return Sizes(
        len(requests) * _draws(config),
        config.num_beams,
        max(config.limit(len(request.prompt)) for request in requests),
        max(len(request.prompt) for request in requests),
        max(len(request.prefix) for request in requests) if soft else 0,
        S,
        V,
    )


def _draws(config: GenerationConfig) -> int:
    return config.num_return_sequences if config.draws else 1


def drive(
    session: Session,
    encoded: Encoded,
    requests: Sequence[Request],
    config: GenerationConfig,
    seed: int,
    *,
    shown: int = 0,
    finished: Callable[[int], None] | None = None,
    written: Stream | None = None,
    timing: dict[str, Any] | None = None,
) -> list[list[Hypothesis]]:
    """A whole search in a session; shown: the size of the attention that is returned, or 0."""
    search, draws = session.search, _draws(config)
    if draws > 1:
        encoded = _spread(encoded, draws)
        requests = [
            request._replace(number=request.number * draws + i)
            for request in requests
            for i in range(draws)
        ]
    began, steps, late = time.perf_counter(), 0, False
    session.steps.begin(encoded)
    search.begin(requests, encoded.lengths, seed)
    watch = _Watch(search, requests, draws, finished, written)
    each = 1 if written is not None else STEPS
    while steps < search.sizes.L - 1:
        if not late and config.max_time and time.perf_counter() - began > config.max_time:
            late = True
            search.late.fill_(True)
        session.take()
        steps += 1
        if (steps % each == 0 or late) and not watch.look():
            break
    watch.look()
    found = search.read()
    results: list[list[Hypothesis]] = []
    wanted = 1 if config.draws else config.num_return_sequences
    for b, request in enumerate(requests):
        own = search.hypotheses(found, b, request.prompt, wanted, shown)
        if b % draws:
            results[-1] += own
        else:
            results.append(own)
    if timing is not None:
        rows = steps * search.sizes.B * search.sizes.K
        timing |= {"steps": steps, "rows": rows, "device_seconds": time.perf_counter() - began}
    return results
