"""The compiled engine: decoders packed once and kept, searches run in C++ from first to last token.

What is packed belongs to a model, and is used only while the model's tensors have the memory, the
version counters and the sampled values that it was made from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encdec_fast.backends import library
from encdec_fast.backends.locks import ForkSafeLock
from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.decoders import Affine, Decoder, Packing, RecurrentDecoder, parts_of
from encdec_fast.generation.result import Hypothesis

Stream = Callable[[int, list[int]], None]


class Request(NamedTuple):
    """What is asked for a sentence. number: by which its draws differ from the others'."""

    prompt: list[int]
    prefix: list[int]
    number: int


class Encoded(NamedTuple):
    """What an encoder left for a batch of B sentences.

    memory (B, S, M), None where the decoder has no attention; lengths (B), how many positions of
    each count. states: for a recurrent decoder its first h, or for an LSTM (h, c), each (layers, B,
    H). context (B, M): what its first step reads as context; None: zeros.
    """

    memory: Tensor | None
    lengths: Sequence[int]
    states: Any = None
    context: Tensor | None = None


SHORTLISTS = 8  # that are kept packed; the one that was used longest ago goes first


class _Packed:
    """A decoder's packed form, and decoders that wait for a search."""

    def __init__(self, decoder: Decoder, weight_dtype: str) -> None:
        self.traces = traces_of(decoder)
        self.weight_dtype = weight_dtype
        packing = Packing(weight_dtype)
        self.model = decoder.compile(packing)
        # Copies that the engine reads as they lie; the model's own tensors live with the model.
        self.alive = packing.alive
        self.idle: list[Any] = []
        self.shortlists: dict[tuple[int, ...], Any] = {}

    @property
    def bytes(self) -> int:
        shortlists: list[Any] = list(self.shortlists.values())
        return int(self.model.bytes) + sum(int(shortlist.bytes) for shortlist in shortlists)

    def shortlist(self, decoder: Decoder, config: GenerationConfig) -> Any:
        """The output layer for config.vocabulary; None without one."""
        if config.vocabulary is None:
            return None
        tokens = config.__dict__.get("_shortlist")
        if tokens is None:
            tokens = tuple(sorted(set(listed(config.vocabulary))))
            object.__setattr__(config, "_shortlist", tokens)
        with _lock.current:
            found = self.shortlists.pop(tokens, None) or self._pack_shortlist(decoder, tokens)
            self.shortlists[tokens] = found
            while len(self.shortlists) > SHORTLISTS:
                del self.shortlists[next(iter(self.shortlists))]
        return found

    def _pack_shortlist(self, decoder: Decoder, tokens: tuple[int, ...]) -> Any:
        assert library.extension is not None
        rows, packing = torch.tensor(tokens), Packing(self.weight_dtype)
        weight, bias = decoder.output.weight.detach(), decoder.output.bias
        chosen = Affine(
            weight.index_select(0, rows),
            None if bias is None else bias.detach().index_select(0, rows),
        )
        context: Any = None
        if isinstance(decoder, RecurrentDecoder):
            chosen, context = chosen.columns(decoder.hidden_size)
        return library.extension.Shortlist(
            packing.affine(chosen),
            None if context is None else packing.affine(context),
            tokens,
            *packing.rest()[1:],
        )

    def fresh(self, traces: list[Any]) -> bool:
        return traces == self.traces and bool(self.model.fresh())


def traces_of(decoder: Decoder) -> list[Any]:
    """The address and the version counter of each tensor, and all settings.

    Inference tensors have no counter.
    """
    parts = parts_of(decoder)
    traces: list[Any] = [
        (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)
        for tensor in parts.tensors
    ]
    return traces + parts.settings


_packed: weakref.WeakKeyDictionary[Any, dict[str, _Packed]] = weakref.WeakKeyDictionary()
_lock = ForkSafeLock()


def packed_bytes(owner: Any) -> dict[str, int]:
    """Bytes of each packed form that is kept for a model, by the dtype of its weights."""
    return {name: packed.bytes for name, packed in _packed.get(owner, {}).items()}


def _packed_for(owner: Any, decoder: Decoder, weight_dtype: str) -> _Packed:
    traces = traces_of(decoder)
    found = _packed.get(owner, {}).get(weight_dtype)
    if found is not None and found.fresh(traces):
        return found
    with _lock.current:
        found = _packed.get(owner, {}).get(weight_dtype)
        if found is None or not found.fresh(traces):
            found = _Packed(decoder, weight_dtype)
            _packed.setdefault(owner, {})[weight_dtype] = found
        return found


_EARLY = {False: 0, True: 1, "never": 2}


def options_of(config: GenerationConfig) -> Any:
    """The engine's options; made once for a config, which does not change."""
    found = config.__dict__.get("_engine_options")
    if found is None:
        assert library.extension is not None
        found = library.extension.Options(_as_dict(config))
        object.__setattr__(config, "_engine_options", found)
    return found


def listed(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _as_dict(config: GenerationConfig) -> dict[str, Any]:
    new, longest = config.max_new_tokens, config.max_length
    if new is None and longest is None:
        new = 20
    return {
        "beams": config.num_beams,
        "returned": config.num_return_sequences,
        "length_penalty": config.length_penalty,
        "early_stopping": _EARLY[config.early_stopping],
        "coverage_penalty": config.coverage_penalty,
        "sample": config.do_sample,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "max_length": -1 if longest is None else longest,
        "max_new": -1 if new is None else new,
        "min_length": config.min_length,
        "min_new": config.min_new_tokens,
        "max_seconds": config.max_time or 0.0,
        "repetition_penalty": config.repetition_penalty,
        "no_repeat_ngram": config.no_repeat_ngram_size,
        "prefix_bias": config.prefix_bias or 0.0,
        "bad_words": [list(word) for word in config.bad_words_ids or ()],
        "suppressed": listed(config.suppress_tokens),
        "begin_suppressed": listed(config.begin_suppress_tokens),
        "forced_bos": listed(config.forced_bos_token_id),
        "forced_eos": listed(config.forced_eos_token_id),
        "eos": listed(config.eos_token_id),
        "vocabulary": listed(config.vocabulary),
    }


def check_vocabulary(
    config: GenerationConfig, requests: Sequence[Request], vocabulary: int
) -> None:
    """ValueError for a token of the config, IndexError for one of a prompt that there is not."""
    if config.__dict__.get("_checked_vocabulary") != vocabulary:
        options = _as_dict(config)
        named = [t for word in options["bad_words"] for t in word]
        for name in ("suppressed", "begin_suppressed", "forced_bos", "forced_eos", "vocabulary"):
            named += options[name]
        for token in named:
            if token >= vocabulary:
                raise ValueError(
                    f"generate: the config names token {token}, but the model writes tokens 0 to "
                    f"{vocabulary - 1}"
                )
        object.__setattr__(config, "_checked_vocabulary", vocabulary)
    for prompt, prefix, _ in requests:
        if min(prompt) < 0:
            raise IndexError(f"generate: a prompt has token {min(prompt)}, but none is negative")
        for token in prefix:
            if not 0 <= token < vocabulary:
                raise IndexError(
                    f"generate: a prefix has token {token}, but the model writes tokens 0 to "
                    f"{vocabulary - 1}"
                )


def check_encoded(decoder: Decoder, encoded: Encoded, B: int) -> None:
    """RuntimeError where an encoder left something that the decoder would read past its end."""

    def check(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
        if tensor is None or tuple(tensor.shape) != shape:
            found = None if tensor is None else tuple(tensor.shape)
            raise RuntimeError(f"generate: {name} must be of the shape {shape}, but it is {found}")

    memory = encoded.memory
    S = memory.shape[1] if memory is not None and memory.dim() == 3 else 0
    if isinstance(decoder, RecurrentDecoder):
        states = encoded.states if isinstance(encoded.states, tuple) else (encoded.states,)
        shape = (len(decoder.layers), B, decoder.hidden_size)
        parts = 2 if decoder.layers[0].cell == "lstm" else 1
        if len(states) != parts:
            raise RuntimeError(f"generate: states must be {parts} tensors, but are {len(states)}")
        for state in states:
            check("a state", state, shape)
        if encoded.context is not None:
            check("context", encoded.context, (B, decoder.fed_size))
        if decoder.attends:
            check("memory", memory, (B, S, decoder.context_size))
    else:
        check("memory", memory, (B, S, decoder.layers[0].cross_key.weight.shape[1]))
    lengths = encoded.lengths
    if decoder.attends and (len(lengths) != B or not all(0 <= n <= S for n in lengths)):
        raise RuntimeError(f"generate: lengths must be {B} integers from 0 to {S}, not {lengths}")


_MOST_ROWS = 2**31 - 1


def count_rows(sentences: int, config: GenerationConfig) -> int:
    """Hypotheses that may be open at a time. MemoryError for more than can be numbered."""
    rows = sentences * (config.num_return_sequences if config.draws else config.num_beams)
    if rows * 2 * config.num_beams > _MOST_ROWS:
        raise MemoryError(
            f"generate: {sentences} sentences with num_beams={config.num_beams} and "
            f"num_return_sequences={config.num_return_sequences} are too many to search at once"
        )
    return rows


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
    """Search for the targets of a batch."""
    assert library.extension is not None
    packed = _packed_for(owner, decoder, weight_dtype)
    threads = torch.get_num_threads()
    rows = count_rows(len(requests), config)
    try:
        session = packed.idle.pop()
    except IndexError:
        session = decoder.start(packed.model)
    check_encoded(decoder, encoded, len(requests))
    session.restrict(packed.shortlist(decoder, config))
    memory = None if encoded.memory is None else encoded.memory.detach().float().contiguous()
    S = 0 if memory is None else memory.shape[1]
    address = 0 if memory is None else memory.data_ptr()
    B, lengths = len(requests), list(encoded.lengths)
    limit = max(config.limit(len(request.prompt)) for request in requests)
    if isinstance(decoder, RecurrentDecoder):
        states = encoded.states if isinstance(encoded.states, tuple) else (encoded.states,)
        h, *c = [state.detach().float().contiguous() for state in states]
        context = None if encoded.context is None else encoded.context.float().contiguous()
        first = 0 if context is None else context.data_ptr()
        cells = c[0].data_ptr() if c else 0
        session.begin(B, S, h.data_ptr(), cells, first, address, lengths, rows, limit, threads)
    else:
        session.begin(address, B, S, lengths, rows, limit, threads)
    options = options_of(config)
    found = library.extension.search(
        session,
        requests,
        options,
        seed,
        need_attention,
        threads,
        finished,
        written,
        timing,
    )
    if timing is not None and isinstance(decoder, RecurrentDecoder):
        timing["products_by_memory"] = session.products_by_memory
    packed.idle.append(session)
    return [[hypothesis(item, S) for item in sentence] for sentence in found]


def hypothesis(found: tuple[list[int], float, list[float], bytes], S: int) -> Hypothesis:
    """From what the engine returns."""
    tokens, score, log_probs, attention = found
    shown = None
    if attention:
        with torch.inference_mode(False):  # an ordinary tensor, wherever this is called
            shown = torch.frombuffer(bytearray(attention), dtype=torch.float32).view(-1, S)
    return Hypothesis(tokens, score, log_probs, shown)
