"""Passes over trees at fixed sizes, uncaptured on a CPU: sizes, places, and the same as steps of any size."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.core.config import EngineConfig
from ridgeline.core.request import SamplingParams
from ridgeline.core.step import UNREAD, Chunk, Sampling, StepPlan, StepResult
from ridgeline.core.tree import ROOT, TokenTree
from ridgeline.engine.build import build
from ridgeline.kernels.select import Table
from ridgeline.ops import Ops
from ridgeline.run.graphs import ROWS, PassGraphs, pass_sizes_up_to
from ridgeline.run.places import PassSize, PassStaging, pass_layout, pass_on_device
from ridgeline.run.prepare import prepare, sample_inputs
from ridgeline.run.runner import Runner

TOKENS = [3 + (place * 17) % 250 for place in range(80)]
BLOCK = 16
TREE = TokenTree((7, 8, 9, 10), (ROOT, 0, 0, ROOT))


# Sizes


def test_sizes() -> None:
    assert pass_sizes_up_to(1, 20) == tuple(PassSize(rows, 1) for rows in (2, 4, 8, 16, 20))
    for most in (1, 3, 8, 64, 200, 256, 300):
        sizes = pass_sizes_up_to(most, 600)
        assert len(set(sizes)) == len(sizes) < 45
        for requests in range(1, min(most, 256) + 1):
            assert any(one.rows == ROWS[-1] and one.requests >= requests for one in sizes)
            holds = [one for one in sizes if one.rows >= requests + 1 and one.requests >= requests]
            assert holds[0].rows < 2 * (requests + 1) + 2, "a node each is not padded to twice the step"


def test_nodes_and_words_of_a_size() -> None:
    assert [PassSize(rows, 1).nodes(256) for rows in (2, 64, 512)] == [1, 63, 256]
    assert [PassSize(rows, 1).words(256) for rows in (2, 33, 34, 64, 512)] == [1, 1, 2, 2, 8]
    assert PassSize(512, 1).words(64) == 2


# Places


def sampling(position: int, **params: Any) -> Sampling:
    return Sampling(SamplingParams(**{"temperature": 0, **params}), 5, position, TOKENS[:position], position)


def drafted(name: str, start: int, blocks: Sequence[int], tree: TokenTree | None, **params: Any) -> Chunk:
    """A known token at `start` and a tree behind it."""
    behind = [sampling(start + 1 + depth, **params) for depth in (() if tree is None else tree.depths)]
    return Chunk(name, [TOKENS[start]], start, blocks, sampling(start + 1, **params), tree=tree, behind=behind)


def settings_of(chunks: Sequence[Chunk]) -> list[Sampling]:
    return [one for chunk in chunks if chunk.sampling is not None for one in (chunk.sampling, *chunk.behind)]


def test_both_sides_see_the_same_fields() -> None:
    size = PassSize(9, 3)
    memory = torch.zeros(pass_layout(size, 2, 5)[1], dtype=torch.uint8)
    host, device = PassStaging(memory, size, 2, 5, BLOCK).fields, pass_on_device(memory, size, 2, 5)
    for name in host.__slots__:
        ours, theirs = getattr(host, name), getattr(device, name)
        ours[...] = torch.arange(ours.size).reshape(ours.shape).numpy()
        assert theirs.shape == ours.shape
        assert torch.equal(theirs.double(), torch.from_numpy(ours).double())
        assert (theirs.data_ptr() - memory.data_ptr()) % 16 == 0, "kernels are compiled for aligned pointers"


def test_rows_nodes_and_padding() -> None:
    size = PassSize(10, 3)
    one = PassStaging(torch.zeros(pass_layout(size, 1, 3)[1], dtype=torch.uint8), size, 1, 3, BLOCK)
    chunks = [drafted("a", 14, [5, 9], TREE, temperature=0.5), drafted("b", 3, [2], None)]
    assert one.fill(chunks, enumerate(settings_of(chunks)))
    fields = one.fields
    assert fields.ids.tolist() == [TOKENS[14], 7, 8, 9, 10, TOKENS[3], 0, 0, 0, 0]
    assert fields.positions.tolist() == [14, 15, 16, 16, 15, 3, 0, 0, 0, 0]
    assert fields.parents.tolist() == [-1, 0, 1, 1, 0, -1, -1, -1, -1, -1]
    assert fields.next.tolist() == [15, 16, 17, 17, 16, 4, 0, 0, 0, 0]
    slots = [5 * BLOCK + 14, 5 * BLOCK + 15, 9 * BLOCK, 9 * BLOCK + 1, 9 * BLOCK + 2, 2 * BLOCK + 3]
    assert fields.slots.tolist() == slots + [-1] * 4
    assert fields.tree[:, 0].tolist() == [0, 0b1, 0b11, 0b101, 0b1000, 0, 0, 0, 0, 0]
    assert fields.starts.tolist() == [0, 5, 6, 6, 10]  # the last request has what nobody else has
    assert fields.lengths.tolist() == [19, 4, 0, 0]
    assert fields.tails.tolist() == [4, 0, 0, 0]
    assert fields.temperature.tolist() == [0.5] * 5 + [0.0] * 5
    assert fields.seeds.tolist() == [5] * 6 + [0] * 4
    assert fields.tables.tolist() == [[5, 9, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0]]

    less = [drafted("b", 4, chunks[1].blocks, TokenTree.chain((1,)))]
    assert one.fill(less, enumerate(settings_of(less)))
    assert fields.ids.tolist() == [TOKENS[4], 1] + [0] * 8
    assert fields.starts.tolist() == [0, 2, 2, 2, 10]
    assert fields.lengths.tolist() == [6, 0, 0, 0]
    assert fields.tails.tolist() == [1, 0, 0, 0]
    assert fields.parents.tolist() == [-1, 0] + [-1] * 8
    assert fields.slots.tolist() == [2 * BLOCK + 4, 2 * BLOCK + 5] + [-1] * 8
    assert fields.tables[0, 0] == 2
    assert not fields.temperature.any()


def test_several_new_tokens_and_no_tree() -> None:
    size = PassSize(8, 1)
    one = PassStaging(torch.zeros(pass_layout(size, 1, 3)[1], dtype=torch.uint8), size, 1, 3, BLOCK)
    assert one.fill([Chunk("a", [4, 5, 6], 15, [1, 2], None)], [(2, sampling(18, seed=5))])
    assert one.fields.positions.tolist() == [15, 16, 17] + [0] * 5
    assert one.fields.slots.tolist() == [31, 32, 33] + [-1] * 5
    assert one.fields.next.tolist() == [0, 0, 18] + [0] * 5
    assert one.fields.tails.tolist() == [0, 0]
    assert not one.fill([Chunk("a", [4], 15, [1], None)], [(0, sampling(16, temperature=1.0, top_k=3))])


# Steps


@pytest.fixture(scope="module")
def made(tiny: Path, one_thread: None) -> Runner:
    settings = {"kernels": "reference", "dtype": "float32", "block_size": BLOCK, "max_num_seqs": 8}
    return build(EngineConfig(model=str(tiny), **settings)).runner  # type: ignore[arg-type]


@pytest.fixture
def twins(made: Runner) -> tuple[Runner, Runner]:
    """One that runs steps as they are and one that pads them, each with its own pages."""
    ops = Ops({})
    table = Table((), dict.fromkeys(("decode", "prefill", "mixed", "tree"), ops))
    pages, device = deepcopy(made.pages), made.device
    for page in (*pages.keys, *pages.values):
        page.zero_()
    mine = deepcopy(pages)
    passes = PassGraphs(made.model, mine, ops, device, BLOCK, pass_sizes_up_to(6, 40), 5)
    return (
        Runner(made.model, pages, table, device, BLOCK),
        Runner(made.model, mine, table, device, BLOCK, passes=passes),
    )


def prompts(count: int) -> list[Chunk]:
    """Of different lengths, each in blocks of its own."""
    return [
        Chunk(str(n), TOKENS[: 5 + 7 * n], 0, [5 * n + k for k in range(5)], sampling(5 + 7 * n)) for n in range(count)
    ]


def guessed(runner: Runner, chunk: Chunk, hits: int, **params: Any) -> TokenTree:
    """A tree that holds `hits` tokens that will be chosen, off its first branch, and some that will not."""
    tokens = list(TOKENS[: chunk.visible + 1])
    rights = []
    for _ in range(max(hits, 1)):
        whole = Chunk("guess", tokens, 0, chunk.blocks, sampling(len(tokens), **params))
        rights.append(runner.run(StepPlan(0, (whole,))).sampled["guess"].token)
        tokens.append(rights[-1])
    wrongs = [(one + 1) % 250 for one in rights]
    nodes, parents = [wrongs[0], 9], [ROOT, 0]
    if hits:
        nodes, parents = [*nodes, rights[0]], [*parents, ROOT]
    if hits > 1:
        nodes, parents = [*nodes, wrongs[1], rights[1]], [*parents, 2, 2]
    return TokenTree(nodes, parents)


def outcome(result: StepResult) -> dict[str, Any]:
    accepted = {name: (list(one.nodes), [t.token for t in one.tokens]) for name, one in result.accepted.items()}
    return {"accepted": accepted, "sampled": {name: one.token for name, one in result.sampled.items()}}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20},
        {"logprobs": 2},
        {"repetition_penalty": 1.2},
    ],
)
def test_a_padded_step_is_the_step(twins: tuple[Runner, Runner], count: int, params: dict[str, Any]) -> None:
    plain, padded = twins
    first = prompts(count)
    for runner in twins:
        runner.run(StepPlan(1, tuple(first)))
    scratch = deepcopy(plain.pages)
    guesser = Runner(plain.model, scratch, plain.table, plain.device, BLOCK)
    mixed = [params if n % 2 else {} for n in range(count)]
    chunks = tuple(
        drafted(c.request_id, c.visible, c.blocks, None if n == 3 else guessed(guesser, c, n % 3, **one), **one)
        for (n, c), one in zip(enumerate(first), mixed)
    )
    ours, theirs = (runner.run(StepPlan(2, chunks)) for runner in twins)
    assert outcome(ours) == outcome(theirs)
    assert ours.padding == 0
    rows = sum(chunk.new for chunk in chunks)
    size = padded.passes.size_for(chunks) if padded.passes is not None else None
    assert size is not None
    assert theirs.padding == size.rows - rows
    if count > 2:
        assert [len(one.nodes) for one in ours.accepted.values()][:3] == [0, 1, 2]
    for one, other in zip(plain.pages.keys + plain.pages.values, padded.pages.keys + padded.pages.values):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert torch.equal(one == 0, other == 0), "padding writes nowhere"
    for name, one in ours.accepted.items():
        for score, other in zip(one.tokens, theirs.accepted[name].tokens):
            assert (score.logprob is None) == (other.logprob is None)


def test_what_no_size_holds_runs_op_by_op(twins: tuple[Runner, Runner]) -> None:
    long = TokenTree.chain(range(3, 50))
    for runner in twins:
        runner.run(StepPlan(1, tuple(prompts(1))))
    results = [runner.run(StepPlan(2, (drafted("0", 5, [0, 1, 2, 3, 4], long),))) for runner in twins]
    assert outcome(results[0]) == outcome(results[1])
    assert results[1].padding == 0


def test_what_is_served(twins: tuple[Runner, Runner]) -> None:
    passes = twins[1].passes
    assert passes is not None
    one = drafted("a", 3, [0], TREE)
    assert passes.serves([one])
    assert passes.size_for([one]) == PassSize(8, 1)
    assert passes.size_for([one] * 5) == PassSize(32, 6)
    assert passes.serves([one, drafted("b", 3, [1], None)])
    assert not passes.serves([one] * 7)
    assert not passes.serves([one, Chunk("b", [1, 2], 0, [1], sampling(2))])
    assert not passes.serves([one, Chunk("b", [1], 0, [1], None)])
    assert not passes.serves([one, Chunk("b", [UNREAD], 3, [1], sampling(4))])
    assert not passes.serves([one, Chunk("b", [1], 0, [1], sampling(1), 2, [4])])


def test_a_model_with_short_windows_has_short_trees(made: Runner) -> None:
    """Their masks must fit into a window."""
    spec = made.model.spec
    sizes = pass_sizes_up_to(1, 128)

    def windowed(window: int) -> PassGraphs:
        model: Any = type("Model", (), {"spec": None, "store": made.model.store})()
        model.spec = type("Spec", (), {"windows": (None, window), "hidden": spec.hidden, "vocabulary": spec.vocabulary})
        return PassGraphs(model, made.pages, Ops({}), made.device, BLOCK, sizes, 5)

    assert windowed(100).most_nodes == 96
    assert windowed(100).size_for([drafted("a", 3, range(9), TokenTree.chain(range(97)))]) is None
    assert windowed(100).size_for([drafted("a", 3, range(9), TokenTree.chain(range(96)))]) == PassSize(128, 1)
    assert windowed(20).size_for([drafted("a", 3, [0], TREE)]) is None


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafting_passes(twins: tuple[Runner, Runner], temperature: float) -> None:
    """The best few behind each row, as `propose` finds them in the rows of a step of any size."""
    plain, padded = twins
    drafts = PassGraphs(plain.model, padded.pages, Ops({}), plain.device, BLOCK, pass_sizes_up_to(4, 64), 5, 3)
    for runner in twins:
        runner.run(StepPlan(1, tuple(prompts(2))))
    several = Chunk("1", TOKENS[11:15], 11, [5, 6, 7, 8, 9], sampling(15, temperature=temperature))
    chunks = [drafted("0", 5, [0, 1, 2, 3, 4], TREE, temperature=temperature), several]
    wanted = [(row, sampling(6 + depth, temperature=temperature)) for row, depth in ((0, 0), (2, 2), (3, 2))]
    wanted.append((8, sampling(15, temperature=temperature)))
    launched = drafts.launch(chunks, wanted)
    assert launched.padding == 7
    assert launched.proposed is not None
    assert launched.chances is not None
    plan = StepPlan(2, tuple(chunks))
    batch = prepare(plan, plain.device, BLOCK).batch
    batch.rows = torch.tensor([row for row, _ in wanted])
    ops = plain.table.ops("tree")
    logits = plain.model.logits(plain.model.forward(batch, plain.pages.keys, plain.pages.values, ops), ops)
    inputs = sample_inputs([one for _, one in wanted], plain.device)
    tokens, chances = ops.propose(logits, inputs.temperature, inputs.seeds, inputs.positions, inputs.greedy, 3)
    rows = [row for row, _ in wanted]
    assert torch.equal(launched.proposed[rows], tokens)
    torch.testing.assert_close(launched.chances[rows], chances, atol=1e-5, rtol=1e-4)
    for one, other in zip(plain.pages.keys, padded.pages.keys):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert drafts.launch(chunks, [(0, sampling(6, temperature=1.0, top_p=0.5))]).proposed is not None
    assert drafts.launch(chunks, [(0, sampling(6, frequency_penalty=1.0))]).proposed is None
