"""Speculation changes nothing of what comes out: every kind of request, every tree, every drafter, alone and in crowds.

Kernels are those for CPUs, whose rows are the same to the bit in any batch; so tokens and log-probabilities are equal,
not close.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emptiness import assert_empty
from plain import Plain
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from test_overlap import KINDS, PROMPTS, jobs, told

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.request import Request
from ridgeline.core.step import StepRecord
from ridgeline.run.beams import Beams
from ridgeline.run.graphs import PassGraphs
from ridgeline.run.places import PassSize
from ridgeline.speculate.acceptance import EDGES
from ridgeline.speculate.seconds import OWN, Seconds
from ridgeline.speculate.speculator import WIDTH, Round

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4
"""Keys and values of a block of 16 tokens in the tiny model."""


def disturbed(tiny: Path, directory: Path, noise: float) -> Path:
    """The tiny model, each matrix with so much noise beside its own spread."""
    shutil.copytree(tiny, directory)
    file = directory / "model.safetensors"
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: one + noise * one.std() * torch.randn(one.shape, generator=generator)
        for name, one in load_file(str(file)).items()
    }
    save_file(tensors, str(file))
    return directory


@pytest.fixture(scope="session")
def near(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that mostly agrees."""
    return disturbed(tiny, tmp_path_factory.mktemp("near") / "model", 0.05)


@pytest.fixture(scope="session")
def stranger(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that knows nothing of the target."""
    return disturbed(tiny, tmp_path_factory.mktemp("stranger") / "model", 10.0)


@pytest.fixture(scope="session")
def expected(tiny: Path, one_thread: None) -> Iterator[dict[str, Any]]:
    """What comes out without speculation, by kind of request."""
    with LLM(tiny, **SETTINGS) as llm:
        yield {kind: told(llm, *jobs([kind])) for kind in KINDS}


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 16,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,
    "seed": 5,
}
SIZES = (PassSize(8, 1), PassSize(64, 32))
"""Of drafting passes, where they are of fixed sizes."""

SHAPES: dict[str, dict[str, Any]] = {
    "auto": {"method": "tree"},
    "wide": {"method": "tree", "tree": [8]},
    "deep": {"method": "tree", "tree": [1, 1, 1, 1, 1, 1]},
    "bushy": {"method": "tree", "tree": [3, 2, 2]},
    "nodes": {"method": "tree", "num_speculative_tokens": 7},
    "chain": {"method": "draft_model", "num_speculative_tokens": 4},
    "chain, sized": {"method": "draft_model"},
    "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    "ngram, sized": {"method": "ngram"},
}


class Price(Seconds):
    """Seconds that no reading moves: what trees are made must not depend on the machine that runs the tests."""

    def learn(self, rows: int, seconds: float, own: float = OWN) -> None: ...


@pytest.fixture
def make(make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    """LLMs with CPU kernels; drafting and a tree's rows cost little beside a step."""

    def made(**settings: Any) -> LLM:
        llm = make_llm(**{**SETTINGS, "kernels": "auto", **settings})
        speculator = llm.built.speculator
        if speculator is not None:
            speculator.seconds = speculator.plain_seconds = Price({1: 1.0, 256: 3.0})
            speculator.draft_seconds = Price({1: 0.05, 256: 0.15})
        return llm

    return made


@pytest.fixture
def make_on_device(make: Callable[..., LLM]) -> Callable[..., LLM]:
    """The same with all levels of a draft behind one another without the host, as where they are captured. Each LLM
    has a list `drafts` of how many requests and levels every such draft had."""

    def made(**settings: Any) -> LLM:
        llm = make(**settings)
        speculator, config = llm.built.speculator, llm.built.config
        blocks = -(-config.max_model_len // config.block_size)
        drafts: list[tuple[int, int]] = []
        for model in speculator.models:
            size = model.device, config.block_size
            ops = model.table.ops("tree")
            model.graphs = passes = PassGraphs(model.model, model.pages, ops, *size, SIZES, blocks, WIDTH)
            model.beams = Beams(
                model.model, model.pages, ops, *size, 32, blocks, passes.proposed, passes.chances, EDGES
            )
            whole = model.beams.draft

            def counted(begun: Any, passed: Any, widths: Any, *more: Any, whole: Any = whole) -> Any:
                drafts.append((len(begun), len(widths)))
                return whole(begun, passed, widths, *more)

            model.beams.draft = counted
        speculator.level_seconds = Price({1: 0.01, 256: 0.03})
        llm.drafts = drafts
        return llm

    return made


def drafting(shape: str, *models: Path) -> dict[str, Any]:
    config = dict(SHAPES[shape])
    if config["method"] != "ngram":
        config["model"] = [str(one) for one in models]
    return config


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_request(make: Callable[..., LLM], near: Path, expected: dict[str, Any], shape: str) -> None:
    llm = make(speculative_config=drafting(shape, near))
    for kind in KINDS:
        assert told(llm, *jobs([kind])) == expected[kind], kind
    tally = llm.built.speculator.tally
    assert tally.drafted > tally.accepted
    assert tally.accepted > 0 or shape.startswith("ngram")  # a random model repeats nothing
    assert_empty(llm)


@pytest.mark.parametrize("shape", ["auto", "deep", "bushy", "nodes", "chain", "chain, sized"])
def test_every_kind_of_request_with_drafts_on_the_device(
    make_on_device: Callable[..., LLM], near: Path, expected: dict[str, Any], shape: str
) -> None:
    llm = make_on_device(speculative_config=drafting(shape, near))
    for kind in KINDS:
        assert told(llm, *jobs([kind])) == expected[kind], kind
    assert llm.drafts
    assert max(levels for _, levels in llm.drafts) > 1
    tally = llm.built.speculator.tally
    assert tally.drafted > tally.accepted > 0
    assert_empty(llm)


def test_what_drafts_take_is_learned_where_it_was_seen(make_on_device: Callable[..., LLM], near: Path) -> None:
    """Drafts of one request take far longer than was said: that says little of those of 64, and of levels as much as of
    the first pass."""
    llm = make_on_device(speculative_config=drafting("deep", near))
    speculator = llm.built.speculator
    speculator.draft_seconds, speculator.level_seconds = Seconds({1: 1.0, 64: 2.0}), Seconds({1: 0.1, 64: 0.1})
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 2.0
        return now

    speculator._clock = clock
    llm.generate(["hello world"], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True), use_tqdm=False)
    one, many = speculator.draft_seconds(1), speculator.draft_seconds(64)
    assert one > 1.2
    assert 1.0 < many / 2.0 < 0.5 + 0.5 * one
    assert speculator.level_seconds(1) > 0.11


@pytest.mark.parametrize("shape", ["bushy", "deep", "chain"])
def test_trees_of_given_shape_are_the_same_wherever_they_are_drafted(
    make: Callable[..., LLM], make_on_device: Callable[..., LLM], near: Path, shape: str
) -> None:
    told_of: list[list[Any]] = []
    for maker in (make, make_on_device):
        llm = maker(speculative_config=drafting(shape, near))
        rounds: list[Round] = []
        llm.built.speculator.listeners.append(rounds.append)
        params = [SamplingParams(max_tokens=20, temperature=heat, seed=3, ignore_eos=True) for heat in (0.0, 0.9)]
        llm.generate(["hello world", "the quick brown fox"], params, use_tqdm=False)
        told_of.append(
            [(one.tree.tokens, one.tree.parents, one.ranks, [round(q, 4) for q in one.chances]) for one in rounds]
        )
    assert told_of[0] == told_of[1]


def test_a_request_that_drafts_pass_by_pass_holds_up_no_other(
    make_on_device: Callable[..., LLM], make: Callable[..., LLM], near: Path
) -> None:
    llm, alone = make_on_device(speculative_config=drafting("chain", near)), make()
    params = [
        SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, frequency_penalty=p) for p in (0.0, 1.0, 0.0)
    ]
    ours, plain = (one.generate(["hello", "world", "quick"], params, use_tqdm=False) for one in (llm, alone))
    assert [one.outputs[0].token_ids for one in ours] == [one.outputs[0].token_ids for one in plain]
    assert max(requests for requests, _ in llm.drafts) == 2
    assert all(one.metrics.num_draft_tokens > 0 for one in ours)


def test_what_repeats_itself_is_drafted_from_itself(make: Callable[..., LLM]) -> None:
    llm, alone = make(speculative_config=drafting("ngram")), make()
    params = SamplingParams(max_tokens=30, temperature=0, logit_bias={40: 50.0, 41: 50.0}, frequency_penalty=2.0)
    ours, plain = (one.generate("hello", params, use_tqdm=False)[0] for one in (llm, alone))
    assert ours.outputs[0].token_ids == plain.outputs[0].token_ids
    assert ours.metrics.num_accepted_tokens > 10
    assert ours.metrics.num_steps < 15 < plain.metrics.num_steps == 30


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_cache_memory_bytes": 7 * BLOCK_BYTES, "max_model_len": 80, "max_num_seqs": 6},
        {"max_num_seqs": 2, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 9},
        {"block_size": 64},
        {"scheduling_policy": "priority"},
        {"async_scheduling": True},
    ],
    ids=["roomy", "preempting", "two seats", "small chunks", "large pages", "priority", "overlapped"],
)
@pytest.mark.parametrize("shape", ["auto", "bushy", "chain", "ngram"])
def test_all_at_once(
    make: Callable[..., LLM], near: Path, expected: dict[str, Any], shape: str, settings: dict[str, Any]
) -> None:
    if "kv_cache_memory_bytes" in settings and shape != "ngram":  # a block is the target's and the drafter's
        settings = {**settings, "kv_cache_memory_bytes": 2 * settings["kv_cache_memory_bytes"]}
    llm = make(speculative_config=drafting(shape, near), **settings)
    got = told(llm, *jobs(list(KINDS)))
    assert got == [one for kind in KINDS for one in expected[kind]]
    if not settings:
        assert got == told(llm, *jobs(list(KINDS)))  # now with prefix hits
    if "kv_cache_memory_bytes" in settings:
        assert llm.built.engine.scheduler.preemptions > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_memory_bytes": 14 * BLOCK_BYTES, "max_model_len": 80, "max_num_seqs": 6},
        {"max_num_batched_tokens": 9},
        {"max_model_len": 80, "async_scheduling": True},
    ],
    ids=["preempting", "small chunks", "overlapped"],
)
@pytest.mark.parametrize("shape", ["auto", "chain"])
def test_all_at_once_with_drafts_on_the_device(
    make_on_device: Callable[..., LLM], near: Path, expected: dict[str, Any], shape: str, settings: dict[str, Any]
) -> None:
    """Short contexts and full pools too, where the slots of a beam find no room."""
    llm = make_on_device(speculative_config=drafting(shape, near), **settings)
    assert told(llm, *jobs(list(KINDS))) == [one for kind in KINDS for one in expected[kind]]
    assert llm.drafts or (shape, len(settings)) == ("auto", 3)  # a beam of eight finds no room in a pool so small
    assert_empty(llm)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 7}, {"temperature": 0.9}])
def test_the_target_as_its_own_drafter_is_always_right(
    make: Callable[..., LLM], tiny: Path, sampling: dict[str, Any]
) -> None:
    """Each round accepts its whole chain, but where the output ends; one pass of the target a round."""
    llm = make(speculative_config={"method": "draft_model", "model": str(tiny), "num_speculative_tokens": 4})
    records: list[StepRecord] = []
    llm.built.engine.listeners.append(records.append)
    params = SamplingParams(max_tokens=21, ignore_eos=True, **sampling)
    output = llm.generate("hello world", params, use_tqdm=False)[0]
    llm.built.engine.listeners.clear()
    metrics = output.metrics
    assert metrics.num_accepted_tokens == metrics.num_draft_tokens == 16
    assert metrics.num_steps == 5 == len(records)  # the prompt's, then four of five tokens
    assert [record.kind for record in records] == ["prefill", *["tree"] * 4]
    assert [record.drafted for record in records] == [record.accepted for record in records] == [0, 4, 4, 4, 4]
    assert all(record.draft_s > 0 for record in records[1:])


@pytest.mark.parametrize("shape", ["auto", "bushy", "chain"])
def test_a_stranger_costs_time_and_changes_nothing(
    make: Callable[..., LLM], stranger: Path, expected: dict[str, Any], shape: str
) -> None:
    llm = make(speculative_config=drafting(shape, stranger))
    for kind in KINDS:
        assert told(llm, *jobs([kind])) == expected[kind], kind


def test_several_drafters_are_merged(
    make: Callable[..., LLM], near: Path, stranger: Path, expected: dict[str, Any]
) -> None:
    llm = make(speculative_config={"method": "tree", "tree": [2, 2], "model": [str(stranger), str(near)]})
    rounds: list[Round] = []
    llm.built.speculator.listeners.append(rounds.append)
    for kind in KINDS:
        assert told(llm, *jobs([kind])) == expected[kind], kind
    assert {source for one in rounds for source in one.sources} == {0, 1}
    by_source = llm.built.speculator.tally.by_source
    assert by_source[1][1] > by_source[0][1]  # the one that agrees is accepted more often
    assert all(one.tree.depth <= 2 and len(one.tree) <= 12 for one in rounds)


def test_a_model_and_n_grams_are_merged(make: Callable[..., LLM], near: Path, expected: dict[str, Any]) -> None:
    llm = make(speculative_config={"method": "tree", "num_speculative_tokens": 6, "model": [str(near), "ngram"]})
    for kind in KINDS:
        assert told(llm, *jobs([kind])) == expected[kind], kind
    params = SamplingParams(max_tokens=30, temperature=0, logit_bias={40: 50.0, 41: 50.0}, frequency_penalty=2.0)
    llm.generate("hello", params, use_tqdm=False)
    assert set(llm.built.speculator.tally.by_source) == {0, 1}


def test_log_probabilities_are_those_of_a_new_pass(make: Callable[..., LLM], near: Path) -> None:
    llm = make(speculative_config=drafting("bushy", near))
    again = make()
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, logprobs=3, ignore_eos=True)
    output = llm.generate("the quick", params, use_tqdm=False)[0]
    assert output.metrics.num_accepted_tokens > 0
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    scored = again.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=3), use_tqdm=False)[
        0
    ].prompt_logprobs
    told_by_trees = output.outputs[0].logprobs
    assert told_by_trees is not None
    assert scored is not None
    for drafted, plain in zip(told_by_trees, scored[len(output.prompt_token_ids) :], strict=True):
        assert plain is not None
        assert drafted == plain


def test_committed_keys_and_values_are_those_of_a_prefill(make: Callable[..., LLM], near: Path) -> None:
    """After random rounds, aborts between them: what lies in the slots of a request's tokens."""
    llm, fresh = make(speculative_config=drafting("bushy", near)), make(max_num_batched_tokens=256)
    chance = random.Random(4)
    engine = llm.built.engine
    streams = [
        llm.stream([chance.randrange(2, 280) for _ in range(length)], SamplingParams(max_tokens=90, ignore_eos=True))
        for length in (3, 17, 40)
    ]
    for stream in streams:
        next(stream)
    for _ in range(12):
        next(chance.choice(streams))
    checked = 0
    for request in engine.scheduler.running:
        if request.computed < request.prompt_len:
            continue
        blocks = engine.scheduler.cache.table(request.request_id)
        slots = torch.tensor([blocks[at // 16] * 16 + at % 16 for at in range(request.computed)])
        ids = request.tokens[: request.computed]
        other = fresh.built.engine
        other.add(Request("again", list(ids), len(ids), SamplingParams(max_tokens=8), 8))
        other.step()
        mine = other.scheduler.cache.table("again")
        own = torch.tensor([mine[at // 16] * 16 + at % 16 for at in range(len(ids))])
        for ours, theirs in zip(_rows(llm, slots), _rows(fresh, own), strict=True):
            assert torch.equal(ours, theirs)
        other.abort("again")
        checked += 1
    assert checked == 3
    for stream in streams:
        stream.close()


def _rows(llm: LLM, slots: torch.Tensor) -> list[torch.Tensor]:
    """[slots, heads, dim] of each layer's keys and values."""
    pages = llm.built.runner.pages
    rows = []
    for pool in (*pages.keys, *pages.values):
        blocks, heads, size, dim = pool.shape
        rows.append(pool.permute(0, 2, 1, 3).reshape(blocks * size, heads, dim)[slots])
    return rows


def test_requests_come_and_go_in_the_middle(make: Callable[..., LLM], near: Path) -> None:
    """Streams closed between rounds, others go on as if alone; no block stays behind."""
    llm, alone = make(speculative_config=drafting("auto", near)), make()
    params = SamplingParams(max_tokens=150, temperature=0.7, seed=1, ignore_eos=True)
    kept = llm.stream("hello world", params)
    left = [llm.stream(prompt, params) for prompt in PROMPTS]
    part = next(kept)
    for number, stream in enumerate(left):
        for _ in range(number + 1):
            next(stream)
        stream.close()
        part = next(kept)
    part = list(kept)[-1]
    expected = alone.generate("hello world", params, use_tqdm=False)[0]
    assert part.output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert_empty(llm)


class Increasing:
    """A constraint: each token is larger than the one before."""

    def __init__(self) -> None:
        self.last = 1

    def mask(self) -> bytes:
        words = [0xFFFFFFFF] * 9
        for token in range(self.last + 1):
            words[token // 32] &= ~(1 << token % 32)
        return b"".join(word.to_bytes(4, "little") for word in words)

    def accept(self, token: int) -> bool:
        assert token > self.last
        self.last = token
        return False


def test_grammars_draft_nothing_and_hold(make: Callable[..., LLM], near: Path) -> None:
    """A request with a grammar runs beside one that drafts."""
    llm = make(speculative_config=drafting("bushy", near))
    engine = llm.built.engine
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    bound = Request("bound", [3, 4, 5], 3, params, 6, grammar=Increasing())
    free = Request("free", [3, 4, 5], 3, params, 12)
    engine.add(bound)
    engine.add(free)
    while engine.has_work:
        engine.step()
    output = bound.tokens[3:]
    assert output == sorted(set(output))
    assert bound.drafted == 0 < free.drafted


# What is refused, before anything is built


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "medusa"}, "tree, draft_model, ngram"),
        ({"method": "tree", "width": 2}, "no entry 'width'"),
        ({"method": "tree", "tree": []}, "list of widths"),
        ({"method": "tree", "tree": [2, 0]}, "from 1"),
        ({"method": "tree", "tree": [2, -1]}, "from 1"),
        ({"method": "tree", "tree": [16, 16]}, "272 nodes"),
        ({"method": "tree", "num_speculative_tokens": 257}, r"\[1, 256\]"),
        ({"method": "tree", "num_speculative_tokens": 0}, r"\[1, 256\]"),
        ({"method": "draft_model", "tree": [1, 1]}, "method 'tree'"),
        ({"method": "ngram", "model": "x"}, "without one"),
        ({"method": "tree", "verification": "hopeful"}, "coupled, multi_step, target_only"),
        ({"method": "ngram", "verification": "multi_step"}, "one draft model"),
        ({"method": "tree", "model": ["x", "y"], "verification": "multi_step"}, "one draft model"),
        ("tree", "mapping"),
    ],
)
def test_configurations_that_make_no_sense(tiny: Path, config: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        LLM(tiny, speculative_config=config)


def test_a_drafter_with_another_vocabulary(tiny: Path, checkpoint: Callable[..., Path]) -> None:
    other = checkpoint(vocab_size=300)
    with pytest.raises(InvalidArgument, match="another vocabulary"):
        LLM(tiny, speculative_config={"method": "tree", "model": str(other)})


def test_a_drafter_with_a_shorter_context(tiny: Path, checkpoint: Callable[..., Path]) -> None:
    other = checkpoint(max_position_embeddings=128)
    with pytest.raises(InvalidArgument, match="128 positions"):
        LLM(tiny, speculative_config={"method": "tree", "model": str(other)})
    LLM(tiny, max_model_len=128, speculative_config={"method": "tree", "model": str(other)}).close()


def test_only_the_embedded_model_brings_its_own_drafter(tiny: Path) -> None:
    with pytest.raises(InvalidArgument, match="name a draft model"):
        LLM(tiny, speculative_config={"method": "tree"})


def test_nothing_is_drafted_without_a_cache(tiny: Path) -> None:
    with pytest.raises(InvalidArgument, match="kv_cache=True"):
        LLM(tiny, speculative_config={"method": "ngram"}, kv_cache=False, enable_prefix_caching=False)


# Other families: the tokens differ, their law does not


@pytest.mark.parametrize("shape", ["auto", "bushy", "nodes"])
@pytest.mark.parametrize("verification", ["multi_step", "target_only"])
def test_the_law_of_three_tokens(
    make: Callable[..., LLM], near: Path, plain: Plain, verification: str, shape: str
) -> None:
    """Chi-square of the joint law over 1,500 samples, against the model written down in plain torch."""
    llm = make(speculative_config={**drafting(shape, near), "verification": verification}, max_num_batched_tokens=256)
    prompt, temperature, samples = [5, 9, 33], 0.5, 1500
    params = SamplingParams(n=100, max_tokens=4, temperature=temperature, top_k=20, ignore_eos=True, detokenize=False)
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for _ in range(samples // 100):
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        counts.update(tuple(one.token_ids[:3]) for one in output.outputs)
        drafted += output.metrics.num_draft_tokens
        accepted += output.metrics.num_accepted_tokens
    assert accepted > drafted / 20 > 0

    def law(path: tuple[int, ...]) -> torch.Tensor:
        logits = plain.logits([*prompt, *path])[-1] / temperature
        kept = logits.topk(20).indices
        return torch.full_like(logits, float("-inf")).scatter(0, kept, logits[kept]).softmax(-1)

    expected: dict[tuple[int, ...], float] = {}
    for first, one in enumerate(law(()).tolist()):
        if one * samples < 8:
            continue
        for second, two in enumerate(law((first,)).tolist()):
            if one * two * samples < 8:
                continue
            for third, three in enumerate(law((first, second)).tolist()):
                if one * two * three * samples >= 8:
                    expected[first, second, third] = one * two * three * samples
    rest = samples - sum(expected.values())
    assert len(expected) > 10
    observed = [counts[path] for path in expected]
    found = chisquare([*observed, samples - sum(observed)], [*expected.values(), rest])
    assert found.pvalue > 1e-4


def test_seeded_requests_keep_their_noise_in_every_family(
    make: Callable[..., LLM], near: Path, expected: dict[str, Any]
) -> None:
    llm = make(speculative_config={**drafting("bushy", near), "verification": "multi_step"})
    for kind in ("greedy", "warm", "cut", "penalties", "scored", "stopped"):
        assert told(llm, *jobs([kind])) == expected[kind], kind


def test_log_probabilities_of_what_multi_step_sampling_emits(make: Callable[..., LLM], near: Path) -> None:
    llm, again = make(speculative_config={**drafting("bushy", near), "verification": "multi_step"}), make()
    params = SamplingParams(max_tokens=24, temperature=0.8, logprobs=2, ignore_eos=True)
    output = llm.generate("the quick", params, use_tqdm=False)[0]
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    scored = again.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)[
        0
    ].prompt_logprobs
    told_by_trees = output.outputs[0].logprobs
    assert told_by_trees is not None
    assert scored is not None
    assert output.metrics.num_accepted_tokens > 0
    assert told_by_trees == scored[len(output.prompt_token_ids) :]
