"""Machine code of the kernels: from the disk in milliseconds, or compiled once on this machine.

Knows LLVM's JIT and a folder of object files. It must not know any op, nor import numba: compiling is
the work of kernels/cpu/code, which is loaded only when an object file is missing.

An object file is named after everything that it depends on (the text of this folder, the processor, the
version of LLVM), so no change can run stale code. It lies beside this package if that can be written,
else in the user's cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import binding

from ridgeline.kernels import kept

FOLDER = Path(__file__).parent
WEEK_S = 7 * 24 * 3600
_lock = threading.RLock()

watchers: list[Callable[[str], None]] = []
"""Called with a kernel's name before it is compiled (about a second each), so that someone may say so."""


@lru_cache(maxsize=1)
def edition() -> str:
    """A digest of what object files depend on."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.py")):
        digest.update(path.read_bytes())
    machine = (binding.get_process_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    digest.update(repr((llvmlite.__version__, machine)).encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def folder() -> Path | None:
    """Where object files lie; None if no place can be written."""
    for base in kept.places(FOLDER / "__pycache__"):
        place = base / f"kernels-{edition()}"
        with contextlib.suppress(OSError):
            if not place.is_dir():
                place.mkdir(parents=True)
                _forget(base)
            if os.access(place, os.W_OK):
                return place
    return None


def _forget(base: Path) -> None:
    """Remove the folders of editions that are a week old."""
    for old in base.glob("kernels-*"):
        if time.time() - old.stat().st_mtime > WEEK_S:
            shutil.rmtree(old, ignore_errors=True)


@lru_cache(maxsize=1)
def target_machine() -> Any:
    """LLVM's description of this processor, set up as numba sets it up."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


@lru_cache(maxsize=1)
def _engine() -> Any:
    """The JIT that object files are linked into; lives as long as the process."""
    return binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine())


def load(name: str, make: Callable[[], bytes]) -> int:
    """The address of the function `name` of the object file that `make` makes, if none is on the disk."""
    with _lock:
        place = folder()
        code = kept.read(place / f"{name}.code") if place else None
        if code is None:
            code = make()
            if place:
                kept.write(place / f"{name}.code", code)
        engine = _engine()
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return int(engine.get_function_address(name))


class Kernel:
    """A compiled function of four 64-bit integers: name is a function of kernels/cpu/code/<module>.py.

    The pool calls it with (arguments, scratch, first unit, last unit): addresses of the call's integers and
    of this worker's memory, and the units to do, the last one excluded.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name
        self.address = 0

    def ready(self) -> int:
        """Its address, compiled if need be."""
        with _lock:
            if not self.address:
                self.address = load(f"ridgeline_{self.name}", self._compile)
            return self.address

    def _compile(self) -> bytes:
        for watcher in watchers:
            watcher(self.name)
        code = f"{__package__}.code"
        function = getattr(importlib.import_module(f"{code}.{self.module}"), self.name)
        made: bytes = importlib.import_module(f"{code}.build").object_code(function, f"ridgeline_{self.name}")
        return made


class _Definition(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


METH_FASTCALL = 0x0080
WORDS = 40
"""Integers that a `Caller` takes at most."""

_CALLER = """
declare i64 @PyLong_AsLongLong(ptr)
declare ptr @PyErr_Occurred()
declare void @Py_IncRef(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)

define ptr @{name}(ptr %none, ptr %arguments, i64 %count) {{
entry:
  %words = alloca [{words} x i64], align 128
  call void @llvm.memset.p0.i64(ptr align 128 %words, i8 0, i64 {size}, i1 false)
  br label %head
head:
  %index = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp slt i64 %index, %count
  br i1 %more, label %body, label %read
body:
  %place = getelementptr ptr, ptr %arguments, i64 %index
  %object = load ptr, ptr %place
  %word = call i64 @PyLong_AsLongLong(ptr %object)
  %slot = getelementptr i64, ptr %words, i64 %index
  store i64 %word, ptr %slot
  %next = add i64 %index, 1
  br label %head
read:
  %error = call ptr @PyErr_Occurred()
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %raise, label %run
raise:
  ret ptr null
run:
  %function_word = load i64, ptr %words
  %function = inttoptr i64 %function_word to ptr
  %first = getelementptr i64, ptr %words, i64 1
  %request = ptrtoint ptr %first to i64
  {before}
  call void %function(i64 %request, i64 0, i64 0, i64 0)
  {after}
  call void @Py_IncRef(ptr %none)
  ret ptr %none
}}

declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
"""


class Caller:
    """A Python function (address, *integers) that calls compiled code with the address of the integers.

    It is a CPython function made of machine code, because ctypes takes a microsecond more. gil: whether
    the interpreter's lock is kept meanwhile. Integers that are not given are 0; at most WORDS - 1 are taken.
    """

    def __init__(self, gil: bool) -> None:
        name = f"ridgeline_caller_{'short' if gil else 'long'}"
        text = _CALLER.format(
            name=name,
            words=WORDS,
            size=8 * WORDS,
            before="" if gil else "%state = call ptr @PyEval_SaveThread()",
            after="" if gil else "call void @PyEval_RestoreThread(ptr %state)",
        )

        def make() -> bytes:
            made: bytes = target_machine().emit_object(binding.parse_assembly(text))
            return made

        self._definition = _Definition(b"call", load(name, make), METH_FASTCALL, None)
        create = ctypes.pythonapi.PyCFunction_NewEx
        create.restype, create.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
        self.call: Callable[..., None] = create(ctypes.addressof(self._definition), None, None)
