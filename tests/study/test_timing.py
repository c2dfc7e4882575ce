"""Medians, intervals, alternating order."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from ridgeline.study import timing
from ridgeline.study.timing import Stretch, Works, alternate, interval, on_host, ratios


def test_intervals_hold_the_median() -> None:
    assert interval([3.0]) == (3.0, 3.0, 3.0)
    middle, low, high = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (middle, low, high) == (3.0, 1.0, 100.0)
    assert ratios([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_rounds_alternate_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []

    def arm(name: str) -> Stretch:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return Stretch(run, 1, False)

    taken = alternate({"a": arm("a"), "b": arm("b")}, rounds=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert taken == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_a_stretch_on_the_host_goes_through_the_copies_within_the_context() -> None:
    seen: list[object] = []

    class Around:
        def __enter__(self) -> None:
            seen.append("in")

        def __exit__(self, *_: object) -> None:
            seen.append("out")

    works = Works([lambda: seen.append(0), lambda: seen.append(1)], Around)
    stretch = on_host(works, least_s=2e-6)
    seen.clear()
    assert stretch.run() > 0
    assert seen[0] == "in"
    assert seen[-1] == "out"
    assert seen[1:-1] == [number % 2 for number in range(stretch.calls)]


def test_graphs_are_replayed_until_a_stretch_is_long_enough() -> None:
    assert [timing.replays(once_s) for once_s in (5e-5, 6e-4, 1e-3, 0.02)] == [20, 2, 1, 1]


def test_stretches_are_long_enough_and_not_too_long() -> None:
    assert timing._calls(1e-5, 1, 1e-3, 0.06) == 100
    assert timing._calls(1e-5, 640, 1e-3, 0.06) == 640
    assert timing._calls(1e-2, 64, 1e-3, 0.06) == 6
    assert timing._calls(1.0, 64, 1e-3, 0.06) == 1


def test_a_cpu_has_no_clocks_to_tell() -> None:
    assert timing.clocks(torch.device("cpu")) == {}


@pytest.mark.gpu
def test_graphs_and_loops_time_the_same_work() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    works = Works([lambda: x @ x])
    graph, loop = (timing.on_cuda(works, 20, one) for one in (True, False))
    assert (graph.graph, loop.graph) == (True, False)
    taken = alternate({"graph": graph, "loop": loop}, 5)
    assert 0.5 < interval(taken["graph"]).median / interval(taken["loop"]).median < 1.5
    assert timing.clocks(torch.device("cuda"))["clocks.sm"].endswith("MHz")


@pytest.mark.gpu
def test_a_graph_keeps_what_it_reads() -> None:
    """Its replays read tensors that nobody else holds; freed memory would go back to the driver with the next graph."""

    def work() -> Callable[[], torch.Tensor]:
        held = torch.ones(1 << 24, device="cuda")
        weak.append(weakref.ref(held))
        return lambda: held @ held

    weak: list[weakref.ref[torch.Tensor]] = []
    stretch = timing.on_cuda(Works([work()]), 20, True)
    gc.collect()
    torch.cuda.empty_cache()
    assert weak[0]() is not None
    assert stretch.run() > 0
    del stretch
    gc.collect()
    assert weak[0]() is None


@pytest.mark.gpu
def test_a_pool_outlives_its_graphs() -> None:
    """Products take a workspace while they are captured, which stays; each graph is gone before the next."""
    device = torch.device("cuda")
    x, pool = torch.randn(512, 512, device=device, dtype=torch.bfloat16), timing.GraphPool(device)
    for _ in range(4):
        stretch = timing.on_cuda(Works([lambda: x @ x]), 20, True, pool)
        assert stretch.graph
        assert stretch.run() * stretch.calls >= 0.5 * timing.LEAST_S
        del stretch
