"""generate(): from source tokens to target tokens, with a whole model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from encdec_fast.backends import (
    Backend,
    Description,
    explained_by,
    library,
    requested_backend,
    select,
    use_backend,
)
from encdec_fast.backends.locks import ForkSafeLock
from encdec_fast.generation import device, engine, reference, step
from encdec_fast.generation._inputs import batches_of, check_lengths, requests_of, sources_of
from encdec_fast.generation._snapshot import Snapshot
from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.decoders import Decoder
from encdec_fast.generation.describe import NotDescribed
from encdec_fast.generation.engine import Encoded, Request, Stream
from encdec_fast.generation.result import Hypothesis

WEIGHT_DTYPES: dict[Any, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    "int8": "int8",
}


class Generates(Protocol):
    """What `generate` asks of a model; those of `encdec_fast.models` answer it.

    source_padding: the token that fills up a source. A model of your own can answer through any
    object that has these four (and may be kept, so that its packed weights are).
    """

    source_padding: int

    def generation_encode(self, source: Tensor, source_lengths: Tensor) -> Encoded:
        """Run the encoder; source int64 (B, S), source_lengths int64 (B)."""

    def generation_decoder(self) -> Decoder:
        """Describe the decoder for the engine. NotDescribed where that is not possible."""

    def generation_step(self, encoded: Encoded) -> tuple[step.Step, Any]:
        """A step in plain torch, and its first state: see `encdec_fast.generation.search`."""


@dataclass(frozen=True)
class GenerationOutput:
    """hypotheses: for each sentence, in the order given, its hypotheses, best first."""

    hypotheses: list[list[Hypothesis]]
    fill_token: int

    @cached_property
    def sequences(self) -> Tensor:
        """(sentences * num_return_sequences, longest) int64: tokens, then fill_token."""
        rows = [h.tokens for sentence in self.hypotheses for h in sentence]
        if not rows:
            return torch.empty(0, 0, dtype=torch.int64)
        longest = max(map(len, rows))
        # As one list: a tensor for each row costs more than all that is in them.
        filled = [[*row, *[self.fill_token] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, dtype=torch.int64)

    @cached_property
    def scores(self) -> Tensor:
        """(sentences * num_return_sequences): each hypothesis' score."""
        return torch.tensor([h.score for sentence in self.hypotheses for h in sentence])


class GenerationCall(NamedTuple):
    """What the backends judge."""

    model: str
    not_described: str
    device: str
    weight_dtype: str = "float32"
    not_one_launch: str = ""  # why the decoder's step cannot be one launch


def _why_not_device(call: GenerationCall) -> list[str]:
    reasons = [call.not_described] if call.not_described else []
    return reasons + device.why_not(call.device, call.weight_dtype)


def _why_not_cuda(call: GenerationCall) -> list[str]:
    reasons = [call.not_described] if call.not_described else []
    reasons += library.cuda_reasons(call.device, requested_backend() == "cuda")
    if call.weight_dtype not in device.DTYPES:
        reasons.append(f"weights in {call.weight_dtype} are for the CPU")
    if call.not_one_launch:
        reasons.append(call.not_one_launch)
    if requested_backend() != "cuda":
        reasons.append("nothing has been measured yet: it runs where it is asked for")
    return reasons


def _why_not_cpu(call: GenerationCall) -> list[str]:
    reasons = _why_not_torch(call)
    if call.not_described:
        reasons.append(call.not_described)
    if call.device != "cpu":
        reasons.append(f"the model is on {call.device}")
    return reasons


def _why_not_torch(call: GenerationCall) -> list[str]:
    if library.extension is None:
        return ["the compiled module encdec_fast._C is not loaded"]
    return []


class _Batch(NamedTuple):
    """The arguments of a search."""

    model: Any
    decoder: Decoder | None
    encoded: Encoded
    requests: list[Request]
    config: GenerationConfig
    seed: int
    weight_dtype: str
    need_attention: bool
    finished: Callable[[int], None] | None
    written: Stream | None
    timing: dict[str, Any] | None


def _run_on(run: Callable[..., list[list[Hypothesis]]], batch: _Batch) -> list[list[Hypothesis]]:
    return run(
        batch.model,
        batch.decoder,
        batch.encoded,
        batch.requests,
        batch.config,
        weight_dtype=batch.weight_dtype,
        seed=batch.seed,
        need_attention=batch.need_attention,
        finished=batch.finished,
        written=batch.written,
        timing=batch.timing,
    )


def _run_step(batch: _Batch) -> list[list[Hypothesis]]:
    take, state = batch.model.generation_step(batch.encoded)
    return step.search(
        take,
        state,
        [request.prompt for request in batch.requests],
        batch.config,
        prefixes=[request.prefix for request in batch.requests],
        source_lengths=list(batch.encoded.lengths),
        seed=batch.seed,
        numbers=[request.number for request in batch.requests],
        need_attention=batch.need_attention,
        stream=batch.written,
        timing=batch.timing,
    )


def _run_reference(batch: _Batch) -> list[list[Hypothesis]]:
    if batch.written is not None:
        raise RuntimeError("generate: the reference does not stream")
    take, state = batch.model.generation_step(batch.encoded)
    prefixes = [request.prefix for request in batch.requests]
    with torch.no_grad():
        return reference.search(
            take,
            state,
            [request.prompt for request in batch.requests],
            batch.config,
            prefixes=prefixes if batch.config.prefix_bias is not None else None,
            source_lengths=list(batch.encoded.lengths),
            generator=torch.Generator().manual_seed(batch.seed % 2**63),
            need_attention=batch.need_attention,
        )


BACKENDS = (
    # The same as the next, with the step of a recurrent decoder as one launch.
    Backend("cuda", partial(_run_on, partial(device.run, one_launch=True)), _why_not_cuda),
    # Decoder and search on the GPU, around Triton's kernels.
    Backend("triton", partial(_run_on, device.run), _why_not_device),
    Backend("cpu", partial(_run_on, engine.run), _why_not_cpu),
    # The compiled search around the model's own modules.
    Backend("torch", _run_step, _why_not_torch),
    Backend("reference", _run_reference, lambda call: []),
)


class _Described(NamedTuple):
    """A model as the backends see it."""

    decoder: Decoder | None
    call: GenerationCall
    weight_dtype: str  # that its own weights have
    snapshot: Snapshot | None  # None: of an object that is no module


_known: weakref.WeakKeyDictionary[Any, _Described] = weakref.WeakKeyDictionary()


def _described(model: Any) -> _Described:
    found = _known.get(model)
    if found is None or found.snapshot is None or not found.snapshot.fresh():
        found = _known[model] = _describe_anew(model)
    return found


def _describe_anew(model: Any) -> _Described:
    decoder, reason = None, ""
    # Before the description: what changes meanwhile must leave it stale.
    snapshot = Snapshot(model) if isinstance(model, nn.Module) else None
    try:
        decoder = model.generation_decoder()
    except NotDescribed as error:
        reason = str(error)
    except AttributeError as error:
        if hasattr(model, "generation_decoder"):
            raise
        raise TypeError(
            f"generate: {type(model).__name__} has no generation_decoder: give a model of "
            "encdec_fast.models, an object like encdec_fast.generation.Generates, or call "
            "encdec_fast.generation.search with a step"
        ) from error
    where = "cpu" if decoder is None else decoder.embedding.device.type
    refused = "" if decoder is None else device.why_not_one_launch(decoder)
    call = GenerationCall(type(model).__name__, reason, where, not_one_launch=refused)
    return _Described(decoder, call, _own_weight_dtype(model), snapshot)


def _own_weight_dtype(model: Any) -> str:
    """Of the output layer, where `optimize` gave it one, or of the parameters."""
    held = getattr(getattr(model, "output", None), "weight_dtype", None)
    if held is None:
        parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
        held = getattr(parameter, "dtype", torch.float32)
    return WEIGHT_DTYPES.get(held, "float32")


def _weight_dtype(described: _Described, weight_dtype: Any) -> str:
    if weight_dtype is None:
        return described.weight_dtype
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            "generate: weight_dtype must be None, torch.float32, torch.bfloat16 or 'int8', but it "
            f"is {weight_dtype!r}"
        )
    return WEIGHT_DTYPES[weight_dtype]


def _check_wishes(
    described: _Described, config: GenerationConfig, need_attention: bool, stream: Stream | None
) -> None:
    decoder = described.decoder
    wanted = need_attention or config.coverage_penalty > 0
    if wanted and decoder is not None and not decoder.attends:
        raise ValueError(
            f"generate: need_attention and coverage_penalty need a decoder that attends, and that "
            f"of {described.call.model} does not"
        )
    if stream is not None and config.draws and config.num_return_sequences > 1:
        raise ValueError("generate: stream is for one sequence of each sentence")


class _Training:
    """The parts of a model that were in training mode, and how many calls wait for their end."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules, self.users = [module for module in modules if module.training], 0


_training: weakref.WeakKeyDictionary[Any, _Training] = weakref.WeakKeyDictionary()
_training_lock = ForkSafeLock()


@contextlib.contextmanager
def _evaluating(model: Any, described: _Described) -> Iterator[None]:
    """Without dropout; the last of several threads that use a model puts it back as it was."""
    modules = [] if described.snapshot is None else [model, *described.snapshot.parts]
    if not any(module.training for module in modules) and model not in _training:
        yield
        return
    with _training_lock.current:
        state = _training.setdefault(model, _Training(modules))
        state.users += 1
        for module in state.modules:
            module.training = False
    try:
        yield
    finally:
        with _training_lock.current:
            state.users -= 1
            if state.users == 0:
                _training.pop(model, None)
                for module in state.modules:
                    module.training = True


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], None] | None]:
    if not shown:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda _: progress.advance(task)


def _describe(model: Any, *args: Any, **kwargs: Any) -> Description:
    found = _described(model)
    decoder = found.decoder
    sizes = "a model of its own step" if decoder is None else type(decoder).__name__
    held = _weight_dtype(found, kwargs.get("weight_dtype"))

    def plan(backend: str) -> str:
        return f"weights in {held}" if backend in ("cpu", "cuda", "triton") else ""

    call = found.call._replace(weight_dtype=held)
    return Description("generate", BACKENDS, call, sizes, plan)


@explained_by(_describe)
def generate(
    model: Any,
    source: Any,
    config: GenerationConfig | None = None,
    *,
    source_lengths: Any = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    weight_dtype: Any = None,
    need_attention: bool = False,
    stream: Stream | None = None,
    progress: bool = False,
    timing: dict[str, Any] | None = None,
    **options: Any,
) -> GenerationOutput:
    """Targets for sources, by greedy search, beam search or sampling.

    model: of `encdec_fast.models`, or any object like `Generates`; it is used as in eval mode.
    source: int64 (B, S), or a list of lists of tokens of any lengths. source_lengths: of a tensor,
        each from 1 to S; None: the model's source_padding, at the end only, is not counted.
    config, options: what to search for; options are names of GenerationConfig's and go before it.
    prefixes: for each sentence the tokens that its target begins with, behind the start token; with
        config.prefix_bias those that it is drawn to.
    weight_dtype: how the engine holds the decoder's weights: torch.float32, torch.bfloat16 or
        "int8"; None: as the model does. They are packed once, and anew when the model's change;
        `encdec_fast.generation.packed_bytes(model)` says what they take.
    need_attention: also return the weights over the source of each token written: a recurrent
        decoder's, of a Transformer the mean over the heads of its last layer.
    stream: called with (sentence, tokens) as soon as these are certain to come next: with one beam
        each token, with more what all open hypotheses have in common.
    progress: show a bar (needs the package rich). timing: a dict that receives the number of steps
        and rows, and the seconds spent in the decoder and in the search; of a recurrent decoder
        also products_by_memory: of each batch, how many of up to three weights that read a context
        were multiplied with the memory once, not with the context in each step.

    Sentences are sorted by length and decoded in batches of at most config.max_batch_tokens; what
    is returned is in the order given. Ctrl-C ends it between two steps.

    Raises RuntimeError for sources of a wrong shape or longer than the model can read, and where a
    score is NaN or infinite; IndexError for tokens outside of the vocabularies; ValueError for
    options that contradict each other or do not fit the model.
    """
    config = GenerationConfig() if config is None else config
    if options:
        config = config.replace(**options)
    described = _described(model)
    held = _weight_dtype(described, weight_dtype)
    call = described.call._replace(weight_dtype=held)
    decoder, backend = described.decoder, select(BACKENDS, call)
    sources = sources_of(source, source_lengths, model.source_padding)
    lengths = sources.sizes
    requests = requests_of(prefixes, len(lengths), config)
    check_lengths(decoder, sources, requests, config)
    _check_wishes(described, config, need_attention, stream)
    if timing is not None:
        timing.clear()
    seed = 0
    if config.do_sample:
        seed = config.seed if config.seed is not None else int(torch.randint(2**63 - 1, ()))
    found: list[list[Hypothesis]] = [[] for _ in lengths]
    with (
        _evaluating(model, described),
        torch.inference_mode(),
        _progress(len(lengths), progress) as advance,
        # What is not the decoder's step runs on whatever it would.
        use_backend(None) if backend.name == "cuda" else contextlib.nullcontext(),
    ):
        for batch in batches_of(lengths, config.max_batch_tokens):
            whole = len(batch) == len(lengths) and batch == list(range(len(lengths)))
            own = sources.lengths if whole else sources.lengths[batch]
            tokens = sources.tokens if whole else sources.tokens[batch]
            if decoder is not None:
                tokens = tokens.to(decoder.embedding.device)
            longest = max(lengths[i] for i in batch)
            if longest < tokens.shape[1]:
                tokens = tokens[:, :longest]
            encoded = model.generation_encode(tokens, own)
            order = batch

            def written(sentence: int, tokens: list[int], order: list[int] = order) -> None:
                assert stream is not None
                stream(order[sentence], tokens)

            own_timing: dict[str, Any] = {}
            results = backend.run(
                _Batch(
                    model,
                    decoder,
                    encoded,
                    [requests[i] for i in batch],
                    config,
                    seed % 2**64,
                    held,
                    need_attention,
                    advance,
                    None if stream is None else written,
                    own_timing,
                )
            )
            if timing is not None:
                for name, value in own_timing.items():
                    timing[name] = timing.get(name, 0) + value
            for i, result in zip(batch, results, strict=True):
                found[i] = result
    return GenerationOutput(found, config.fill_token)
