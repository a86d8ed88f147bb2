"""Searches on the device: the first steps run as they are, then a graph of one is replayed.

The host looks at the results every few steps. What a search needs on the device, a session, is kept
with its graph for the next call of the same sizes.
"""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import BackendRefused, requested_backend
from encdec_fast.backends.locks import ForkSafeLock
from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.decoders import Decoder, RecurrentDecoder, parts_of
from encdec_fast.generation.device.decode_step import MOST_ROWS, shared_bytes
from encdec_fast.generation.device.recurrent import RecurrentSteps
from encdec_fast.generation.device.search import Search, Sizes
from encdec_fast.generation.device.transformer import TransformerSteps
from encdec_fast.generation.device.weights import Weights, place_of
from encdec_fast.generation.engine import (
    Encoded,
    Request,
    Stream,
    check_encoded,
    count_rows,
)
from encdec_fast.generation.result import Hypothesis
from encdec_fast.ops import _triton
from encdec_fast.ops._call import without_autocast
from encdec_fast.ops._checks import checks_asked
from encdec_fast.ops._recurrent_cuda import limits

STEPS = 8  # between two looks of the host
EAGER = 12  # steps of a session before it is captured: what comes once is hardly worth a graph
KEPT = 4  # sessions of a model
ALIGNED = 16  # source lengths are rounded up to it, so that fewer sessions serve more calls
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_log = logging.getLogger(__name__)


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
        self.captures = search.device.type == "cuda" and not checks_asked()
        self.replay: Callable[[], None] | None = None
        self.taken = 0  # steps that ran as they are
        self.prepared = 0.0  # seconds in which kernels were compiled, or the graph was made

    def step(self) -> None:
        """Feed the next tokens and choose those after them."""
        search = self.search
        taken = self.steps.step(
            search.next_tokens, search.parents, search.position[:1], search.ancestors
        )
        search.advance(*taken)

    def take(self) -> None:
        """A step, by the graph once there is one."""
        if self.replay is not None:
            self.replay()
            return
        began = time.perf_counter()
        self.step()
        self.taken += 1
        if self.taken == 1:
            self.prepared += time.perf_counter() - began
        if self.captures and self.taken >= EAGER:
            began = time.perf_counter()
            self._capture()
            self.prepared += time.perf_counter() - began

    def _capture(self) -> None:
        try:
            self.replay = _triton.kernels("_replay").record(self.step, self.search.device)
        except RuntimeError as error:  # somebody else's doing: the steps are as right without
            self.captures = False
            _log.warning("generate: a step could not be captured, and runs as it is: %s", error)


class _Kept:
    """What a model has on the device: sessions, the latest used ones, and weights they share."""

    def __init__(self) -> None:
        self.sessions: OrderedDict[Any, Session] = OrderedDict()
        self.weights: dict[Any, Weights] = {}


_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()
_lock = ForkSafeLock()


def release(model: Any) -> None:
    """Free what generation keeps of a model on a GPU between calls; the next call makes it anew.

    model: as given to `generate`, or a model of transformers' `generate` after `optimize`.
    """
    owner = vars(model).get("generate", model)
    with _lock.current:
        for own in (model, owner):
            _kept.pop(own, None)


def _session(
    owner: Any,
    decoder: Decoder,
    config: GenerationConfig,
    sizes: Sizes,
    S: int,
    dtype: torch.dtype,
    one_launch: bool,
) -> tuple[Any, Session]:
    """A session that nobody uses, and the key that it is put back with; S: of the memory."""
    places = tuple(place_of(tensor) for tensor in parts_of(decoder).tensors)
    own = (places, repr(parts_of(decoder).settings), dtype)
    options = repr(astuple(config.replace(seed=None, max_time=None, max_batch_tokens=None)))
    # What else the launches depend on.
    around = requested_backend(), checks_asked(), torch.get_float32_matmul_precision()
    key = (own, options, sizes, S, around, one_launch)
    with _lock.current:
        kept = _kept.setdefault(owner, _Kept())
        found = kept.sessions.pop(key, None)
        weights = kept.weights.get(own)
        # Other tensors than the model has now serve nobody.
        for old in [old for old in kept.weights if old[0] != places]:
            del kept.weights[old]
        for other in [other for other in kept.sessions if other[0][0] != places]:
            del kept.sessions[other]
        while found is None and len(kept.sessions) >= KEPT:
            kept.sessions.popitem(last=False)
    if found is not None:
        return key, found

    def make() -> Session:
        nonlocal weights
        with torch.inference_mode(False), torch.no_grad():
            device = decoder.output.weight.device
            weights = Weights(decoder, dtype, device) if weights is None else weights
            B, K, needs = sizes.B, sizes.K, sizes.S > 0
            steps: RecurrentSteps | TransformerSteps
            if isinstance(decoder, RecurrentDecoder):
                steps = RecurrentSteps(decoder, weights, B, K, S, needs, one_launch)
            else:
                steps = TransformerSteps(decoder, weights, B, K, S, sizes.L, needs)
            return Session(Search(config, sizes, device), steps)

    try:
        found = make()
    except torch.OutOfMemoryError:
        with _lock.current:
            kept.sessions.clear()
        torch.cuda.empty_cache()
        found = make()
    with _lock.current:
        assert weights is not None
        kept.weights[own] = weights
    return key, found


def _put_back(owner: Any, key: Any, session: Session) -> None:
    with _lock.current:
        kept = _kept.setdefault(owner, _Kept()).sessions
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


def _rounded(count: int, to: int) -> int:
    return -(-count // to) * to


def _padded_source(decoder: Decoder, S: int) -> int:
    most = decoder.max_source_length
    whole = _rounded(S, ALIGNED)
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
        failed, now = self.search.state(len(self.requests))
        if failed:
            raise RuntimeError(f"the decoder's scores of token {failed} are NaN or infinite")
        if self.written is not None:
            self._stream(now)
        for b, rows in enumerate(now):
            if self.open[b] and not any(rows):
                self.open[b] = False
                if self.finished is not None and b % self.draws == 0:
                    self.finished(b // self.draws)
        return any(self.open)

    def _stream(self, now: list[list[bool]]) -> None:
        found, last = self.search.read(with_attention=False), int(self.search.position[0])
        for b, request in enumerate(self.requests):
            if not self.open[b]:
                continue
            prompt = request.prompt
            if any(now[b]):
                paths = found.paths(b, len(prompt), last, now[b])
            else:  # what is returned first
                best = found.hypotheses(b, prompt, 1, 0)
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
    one_launch: bool = False,
) -> list[list[Hypothesis]]:
    """Search for the targets of a batch; arguments and results are those of `engine.run`.

    one_launch: a step of the decoder is one launch (decode_step.py). BackendRefused where there are
    more rows than it has.
    """
    count_rows(len(requests), config)
    check_encoded(decoder, encoded, len(requests))
    shown = 0 if encoded.memory is None else encoded.memory.shape[1]
    S = _padded_source(decoder, shown)
    attends = decoder.attends and (need_attention or config.coverage_penalty > 0)
    V = decoder.output.weight.shape[0]
    sizes = sizes_of(requests, config, S if attends else 0, V, kept=need_attention and attends)
    rows = sizes.B * sizes.K
    if one_launch and rows > MOST_ROWS:
        raise BackendRefused(
            f"generate: the decode step of the cuda backend has at most {MOST_ROWS} rows, and here "
            f"are {rows} ({sizes.B} sentences of {sizes.K} beams): lower max_batch_tokens, or ask "
            "for another backend"
        )
    device = decoder.output.weight.device
    if one_launch:
        assert isinstance(decoder, RecurrentDecoder)
        has = limits(-1 if device.type == "cpu" else decoder.output.weight.get_device())
        needed = shared_bytes(decoder, rows, S)
        if has.capability < 80 or needed > has.shared_bytes:
            raise BackendRefused(
                "generate: the decode step of the cuda backend needs compute capability 8.0 and "
                f"{needed} bytes of shared memory for a block, and the device has "
                f"{has.capability / 10} and {has.shared_bytes}"
            )
    here = torch.cuda.device_of(decoder.output.weight)
    with here, torch.no_grad(), without_autocast(device.type):
        key, session = _session(owner, decoder, config, sizes, S, DTYPES[weight_dtype], one_launch)
        # Another description may have the same tensors' memory, and other tensors.
        session.steps.decoder = decoder
        session.steps.weights.refresh(decoder)
        try:
            results = drive(
                *(session, encoded, requests, config, seed),
                shown=shown if need_attention else 0,
                finished=finished,
                written=written,
                timing=timing,
            )
        except BaseException:
            if device.type == "cuda":  # steps may be on their way in what is given up now
                torch.cuda.current_stream(device).synchronize()
            raise
    _put_back(owner, key, session)
    return results


def sizes_of(
    requests: Sequence[Request], config: GenerationConfig, S: int, V: int, *, kept: bool
) -> Sizes:
    """Of a search for these, with some room; S: of the attention that is looked at, or 0."""
    B = len(requests) * _draws(config)
    soft = config.prefix_bias is not None
    longest = max(len(request.prefix) for request in requests) if soft else 0
    return Sizes(
        B if B <= 8 else _rounded(B, 8 if B <= 64 else 32),
        config.num_beams,
        _rounded(max(config.limit(len(request.prompt)) for request in requests), 16),
        _rounded(max(len(request.prompt) for request in requests), 8),
        _rounded(longest, 8),
        S,
        V,
        kept,
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
    # What is prepared once is not the search's time.
    began, steps, late = time.perf_counter() - session.prepared, 0, False
    most = max(config.limit(len(request.prompt)) for request in requests)
    session.steps.begin(encoded)
    search.begin(requests, encoded.lengths, seed)
    watch = _Watch(search, requests, draws, finished, written)
    each = 1 if written is not None else STEPS
    looked = False  # since the last step
    going = True
    while going and steps < most - 1:
        spent = time.perf_counter() - began - session.prepared
        if not late and config.max_time and spent > config.max_time:
            late = True
            search.late.fill_(True)
        session.take()
        steps += 1
        looked = steps % each == 0 or late
        if looked:
            going = watch.look()
    if not looked:
        watch.look()
    found = search.read()
    results: list[list[Hypothesis]] = []
    wanted = 1 if config.draws else config.num_return_sequences
    for b, request in enumerate(requests):
        own = found.hypotheses(b, request.prompt, wanted, shown)
        if b % draws:
            results[-1] += own
        else:
            results.append(own)
    if timing is not None:
        spent = time.perf_counter() - began - session.prepared
        rows = steps * len(requests) * search.sizes.K
        timing |= {"steps": steps, "rows": rows, "device_seconds": spent}
    return results
