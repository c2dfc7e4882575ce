"""Recording work as CUDA graphs, and replaying it.

Knows how torch and the driver record a stream. It must not know what a step is.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from ridgeline.core.errors import KernelRefused

Size = TypeVar("Size")
Works = Sequence[Callable[[], None]]


def run(graph: torch.cuda.CUDAGraph | None, work: Callable[[Size], None], size: Size) -> None:
    """A size's work, replayed if it was captured."""
    if graph is None:
        work(size)
    else:
        graph.replay()


@torch.inference_mode()
def capture_each(
    device: torch.device,
    sizes: Sequence[Size],
    ready: Callable[[Size], Works],
    progress: Callable[[int, int], None] | None,
) -> list[list[torch.cuda.CUDAGraph]]:
    """Graphs of each size's works, which `ready` tells once its inputs are padding. Put the largest first, so that the
    others find the memory that they need.

    progress(done, total) counts sizes. Every work runs once uncaptured before: kernels compile then.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    found = []
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream), no_garbage_collection():
        for number, size in enumerate(sizes):
            works = ready(size)
            for work in works:
                work()
            stream.synchronize()
            found.append([captured(work, pool) for work in works])
            if progress is not None:
                progress(number + 1, len(sizes))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what the uncaptured runs held, on a stream that nobody will use again
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


def captured(work: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Record what `work` launches on the current stream. KernelRefused if something in it cannot be recorded.

    A pool whose graphs are all gone takes no further one.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # the capture is broken, which is said here once more
                _end(graph)
            raise
        _end(graph)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise KernelRefused(
            f"a step cannot be captured as a CUDA graph; enforce_eager=True runs it op by op ({error})"
        ) from error
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
