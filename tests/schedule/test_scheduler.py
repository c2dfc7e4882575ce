"""The scheduler's rules one by one; what holds in any order of events is in test_state_machine."""

from __future__ import annotations

import pytest
from world import Setup, World

from ridgeline.core.errors import ContextLengthExceeded, DoesNotFit, InvalidArgument
from ridgeline.core.request import FinishReason, Request, SamplingParams
from ridgeline.core.step import StepPlan, StepResult, TokenScore
from ridgeline.kv import KVCache
from ridgeline.schedule import Scheduler, make_policy

ROOMY = Setup(block_size=4, spare_blocks=60, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=40)


def made(
    *,
    blocks: int = 8,
    caching: bool = False,
    seqs: int = 4,
    batched: int = 16,
    length: int = 16,
    chunked: bool = True,
    kv_cache: bool = True,
) -> Scheduler:
    cache = KVCache(block_size=4, num_blocks=blocks, enable_prefix_caching=caching)
    return Scheduler(cache, make_policy("fcfs"), seqs, batched, length, chunked, kv_cache)


def spans(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(chunk.request_id, chunk.start, chunk.new) for chunk in plan.chunks]


def request(name: str = "a", tokens: int = 3, max_tokens: int = 4, **settings: object) -> Request:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    return Request(name, [1] * tokens, tokens, params, max_tokens)


def run(scheduler: Scheduler, token: int = 7) -> list[tuple[str, int, int]]:
    """One step in which everybody samples the same token."""
    plan = scheduler.plan(scheduler.choose())
    assert plan is not None
    result = StepResult({chunk.request_id: TokenScore(token) for chunk in plan.chunks if chunk.sampling})
    scheduler.commit(plan, result)
    return spans(plan)


def test_arguments_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(DoesNotFit, match="max_model_len 16 needs 4 blocks"):
        made(blocks=3)
    with pytest.raises(InvalidArgument, match=r"max_num_batched_tokens.*max_model_len"):
        made(chunked=False, batched=15)
    with pytest.raises(InvalidArgument, match="enable_prefix_caching"):
        made(kv_cache=False, caching=True)
    with pytest.raises(InvalidArgument, match="max_num_seqs"):
        made(seqs=0)
    with pytest.raises(InvalidArgument, match="max_num_batched_tokens"):
        made(batched=0)


def test_requests_that_cannot_run_are_refused() -> None:
    scheduler = made()
    with pytest.raises(ContextLengthExceeded):
        scheduler.add(request(tokens=16))
    with pytest.raises(InvalidArgument, match="empty"):
        scheduler.add(request(tokens=0))
    scheduler.add(request())
    with pytest.raises(InvalidArgument, match="in use"):
        scheduler.add(request())
    stranger = request("b", tokens=4)
    stranger.leader = request("c", tokens=3)
    with pytest.raises(InvalidArgument, match="differ"):
        scheduler.add(stranger)
    assert len(scheduler.waiting) == 1


def test_with_nothing_to_do_there_is_no_plan() -> None:
    scheduler = made()
    assert not scheduler.has_work
    assert scheduler.plan(scheduler.choose()) is None


def test_a_prompt_is_computed_in_chunks_and_sampled_at_its_end() -> None:
    scheduler = made(batched=4)
    scheduler.add(request(tokens=10, max_tokens=2))
    assert run(scheduler) == [("a", 0, 4)]
    assert run(scheduler) == [("a", 4, 4)]
    assert run(scheduler) == [("a", 8, 2)]
    assert run(scheduler) == [("a", 10, 1)]
    assert not scheduler.has_work


def test_decodes_take_their_tokens_before_prefills_share_the_rest() -> None:
    scheduler = made(batched=4, blocks=32)
    scheduler.add(request("a", tokens=3))
    run(scheduler)
    scheduler.add(request("b", tokens=9))
    scheduler.add(request("c", tokens=3))
    assert run(scheduler) == [("a", 3, 1), ("b", 0, 3)]
    assert run(scheduler) == [("a", 4, 1), ("b", 3, 3)]
    scheduler.abort("a")
    assert run(scheduler) == [("c", 0, 1), ("b", 6, 3)], "one-token chunks come first in a plan"


def test_without_chunking_a_prompt_is_computed_whole_beside_decodes() -> None:
    scheduler = made(batched=16, blocks=32, chunked=False)
    scheduler.add(request("a", tokens=3))
    run(scheduler)
    scheduler.add(request("b", tokens=10))
    scheduler.add(request("c", tokens=10))
    assert run(scheduler) == [("a", 3, 1), ("b", 0, 10)]
    assert run(scheduler) == [("a", 4, 1), ("b", 10, 1), ("c", 0, 10)]


def test_without_a_kv_cache_every_token_computes_all_of_them_again() -> None:
    scheduler = made(kv_cache=False)
    scheduler.add(request(tokens=3, max_tokens=3))
    assert [run(scheduler) for _ in range(3)] == [[("a", 0, 3)], [("a", 0, 4)], [("a", 0, 5)]]
    assert not scheduler.has_work
    chunked = made(kv_cache=False, batched=3)
    chunked.add(request(tokens=4, max_tokens=2))
    assert [run(chunked) for _ in range(4)] == [[("a", 0, 3)], [("a", 3, 1)], [("a", 0, 3)], [("a", 3, 2)]]


def test_no_more_run_than_there_are_seats_or_tokens() -> None:
    for seats, batched in ((2, 16), (8, 2)):
        scheduler = made(seqs=seats, batched=batched, blocks=32)
        for name in "abc":
            scheduler.add(request(name, tokens=1))
        run(scheduler)
        assert len(scheduler.running) == 2
        assert len(scheduler.waiting) == 1


def test_a_newcomer_needs_blocks_for_all_of_its_tokens() -> None:
    scheduler = made(batched=18, blocks=6)
    scheduler.add(request("a", tokens=14, max_tokens=2))
    scheduler.add(request("b", tokens=9))
    assert run(scheduler) == [("a", 0, 14)], "a chunk of 4 tokens would fit, but b needs 3 blocks and 2 are free"
    assert run(scheduler) == [("a", 14, 1)]
    assert run(scheduler) == [("b", 0, 9)]


def test_the_last_in_rank_waits_for_blocks_with_what_it_has() -> None:
    scheduler = made(blocks=4)
    scheduler.add(request("a", tokens=7, max_tokens=3))
    scheduler.add(request("b", tokens=8, max_tokens=3))
    assert run(scheduler) == [("a", 0, 7), ("b", 0, 8)]
    assert run(scheduler) == [("a", 7, 1)]
    assert len(scheduler.cache.table("b")) == 2
    scheduler.abort("a")
    assert run(scheduler) == [("b", 8, 1)]
    assert scheduler.preemptions == 0


def test_beside_others_a_newcomer_leaves_a_small_reserve() -> None:
    scheduler = made(blocks=200, batched=1000, length=800)
    scheduler.add(request("a", tokens=4))
    scheduler.add(request("b", tokens=197 * 4 + 1))
    scheduler.add(request("c", tokens=4))
    assert run(scheduler) == [("a", 0, 4)], "b would leave 1 block free, 2 are the reserve; c is behind b"
    scheduler.abort("a")
    assert run(scheduler)[0] == ("b", 0, 197 * 4 + 1)


def test_the_end_of_sequence_has_no_stop_reason_and_a_stop_id_is_its_own() -> None:
    for eos, stop, reason in (({7}, set(), None), (set(), {7}, 7), ({7}, {7}, None)):
        scheduler = made()
        one = request()
        one.eos_ids, one.stop_ids = frozenset(eos), frozenset(stop)
        scheduler.add(one)
        run(scheduler)
        assert one.finish is FinishReason.STOP
        assert one.stop_reason == reason
        assert one.tokens == [1, 1, 1, 7]
        assert scheduler.cache.free_blocks == 8
        assert not scheduler.has_work


def test_max_tokens_and_a_full_context_end_with_length() -> None:
    for max_tokens, length in ((2, 5), (99, 16)):
        scheduler = made()
        one = request(max_tokens=max_tokens)
        scheduler.add(one)
        while scheduler.has_work:
            run(scheduler)
        assert one.finish is FinishReason.LENGTH
        assert len(one.tokens) == length


def test_what_would_end_the_output_is_forbidden_before_min_tokens() -> None:
    scheduler = made()
    one = request(min_tokens=2)
    one.eos_ids, one.stop_ids = frozenset({5}), frozenset({6})
    scheduler.add(one)
    seen = []
    for _ in range(3):
        plan = scheduler.plan(scheduler.choose())
        assert plan is not None
        assert plan.chunks[0].sampling is not None
        seen.append(plan.chunks[0].sampling.forbidden)
        scheduler.commit(plan, StepResult({"a": TokenScore(9)}))
    assert seen == [(5, 6), (5, 6), ()]


def test_the_last_token_of_a_bad_word_is_forbidden_behind_the_others() -> None:
    scheduler = made()
    one = request()
    one.bad_word_ids = ((9,), (1, 2), (7, 8), (7, 7, 3))
    scheduler.add(one)
    seen = []
    for _ in range(3):
        plan = scheduler.plan(scheduler.choose())
        assert plan is not None
        assert plan.chunks[0].sampling is not None
        seen.append(plan.chunks[0].sampling.forbidden)
        scheduler.commit(plan, StepResult({"a": TokenScore(7)}))
    assert seen == [(9,), (8, 9), (3, 8, 9)], "only output counts: the prompt's last token is a 1"


def test_an_abort_returns_blocks_at_once_and_twice_is_once() -> None:
    scheduler = made()
    scheduler.add(request())
    run(scheduler)
    assert scheduler.cache.free_blocks == 7
    aborted = scheduler.abort("a")
    assert aborted is not None
    assert aborted.finish is FinishReason.ABORT
    assert scheduler.cache.free_blocks == 8
    assert scheduler.abort("a") is None
    assert scheduler.finish("a", 1, "x") is None


def test_results_of_a_request_that_ended_meanwhile_are_dropped() -> None:
    scheduler = made()
    one = request()
    scheduler.add(one)
    plan = scheduler.plan(scheduler.choose())
    assert plan is not None
    scheduler.abort("a")
    assert scheduler.commit(plan, StepResult({"a": TokenScore(7)})) == []
    assert one.tokens == [1, 1, 1]


def test_tokens_after_a_stop_string_are_dropped_and_not_published() -> None:
    scheduler = made(caching=True, length=32, blocks=16)
    one = request(max_tokens=20)
    scheduler.add(one)
    for _ in range(10):
        run(scheduler)
    live = one.tokens
    ended = scheduler.finish("a", 3, "stop")
    assert ended is one
    assert (one.finish, one.stop_reason, one.output_len, one.computed) == (FinishReason.STOP, "stop", 3, 6)
    assert len(live) == 13, "a plan that holds the old list is not disturbed"
    assert scheduler.cache.idle_blocks == 1, "tokens 0-3 are published; 4-7 contain a dropped one"
    assert scheduler.cache.free_blocks == 16


def test_a_stop_string_can_end_a_preempted_request() -> None:
    world = World(Setup(spare_blocks=0, enable_prefix_caching=False))
    for _ in range(3):
        world.add([1, 1, 2], max_tokens=9, ignore_eos=True)
    while not world.scheduler.preemptions:
        world.step()
    world.stop("2", 1)
    world.drain()
    assert world.requests["2"].output_len == 1


def test_prompt_scores_are_reported_once_although_computed_twice() -> None:
    world = World(Setup(policy="priority", max_num_seqs=1, max_num_batched_tokens=5, max_model_len=14))
    world.add([1, 2, 3, 4, 1, 2, 3, 4], prompt_logprobs=1, priority=1, max_tokens=2, ignore_eos=True)
    world.step()
    assert world.scored["0"] == [2, 3, 4, 1, 2]
    world.add([3, 3], max_tokens=2, ignore_eos=True)
    world.step()
    assert world.requests["0"].preemptions == 1
    world.drain()
    assert world.scored["0"] == [2, 3, 4, 1, 2, 3, 4]


def test_a_prompt_to_be_scored_is_not_taken_from_the_cache_but_serves_others() -> None:
    world = World(ROOMY)
    prompt = [1, 2, 3, 4] * 3
    world.add(prompt)
    world.drain()
    (scored,) = world.add(prompt, prompt_logprobs=1)
    world.drain()
    assert scored.cached_tokens == 0
    (other,) = world.add(prompt)
    world.drain()
    assert other.cached_tokens == 8


def test_outputs_are_found_by_the_next_turn_of_a_conversation() -> None:
    world = World(ROOMY)
    (first,) = world.add([1, 2, 3, 4], max_tokens=9, ignore_eos=True)
    world.drain()
    (second,) = world.add([*first.tokens, 4, 4])
    world.drain()
    assert second.cached_tokens == 12


def test_cached_tokens_are_those_found_at_the_first_start() -> None:
    world = World(Setup(policy="priority", max_num_seqs=1, block_size=2))
    world.add([1, 2, 3, 4, 1], max_tokens=4, ignore_eos=True, priority=1)
    world.step()
    world.add([3], max_tokens=1, ignore_eos=True)
    world.drain()
    assert world.requests["0"].preemptions == 1
    assert world.requests["0"].cached_tokens == 0


def test_samples_of_one_prompt_compute_it_once() -> None:
    world = World(Setup(**{**ROOMY.__dict__, "enable_prefix_caching": False}))
    samples = world.add([1, 2, 3, 4, 1, 2], n=3, max_tokens=5, ignore_eos=True)
    world.step()
    assert [one.computed for one in samples] == [6, 5, 5]
    table = world.cache.table("0")
    assert world.cache.table("1") == world.cache.table("2") == table
    plan = world.scheduler.plan(world.scheduler.choose())
    assert [(name, new) for name, _, new in spans(plan)] == [("0", 1), ("1", 1), ("2", 1)]
    assert plan is not None
    assert [source for source, _ in plan.copies] == [table[1], table[1]], "the last of three writes in place"
    assert world.cache.table("1")[0] == world.cache.table("2")[0] == table[0]


def test_a_sample_that_comes_late_shares_what_its_leader_has() -> None:
    world = World(ROOMY)
    (leader,) = world.add([1, 2, 3, 4, 1, 2], max_tokens=9, ignore_eos=True)
    for _ in range(4):
        world.step()
    (late,) = world.add([1, 2, 3, 4, 1, 2], leader=leader)
    assert late.computed == late.cached_tokens == 5
    world.drain()


def test_samples_whose_leader_ends_first_go_their_own_way() -> None:
    world = World(Setup(**{**ROOMY.__dict__, "max_num_batched_tokens": 4}))
    samples = world.add([1, 2, 3, 4, 1, 2], n=3, max_tokens=3)
    world.step()
    world.abort("0")
    assert [one.computed for one in samples[1:]] == [0, 0]
    world.drain()
    assert all(one.finish is not None for one in samples)


def test_waiting_samples_give_their_shares_back_when_blocks_run_out() -> None:
    world = World(Setup(block_size=2, spare_blocks=0, max_num_seqs=1, max_model_len=12, enable_prefix_caching=False))
    samples = world.add([1, 2, 3, 4, 1], n=2, max_tokens=7, ignore_eos=True)
    world.step()
    assert samples[1].computed == 4
    while world.requests["0"].finish is None:
        world.step()
    assert samples[1].computed == 0
    assert world.scheduler.preemptions == 0
    world.drain()


def test_choosing_twice_forgets_no_copy() -> None:
    world = World(Setup(**{**ROOMY.__dict__, "enable_prefix_caching": False}))
    world.add([1, 2, 3, 4, 1, 2], n=2, max_tokens=5, ignore_eos=True)
    world.step()
    world.scheduler.choose()
    plan = world.scheduler.plan(world.scheduler.choose())
    assert plan is not None
    assert len(plan.copies) == 1


# Running ahead


def test_an_end_by_length_is_foreseen_and_keeps_nobody_out() -> None:
    world = World(Setup(**{**ROOMY.__dict__, "ahead": True}))
    (first,) = world.add([1, 2, 3], max_tokens=2, ignore_eos=True)
    world.step()
    world.step()
    assert (first.output_len, first.unread, first.planned) == (1, 1, 4)
    world.add([2, 2], max_tokens=3, ignore_eos=True)
    plan = world.scheduler.plan(world.scheduler.choose())
    assert spans(plan) == [("1", 0, 2)]
    assert first.finish is None


def test_what_a_preempted_request_has_under_way_is_kept() -> None:
    world = World(Setup(policy="priority", max_num_seqs=1, max_model_len=14, ahead=True))
    (first,) = world.add([1, 2, 3], max_tokens=5, ignore_eos=True, priority=1)
    world.step()
    world.add([3, 3], max_tokens=2, ignore_eos=True)
    world.step()
    assert (first.preemptions, first.output_len, first.computed, first.unread) == (1, 1, 0, 0)
    world.drain()
    assert first.output_len == 5


def test_samples_wait_for_what_their_leader_has_under_way() -> None:
    """Blocks are shared when the step that fills them has come back, not when it was planned."""
    world = World(Setup(**{**ROOMY.__dict__, "ahead": True}))
    leader, child = world.add([1, 2, 3, 4, 1, 2], n=2, max_tokens=3, ignore_eos=True)
    world.step()
    assert (leader.computed, leader.planned, child.computed) == (0, 6, 0)
    (late,) = world.add([1, 2, 3, 4, 1, 2], leader=leader, max_tokens=3, ignore_eos=True)
    assert not world.cache.holds(late.request_id)
    world.step()
    assert (leader.computed, child.computed, late.computed) == (6, 5, 5)
    world.drain()
