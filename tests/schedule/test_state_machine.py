"""Arrivals, ends and exhaustion in any order: every step reads only what belongs to it, and all come to an end.

hypothesis looks for a short story that breaks it; a long dull run of random ones is marked slow.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import Setup, World

from ridgeline.schedule import POLICIES


def setup_from(rng: random.Random) -> Setup:
    """Any configuration that a scheduler accepts, small enough for things to run short."""
    max_model_len = rng.randint(3, 14)
    chunked = rng.random() < 0.7
    kv_cache = rng.random() < 0.8
    return Setup(
        policy=rng.choice(sorted(POLICIES)),
        block_size=rng.randint(1, 4),
        spare_blocks=rng.choice((0, 0, 1, 2, 4, 9)),
        max_num_seqs=rng.randint(1, 5),
        max_num_batched_tokens=rng.randint(1, 14) if chunked else max_model_len + rng.randint(0, 6),
        max_model_len=max_model_len,
        enable_chunked_prefill=chunked,
        enable_prefix_caching=kv_cache and rng.random() < 0.75,
        kv_cache=kv_cache,
        ahead=rng.random() < 0.6,
        drafts=rng.choice((0, 1, 3, 8)) if kv_cache else 0,
    )


def add_some(world: World, rng: random.Random) -> None:
    """One request, or n samples of one prompt; often with a prefix that was there before."""
    longest = world.setup.max_model_len - 1
    known = list(world.requests.values())
    if known and rng.random() < 0.15:
        elder = rng.choice(known)
        world.add(elder.tokens[: elder.prompt_len], salt=elder.salt, leader=elder, max_tokens=rng.randint(1, 9))
        return
    prompt = [rng.randrange(2) for _ in range(rng.randint(1, longest))]
    if known and rng.random() < 0.5:
        elder = rng.choice(known)
        prompt = (elder.tokens[: rng.randint(1, len(elder.tokens))] + prompt[: rng.randint(0, 3)])[:longest]
    world.add(
        prompt,
        n=rng.choice((1, 1, 1, 2, 3)),
        max_tokens=rng.randint(1, 9),
        min_tokens=rng.choice((0, 0, 2, 4)),
        priority=rng.randrange(3),
        salt=rng.choice(("", "", "", "other")),
        prompt_logprobs=rng.choice((None, None, None, 1)),
        bad_words=rng.choice(((), (), ((1,),), ((2, 3), (1, 1, 4)))),
        stop_ids=rng.choice((frozenset(), frozenset({4}))),
        ignore_eos=rng.random() < 0.7,
    )


def end_some(world: World, rng: random.Random) -> None:
    """An abort or a stop string, of a living request or (harmlessly) of one that has ended."""
    if not world.requests:
        return
    request_id = rng.choice(sorted(world.alive if world.alive and rng.random() < 0.9 else world.requests))
    if rng.random() < 0.5:
        world.abort(request_id)
    else:
        world.stop(request_id, rng.randint(0, world.requests[request_id].output_len))


def meddled_step(world: World, rng: random.Random) -> None:
    """A step with something happening between its parts."""
    moment = rng.choice(("chosen", "planned", "run"))
    deed = rng.choice((add_some, end_some, end_some, lambda world, rng: world.scheduler.choose()))
    if moment != "chosen" and deed not in (add_some, end_some):
        moment = "chosen"  # choosing twice is allowed as long as nothing is under way
    world.step(lambda when: deed(world, rng) if when == moment else None)


class Story(RuleBasedStateMachine):
    """What can happen to a scheduler, in any order."""

    @initialize(rng=st.randoms(use_true_random=False))
    def begin(self, rng: random.Random) -> None:
        self.world = World(setup_from(rng))

    @rule(rng=st.randoms(use_true_random=False))
    def somebody_comes(self, rng: random.Random) -> None:
        add_some(self.world, rng)

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.alive)
    @rule(rng=st.randoms(use_true_random=False))
    def a_step_is_disturbed(self, rng: random.Random) -> None:
        meddled_step(self.world, rng)

    @precondition(lambda self: self.world.alive)
    @rule(rng=st.randoms(use_true_random=False))
    def somebody_goes(self, rng: random.Random) -> None:
        end_some(self.world, rng)

    @rule(more=st.booleans())
    def more_to_come(self, more: bool) -> None:
        self.world.scheduler.more_to_come = more

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


Story.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStory = Story.TestCase


def tell(seed: int, length: int) -> World:
    """A random story, without hypothesis: faster, but it comes as long as it is."""
    rng = random.Random(seed)
    world = World(setup_from(rng))
    for _ in range(length):
        deed = rng.choice((add_some, add_some, end_some, meddled_step, None, None, None, None))
        if deed is None:
            world.step()
        else:
            deed(world, rng)
        if rng.random() < 0.05:
            world.scheduler.more_to_come = not world.scheduler.more_to_come
        world.check()
    world.drain()
    return world


def test_random_stories() -> None:
    worlds = [tell(seed, 50) for seed in range(700)]
    assert sum(world.surplus for world in worlds) > 100
    assert sum(world.scheduler.preemptions for world in worlds) > 700
    assert sum(world.cache.hit_tokens for world in worlds) > 700
    assert sum(world.drafted for world in worlds) > 2000
    assert sum(world.accepted for world in worlds) > 700
    assert sum(world.cache.evictions for world in worlds) > 700


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_many_random_stories(part: int) -> None:
    for seed in range(2000 * (part + 1), 2000 * (part + 2)):
        tell(seed, 60)
