"""What is drafted when: probes, trees that follow each context's chances, and what is learned of prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from ridgeline.core.request import Request, SamplingParams
from ridgeline.core.speculation import Speculation
from ridgeline.core.step import Accepted, Chunk, Sampling, StepPlan, StepResult, TokenScore
from ridgeline.core.tree import ROOT, TokenTree
from ridgeline.speculate.draft_model import Growth, Proposal
from ridgeline.speculate.seconds import Seconds
from ridgeline.speculate.speculator import LONGEST_PAUSE, PROBE_STEPS, PROBED, PROBING_STEPS, Speculator

CHEAP, DEAR = Seconds({1: 1.0, 64: 1.1}), Seconds({1: 1.0, 2: 9.0, 64: 99.0})
PARAMS = SamplingParams(temperature=0.0)


class Drafter:
    """Proposes tokens 1, 2, ... behind every node. sure: requests behind whose tokens it is sure of the first; of the
    others it knows nothing. clock: time, which a pass takes."""

    beams = None
    block_size = 16

    def __init__(self, sure: Sequence[str] = (), pass_s: float = 0.1) -> None:
        self.sure = sure
        self.pass_s = pass_s
        self.now = 0.0
        self.passes: list[int] = []
        self.last_rows = 0
        self.lacking: dict[str, int] = {}

    def clock(self) -> float:
        return self.now

    def propose(self, growths: Sequence[Growth], count: int) -> list[list[Proposal]]:
        self.now += self.pass_s
        self.passes.append(len(growths))
        self.last_rows = sum(len(growth.at) for growth in growths)
        proposed = []
        for growth in growths:
            if growth.at != [ROOT]:
                growth.expanded += growth.at
            first = 0.99 if growth.request.request_id in self.sure else 0.05
            chances = [first, *([0.01] * (count - 1))]
            proposed.append([Proposal(list(range(1, count + 1)), chances) for _ in growth.at])
        return proposed

    def behind(self, request: Request, blocks: Sequence[int]) -> int:
        return self.lacking.get(request.request_id, 1)

    def forget(self, request_id: str) -> None: ...


def speculator(drafter: Drafter, seconds: Seconds, method: str = "tree", most_rows: int = 512) -> Speculator:
    model: Any = drafter
    asked = Speculation.of({"method": method})
    prices = seconds.copy(), Seconds({1: seconds(1), 99: 1.2}), Seconds({1: drafter.pass_s})
    return Speculator(asked, [model], *prices, most_rows, drafter.clock)


def requests(*names: str) -> list[tuple[Request, int]]:
    made = []
    for name in names:
        request = Request(name, [1, 2, 3, 4], 3, PARAMS, 100)
        request.computed = request.planned = 3
        made.append((request, 1))
    return made


def draft(one: Speculator, chosen: Sequence[tuple[Request, int]], room: int = 256) -> dict[str, TokenTree]:
    return one.draft(chosen, lambda request, nodes, slots: min(nodes, room), lambda request: 50, lambda name: [0])


def verified(one: Speculator, trees: dict[str, TokenTree], how_far: Callable[[str], int], step_s: float) -> None:
    """A step has accepted so many nodes of each tree's first path."""
    plan = StepPlan(
        1, tuple(Chunk(name, [4], 3, [0], Sampling(PARAMS, 0, 4, [], 3), tree=t) for name, t in trees.items())
    )
    accepted = {}
    for name, tree in trees.items():
        path, node = [], next(iter(tree.children(ROOT)), None)
        while node is not None and len(path) < how_far(name):
            path.append(node)
            node = next(iter(tree.children(node)), None)
        accepted[name] = Accepted(path, [TokenScore(7)] * (len(path) + 1))
    one.learn(plan, StepResult(accepted=accepted), step_s)


def test_where_trees_never_pay_one_is_tried_now_and_then() -> None:
    drafter = Drafter()
    one = speculator(drafter, DEAR)
    trees = [draft(one, requests("a")) for _ in range(3 * PROBE_STEPS)]
    assert 1 <= len(drafter.passes) <= 3
    assert sum(map(len, trees)) <= 3


def test_one_is_tried_of_few_requests_that_lack_little() -> None:
    """It stays in its step, though it is not worth its rows: it is there to be learned from."""
    names = [f"r{number}" for number in range(4 * PROBED)]
    drafter = Drafter()
    drafter.lacking = {name: 100 - number for number, name in enumerate(names)}
    one = speculator(drafter, DEAR)
    trees = [draft(one, requests(*names)) for _ in range(PROBE_STEPS + 1)]
    assert not any(trees[:-1])
    assert set(trees[-1]) == set(names[-PROBED:])


def test_what_never_pays_is_tried_ever_more_seldom() -> None:
    drafter = Drafter()
    one = speculator(drafter, DEAR)
    plain = StepPlan(1, (Chunk("a", [4], 3, [0], Sampling(PARAMS, 0, 4, [], 3)),))
    tried = []
    for number in range(8 * LONGEST_PAUSE):
        trees = draft(one, requests("a"))
        if trees:
            tried.append(number)
            verified(one, trees, lambda name: 0, 9.0)
        else:
            one.learn(plain, StepResult(), 1.0)
    begun = tried[::PROBING_STEPS]
    assert tried == [number + more for number in begun for more in range(PROBING_STEPS)]
    pauses = [later - number - PROBING_STEPS for number, later in pairwise(begun)]
    assert pauses[:4] == [2 * PROBE_STEPS, 4 * PROBE_STEPS, LONGEST_PAUSE, LONGEST_PAUSE]
    assert set(pauses[3:]) == {LONGEST_PAUSE}


def test_a_price_that_was_said_too_high_is_found_out() -> None:
    """Trees bring three tokens in 1.2 times the time, and were said to take so long that they lose a little."""
    one = speculator(Drafter(["a"], pass_s=0.01), Seconds({1: 1.0, 2: 3.2, 99: 3.3}))
    plain = StepPlan(1, (Chunk("a", [4], 3, [0], Sampling(PARAMS, 0, 4, [], 3)),))
    assert not one.pays(1)
    with_trees = []
    for _ in range(4 * PROBE_STEPS):
        trees = draft(one, requests("a"))
        with_trees.append(bool(trees))
        if trees:
            verified(one, trees, lambda name: 2, 1.2)
        else:
            one.learn(plain, StepResult(), 1.0)
    assert not any(with_trees[: PROBE_STEPS - 2])
    assert all(with_trees[-PROBE_STEPS:])


def test_the_first_step_with_trees_is_no_price() -> None:
    """Places of another kind of step are written anew for it."""
    one = speculator(Drafter(["a"]), CHEAP)
    before = one.seconds(2)
    trees = draft(one, requests("a"))
    verified(one, trees, lambda name: 0, 9.0)
    assert one.seconds(2) == before
    verified(one, draft(one, requests("a")), lambda name: 0, 9.0)
    assert one.seconds(2) > before


def test_rows_are_shared_out_to_all() -> None:
    """Where a step has no room for as many nodes as each may have, nobody goes away empty."""
    names = [f"r{number}" for number in range(16)]
    trees = draft(speculator(Drafter(names, pass_s=0.001), CHEAP, most_rows=80), requests(*names))
    assert set(trees) == set(names)
    assert max(map(len, trees.values())) <= 4


def test_drafts_that_are_never_worth_their_rows_are_given_up() -> None:
    """What a draft was said to bring is held against nothing, then: no tree of it is ever verified."""
    drafter = Drafter()
    one = speculator(drafter, Seconds({1: 1.0, 2: 1.4, 64: 20.0}))
    plain = StepPlan(1, (Chunk("a", [4], 3, [0], Sampling(PARAMS, 0, 4, [], 3)),))
    for _ in range(60):
        assert not draft(one, requests("a"))
        one.learn(plan=plain, result=StepResult(), step_s=1.0)
    assert drafter.passes
    assert one.acceptance.trust < 0.9
    assert not one.pays(1)


def test_where_trees_pay_there_is_always_one() -> None:
    one = speculator(Drafter(["a"]), CHEAP)
    for _ in range(40):
        trees = draft(one, requests("a"))
        assert trees
        assert one.pays(1)
        verified(one, trees, lambda name: 9, 1.0)
    assert one.tally.steps == 40


def test_trees_are_deep_where_the_drafter_is_sure() -> None:
    one = speculator(Drafter(["sure"]), CHEAP)
    for _ in range(60):
        trees = draft(one, requests("sure", "lost"))
        verified(one, trees, lambda name: 9 if name == "sure" else 0, 1.0)
    assert trees["sure"].depth >= 4
    assert "lost" not in trees or trees["lost"].depth <= 1


def test_rows_that_cost_more_than_they_bring_are_left_out() -> None:
    """Each row costs a tenth of a step: of siblings, only the likely one is verified."""
    one = speculator(Drafter(["a"], pass_s=0.01), Seconds({1: 1.0, 101: 11.0}))
    for _ in range(60):
        trees = draft(one, requests("a"))
        verified(one, trees, lambda name: 2, 1.0 + 0.1 * len(trees["a"]))
    assert trees["a"].is_chain
    assert 2 <= len(trees["a"]) <= 4


def test_room_is_kept_to() -> None:
    one = speculator(Drafter(["a"]), CHEAP)
    assert len(draft(one, requests("a"), room=2)["a"]) <= 2
    assert draft(one, requests("a"), room=0) == {}


def test_prompts_are_no_price_of_rows() -> None:
    one = speculator(Drafter(), CHEAP)
    before = one.plain_seconds(40)
    one.learn(StepPlan(1, (Chunk("a", [1] * 40, 0, [0], Sampling(PARAMS, 0, 4, [], 3)),)), StepResult(), 9.0)
    assert one.plain_seconds(40) == before
    one.learn(StepPlan(1, (Chunk("a", [1], 0, [0], Sampling(PARAMS, 0, 4, [], 3)),)), StepResult(), 9.0)
    assert one.plain_seconds(1) > 1.0


def test_steps_with_trees_and_without_have_prices_of_their_own() -> None:
    """A step with trees costs twice as much for as many rows: with four requests that never pays, with one it does."""
    one = speculator(Drafter(["a", "b", "c", "d"], pass_s=0.0), Seconds({1: 1.9, 99: 2.1}))
    one.plain_seconds = Seconds({1: 1.0, 4: 1.1})
    for _ in range(30):
        trees = draft(one, requests("a"))
        verified(one, trees, lambda name: 3, 2.0)
    assert trees
    crowd = requests("a", "b", "c", "d")
    for _ in range(150):
        trees = draft(one, crowd)
        verified(one, trees, lambda name: 0, 2.0 if trees else 1.1)
    assert not trees
    assert one.plain_seconds(4) < 1.5 < one.seconds(8)


@pytest.mark.parametrize("method", ["tree", "draft_model"])
def test_a_chain_is_one_wide(method: str) -> None:
    """Where the drafter is not sure, and rows cost little, a tree has siblings."""
    trees = draft(speculator(Drafter(), CHEAP, method), requests("a"))
    assert trees["a"].is_chain == (method == "draft_model")
