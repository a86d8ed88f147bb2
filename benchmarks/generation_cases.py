"""Cases of generation: whole models from source tokens to target tokens, with forced lengths."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import encdec_fast
from benchmarks.op_case import Contender, Op, OpCase, Results, Work
from encdec_fast.generation import generate
from encdec_fast.models import RecurrentEncoderDecoder
from examples import g2p
from examples.g2p_model import checkpoint, data, pronounce

VOCABULARY, SOURCE, TARGET = 32000, 20, 32  # of translation
RECURRENT_VOCABULARY, RECURRENT_SOURCE, RECURRENT_TARGET = 8000, 25, 25
WORDS = 64  # of the example's test words, in all cases of pronunciation
WEIGHTS: dict[str, Any] = {"float32": None, "bfloat16": torch.bfloat16, "int8": "int8"}


@cache
def marian() -> Any:
    """Transformer-base of 6 + 6 layers with random weights; the last token is padding."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    last = VOCABULARY - 1
    config = MarianConfig(
        vocab_size=VOCABULARY,
        decoder_vocab_size=VOCABULARY,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_position_embeddings=128,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=last,
        decoder_start_token_id=last,
        eos_token_id=0,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config).eval().requires_grad_(False)


@cache
def _translators() -> Any:
    from benchmarks.peers.ctranslate2_marian import Translators

    return Translators(marian(), torch.get_num_threads())


@cache
def _fast_marian(dtype: str) -> Any:
    from encdec_fast.integrations import transformers as integration

    return integration.optimize(copy.deepcopy(marian()), weight_dtype=WEIGHTS[dtype])


def _translation(case: OpCase) -> Work:
    """transformers' generate, the same call on the engine, CTranslate2 in every mode it has."""
    b, beams = case.shape
    torch.manual_seed(1)
    source = torch.randint(1, VOCABULARY - 1, (b, SOURCE))
    options = {
        "num_beams": beams,
        "do_sample": False,
        "min_new_tokens": TARGET,
        "max_new_tokens": TARGET,
        "suppress_tokens": [VOCABULARY - 1],
    }
    given = {"input_ids": source, "attention_mask": torch.ones_like(source), **options}
    right = marian().generate(**given)

    def of_tensor(found: Tensor) -> Results:
        lengths = torch.full((len(found),), float(found.shape[1] - 1))
        # Coarser weights may write other tokens: with random weights nothing is certain.
        return {"length": lengths, **({"tokens": found} if case.dtype == "float32" else {})}

    def of_ctranslate2(found: Any) -> Results:
        lengths = torch.tensor([float(len(r.hypotheses[0])) for r in found])
        return {"length": lengths, **({"tokens": right} if case.dtype == "float32" else {})}

    contenders = [Contender("transformers", lambda: marian().generate(**given), of_tensor)]
    translators = _translators()
    for mode in translators.modes:
        call = translators.call(mode, source, beams, TARGET)
        contenders.append(Contender(f"CTranslate2 {mode}", call, of_ctranslate2))
    ours = _fast_marian(case.dtype)
    contenders.append(Contender("encdec_fast", lambda: ours.generate(**given), of_tensor))
    return Work(contenders, of_tensor(right))


class _Beams(nn.Module):
    """Beam search in a torch loop for RecurrentEncoderDecoder: cached keys, vectorised beams.

    Its modules are torch's own. It takes as many steps as are asked for, and never ends before.
    With one beam it is greedy, and ends where every sentence has.
    """

    def __init__(self, model: RecurrentEncoderDecoder, steps: int, start: int, end: int) -> None:
        super().__init__()
        self.plain = encdec_fast.restore(copy.deepcopy(model))
        self.steps, self.start, self.end = steps, start, end
        own = model.encoder
        self.encoder = nn.LSTM(
            own.input_size, own.hidden_size, own.num_layers, batch_first=True, bidirectional=True
        )
        self.encoder.load_state_dict(own.state_dict())
        cell = model.decoder.cell.cell
        self.cell = nn.LSTMCell(cell.input_size, cell.hidden_size)
        self.cell.load_state_dict(cell.state_dict())
        self.upper = None
        if model.upper is not None:
            self.upper = nn.LSTMCell(model.upper.input_size, model.upper.hidden_size)
            named = {n.removesuffix("_l0"): t for n, t in model.upper.state_dict().items()}
            self.upper.load_state_dict(named)
        self.eval().requires_grad_(False)

    def forward(self, source: Tensor, beams: int, lengths: Tensor | None = None) -> Tensor:
        """lengths: of the sentences, where they are unequal."""
        model = self.plain
        b, attention = source.shape[0], model.decoder.cell.attention
        embedded = F.embedding(source, model.source_embedding.weight)
        outside = None
        if lengths is None:
            memory, state = self.encoder(embedded)
        else:
            packed = pack_padded_sequence(embedded, lengths, True, enforce_sorted=False)
            memory, state = self.encoder(packed)
            memory = pad_packed_sequence(memory, batch_first=True)[0]
            outside = (torch.arange(source.shape[1]) >= lengths.unsqueeze(1)).unsqueeze(2)
        pairs = [part.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) for part in state]
        linears = (model.bridge.hidden_proj, model.bridge.cell_proj)
        h, c = (
            F.linear(pair[-model.decoder_layers :], linear.weight, linear.bias)
            for pair, linear in zip(pairs, linears, strict=True)
        )
        memory = memory.repeat_interleave(beams, 0)
        keys = F.linear(memory, attention.memory_proj.weight)
        states = [t.repeat_interleave(beams, 0) for layer in zip(h, c, strict=True) for t in layer]
        context = memory.new_zeros(b * beams, memory.shape[2])
        tokens = torch.full((b * beams,), self.start)
        scores = torch.full((b, beams), -1e9)
        scores[:, 0] = 0
        first_row = torch.arange(b).unsqueeze(1) * beams
        written = tokens.unsqueeze(1)
        ended = torch.zeros(b, dtype=torch.bool)
        for _ in range(self.steps):
            x = F.embedding(tokens, model.target_embedding.weight)
            states[:2] = self.cell(torch.cat([x, context], 1), tuple(states[:2]))
            query = F.linear(states[0], attention.query_proj.weight).unsqueeze(1)
            found = F.linear(torch.tanh(query + keys), attention.score.weight)
            if outside is not None:
                found = found.masked_fill(outside, -torch.inf)
            context = (found.softmax(1).transpose(1, 2) @ memory).squeeze(1)
            if self.upper is not None:
                given = torch.cat([states[0], context], 1)
                states[2:] = self.upper(given, tuple(states[2:]))
            top = torch.cat([states[-2], context], 1)
            logits = F.linear(top, model.output.weight, model.output.bias)
            if beams == 1:
                tokens = logits.argmax(-1)
                written = torch.cat([written, tokens.unsqueeze(1)], 1)
                ended |= tokens == self.end
                if bool(ended.all()):
                    break
                continue
            logits[:, self.end] = -torch.inf
            log_probs = logits.log_softmax(-1)
            sums = scores.unsqueeze(-1) + log_probs.view(b, beams, -1)
            scores, places = sums.flatten(1).topk(beams)
            rows = (places // log_probs.shape[1] + first_row).flatten()
            tokens = (places % log_probs.shape[1]).flatten()
            states = [t.index_select(0, rows) for t in states]
            context = context.index_select(0, rows)
            written = torch.cat([written.index_select(0, rows), tokens.unsqueeze(1)], 1)
        return written[::beams]


@cache
def _recurrent_model() -> RecurrentEncoderDecoder:
    torch.manual_seed(0)
    v = RECURRENT_VOCABULARY
    model = RecurrentEncoderDecoder(v, v, 512, 512, encoder_layers=2, decoder_layers=2)
    return model.eval().requires_grad_(False)


def _recurrent_translation(case: OpCase) -> Work:
    """2-layer BiLSTM 512, additive attention 512, 2-layer LSTM 512 fed its context, 8k tokens."""
    b, beams = case.shape
    torch.manual_seed(1)
    source = torch.randint(2, RECURRENT_VOCABULARY, (b, RECURRENT_SOURCE))
    model, start, end = _recurrent_model(), 0, 1
    loop = _Beams(model, RECURRENT_TARGET, start, end)
    ours = encdec_fast.optimize(copy.deepcopy(model), WEIGHTS[case.dtype])
    options = {
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "suppress_tokens": [end],
        "num_beams": beams,
        "max_new_tokens": RECURRENT_TARGET,
        "length_penalty": 0.0,
    }

    def torch_loop() -> Tensor:
        with torch.inference_mode():
            return loop(source, beams)

    def results(found: Any) -> Results:
        tokens = found if isinstance(found, Tensor) else found.sequences
        lengths = torch.full((len(tokens),), float(tokens.shape[1]))
        return {"length": lengths, **({"tokens": tokens} if case.dtype == "float32" else {})}

    contenders = [
        Contender("torch", torch_loop, results),
        Contender("encdec_fast", lambda: generate(ours, source, **options), results),
    ]
    return Work(contenders, results(torch_loop()))


@cache
def _pronouncer() -> tuple[RecurrentEncoderDecoder, list[tuple[Tensor, Tensor]], int, int]:
    """The recurrent model of examples/g2p_model, words that it was not trained on, one by one as
    (letters, length), and the numbers of their letters and of the phonemes that it writes.
    """
    path = Path(checkpoint.__file__).parent / "recurrent.safetensors"
    model: Any = checkpoint.load_model(path)[0].requires_grad_(False)
    words = random.Random(0).sample(sorted(data.load_split().test), WORDS)
    sounds = pronounce.pronounce(model, words)
    written = sum(len(found) + 1 for found in sounds.values())
    singles = [data.encode_words([word]) for word in words]
    return model, singles, sum(int(length) for _, length in singles), written


def _pronunciation(case: OpCase) -> Work:
    """The recurrent model of examples/g2p_model, greedy, on words of unequal length, to their ends.

    64 words, so many of them in a call: one by one, or all at once.
    """
    model, singles, *_ = _pronouncer()
    calls = singles
    if case.shape[0] > 1:
        letters = [source[0] for source, _ in singles]
        lengths = torch.cat([length for _, length in singles])
        calls = [(pad_sequence(letters, batch_first=True), lengths)]
    loop = _Beams(model, data.MAX_LENGTH, g2p.START, g2p.END)
    ours = encdec_fast.optimize(copy.deepcopy(model))

    def torch_loop() -> list[Tensor]:
        with torch.inference_mode():
            return [
                loop(source, 1, lengths if len(source) > 1 else None) for source, lengths in calls
            ]

    def engine() -> list[Tensor]:
        found = (generate(ours, s, pronounce.CONFIG, source_lengths=n) for s, n in calls)
        return [output.sequences for output in found]

    def results(found: list[Tensor]) -> Results:
        sounds = [
            [*itertools.takewhile(lambda token: token != g2p.END, row[1:].tolist())]
            for part in found
            for row in part
        ]
        rows = [torch.tensor(row, dtype=torch.float32) for row in sounds]
        return {"tokens": pad_sequence(rows, batch_first=True)}

    contenders = [
        Contender("torch", torch_loop, results),
        Contender("encdec_fast", engine, results),
    ]
    return Work(contenders, results(torch_loop()))


def flops(case: OpCase) -> int:
    """Multiply-adds of all products, times two."""
    b, beams = case.shape
    if case.op == "translation":
        layer = 4 * 512 * 512 + 2 * 512 * 2048
        step = 6 * (layer + 2 * 512 * 512) + 512 * VOCABULARY
        return 2 * b * (SOURCE * 6 * (layer + 2 * 512 * 512) + TARGET * beams * step)
    if case.op == "recurrent_translation":
        encoder = 2 * 4 * 512 * (512 + 512) + 2 * 4 * 512 * (1024 + 512) + 1024 * 512
        step = 4 * 512 * (1536 + 512) * 2 + 512 * 512 + 1536 * RECURRENT_VOCABULARY
        return 2 * b * (RECURRENT_SOURCE * encoder + RECURRENT_TARGET * beams * step)
    encoder = 2 * 4 * 192 * (128 + 192) + 2 * 4 * 192 * (384 + 192) + 384 * 128
    step = 4 * 256 * (512 + 256) + 256 * 128 + 640 * 74
    _, _, letters, sounds = _pronouncer()
    return 2 * (letters * encoder + sounds * step)


MAKERS: dict[Op, Callable[[OpCase], Work]] = {
    "translation": _translation,
    "recurrent_translation": _recurrent_translation,
    "pronunciation": _pronunciation,
}

SUITES: dict[str, list[OpCase]] = {
    "generation": [
        *(OpCase("pronunciation", "float32", (b, 1)) for b in (1, 64)),
        *(
            OpCase("recurrent_translation", dtype, (b, 5))
            for dtype in ("float32", "bfloat16", "int8")
            for b in (1, 32)
        ),
        *(
            OpCase("translation", dtype, shape)
            for dtype in ("float32", "bfloat16", "int8")
            for shape in ((1, 1), (1, 4), (8, 4), (32, 1), (32, 4))
        ),
    ]
}
