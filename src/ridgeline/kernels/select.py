"""Which kernel serves each op, decided once at start from the forward pass itself.

For every class of work the model's forward pass is run on meta tensors; each op call that it makes is
shown to each registered kernel's `accepts`. The best kernel that accepts every call serves. Knows
kernels' names and order. It must not know models: the caller hands in a function that runs the forward.

Order: reference < torch < triton < cuda on GPUs; reference < cpu on CPUs. On a GPU the reference is
never taken silently.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.ops import REGISTRY, Op, Ops
from ridgeline.ops.op import Kernel

ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "torch"), "meta": ()}
FOLDERS = {"cpu": ("cpu",), "cuda": ("torch", "triton"), "meta": ()}
CLASSES_OF_WORK = ("decode", "prefill", "mixed")


@dataclass(frozen=True, slots=True)
class Choice:
    """One row of the table: what serves an op for a class of work, why, and what was refused why.

    classes: the classes of work that share this row.
    """

    op: str
    work: str
    kernel: str
    reason: str
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """The frozen choice: rows to print, and for each class of work the ops bound to their kernels."""

    rows: tuple[Choice, ...]
    by_work: Mapping[str, Ops]

    def ops(self, work: str) -> Ops:
        return self.by_work[work]


class _Calls:
    """An observer that keeps the arguments of each op call (meta tensors, so they weigh nothing)."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.setdefault(op.name, []).append((args, kwargs))

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...


def load_kernels(device: str) -> None:
    """Import the kernel modules that can serve a device type ("cpu", "cuda"), which registers them."""
    for folder in FOLDERS[device]:
        package = importlib.import_module(f"ridgeline.kernels.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def select(device: torch.device, trace: Callable[[str, Ops], None], wanted: str = "auto") -> Table:
    """Choose kernels for a device.

    trace(work, ops) runs the forward pass and the sampling of a step of that class of work on meta
    tensors. wanted: "auto", or a family of kernels to be used wherever it exists ("reference" included).
    Raises KernelRefused if `wanted` was named and refuses a call, or if a GPU is left with a reference.
    """
    if wanted != "reference":
        load_kernels(device.type)
    capability = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    rows: list[Choice] = []
    by_work: dict[str, Ops] = {}
    for work in CLASSES_OF_WORK:
        calls = _Calls()
        trace(work, Ops({}, calls))
        kernels: dict[str, Callable[..., Any]] = {}
        for name, seen in calls.calls.items():
            choice, kernel = _choose(REGISTRY[name], seen, work, device.type, capability, wanted)
            rows.append(choice)
            if kernel is not None:
                kernels[name] = kernel.call
        by_work[work] = Ops(kernels)
    return Table(tuple(rows), by_work)


def _choose(
    op: Op,
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
    work: str,
    device: str,
    capability: int,
    wanted: str,
) -> tuple[Choice, Kernel | None]:
    refused: dict[str, str] = {}
    if wanted == "reference":
        return Choice(op.name, work, "reference", "asked for"), None
    names = [name for name in ORDER[device] if name in op.kernels]
    if wanted != "auto" and wanted in op.kernels:
        names = [wanted]
    for name in names:
        kernel = op.kernels[name]
        reason = kernel.need.refuse(device, capability) or _refusal(kernel, calls)
        if reason is None:
            why = "asked for" if name == wanted else "the best that accepts"
            return Choice(op.name, work, name, why, refused), kernel
        refused[name] = reason
    if refused and wanted in refused:
        raise KernelRefused(f"kernel {wanted} for {op.name} ({work}) was asked for and refuses: {refused[wanted]}")
    if device == "cuda":
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "none is registered"
        raise KernelRefused(
            f"no kernel serves {op.name} ({work}) on this GPU ({listed}); kernels='reference' runs plain torch"
        )
    return Choice(op.name, work, "reference", "no kernel accepts" if refused else "no kernel exists", refused), None


def _refusal(kernel: Kernel, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> str | None:
    if kernel.accepts is None:
        return None
    for args, kwargs in calls:
        reason = kernel.accepts(*args, **kwargs)
        if reason is not None:
            return reason
    return None
