"""An op: its meaning in plain torch, its cost, its examples, and the kernels that can serve it.

Knows how ops are declared and how a table of chosen kernels is called. It must not know any single
op, nor which kernel is chosen (kernels/select.py), nor what an observer does with what it sees.

There is no ambient state: a forward pass receives an `Ops` and calls `ops.norm(...)`. Without an
observer that attribute *is* the kernel; with one it is the kernel wrapped in two calls. References
compose plain functions, so only the outermost op is ever observed. A reference may answer meta tensors
with an empty result of the right shape and dtype (a test holds the two equal): torch's meta functions of
all its small steps take a hundred times as long, and the first that is written in Python imports torch's compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ridgeline.core.cost import Cost

CLASSES = ("contraction", "normalization", "elementwise", "movement")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a kernel may be from the reference: |kernel - reference| <= absolute + relative * |reference|."""

    absolute: float
    relative: float


@dataclass(frozen=True, slots=True)
class Need:
    """A device that a kernel needs: its type ("cuda", "cpu", or "any") and, on CUDA, the least capability (80, 90)."""

    device: str
    capability: int = 0

    def refuse(self, device: str, capability: int) -> str | None:
        """Why a device does not serve, or None if it does."""
        if self.device not in (device, "any"):
            return f"needs a {self.device} device"
        if capability < self.capability:
            return f"needs compute capability {self.capability / 10:.1f}, this device has {capability / 10:.1f}"
        return None


def cuda(capability: int) -> Need:
    return Need("cuda", capability)


def cpu() -> Need:
    return Need("cpu")


def anywhere() -> Need:
    return Need("any")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way of computing an op.

    accepts(*args, **kwargs) -> None or the reason for refusing; it is asked once, at start, with meta
    tensors, so it must look at shapes, dtypes and plain values only.
    traffic: Cost that this kernel really moves for these arguments, never below the floor; None if
    nobody has worked it out.
    invariant: the call that keeps a promise: a row's bits follow from that row's own data, whatever other rows
    a call holds and however a sequence was cut into calls. `call` itself, a slower way, or None if there is none.
    """

    name: str
    need: Need
    call: Callable[..., Any]
    accepts: Callable[..., str | None] | None = None
    traffic: Callable[..., Cost] | None = None
    invariant: Callable[..., Any] | None = None


class Op:
    """An op under its name; calling it runs the reference.

    kind is one of CLASSES (Ivanov et al., "Data Movement Is All You Need", 2007.00072, sort a
    transformer's operators so). by_rows: whether the reference, on a CPU, keeps the promise of Kernel.invariant.
    """

    def __init__(self, reference: Callable[..., Any], kind: str, by_rows: bool = False) -> None:
        assert kind in CLASSES, kind
        self.name: str = reference.__name__
        self.kind = kind
        self.by_rows = by_rows
        self.reference = reference
        self.kernels: dict[str, Kernel] = {}
        self.tolerance: dict[str, Tolerance] = {}
        self._cost: Callable[..., Cost] | None = None
        self._examples: Callable[..., Iterator[Mapping[str, Any]]] | None = None
        self.__doc__ = reference.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reference(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def cost(self, function: Callable[..., Cost]) -> Callable[..., Cost]:
        """Declare the floor: least FLOPs and bytes, from shapes, dtypes and Spans alone."""
        self._cost = function
        return function

    def floor(self, *args: Any, **kwargs: Any) -> Cost:
        """The floor for these arguments (meta tensors will do)."""
        if self._cost is None:
            raise TypeError(f"op {self.name} declares no cost")
        return self._cost(*args, **kwargs)

    def examples(self, function: Callable[..., Iterator[Mapping[str, Any]]]) -> Callable[..., Any]:
        """Declare inputs that tests run every kernel on: function(device, dtype) yields keyword arguments."""
        self._examples = function
        return function

    def inputs(self, device: Any, dtype: Any) -> Iterator[Mapping[str, Any]]:
        if self._examples is None:
            raise TypeError(f"op {self.name} declares no examples")
        return self._examples(device, dtype)

    def kernel(
        self,
        name: str,
        needs: Need,
        accepts: Callable[..., str | None] | None = None,
        traffic: Callable[..., Cost] | None = None,
        invariant: bool | Callable[..., Any] = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a kernel with the reference's signature under `name` ("triton", "cpu", "cuda").

        invariant: True if the function keeps the promise of Kernel.invariant, or another function that does.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            assert name not in self.kernels, f"{self.name} has a kernel {name} already"
            steady = function if invariant is True else invariant or None
            self.kernels[name] = Kernel(name, needs, function, accepts, traffic, steady)
            return function

        return register


REGISTRY: dict[str, Op] = {}


def op(kind: str, *, by_rows: bool = False, **tolerance: Tolerance) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op. Keywords are tolerances by dtype name: float32=Tolerance(...), bfloat16=..."""

    def declare(reference: Callable[..., Any]) -> Op:
        assert reference.__name__ not in REGISTRY, f"op {reference.__name__} exists already"
        declared = Op(reference, kind, by_rows)
        declared.tolerance.update(tolerance)
        REGISTRY[declared.name] = declared
        return declared

    return declare


class Observer(Protocol):
    """Sees every op of a forward pass: a Meter adds up costs, a Timer takes times."""

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...


class Ops:
    """The ops of a forward pass as attributes, each bound to the kernel that serves it.

    kernels: op name -> callable; ops that are not named run their reference.
    """

    def __init__(self, kernels: Mapping[str, Callable[..., Any]], observer: Observer | None = None) -> None:
        self._kernels = dict(kernels)
        self._observer = observer
        for name, declared in REGISTRY.items():
            call = self._kernels.get(name, declared.reference)
            setattr(self, name, call if observer is None else _observed(declared, call, observer))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no op {name!r}; ops are {', '.join(REGISTRY)}")

    def observed(self, observer: Observer) -> Ops:
        """The same kernels, watched."""
        return Ops(self._kernels, observer)


def _observed(declared: Op, call: Callable[..., Any], observer: Observer) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        observer.before(declared, args, kwargs)
        result = call(*args, **kwargs)
        observer.after(declared, args, kwargs, result)
        return result

    return watched
