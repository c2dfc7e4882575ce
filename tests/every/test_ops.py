"""Every op and every kernel in the registry: a new one is tested by being there.

An op must declare cost, examples and tolerance; its reference must say the same on meta; its cost must
read shapes alone; and each kernel that this machine can run must agree with the reference.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from ridgeline.core.cost import Cost
from ridgeline.core.step import Spans
from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY, Op, Ops, Weight
from ridgeline.ops.op import Kernel, Need, Tolerance

DTYPES = ("float32", "bfloat16", "float16")
MAY_OVERWRITE = {("norm", "residual"), ("layer_norm", "residual")}
"""Arguments that a kernel may use as scratch, by the op's own word."""

Arguments = Mapping[str, Any]

if importlib.util.find_spec("numba"):  # a GPU machine may do without
    load_kernels("cpu")
if torch.cuda.is_available():
    load_kernels("cuda")


def examples(op: Op, device: str, dtype: str) -> Iterator[Arguments]:
    torch.manual_seed(0)
    yield from op.inputs(torch.device(device), getattr(torch, dtype))


def each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same argument with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Weight):
        return replace(value, data=change(value.data))
    if isinstance(value, (list, tuple)):
        return type(value)(each(one, change) for one in value)
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of an argument or result, in order."""
    found: list[torch.Tensor] = []
    each(value, lambda tensor: found.append(tensor) or tensor)
    return found


def changed(arguments: Arguments, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {name: each(value, change) for name, value in arguments.items()}


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of this shape and dtype, full of what no computation survives."""
    if tensor.is_floating_point():
        return torch.full_like(tensor, float("nan"))
    return torch.full_like(tensor, -(1 << 30))


def close(have: torch.Tensor, want: torch.Tensor, tolerance: Tolerance) -> None:
    assert have.shape == want.shape
    assert have.dtype == want.dtype
    torch.testing.assert_close(have, want, atol=tolerance.absolute, rtol=tolerance.relative, equal_nan=True)


every_op = pytest.mark.parametrize("op", REGISTRY.values(), ids=REGISTRY)


@every_op
def test_declares_all_that_an_op_must(op: Op) -> None:
    assert op.reference.__doc__
    assert "float32" in op.tolerance
    assert set(op.tolerance) <= set(DTYPES)
    seen = list(examples(op, "cpu", "float32"))
    assert seen
    for arguments in seen:
        cost = op.floor(**arguments)
        for amount in (cost.flops, cost.read_bytes, cost.write_bytes, cost.link_bytes):
            assert math.isfinite(amount)
            assert amount >= 0
        assert cost.bytes > 0
        assert cost.launches >= 1


@every_op
def test_reference_on_meta(op: Op) -> None:
    """The same shapes and dtypes as on the CPU, for each dtype that it names."""
    for dtype in op.tolerance:
        for arguments in examples(op, "cpu", dtype):
            shadow = op(**changed(arguments, lambda tensor: tensor.to("meta")))
            real = op(**changed(arguments, torch.clone))
            for ours, theirs in zip(tensors(real), tensors(shadow), strict=True):
                assert theirs.device.type == "meta"
                assert ours.shape == theirs.shape
                assert ours.dtype == theirs.dtype


@every_op
def test_cost_reads_shapes_alone(op: Op) -> None:
    """Not one value: the same on meta tensors and on poisoned ones."""
    for arguments in examples(op, "cpu", "float32"):
        cost = op.floor(**arguments)
        assert op.floor(**changed(arguments, lambda tensor: tensor.to("meta"))) == cost
        assert op.floor(**changed(arguments, poisoned)) == cost


@every_op
def test_cost_reads_what_it_must(op: Op) -> None:
    """The floor writes the result at least, and no more than all that a call can touch."""
    for arguments in examples(op, "cpu", "float32"):
        result = op(**changed(arguments, torch.clone))
        cost = op.floor(**arguments)
        new = sum(one.nbytes for one in tensors(result) if not any(one is other for other in tensors(arguments)))
        given = sum(tensor.nbytes for value in arguments.values() for tensor in tensors(value))
        assert cost.bytes <= 2 * given + new
        if op.name not in ("attention", "moe"):  # whose few keys and experts may be less than what is given
            assert cost.write_bytes <= given + new


@every_op
def test_only_the_outermost_op_is_seen(op: Op) -> None:
    """A reference made of others is one op to an observer, and costs what it says itself."""

    class Seen:
        def __init__(self) -> None:
            self.names: list[str] = []

        def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.names.append(op.name)

        def after(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None: ...

    arguments = changed(next(examples(op, "cpu", "float32")), torch.clone)
    seen = Seen()
    getattr(Ops({}, seen), op.name)(**arguments)
    assert seen.names == [op.name]


# Kernels


def here() -> list[tuple[Op, Kernel]]:
    """Every kernel that this machine can run, on each device where it can."""
    devices = {"cpu": 0}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        devices["cuda"] = 10 * major + minor
    return [
        (op, replace(kernel, need=Need(device, kernel.need.capability)))
        for op in REGISTRY.values()
        for kernel in op.kernels.values()
        for device, capability in devices.items()
        if kernel.need.refuse(device, capability) is None
    ]


def name_of(pair: tuple[Op, Kernel]) -> str:
    op, kernel = pair
    return f"{op.name}-{kernel.name}-{kernel.need.device}"


KERNELS = [
    pytest.param(pair, id=name_of(pair), marks=[pytest.mark.gpu] if pair[1].need.device == "cuda" else [])
    for pair in here()
]


def packed(arguments: Arguments, kernel: Kernel) -> dict[str, Any]:
    """Arguments as an engine hands them to this kernel: matrices in panels on a CPU."""
    if kernel.need.device != "cpu":
        return dict(arguments)
    return {name: one.to_panels() if isinstance(one, Weight) else one for name, one in arguments.items()}


def accepted(op: Op, kernel: Kernel, dtype: str) -> Iterator[tuple[Arguments, Arguments]]:
    """Examples that the kernel accepts: for the reference, and for the kernel."""
    for arguments in examples(op, kernel.need.device, dtype):
        own = packed(arguments, kernel)
        shadow = changed(own, lambda tensor: tensor.to("meta"))
        if kernel.accepts is None or kernel.accepts(**shadow) is None:
            yield arguments, own


@pytest.mark.parametrize("pair", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_agrees_with_its_reference(pair: tuple[Op, Kernel], dtype: str) -> None:
    """Results, and what was written into the arguments, within the op's tolerance."""
    op, kernel = pair
    tolerance = op.tolerance.get(dtype)
    if tolerance is None:
        pytest.skip(f"{op.name} names no tolerance for {dtype}")
    ran = 0
    for arguments, own in accepted(op, kernel, dtype):
        ran += 1
        theirs, ours = changed(arguments, torch.clone), changed(own, torch.clone)
        want, have = op(**theirs), kernel.call(**ours)
        for one, other in zip(tensors(have), tensors(want), strict=True):
            close(one, other, tolerance)
        for name, value in theirs.items():
            if isinstance(value, Weight) or (op.name, name) in MAY_OVERWRITE:
                continue
            for one, other in zip(tensors(ours[name]), tensors(value), strict=True):
                close(one, other, tolerance)
    if not ran:
        pytest.skip(f"{kernel.name} accepts no example of {op.name} in {dtype}")


@pytest.mark.parametrize("pair", KERNELS)
def test_kernel_is_reached(pair: tuple[Op, Kernel]) -> None:
    """Some example is accepted in some dtype; a kernel that none reaches would be tested by nothing."""
    op, kernel = pair
    assert any(next(accepted(op, kernel, dtype), None) is not None for dtype in op.tolerance)


@pytest.mark.parametrize("pair", KERNELS)
def test_kernel_moves_no_less_than_the_floor(pair: tuple[Op, Kernel]) -> None:
    op, kernel = pair
    if kernel.traffic is None:
        pytest.skip("undeclared: unknown, and printed so")
    for dtype in op.tolerance:
        for arguments, own in accepted(op, kernel, dtype):
            moved, floor = kernel.traffic(**own), op.floor(**arguments)
            assert isinstance(moved, Cost)
            assert moved.flops >= floor.flops
            assert moved.bytes >= floor.bytes


def test_a_name_that_is_no_op() -> None:
    with pytest.raises(AttributeError, match=r"no op 'atention'; ops are .*attention"):
        Ops({}).atention  # noqa: B018


def test_attention_cost_takes_spans_not_tensors() -> None:
    """The host's integers decide, so that a padded or captured batch is priced by what it holds."""
    arguments = dict(next(examples(REGISTRY["attention"], "cpu", "float32")))
    one = REGISTRY["attention"].floor(**{**arguments, "spans": Spans((1,), (100,))})
    two = REGISTRY["attention"].floor(**{**arguments, "spans": Spans((1,), (200,))})
    assert two.flops == 2 * one.flops
