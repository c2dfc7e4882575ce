"""What a launch from Python costs the host, and how long a CUDA kernel takes to compile, and to come from the disk.

Launches: one small kernel with the arguments of `attention`'s rung v2 (26 of them), called in a row on an idle
stream; the host's time of one call. Compiling: each .cu once for this GPU (the choice that its pairwise cover begins
with), into an empty folder, then again from it, loading onto the GPU included.

    PYTHONPATH=src python3 -m benchmarks.gpu_launch --out $OUT
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Record, interval, parser
from ridgeline.kernels.cuda import nvrtc
from ridgeline.kernels.cuda.instances import ARCHITECTURE, declared
from ridgeline.kernels.cuda.nvrtc import FLOAT32, INT32, INT64, POINTER, Kernel

MOST_COMPILE_S, MOST_CACHE_S = 5.0, 0.05
ARGUMENTS = (*(POINTER,) * 12, *(INT32,) * 6, *(INT64,) * 6, *(FLOAT32,) * 2)
NUMBERS = (*(1,) * 12, *(0.5,) * 2)
SOURCE = """
extern "C" __global__ void touch({}) {{ if (i0 < 0) *reinterpret_cast<float*>(p0) = f0 + f1; }}
""".format(
    ", ".join(
        [f"void* p{n}" for n in range(12)]
        + [f"int i{n}" for n in range(6)]
        + [f"long long l{n}" for n in range(6)]
        + [f"float f{n}" for n in range(2)]
    )
)


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    record = Record("gpu-launch", options)
    calls = 50 if options.quick else 400
    record.settings = {"calls_in_a_row": calls, "arguments": len(ARGUMENTS)}
    with tempfile.TemporaryDirectory(prefix="ridgeline-launch-") as scratch:
        os.environ["RIDGELINE_CACHE"] = scratch
        nvrtc.folder.cache_clear()
        launches(record, Path(scratch), options.rounds, calls)
        compiles(record, options.kernels)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=20)
    result.add_argument(
        "--kernels", nargs="+", default=[], help="modules to compile (default: all that declare INSTANCES)"
    )
    return result


def launches(record: Record, scratch: Path, rounds: int, calls: int) -> None:
    """Host microseconds of one launch, by way."""
    source = scratch / "touch.cu"
    source.write_text(SOURCE)
    tensors = [torch.zeros(64, device="cuda") for _ in range(12)]
    ours = Kernel(str(source), "touch", ARGUMENTS, {})
    arms: dict[str, Callable[[], Any]] = {
        "Kernel.launch": lambda: ours.launch((1, 1, 1), 32, 0, *tensors, *NUMBERS),
        "torch add_": lambda: tensors[0].add_(1.0),
        **_others(source, tensors),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for call in arms.values():
        for _ in range(20):
            call()
    for _ in range(rounds):
        for name, call in arms.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - start) / calls)
    record.timings["launch_s"] = times
    record.summary["launch_us"] = {name: [1e6 * one for one in interval(taken)] for name, taken in times.items()}
    rows = [(name, interval(taken).show(".2f", " us", 1e6)) for name, taken in times.items()]
    record.table("Host time of a launch", ("way", "median [95 %]"), rows)


def _others(source: Path, tensors: list[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """The same kernel through cuda-core and cuda-bindings, from the same tensors and numbers on the same stream."""
    from cuda.bindings import driver
    from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch
    from numpy import float32, int32, int64, uint64

    device = Device(torch.cuda.current_device())
    device.set_current()
    code = nvrtc.compile(str(source), {}, nvrtc.architecture(torch.cuda.current_device())).code
    kernel = ObjectCode.from_cubin(code).get_kernel("touch")
    handle = driver.CUfunction(int(kernel.handle))
    config = LaunchConfig(grid=1, block=32)
    streams: dict[int, Stream] = {}
    kinds = (*(ctypes.c_void_p,) * 12, *(ctypes.c_int,) * 6, *(ctypes.c_longlong,) * 6, *(ctypes.c_float,) * 2)
    makers = (*(uint64,) * 12, *(int32,) * 6, *(int64,) * 6, *(float32,) * 2)

    def values() -> list[Any]:
        return [*(tensor.data_ptr() for tensor in tensors), *NUMBERS]

    def core() -> None:
        raw = torch.cuda.current_stream().cuda_stream
        stream = streams.get(raw) or streams.setdefault(raw, Stream.from_handle(raw))
        launch(stream, config, kernel, *(make(value) for make, value in zip(makers, values())))

    def bindings() -> None:
        raw = torch.cuda.current_stream().cuda_stream
        (error,) = driver.cuLaunchKernel(handle, 1, 1, 1, 32, 1, 1, 0, raw, (tuple(values()), kinds), 0)
        assert not error, error

    return {"cuda-core launch": core, "cuda-bindings cuLaunchKernel": bindings}


def compiles(record: Record, only: Sequence[str]) -> None:
    """Seconds to compile each source, and to read it from the disk and load it."""
    current = nvrtc.architecture(torch.cuda.current_device())
    rows, slowest, latest = [], 0.0, 0.0
    for name, instances in declared().items():
        if only and name not in only:
            continue
        fitting = [one for one in instances.cover() if str(one[ARCHITECTURE]).rstrip("a") == current]
        if not fitting:
            continue
        choice = {key: value for key, value in fitting[0].items() if key != ARCHITECTURE}
        defines, arch = instances.defines(choice), str(fitting[0][ARCHITECTURE])
        start = time.perf_counter()
        code = nvrtc.compile(instances.file, defines, arch).code
        compiled = time.perf_counter()
        nvrtc._headers.cache_clear()
        again = nvrtc.compile(instances.file, defines, arch).code
        read = time.perf_counter()
        assert again == code
        library = ctypes.c_void_p()
        none = ctypes.c_void_p()
        reference = ctypes.byref(library)
        nvrtc._checked(nvrtc._driver().cuLibraryLoadData(reference, code, none, none, 0, none, none, 0), "loading")
        loaded = time.perf_counter()
        taken = compiled - start, loaded - compiled
        slowest, latest = max(slowest, taken[0]), max(latest, taken[1])
        record.timings[name] = {"compile_s": taken[0], "read_s": read - compiled, "load_s": loaded - read}
        rows.append((name, f"{taken[0]:.2f} s", f"{1e3 * taken[1]:.1f} ms", str(choice)))
    record.table("Compiling", ("kernel", "first", "from the disk", "choice"), rows)
    record.target("first compile of a kernel", "at most 5 s", f"{slowest:.2f} s", slowest <= MOST_COMPILE_S)
    record.target("from the cache", "at most 50 ms", f"{1e3 * latest:.1f} ms", latest <= MOST_CACHE_S)


if __name__ == "__main__":
    main()
