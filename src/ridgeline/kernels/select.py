"""Which kernel serves each op, decided once at start from the forward pass itself.

For every class of work the model's forward pass is run on meta tensors; each op call that it makes is
shown to each registered kernel's `accepts`. The best kernel that accepts every call serves. Knows
kernels' names and order. It must not know models: the caller hands in a function that runs the forward.

Order of families: reference < torch < triton < cuda on GPUs; reference < cpu on CPUs. On a GPU the
reference is never taken silently. An op may have several kernels of a family, each best at one class of
work: rungs of a ladder. Any rung can be asked for by its name, those that are there to teach only so.

Where a row's bits must not depend on its neighbours (batch_invariant), only kernels serve that promise it, and
one and the same for all classes of work: a token's neighbours decide which class its step is of.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels import tables
from ridgeline.ops import REGISTRY, Op, Ops
from ridgeline.ops.op import Kernel

logger = logging.getLogger("ridgeline")

ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "torch"), "meta": ()}
FOLDERS = {"cpu": ("cpu", "torch"), "cuda": ("torch", "triton", "cuda"), "meta": ()}
CLASSES_OF_WORK = ("decode", "prefill", "mixed")
RUNGS: Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]] = {
    ("attention", "cuda"): {
        "decode": ("decode", "sm90", "v2"),
        "prefill": ("sm90", "v2"),
        "mixed": ("sm90", "v2", "decode"),
        "tree": ("decode", "sm90", "v2"),
    },
}
"""(op, family) -> for each class of work, kernels of that family, best first. Elsewhere a family is one kernel
that bears its name. "tree" (verifying draft trees) is a class of work once a step may hold one.
"""


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


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Calls:
    """An observer that keeps the arguments of each op call (meta tensors, so they weigh nothing)."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Arguments]] = {}

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.setdefault(op.name, []).append((args, kwargs))

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...


def load_kernels(device: str) -> None:
    """Import the kernel modules that can serve a device type ("cpu", "cuda"), which registers them.

    Their tables of tiles are set to what is known of this GPU (kernels/tables).
    """
    for folder in FOLDERS[device]:
        package = importlib.import_module(f"ridgeline.kernels.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    if device == "cuda" and torch.cuda.is_available():
        _settle(torch.cuda.get_device_name())


@cache
def _settle(device: str) -> None:
    """Once a process; a table that does not count any more is told."""
    for name, why in tables.settle(device).passed_over.items():
        logger.warning("table %s is not used: %s", name, why)


def select(
    device: torch.device,
    trace: Callable[[str, Ops], None],
    wanted: str = "auto",
    rungs: Mapping[str, Sequence[str]] | None = None,
    works: Sequence[str] = CLASSES_OF_WORK,
    invariant: bool = False,
) -> Table:
    """Choose kernels for a device.

    trace(work, ops) runs the forward pass and the sampling of a step of that class of work on meta
    tensors. wanted: "auto", or a family of kernels to be used wherever it exists ("reference" included).
    rungs: op -> kernels by name, of which the first that accepts serves, whatever `wanted` says.
    invariant: no row's bits may depend on its neighbours.
    Raises KernelRefused if what was named refuses a call or is not there, if a GPU is left with a reference, or
    if nothing keeps rows apart that must be.
    """
    rungs = rungs or {}
    if wanted not in ("auto", "reference", *ORDER[device.type]):
        raise KernelRefused(f"kernels={wanted!r} serve no {device.type} device; here are {_listed(ORDER[device.type])}")
    if wanted != "reference" or rungs:
        load_kernels(device.type)
    capability = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    traced = {work: _traced(trace, work) for work in works}
    rows: list[Choice] = []
    by_work: dict[str, Ops] = {}
    for work, calls in traced.items():
        kernels: dict[str, Callable[..., Any]] = {}
        for name, seen in calls.items():
            wishes = {
                one: _wish(REGISTRY[name], one, device.type, wanted, tuple(rungs.get(name, ())))
                for one in (works if invariant else (work,))
                if name in traced[one]
            }
            if invariant:
                seen = [call for one in wishes for call in traced[one][name]]
            case = _Case(REGISTRY[name], work, device.type, capability, seen, invariant)
            choice, kernel = _choose(case, _common(wishes))
            rows.append(choice)
            if kernel is not None:
                call = kernel.invariant if invariant else kernel.call
                assert call is not None
                kernels[name] = call
        by_work[work] = Ops(kernels)
    return Table(tuple(rows), by_work)


def _traced(trace: Callable[[str, Ops], None], work: str) -> dict[str, list[Arguments]]:
    calls = _Calls()
    trace(work, Ops({}, calls))
    return calls.calls


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


class _Wish(NamedTuple):
    """Kernels to be tried, best first, and who asked for them (None: nobody). apart: kernels that are for other
    classes of work -> for which ones."""

    names: tuple[str, ...]
    asked: str | None
    apart: Mapping[str, str] = MappingProxyType({})


class _Case(NamedTuple):
    """An op's calls in a class of work, and what the device and the user ask of a kernel for them."""

    op: Op
    work: str
    device: str
    capability: int
    calls: list[Arguments]
    invariant: bool


def _wish(op: Op, work: str, device: str, wanted: str, rungs: tuple[str, ...]) -> _Wish:
    if rungs:
        for name in rungs:
            if name != "reference" and name not in op.kernels:
                raise KernelRefused(
                    f"{op.name} has no kernel {name} here; there are {_listed((*op.kernels, 'reference'))}"
                )
        return _Wish(rungs, _listed(rungs))
    if wanted == "reference":
        return _Wish(("reference",), wanted)
    family = [name for name in _family(op, wanted, work) if name in op.kernels]
    if wanted != "auto" and family:
        return _Wish(tuple(family), wanted)
    every = [name for one in ORDER[device] for name in _family(op, one, work) if name in op.kernels]
    return _Wish(tuple(every), None)


def _common(wishes: Mapping[str, _Wish]) -> _Wish:
    """What is wished for in every class of work, in the order of the first."""
    first = next(iter(wishes.values()))
    homes = {name: [work for work, wish in wishes.items() if name in wish.names] for name in first.names}
    apart = {name: _listed(works) for name, works in homes.items() if len(works) < len(wishes)}
    return _Wish(tuple(name for name in first.names if name not in apart), first.asked, apart)


def _family(op: Op, family: str, work: str) -> tuple[str, ...]:
    return RUNGS.get((op.name, family), {}).get(work, (family,))


def _choose(case: _Case, wish: _Wish) -> tuple[Choice, Kernel | None]:
    op, work = case.op, case.work
    refused = {name: f"serves {works} alone, and all work must be served alike" for name, works in wish.apart.items()}
    why = "the best that accepts" if wish.asked is None else "asked for"
    if case.invariant:
        why += ", batch-invariant"
    for name in wish.names:
        kernel = None if name == "reference" else op.kernels[name]
        reason = _lets_rows_meet(case, kernel) if case.invariant else None
        if kernel is not None:
            reason = kernel.need.refuse(case.device, case.capability) or reason or _refusal(kernel, case.calls)
        if reason is None:
            return Choice(op.name, work, name, why, refused), kernel
        refused[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "none is registered"
    if wish.asked is not None:
        raise KernelRefused(f"{wish.asked} for {op.name} ({work}) was asked for and refuses: {listed}")
    if case.invariant and _lets_rows_meet(case, None):
        raise KernelRefused(
            f"no kernel of {op.name} ({work}) on this {case.device} device is batch-invariant: {listed}"
        )
    if case.device == "cuda":
        raise KernelRefused(
            f"no kernel serves {op.name} ({work}) on this GPU ({listed}); kernels='reference' runs plain torch"
        )
    return Choice(op.name, work, "reference", "no kernel accepts" if refused else "no kernel exists", refused), None


def _lets_rows_meet(case: _Case, kernel: Kernel | None) -> str | None:
    """Why a kernel (None: the reference) is not batch-invariant, or None if it is."""
    kept = case.op.by_rows and case.device == "cpu" if kernel is None else kernel.invariant is not None
    return None if kept else "is not batch-invariant: the bits of a row may depend on its neighbours"


def _refusal(kernel: Kernel, calls: list[Arguments]) -> str | None:
    if kernel.accepts is None:
        return None
    for args, kwargs in calls:
        reason = kernel.accepts(*args, **kwargs)
        if reason is not None:
            return reason
    return None
