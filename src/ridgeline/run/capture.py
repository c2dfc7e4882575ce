"""Recording work as CUDA graphs, and replaying it.

Knows how torch and the driver record a stream. It must not know what a step is.

A graph begins on the device when the host has launched all of it, which takes about a microsecond a kernel. So work
that the device waits for (a pass over trees, a prompt) is recorded as two graphs where it is long: while the first
few kernels run, the host launches the others (Cuts).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.ops.op import Op

FIRST_OPS, LEAST_OPS = 24, 96
"""Ops of the first graph of two, and of work that is worth two."""

Size = TypeVar("Size")
Works = Sequence[Callable[[], None]]


class Recorded:
    """One piece of work: graphs that follow one another."""

    __slots__ = ("graphs",)

    def __init__(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        self.graphs = tuple(graphs)

    def replay(self) -> None:
        for graph in self.graphs:
            graph.replay()


class Cuts:
    """An observer of ops (ops/op.py) that counts them, and knows when a recording is to go on in another graph."""

    def __init__(self) -> None:
        self.seen = 0
        self._next: Callable[[], None] | None = None

    def start(self, next_graph: Callable[[], None] | None = None) -> None:
        """Count from here. next_graph: called once, before the op that follows the first FIRST_OPS."""
        self.seen, self._next = 0, next_graph

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen == FIRST_OPS and self._next is not None:
            self._next()
        self.seen += 1

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...


def run(recorded: Recorded | None, work: Callable[[Size], None], size: Size) -> None:
    """A size's work, replayed if it was recorded."""
    if recorded is None:
        work(size)
    else:
        recorded.replay()


@torch.inference_mode()
def capture_each(
    device: torch.device,
    sizes: Sequence[Size],
    ready: Callable[[Size], Works],
    progress: Callable[[int, int], None] | None,
    cuts: Cuts | None = None,
) -> list[list[Recorded]]:
    """Recordings of each size's works, which `ready` tells once its inputs are padding. Put the largest first, so that
    the others find the memory that they need.

    progress(done, total) counts sizes. cuts: observes the ops of works of which long ones are two graphs each. Every
    work runs once unrecorded before: kernels compile then.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    found = []
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream), no_garbage_collection():
        for number, size in enumerate(sizes):
            works = ready(size)
            long = []
            for work in works:
                if cuts is not None:
                    cuts.start()
                work()
                long.append(cuts is not None and cuts.seen >= LEAST_OPS)
            stream.synchronize()
            found.append([captured(work, pool, cuts if cut else None) for work, cut in zip(works, long)])
            if progress is not None:
                progress(number + 1, len(sizes))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what the unrecorded runs held, on a stream that nobody will use again
    return found


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Memory that the collector frees in the middle of a recording would break it."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def captured(work: Callable[[], None], pool: Any, cuts: Cuts | None = None) -> Recorded:
    """Record what `work` launches on the current stream, in two graphs with `cuts`, which observes its ops.

    KernelRefused if something in it cannot be recorded. A pool whose recordings are all gone takes no further one.
    """
    graphs = [_begun(pool)]

    def next_graph() -> None:
        _end(graphs[-1])
        graphs.append(_begun(pool))

    if cuts is not None:
        cuts.start(next_graph)
    try:
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # the recording is broken, which is said here once more
                _end(graphs[-1])
            raise
        _end(graphs[-1])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise KernelRefused(
            f"a step cannot be captured as a CUDA graph; enforce_eager=True runs it op by op ({error})"
        ) from error
    finally:
        if cuts is not None:
            cuts.start()
    return Recorded(graphs)


def _begun(pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool, capture_error_mode="thread_local")
    return graph


def _end(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture. RuntimeError if it is broken, but then, too, torch knows that it is over.

    torch asks the driver first, and if that says that the capture is broken leaves all else as it was: random numbers
    are for a capture that never ends, the pool's memory is never given back. So the same graph ends once more, with
    another recording on the stream, which is good.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError):  # torch had come further than the driver's answer, and knows
            _record_little()
            graph.capture_end()
        raise


THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"""


def _record_little() -> None:
    """Begin a recording on the current stream past torch, and record one operation."""
    one = torch.empty(1, device="cuda")
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    problem = ctypes.CDLL("libcuda.so.1").cuStreamBeginCapture_v2(stream, THREAD_LOCAL)
    if problem:
        raise RuntimeError(f"cuStreamBeginCapture failed ({problem})")
    one.zero_()
