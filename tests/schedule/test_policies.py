"""Order, admission and victims of each policy, and how they are found."""

from __future__ import annotations

import pytest
from world import Setup, World

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.request import Request, SamplingParams
from ridgeline.schedule import POLICIES, make_policy
from ridgeline.schedule.queue import Queue


def running(world: World) -> list[str]:
    return [request.request_id for request in world.scheduler.running]


def waiting(world: World) -> list[str]:
    return [request.request_id for request in world.scheduler.waiting]


def test_policies_are_the_files_of_their_folder() -> None:
    assert set(POLICIES) >= {"fcfs", "priority", "static"}
    assert make_policy("fcfs") is not make_policy("fcfs")


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="fcfs, priority, static") as refused:
        make_policy("lottery")
    assert "lottery" in str(refused.value)


def test_fcfs_serves_in_order_of_arrival_and_ignores_priority() -> None:
    world = World(Setup(policy="fcfs", max_num_seqs=2))
    for priority in (3, 2, 1):
        world.add([1, 1], priority=priority, ignore_eos=True)
    world.step()
    assert running(world) == ["0", "1"]
    world.drain()


def test_fcfs_takes_blocks_from_the_last_to_come() -> None:
    world = World(Setup(policy="fcfs", spare_blocks=0, max_num_seqs=3, enable_prefix_caching=False))
    for _ in range(3):
        world.add([1, 1, 2], max_tokens=9, ignore_eos=True)
    while not world.scheduler.preemptions:
        world.step()
    assert running(world) == ["0", "1"]
    assert waiting(world) == ["2"]
    assert world.requests["2"].preemptions == 1
    assert world.requests["2"].computed == 0
    world.drain()


def test_priority_serves_the_urgent_first() -> None:
    world = World(Setup(policy="priority", max_num_seqs=1))
    for priority in (2, 0, 1):
        world.add([1, 1], priority=priority, ignore_eos=True)
    world.step()
    assert running(world) == ["1"]
    assert waiting(world) == ["2", "0"]
    world.drain()


def test_priority_takes_a_seat_from_the_less_urgent() -> None:
    world = World(Setup(policy="priority", max_num_seqs=2))
    for priority in (1, 2):
        world.add([1, 1], priority=priority, max_tokens=8, ignore_eos=True)
    world.step()
    world.add([2, 2], priority=1, ignore_eos=True)
    world.add([2, 3], priority=2, ignore_eos=True)
    world.step()
    assert running(world) == ["0", "2"], "the same priority displaces nobody, a lower one the last"
    assert world.requests["1"].preemptions == 1
    world.drain()


def test_priority_takes_blocks_from_the_less_urgent() -> None:
    world = World(Setup(policy="priority", spare_blocks=0, max_num_seqs=3, enable_prefix_caching=False))
    world.add([1] * 9, priority=5, max_tokens=2, ignore_eos=True)
    world.step()
    world.step()
    world.add([2] * 9, priority=1, max_tokens=2, ignore_eos=True)
    world.step()
    assert running(world) == ["1"]
    assert waiting(world) == ["0"]
    world.drain()


def test_static_admits_nobody_until_its_batch_has_ended() -> None:
    world = World(Setup(policy="static", max_num_seqs=2))
    world.add([1, 1], max_tokens=1, ignore_eos=True)
    world.add([1, 2], max_tokens=4, ignore_eos=True)
    world.add([1, 3], max_tokens=4, ignore_eos=True)
    for _ in range(4):
        world.step()
        assert "2" in waiting(world)
    assert running(world) == []
    world.step()
    assert running(world) == ["2"]
    world.drain()


def test_static_waits_for_a_full_batch_while_more_is_to_come() -> None:
    world = World(Setup(policy="static", max_num_seqs=2))
    world.scheduler.more_to_come = True
    world.add([1, 1], ignore_eos=True)
    assert world.step() == []
    assert world.scheduler.has_work
    world.add([1, 2], ignore_eos=True)
    assert len(world.step()) == 2
    world.add([1, 3], ignore_eos=True)
    while running(world):
        world.step()
    assert world.step() == []
    world.drain()


def test_static_prefills_its_batch_over_several_steps_if_it_must() -> None:
    world = World(Setup(policy="static", max_num_seqs=3, max_num_batched_tokens=4, spare_blocks=9))
    for _ in range(4):
        world.add([1, 1, 1, 1], max_tokens=6, ignore_eos=True, salt=str(len(world.requests)))
    for _ in range(5):
        world.step()
    assert running(world) == ["0", "1", "2"]
    assert waiting(world) == ["3"]
    world.drain()


def test_static_goes_on_when_an_id_comes_back() -> None:
    policy, queue = make_policy("static"), Queue()
    first, head, reused = (Request(name, [1], 1, SamplingParams(), 1) for name in ("x", "y", "x"))
    queue.push(first, (0,))
    policy.gather(queue, running=0, seats=1, more_to_come=False)
    assert policy.admits(first)
    queue.remove(first)
    queue.push(head, (1,))
    queue.push(reused, (2,))
    policy.gather(queue, running=0, seats=1, more_to_come=False)
    assert policy.admits(head)
    assert not policy.admits(reused)
