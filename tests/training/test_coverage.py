"""Coverage against counting by hand: coupled continuations, places, static trees, the measures that follow."""

from __future__ import annotations

import copy
import itertools
import random

import numpy as np
import pytest
import torch

from ridgeline.ops.sample import gumbel
from training.combine import ABSENT
from training.coverage import (
    CHILDREN,
    DEPTH,
    NGRAM,
    accepted,
    by_depth,
    chain_accepted,
    continued,
    costs,
    covered,
    found_at,
    gain,
    grown,
    judged,
    law_of,
    lookups,
    parts,
    places,
    report,
    tree_accepted,
)
from training.model import Llama, Sizes, parameter_count

TINY = Sizes(32, 16, 2, 1, 2, 48, vocab_size=300, max_position_embeddings=64)


def model(seed: int) -> Llama:
    torch.manual_seed(seed)
    made = Llama(TINY)
    for weight in made.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return made.eval().requires_grad_(False)


def near(other: Llama) -> Llama:
    """A model that is often right about what the other one says."""
    made = copy.deepcopy(other)
    draw = torch.Generator().manual_seed(9)
    for weight in made.parameters():
        weight += 0.08 * torch.randn(weight.shape, generator=draw)
    return made


OPENINGS = [torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 5, 9)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_continuations_are_the_engines_choice(temperature: float) -> None:
    target = model(0)
    rows = continued(target, OPENINGS, 10, temperature)
    assert rows.known == [5, 5, 9]
    for row, (ids, opening) in enumerate(zip(rows.ids, OPENINGS)):
        assert torch.equal(ids[: len(opening)], opening)
        assert len(ids) == len(opening) + 10
        for place in range(len(opening), len(ids)):
            scores = target(ids[None, :place])[0, -1].log_softmax(-1)
            if temperature:
                scores = scores / temperature + gumbel(torch.tensor([row + 1]), torch.tensor([place]), 300)[0]
            assert scores.argmax() == ids[place]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_target_itself_is_always_right(temperature: float) -> None:
    """An oracle proposes the token first, everywhere: the noise of drafter and target is one and the same."""
    target = model(0)
    rows = continued(target, OPENINGS, 10, temperature)
    for at in places({"oracle": target, "other": model(1)}, rows, temperature):
        assert found_at(at.drafters["oracle"].tokens, at.chosen).tolist() == [0] * 10
        assert (found_at(at.drafters["other"].tokens, at.chosen) > 0).any()


def test_lookups_know_only_what_stands_before() -> None:
    ids = torch.tensor([7, 1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3])
    tokens, lengths, runs = lookups(ids, 3)
    assert tokens[:5].tolist() == [[ABSENT] * 3 for ABSENT in [-1] * 4] + [[3, -1, -1]]
    assert tokens[5].tolist() == [9, -1, -1]  # behind 1 2 3 at the second time stood 9 so far
    assert lengths[5].tolist() == [3, 0, 0]
    assert tokens[8].tolist() == [3, -1, -1]
    assert lengths[8].tolist() == [2, 0, 0]
    # Behind 1 2 stood 3 before, which is right; what stood behind it is right or wrong only where the row goes on.
    assert runs.tolist() == [-1, -1, -1, -1, 1, 0, -1, -1, 1]


def test_places_beyond_the_children_are_absent() -> None:
    children = torch.tensor([[4, 5, 6], [1, 2, 3]])
    assert found_at(children, torch.tensor([6, 9])).tolist() == [2, CHILDREN]


def test_grown_trees_are_the_best_of_all() -> None:
    """Against every tree of so many nodes over three places and three levels."""
    law = [0.2, 0.5, 0.1]
    every = [path for length in (1, 2, 3) for path in itertools.product(range(3), repeat=length)]
    value = {path: float(np.prod([law[place] for place in path])) for path in every}
    for nodes in (1, 2, 3, 4):
        whole = (
            tree
            for tree in itertools.combinations(every, nodes)
            if all(len(path) == 1 or path[:-1] in tree for path in tree)
        )
        most = max(sum(value[path] for path in tree) for tree in whole)
        paths = grown(law, nodes, 3)
        assert len(set(paths)) == nodes
        assert all(len(path) == 1 or path[:-1] in paths for path in paths)
        assert sum(value[path] for path in paths) == pytest.approx(most)


def test_a_law_with_zeros_still_gives_a_tree() -> None:
    paths = grown([1.0, 0.0, 0.0], 5, 2)
    assert len(set(paths)) == 5
    assert all(len(path) == 1 or path[:-1] in paths for path in paths)


def test_accepted_tokens_are_the_longest_path() -> None:
    draw = random.Random(0)
    found = np.array([[draw.choice((0, 0, 1, 2, CHILDREN)) for _ in range(20)] for _ in range(4)])
    paths = grown([0.5, 0.3, 0.1], 9, 3)
    made = accepted(paths, found, 3)
    assert made.shape == (4, 18)
    for row, start in itertools.product(range(4), range(18)):
        longest = 0
        while longest < 3 and tuple(found[row, start : start + longest + 1]) in paths:
            longest += 1
        assert made[row, start] == longest
    assert accepted([(0,)], found, 1).mean() == pytest.approx((found == 0).mean())


def test_depths_are_conditional() -> None:
    found = np.array([[0, 1, 0, 5, 0, 0, 0, 0]])
    assert by_depth(found, 1, 2) == [pytest.approx(5 / 7), pytest.approx(3 / 5)]
    assert by_depth(found, 2, 3) == [pytest.approx(5 / 6), pytest.approx(4 / 5), pytest.approx(3 / 4)]
    assert law_of(found)[:2] == [pytest.approx(6 / 8), pytest.approx(1 / 8)]


def test_each_half_is_measured_with_the_other_halfs_tree() -> None:
    """The halves have nothing in common, so no tree helps; with rows that agree it does."""
    apart = np.zeros((4, 12), dtype=np.int64)
    apart[1::2] = 3
    assert tree_accepted((apart,), 2).tolist() == [0.0] * 4
    assert tree_accepted((np.zeros((4, 12), dtype=np.int64),), DEPTH).tolist() == [DEPTH] * 4


def test_trees_drafted_apart_share_the_nodes() -> None:
    """Two drafters that are right in turns: together they cover all, with half of the nodes each."""
    one = np.zeros((4, 12), dtype=np.int64)
    other = np.zeros_like(one)
    one[:, 6:], other[:, :6] = CHILDREN, CHILDREN
    assert covered((one,), 2) == 0.5
    assert covered((one, other), 1) == 0.5
    assert covered((one, other), 2) == 1.0
    both = tree_accepted((one, other), 4)
    for row in range(4):  # chains of two: at six of the seven starts one of them goes two deep, at one start one deep
        assert both[row] == pytest.approx((6 * 2 + 1) / 7)
    assert parts(7, 2) == [4, 3]


def test_a_chain_behind_a_match_takes_nodes_where_it_helps() -> None:
    """The model is right at first places half of the time, a match always: all nodes that may go to the chain do."""
    draw = random.Random(1)
    found = np.array([[draw.choice((0, 1)) for _ in range(12)] for _ in range(4)])
    none = np.full_like(found, ABSENT)
    assert chain_accepted(found, none, 8).tolist() == tree_accepted((found,), 8).tolist()
    assert chain_accepted(found, np.full_like(found, DEPTH), 8).tolist() == [DEPTH] * 4
    assert chain_accepted(found, np.zeros_like(found), 8).tolist() == tree_accepted((found,), 8).tolist()


def test_gain_is_a_paired_ratio() -> None:
    theirs = np.array([1.0, 2.0, 3.0, 10.0])
    assert gain(1.5 * theirs, theirs) == pytest.approx([1.5, 1.5, 1.5])
    ratio, low, high = gain(theirs + np.array([1, -1, 1, 1]), theirs)
    assert low < ratio < high
    assert ratio == pytest.approx(18 / 16)


def test_a_second_drafter_that_knows_more_is_seen_to_pay() -> None:
    """The target as second model: every combination that can learn finds that out, at no more nodes."""
    target = model(0)
    draw = torch.Generator().manual_seed(5)
    rows = continued(target, [torch.randint(1, 300, (6,), generator=draw) for _ in range(6)], 20, 0.0)
    made = report({"first": near(target), "same": near(target), "oracle": target}, rows, 0.0)
    arms = made["arms"]
    assert arms["oracle"]["covered"]["1"] == 1.0
    assert arms["first + oracle, union"]["covered"]["2"] == 1.0
    assert arms["first + oracle, stacking"]["covered"]["1"] > arms["first"]["covered"]["1"] + 0.1
    assert arms["first + oracle, weighting"]["covered"]["1"] > arms["first"]["covered"]["1"]
    for way in ("union", "voting", "weighting"):  # a twin adds nothing
        assert arms[f"first + same, {way}"]["law"] == pytest.approx(arms["first"]["law"])
    assert arms["first"]["trees"]["16"]["beside_first"] == pytest.approx([1.0, 1.0, 1.0])
    assert judged("first", [made]) == pytest.approx(1.0)
    assert judged("first + oracle, union", [made]) > 1.08
    assert NGRAM in arms


def test_costs_add_up() -> None:
    count = parameter_count(model(0))
    made = costs({"first": count, "second": 3 * count})
    assert made["first"] == {"bytes": 2 * count, "passes": 1}
    assert made["first + second"] == {"bytes": 8 * count, "passes": 2}
    assert made[f"first + {NGRAM}"] == {"bytes": 2 * count, "passes": 1}
