"""CUDA C++ made into machine code by NVRTC, kept on the disk by content, and launched on torch's stream.

Knows NVRTC, cubins, the driver's launch call and its tensor maps. It must not know any op.

A kernel is compiled for the GPU that it first runs on (seconds, once on a machine) and read from the disk
afterwards. No header of CUDA is needed: include/ holds all that the sources use. A launch packs its arguments
into memory that the driver was told of once, and makes one call of the C interface (benchmarks/gpu_launch.py times
it beside the ways that cuda-core and cuda-bindings offer).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import io
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels import kept

FOLDER = Path(__file__).parent
INCLUDE = FOLDER / "include"
MONTH_S = 30 * 24 * 3600
STATIC_SHARED_BYTES = 48 * 1024
"""Shared memory that a block gets without asking for more."""
INVALID_CONTEXT = 201

_importing = threading.Lock()  # cuda-core cannot be imported by two threads at once

watchers: list[Callable[[str], None]] = []
"""Called with a kernel's name before it is compiled, so that someone may say so."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code of every kernel of a file, and what the compilers said about it (ptxas -v included)."""

    code: bytes
    log: str


def architecture(device: int, features: bool = False) -> str:
    """The name of a device's architecture, "sm_90"; with `features`, "sm_90a" (wgmma, setmaxnreg)."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if features else "")


@lru_cache(maxsize=1)
def version() -> str:
    """NVRTC's version, from the package's metadata: loading the library takes longer than reading a cubin."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    return _library_version()


def _library_version() -> str:
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as problem:
        raise missing(problem) from problem
    return f"{major}.{minor}"


def missing(problem: Exception) -> KernelRefused:
    """What to say when NVRTC, or its Python side, is not there."""
    return KernelRefused(
        f"CUDA kernels are compiled by NVRTC, which is not installed ({problem}): pip install nvidia-cuda-nvrtc "
        "cuda-core (or ridgeline[gpu]), or name the kernel 'triton', which does without"
    )


@lru_cache(maxsize=1)
def _headers() -> bytes:
    """A digest of all headers."""
    digest = hashlib.sha256()
    for path in sorted(INCLUDE.glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


def key(file: str, defines: Mapping[str, int | str], arch: str) -> str:
    """A digest of everything that machine code depends on: source, headers, defines, architecture, NVRTC."""
    digest = hashlib.sha256((FOLDER / file).read_bytes() + _headers())
    digest.update(repr((sorted(defines.items()), arch, version())).encode())
    return digest.hexdigest()[:24]


@lru_cache(maxsize=1)
def folder() -> Path | None:
    """Where cubins lie; None if no place can be written."""
    for base in kept.places(FOLDER / "__pycache__"):
        place = base / "cubins"
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    return None


def _forget(place: Path) -> None:
    """Remove cubins that nobody has read for a month."""
    for old in place.glob("*.cubin"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > MONTH_S:
                old.unlink()


def compile(file: str, defines: Mapping[str, int | str], arch: str) -> Cubin:
    """The machine code of a source of this folder ("attention_v2.cu"), from the disk or compiled now.

    arch: "sm_80", "sm_90", "sm_90a" ...; no GPU is needed. Raises KernelRefused if NVRTC is not installed and
    RuntimeError, with the compiler's messages, if the source does not compile.
    """
    place = folder()
    path = place / f"{Path(file).stem}-{arch}-{key(file, defines, arch)}.cubin" if place else None
    content = kept.read(path) if path else None
    if content is not None and path is not None:
        with contextlib.suppress(OSError):
            os.utime(path)
        size = int.from_bytes(content[:8], "little")
        return Cubin(content[8 + size :], content[8 : 8 + size].decode())
    for watcher in watchers:
        watcher(Path(file).stem)
    made = _compile(file, defines, arch)
    if place and path:
        _forget(place)
        log = made.log.encode()
        kept.write(path, len(log).to_bytes(8, "little") + log + made.code)
    return made


def _compile(file: str, defines: Mapping[str, int | str], arch: str) -> Cubin:
    _library_version()
    try:
        with _importing:
            from cuda.core import Program, ProgramOptions
    except ImportError as problem:
        raise missing(problem) from problem
    options = ProgramOptions(
        name=file,
        arch=arch,
        std="c++17",
        include_path=str(INCLUDE),
        define_macro=[(name, str(value)) for name, value in sorted(defines.items())] or None,
        ptxas_options=["-v"],
        minimal=True,
        device_as_default_execution_space=True,
    )
    log = io.StringIO()
    try:
        program = Program((FOLDER / file).read_text(encoding="utf-8"), "c++", options)
        code = program.compile("cubin", logs=log).code
    except Exception as problem:
        raise RuntimeError(f"{file} with {dict(defines)} for {arch} does not compile: {problem}") from problem
    assert isinstance(code, bytes)
    return Cubin(code, log.getvalue().strip("\0 \n"))


POINTER, INT32, INT64, FLOAT32, TENSOR_MAP = "Q", "i4x", "q", "f4x", "128s"
"""Kinds of arguments of a kernel: a tensor or None, numbers, and 128 bytes of `tensor_map` by value."""

_SIZES = {POINTER: 8, INT32: 4, INT64: 8, FLOAT32: 4, TENSOR_MAP: 128}
_CONFIG = "<7I4xQQI4x"  # CUlaunchConfig: grid, block, shared bytes, stream, attributes and their number
_CLUSTER_DIMENSION, _DEPENDENT = 4, 6


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(ctypes.c_int(result), ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()} ({result})")


class Kernel:
    """A kernel of a source file with its defines, launched on the current stream of its tensors' device.

    symbol: the name of an `extern "C" __global__` function of `file`. arguments: kinds of its parameters in
    order (POINTER ...), held against the machine code when it is loaded. features: compile for "sm_90a", not
    "sm_90". shared_bytes: the most dynamic shared memory that a launch asks for. cluster: blocks of a cluster.
    dependent: the kernel calls griddepcontrol.wait, and may start before its predecessor in the stream ends.

    Launches may be captured in CUDA graphs once `load` or a launch has been called outside of a capture.
    """

    def __init__(
        self,
        file: str,
        symbol: str,
        arguments: tuple[str, ...],
        defines: Mapping[str, int | str],
        shared_bytes: int = 0,
        features: bool = False,
        cluster: tuple[int, int, int] = (1, 1, 1),
        dependent: bool = False,
    ) -> None:
        self.file, self.symbol, self.arguments, self.defines = file, symbol, arguments, dict(defines)
        self.shared_bytes, self.features = shared_bytes, features
        self._loaded: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()
        self._pointers = tuple(place for place, kind in enumerate(arguments) if kind == POINTER)
        # One piece of memory: the launch's configuration, then the values of the parameters, each at its own address.
        layout = struct.Struct(_CONFIG + "".join(arguments))
        self._pack, self._memory = layout.pack_into, ctypes.create_string_buffer(layout.size)
        base = ctypes.addressof(self._memory)
        starts = [struct.calcsize(_CONFIG + "".join(arguments[:place])) for place in range(len(arguments))]
        self._places = (ctypes.c_void_p * len(arguments))(*(base + start for start in starts))
        self._references = ctypes.c_void_p(base), ctypes.c_void_p(ctypes.addressof(self._places))
        attributes = b""
        if cluster != (1, 1, 1):
            attributes += struct.pack("<I4x3I52x", _CLUSTER_DIMENSION, *cluster)
        if dependent:
            attributes += struct.pack("<I4xi60x", _DEPENDENT, 1)
        self._attributes = ctypes.create_string_buffer(attributes, max(len(attributes), 1))
        self._attribute_list = (ctypes.addressof(self._attributes), len(attributes) // 72)
        self._call: Any = None

    def load(self, device: int) -> ctypes.c_void_p:
        """Compile or read the machine code and load it on a device; the driver's handle of the kernel."""
        with self._lock, torch.cuda.device(device), _context(device):
            if device in self._loaded:
                return self._loaded[device]
            cuda = _driver()
            code = compile(self.file, self.defines, architecture(device, self.features)).code
            library, handle = ctypes.c_void_p(), ctypes.c_void_p()
            none = ctypes.c_void_p()
            what = f"loading {self.symbol} of {self.file}"
            _checked(cuda.cuLibraryLoadData(ctypes.byref(library), code, none, none, 0, none, none, 0), what)
            _checked(cuda.cuLibraryGetKernel(ctypes.byref(handle), library, self.symbol.encode()), what)
            self._check(cuda, handle, what)
            if self.shared_bytes > STATIC_SHARED_BYTES:
                # 8: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(cuda.cuKernelSetAttribute(8, self.shared_bytes, handle, device), what)
            function = ctypes.c_void_p()
            _checked(cuda.cuKernelGetFunction(ctypes.byref(function), handle), what)  # loads it here and now
            self._call = cuda.cuLaunchKernelEx
            self._loaded[device] = handle
            return handle

    def _check(self, cuda: ctypes.CDLL, handle: ctypes.c_void_p, what: str) -> None:
        """Hold the declared kinds of arguments against the parameters of the machine code."""
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        sizes = []
        for number in range(len(self.arguments)):
            into = ctypes.byref(offset), ctypes.byref(size)
            sizes.append(0 if cuda.cuKernelGetParamInfo(handle, ctypes.c_size_t(number), *into) else size.value)
        expected = [_SIZES[kind] for kind in self.arguments]
        count = ctypes.c_size_t(len(sizes))
        if hasattr(cuda, "cuKernelGetParamCount"):  # drivers of CUDA 13.1 and later
            _checked(cuda.cuKernelGetParamCount(handle, ctypes.byref(count)), what)
        if sizes != expected or count.value != len(sizes):
            raise RuntimeError(
                f"{what}: its {count.value} parameters have {sizes} bytes, the launch would give {expected}"
            )

    def launch(self, grid: tuple[int, int, int], block: int, shared_bytes: int, *arguments: Any) -> None:
        """Launch on the current stream of the device of the first tensor among the arguments.

        arguments: a value for each declared kind; tensors or None for pointers. block: threads. Raises
        RuntimeError if the driver refuses.
        """
        values = list(arguments)
        device = -1
        for place in self._pointers:
            tensor = values[place]
            if tensor is None:
                values[place] = 0
            else:
                if device < 0:
                    device = tensor.get_device()
                values[place] = tensor.data_ptr()
        handle = self._loaded.get(device) or self.load(device)
        stream = torch._C._cuda_getCurrentRawStream(device)
        with self._lock:
            self._pack(self._memory, 0, *grid, block, 1, 1, shared_bytes, stream, *self._attribute_list, *values)
            if torch._C._cuda_getDevice() == device:
                result = self._call(self._references[0], handle, self._references[1], None)
            else:
                result = INVALID_CONTEXT
            if result == INVALID_CONTEXT:  # another device is current, or a thread that has not used CUDA yet
                with torch.cuda.device(device), _context(device):
                    result = self._call(self._references[0], handle, self._references[1], None)
        if result:
            _checked(result, f"launch of {self.symbol}, grid {grid}, {block} threads, {shared_bytes} bytes shared,")


@contextlib.contextmanager
def _context(device: int) -> Iterator[None]:
    """The device's primary context made current on this thread, for a launch that found none."""
    cuda, context = _driver(), ctypes.c_void_p()
    _checked(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "using the device")
    try:
        _checked(cuda.cuCtxPushCurrent_v2(context), "using the device")
        try:
            yield
        finally:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)


_MAP_TYPES = {torch.bfloat16: 9, torch.float16: 6, torch.float32: 7, torch.uint8: 0, torch.float8_e4m3fn: 0}
_MAP_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_MAP_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}


def tensor_map(
    tensor: torch.Tensor,
    box: tuple[int, ...],
    sizes: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
    swizzle: int = 128,
    promotion: int = 256,
) -> bytes:
    """128 bytes that tell the copy engine (TMA, sm_90) how to fetch boxes of a tensor, for a `__grid_constant__`.

    All tuples run from the innermost dimension outwards, in elements; sizes and strides default to the tensor's
    own, reversed, and strides start with the second dimension (the innermost is dense). At most 5 dimensions;
    box dimensions at most 256, the innermost at most `swizzle` bytes; strides and the address multiples of 16
    bytes. What lies outside of the sizes reads as zero. Maps are remembered: making one costs microseconds.
    """
    if sizes is None:
        sizes = tuple(reversed(tensor.shape))
    if strides is None:
        strides = tuple(reversed(tensor.stride()[:-1]))
    return _encode(tensor.data_ptr(), tensor.dtype, tensor.element_size(), box, sizes, strides, swizzle, promotion)


@lru_cache(maxsize=4096)
def _encode(
    address: int,
    dtype: torch.dtype,
    width: int,
    box: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    swizzle: int,
    promotion: int,
) -> bytes:
    rank = len(box)
    assert len(sizes) == rank == len(strides) + 1, (box, sizes, strides)
    room = ctypes.create_string_buffer(192)
    start = -ctypes.addressof(room) % 64
    result = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + start),
        _MAP_TYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * max(rank - 1, 1))(*(stride * width for stride in strides)),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        0,
        _MAP_SWIZZLES[swizzle],
        _MAP_PROMOTIONS[promotion],
        0,
    )
    _checked(result, f"tensor map of sizes {sizes}, strides {strides}, box {box}, {dtype}")
    return room.raw[start : start + 128]
