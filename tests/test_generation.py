"""generate() with whole models: the engine held to the reference search around torch's modules."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_fast import explain, use_backend
from encdec_fast.backends import library
from encdec_fast.generation import GenerationConfig, GenerationOutput, generate, packed_bytes
from encdec_fast.models import RecurrentEncoderDecoder, TransformerEncoderDecoder
from encdec_fast.nn import AdditiveAttention, AttentionDecoder, LuongAttention

pytestmark = pytest.mark.usefixtures("native")

SOURCES, TARGETS, START, NEW = 17, 23, 1, 12
SENTENCES = [
    torch.randint(1, SOURCES, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (5, 1, 9, 3, 7, 2, 9, 4, 6, 8)
]
ATTENTIONS = ("additive", "dot", "general", "concat", "location", None)
CORES = len(os.sched_getaffinity(0))
TIMEOUT = 100.0  # seconds after which a script counts as hanging


def recurrent(cell: str, attention: str | None, layers: int, H: int = 18, E: int = 7) -> Any:
    sizes = {"embedding_size": E, "hidden_size": H, "encoder_hidden_size": H // 2}
    return RecurrentEncoderDecoder(
        SOURCES,
        TARGETS,
        **sizes,
        cell=cell,
        attention=attention,
        encoder_layers=2,
        decoder_layers=layers,
        max_source_length=9,
        dropout=0.5,
    )


def attending(attention: nn.Module, cell: str, layers: int) -> Any:
    """A model around an attention that it has no name for."""
    model = recurrent(cell, "additive", layers)
    model.decoder = AttentionDecoder(7, 18, 18, attention, cell)
    return model


def attentional(score: str) -> nn.Module:
    """With an output layer, whose vector is fed in the context's place."""
    return LuongAttention(18, 18, score, output_size=18)


def transformer(heads: int, head_size: int, **options: Any) -> Any:
    sizes = (heads * head_size, heads, 2, 2, 45)
    return TransformerEncoderDecoder(SOURCES, TARGETS, *sizes, max_length=30, **options)


BUILDERS: dict[str, Callable[[], Any]] = {
    f"{cell}-{attention}-{layers}": lambda c=cell, a=attention, n=layers: recurrent(c, a, n)
    for cell in ("lstm", "gru")
    for attention in ATTENTIONS
    for layers in (1, 2, 3)
} | {
    # An embedding as wide as there are tokens: what each gives to the gates is a table.
    "lstm-additive-wide": lambda: recurrent("lstm", "additive", 2, E=TARGETS),
    "gru-location-wide": lambda: recurrent("gru", "location", 1, E=TARGETS),
    "gru-None-wide": lambda: recurrent("gru", None, 1, E=TARGETS + 1),
    "lstm-covering-2": lambda: attending(AdditiveAttention(18, 18, 11, True), "lstm", 2),
    "gru-covering-1": lambda: attending(AdditiveAttention(18, 18, 16, True), "gru", 1),
    "lstm-attentional-2": lambda: attending(attentional("general"), "lstm", 2),
    "lstm-attentional-3": lambda: attending(attentional("concat"), "lstm", 3),
    "gru-attentional-1": lambda: attending(attentional("dot"), "gru", 1),
    "pre-relu-5": lambda: transformer(4, 5),
    "post-gelu-22": lambda: transformer(2, 22, norm_first=False, activation="gelu"),
    "pre-gelu-16": lambda: transformer(2, 16, activation="gelu", tied_output=True),
    "post-relu-1": lambda: transformer(6, 1, norm_first=False),
}
FEW = (
    "lstm-additive-2",
    "gru-dot-1",
    "gru-None-3",
    "lstm-location-1",
    "lstm-additive-wide",
    "gru-location-wide",
    "lstm-covering-2",
    "lstm-attentional-2",
    "pre-relu-5",
    "post-gelu-22",
)
EACH_OF_FEW = pytest.mark.parametrize("name", FEW)


@cache
def made(name: str) -> tuple[Any, GenerationConfig]:
    """A model whose distributions are not flat, and as end the token that makes half of the
    sentences end before the limit, greedily, or nearly half of them.
    """
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.5 if parameter.dim() > 1 else 1)
        config = GenerationConfig(max_new_tokens=NEW, decoder_start_token_id=START)
        written = [h[0][1:-1] for h in tokens_of(by_reference(model, config))]
        shares = {
            token: sum(token in tokens for tokens in written) / len(written)
            for token in range(2, TARGETS)
        }
        end = min(shares, key=lambda token: abs(shares[token] - 0.5))
        if 0.4 <= shares[end] <= 0.7:
            return model, config.replace(eos_token_id=end)
    raise AssertionError(f"no weights of {name} end early")


def by_reference(model: Any, config: GenerationConfig, **options: Any) -> GenerationOutput:
    with use_backend("reference"):
        return generate(model, SENTENCES, config, **options)


def tokens_of(found: GenerationOutput) -> list[list[list[int]]]:
    return [[h.tokens for h in each] for each in found.hypotheses]


def assert_agrees(name: str, changes: dict[str, Any], **options: Any) -> GenerationOutput:
    """Token for token as the reference."""
    model, config = made(name)
    config = config.replace(**changes)
    with use_backend("cpu"):
        found = generate(model, SENTENCES, config, **options)
    expected = by_reference(model, config, **options)
    assert tokens_of(found) == tokens_of(expected)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=2e-4)
    for mine, others in zip(found.hypotheses, expected.hypotheses, strict=True):
        for own, other in zip(mine, others, strict=True):
            assert own.log_probs == pytest.approx(other.log_probs, abs=2e-4)
            assert (own.attention is None) == (other.attention is None)
            if own.attention is not None and other.attention is not None:
                torch.testing.assert_close(own.attention, other.attention, rtol=0, atol=1e-4)
    return found


BEAMS = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.6}


@pytest.mark.parametrize("name", BUILDERS)
def test_as_reference(name: str) -> None:
    found = assert_agrees(name, {})
    early = sum(len(each[0].tokens) <= NEW for each in found.hypotheses) / len(SENTENCES)
    assert 0.3 <= early <= 0.8
    assert_agrees(name, BEAMS)


@EACH_OF_FEW
def test_prefixes(name: str) -> None:
    prefixes = [[3] * (i % 4) + [5] * (i % 3) for i in range(len(SENTENCES))]
    for changes in ({}, BEAMS):
        found = assert_agrees(name, changes, prefixes=prefixes)
        for tokens, prefix in zip(tokens_of(found), prefixes, strict=True):
            assert all(h[: len(prefix) + 1] == [START, *prefix] for h in tokens)
        assert_agrees(name, {**changes, "prefix_bias": 0.4}, prefixes=prefixes)


@pytest.mark.parametrize("name", [name for name in FEW if "None" not in name])
def test_attention(name: str) -> None:
    """Of Transformers the step in torch gives none: there it is compared with the module's own."""
    model, config = made(name)
    if "-" in name and isinstance(model, RecurrentEncoderDecoder):
        assert_agrees(name, {}, need_attention=True)
        assert_agrees(name, {**BEAMS, "coverage_penalty": 0.4}, need_attention=True)
        return
    found = generate(model, SENTENCES, config, need_attention=True)
    seen: list[Tensor] = []
    last = copy.deepcopy(model).eval()
    attention = last.transformer.decoder.layers[-1].multihead_attn

    def keep(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        options["need_weights"] = True
        result = nn.MultiheadAttention.forward(attention, query, key, value, **options)
        seen.append(result[1][0])
        return result

    attention.forward = keep
    for source, each in zip(SENTENCES, found.hypotheses, strict=True):
        with torch.no_grad():
            last(torch.tensor([source]), None, torch.tensor([each[0].tokens[:-1]]))
        weights = each[0].attention
        assert weights is not None
        torch.testing.assert_close(weights[:, : len(source)], seen.pop(), rtol=0, atol=1e-5)
        assert not weights[:, len(source) :].any()


def test_coverage_needs_attention() -> None:
    model, config = made("gru-None-3")
    with pytest.raises(ValueError, match="attention"):
        generate(model, SENTENCES, config, need_attention=True)
    with pytest.raises(ValueError, match="attention"):
        generate(model, SENTENCES, config, num_beams=2, coverage_penalty=0.5)


# Numbers are rounded to 8 bits of mantissa, or to 255 steps of the largest, before each product;
# the errors of a dozen products in a row add up. In parts of the largest log probability.
BOUNDS = {torch.bfloat16: 0.03, "int8": 0.06}


@pytest.mark.parametrize("weight_dtype", BOUNDS)
@EACH_OF_FEW
def test_narrow_weights(name: str, weight_dtype: Any) -> None:
    """Scores near those in float64; most tokens are the same until a hypothesis first differs."""
    model, config = made(name)
    every = {"num_beams": TARGETS, "num_return_sequences": TARGETS, "max_new_tokens": 1}
    prefixes = [[4, 7, 2][: i % 4] for i in range(len(SENTENCES))]
    exact = copy.deepcopy(model).double().eval()
    for dtype, bound in ((torch.float32, 1e-5), (weight_dtype, BOUNDS[weight_dtype])):
        options = {"prefixes": prefixes, "weight_dtype": dtype}
        found = generate(model, SENTENCES, config, **every, **options)
        for source, prefix, each in zip(SENTENCES, prefixes, found.hypotheses, strict=True):
            with torch.no_grad():
                scores = exact(torch.tensor([source]), None, torch.tensor([[START, *prefix]]))
            expected = scores[0, -1].log_softmax(0)
            mine = torch.zeros(TARGETS).double()
            for h in each:
                mine[h.tokens[-1]] = h.log_probs[0]
            assert (mine - expected).abs().max() <= bound * expected.abs().max()
    whole, narrow = (
        tokens_of(generate(model, SENTENCES, config, weight_dtype=dtype))
        for dtype in (None, weight_dtype)
    )
    same = [
        a == b
        for one, two in zip(whole, narrow, strict=True)
        for a, b in zip(one[0], two[0], strict=False)
    ]
    assert sum(same) >= 0.7 * len(same)
    assert (
        packed_bytes(model)["float32"]
        > packed_bytes(model)["int8" if weight_dtype == "int8" else "bfloat16"]
    )


ISA_SCRIPT = """
import test_generation as tests
tests.torch.set_num_threads(1)
for name in tests.FEW:
    for changes in ({}, tests.BEAMS):
        tests.assert_agrees(name, changes)
print("agree", tests.library.extension.chosen_isa())
"""


def run_script(script: str, *arguments: str, **variables: str) -> list[str]:
    """What it prints, line by line."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, (result.stdout, result.stderr[-2000:])
    return result.stdout.splitlines()


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "avx512_amx"])
def test_instruction_sets(isa: str) -> None:
    """In fresh memory that holds no zeros, so that numbers nobody wrote show."""
    assert library.extension is not None
    if isa not in library.extension.cpu_info()["isas"]:
        pytest.skip(f"this processor has no {isa}")
    assert run_script(ISA_SCRIPT, ENCDEC_FAST_ISA=isa, MALLOC_PERTURB_="128") == [f"agree {isa}"]


@cache
def large(kind: str) -> Any:
    """Large enough that its steps are taken by teams."""
    torch.manual_seed(5)
    return recurrent("lstm", "additive", 2, 96) if kind == "recurrent" else transformer(8, 24)


@pytest.mark.parametrize("kind", ["recurrent", "transformer"])
def test_thread_counts(kind: str) -> None:
    options = {"max_new_tokens": NEW, "decoder_start_token_id": START, "num_beams": 4}
    expected = generate(large(kind), SENTENCES, **options)
    for threads in sorted({2, 3, CORES, 2 * CORES, 4 * CORES}):
        torch.set_num_threads(threads)
        found = generate(large(kind), SENTENCES, **options)
        assert tokens_of(found) == tokens_of(expected)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["recurrent", "transformer"])
def test_two_threads_share_a_model(kind: str) -> None:
    torch.set_num_threads(2)
    model = copy.deepcopy(large(kind)).eval()  # packed by whoever comes first
    jobs: list[dict[str, Any]] = [{"num_beams": 3}, {"do_sample": True, "seed": 1}]
    found: list[list[Any]] = [[], []]

    def work(index: int) -> None:
        for _ in range(6):
            options = {"decoder_start_token_id": START, "max_new_tokens": NEW, **jobs[index]}
            found[index].append(tokens_of(generate(model, SENTENCES, **options)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    for index in range(2):
        both, found[index] = found[index], []
        work(index)
        assert both == [found[index][0]] * 6


FORK = """
import os, signal, threading, torch
import test_generation as tests
from encdec_fast.generation import engine
torch.set_num_threads(2)
names = ("lstm-additive-2", "gru-dot-1")  # torch itself may hang in the other encoder
def found(name, **options):
    model, config = tests.made(name)
    return tests.tokens_of(tests.generate(model, tests.SENTENCES, config, **options))
before = {name: found(name) for name in names}
def work():
    return all(found(name) == before[name] for name in names)
def child(function):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that hangs ends, and so fails the test
        try:
            os._exit(0 if function() else 2)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def with_threads(count):
    torch.set_num_threads(count)
    return work()
print("after use", child(work), child(lambda: with_threads(4)), flush=True)
held, done = threading.Event(), threading.Event()
def packing():
    with engine._lock.current:
        held.set()
        done.wait()
thread = threading.Thread(target=packing)
thread.start()
held.wait()
new = lambda: found("gru-dot-1", weight_dtype=torch.bfloat16) != []
print("while another thread packs", child(new), flush=True)
done.set()
thread.join()
print("parent", work())
"""


def test_fork() -> None:
    printed = run_script(FORK)
    assert printed == ["after use 0 0", "while another thread packs 0", "parent True"]


@EACH_OF_FEW
def test_batches(name: str) -> None:
    """Together, in any order, in batches and one at a time: the same sentences, the same tokens."""
    model, config = made(name)
    for changes in ({}, BEAMS, {"do_sample": True, "seed": 4}):
        own = config.replace(**changes)
        expected = tokens_of(generate(model, SENTENCES, own))
        for most in (1, 9, 20, 40):
            found = generate(model, SENTENCES, own.replace(max_batch_tokens=most))
            assert tokens_of(found) == expected, (changes, most)
        if own.do_sample:
            continue  # a sentence's draws depend on its place
        alone = [tokens_of(generate(model, [source], own))[0] for source in SENTENCES]
        assert alone == expected
        assert tokens_of(generate(model, SENTENCES[::-1], own)) == expected[::-1]
        padded = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in SENTENCES], batch_first=True)
        lengths = [len(source) for source in SENTENCES]
        assert tokens_of(generate(model, padded, own)) == expected
        assert tokens_of(generate(model, padded + 0, own, source_lengths=lengths)) == expected


def all_steps(model: Any, source: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """A new model with these weights, which has never generated."""
    fresh = copy.deepcopy(model)
    with use_backend("reference"):
        return [h[0] for h in tokens_of(generate(fresh, source, config))]


def no_grad(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.1)


def data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(-1.1)


def new_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * -1.1


def optimizer(model: Any) -> None:
    model(torch.tensor([[3, 4]]), None, torch.tensor([[1, 2]])).logsumexp(-1).sum().backward()
    torch.optim.SGD(model.parameters(), lr=5.0).step()


def assign(model: Any) -> None:
    state = {name: value * -1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model: Any) -> None:
    model.output = nn.Linear(model.output.in_features, TARGETS)


def settings(model: Any) -> None:
    """Not the weights, but what is done with them."""
    if isinstance(model, RecurrentEncoderDecoder):
        pytest.skip("it has none")
    for layer in model.transformer.decoder.layers:
        layer.norm_first = not layer.norm_first
        layer.activation = F.silu


CHANGES = (no_grad, data, new_data, optimizer, assign, replaced, settings)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@EACH_OF_FEW
def test_changed_models(name: str, change: Callable[[Any], None]) -> None:
    model, config = made(name)
    model = copy.deepcopy(model)
    before = tokens_of(generate(model, SENTENCES, config))
    change(model)
    after = [h[0] for h in tokens_of(generate(model, SENTENCES, config))]
    assert after == all_steps(model, SENTENCES, config)
    assert [[tokens] for tokens in after] != before


def test_copies() -> None:
    model, config = made("lstm-additive-2")
    expected = tokens_of(generate(model, SENTENCES, config))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert packed_bytes(other) == {}
        assert tokens_of(generate(other, SENTENCES, config)) == expected
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config
        assert tokens_of(generate(model, SENTENCES, same)) == expected


def test_training_mode_comes_back() -> None:
    model, config = made("lstm-additive-2")
    model = copy.deepcopy(model).train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    assert tokens_of(generate(model, SENTENCES, config)) == tokens_of(
        generate(copy.deepcopy(model).eval(), SENTENCES, config)
    )
    with pytest.raises(KeyError):
        generate(model, SENTENCES, config, stream=lambda sentence, tokens: {}[sentence])
    assert [module.training for module in model.modules()] == modes


PARTS = {
    "lstm-additive-2": (
        "output",
        "decoder.cell",
        "decoder.cell.attention",
        "upper",
        "target_embedding",
    ),
    "gru-None-3": ("output", "decoder", "target_embedding"),
    "pre-relu-5": ("output", "transformer.decoder", "transformer.decoder.layers.1.linear1"),
}


@pytest.mark.parametrize(("name", "part"), [(n, p) for n, parts in PARTS.items() for p in parts])
def test_hooks_are_called(name: str, part: str) -> None:
    model, config = made(name)
    model, calls = copy.deepcopy(model), []
    assert explain(generate, model, SENTENCES, config).backend == "cpu"
    expected = tokens_of(generate(model, SENTENCES, config))
    model.get_submodule(part).register_forward_hook(lambda *given: calls.append(1))
    explanation = explain(generate, model, SENTENCES, config)
    assert explanation.backend == "torch"
    assert "hook" in str(explanation)
    assert tokens_of(generate(model, SENTENCES, config)) == expected
    assert len(calls) > 2


def test_streams_by_the_order_given() -> None:
    model, config = made("gru-dot-1")
    for options in ({}, {"num_beams": 3}, {"max_batch_tokens": 9}):
        streamed: list[list[int]] = [[START] for _ in SENTENCES]

        def write(i: int, tokens: list[int], to: list[list[int]] = streamed) -> None:
            to[i].extend(tokens)

        found = generate(model, SENTENCES, config, stream=write, **options)
        assert streamed == [each[0] for each in tokens_of(found)]


def test_timing_is_of_the_whole_call() -> None:
    model, config = made("gru-dot-1")
    whole: dict[str, Any] = {}
    generate(model, SENTENCES, config, timing=whole)
    assert whole["steps"] == NEW
    assert NEW < whole["rows"] <= NEW * len(SENTENCES)
    single: dict[str, Any] = {}
    generate(model, SENTENCES, config, timing=single, max_batch_tokens=1)
    assert single["rows"] == single["steps"] == whole["rows"]


def test_interrupt() -> None:
    """Ctrl-C in the middle of the engine's work; the next search is as ever."""
    model, config = made("gru-dot-1")
    expected = tokens_of(generate(model, SENTENCES, config))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        generate(model, SENTENCES, config, eos_token_id=None, max_new_tokens=10**7)
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert tokens_of(generate(model, SENTENCES, config)) == expected


MEMORY = """
import resource
import test_generation as tests
tests.torch.set_num_threads(1)
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def fail(*given):
    raise KeyError
def work(count):
    for i in range(count):
        for name in ("lstm-additive-2", "pre-relu-5"):
            model, config = tests.made(name)
            tests.generate(model, tests.SENTENCES, config, num_beams=1 + i % 4, need_attention=True)
            try:
                tests.generate(model, tests.SENTENCES, config, stream=fail)
            except KeyError:
                continue
work(20)
before = used()
work(100)
print(used() - before)
"""


def test_memory_is_flat() -> None:
    """In MB, of the whole process; a session that was kept after each of 200 errors would show."""
    assert int(run_script(MEMORY)[0]) <= 6


def test_no_sentences() -> None:
    for name in ("lstm-additive-2", "pre-relu-5"):
        model, config = made(name)
        for source in ([], torch.zeros(0, 4).long()):
            found = generate(model, source, config)
            assert found.hypotheses == [] and found.sequences.numel() == found.scores.numel() == 0


def test_weights_that_are_no_numbers() -> None:
    model, config = made("pre-relu-5")
    model = copy.deepcopy(model)
    nn.init.constant_(model.output.bias, math.nan)
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        generate(model, SENTENCES, config)
