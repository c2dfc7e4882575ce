"""The table of kernels: order of families and rungs, what is asked for by name, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels import select as selecting
from ridgeline.kernels.select import CLASSES_OF_WORK, Table, select
from ridgeline.ops import Ops, attention
from ridgeline.ops.attention import attention_inputs
from ridgeline.ops.op import Kernel, anywhere, cuda

GPU = torch.device("cuda")


def kernel(name: str, capability: int, reason: str | None = None, steady: bool = False) -> Kernel:
    def invariant(*_: object, **__: object) -> str:
        return f"{name}, steady"

    call = Kernel(name, cuda(capability), lambda *_, **__: name, lambda *_, **__: reason)
    return replace(call, invariant=invariant) if steady else call


@pytest.fixture(autouse=True)
def _ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with one kernel for each rung, on a Hopper GPU that is not there."""
    rungs = [kernel("v1", 80), kernel("v2", 80), kernel("sm90", 90), kernel("decode", 80), kernel("triton", 80)]
    rungs.append(Kernel("standard", anywhere(), lambda *_, **__: "standard"))
    monkeypatch.setattr(attention, "kernels", {one.name: one for one in rungs})
    monkeypatch.setattr(selecting, "load_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def trace(work: str, ops: Ops) -> None:
    del work
    inputs = attention_inputs("meta", torch.bfloat16, 4, 2, 64, 16, None, (1,), (5,))
    ops.attention(**inputs)  # type: ignore[attr-defined]


def served(table: Table) -> dict[str, str]:
    return {row.work: row.kernel for row in table.rows}


def test_each_class_of_work_has_its_rung() -> None:
    works = (*CLASSES_OF_WORK, "tree")
    table = select(GPU, trace, works=works)
    assert served(table) == {"decode": "decode", "prefill": "sm90", "mixed": "sm90", "tree": "decode"}
    assert table.ops("tree").attention() == "decode"  # type: ignore[attr-defined]
    assert served(select(GPU, trace, "cuda")) == {"decode": "decode", "prefill": "sm90", "mixed": "sm90"}
    assert set(served(select(GPU, trace, "triton")).values()) == {"triton"}


def test_an_older_gpu_takes_the_next_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    table = select(GPU, trace)
    assert served(table) == {"decode": "decode", "prefill": "v2", "mixed": "v2"}
    assert "9.0" in table.rows[1].refused["sm90"]


def test_a_rung_that_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sm90", "v2", "decode"):
        monkeypatch.setitem(attention.kernels, name, kernel(name, 80, "q: too wide"))
    table = select(GPU, trace)
    assert set(served(table).values()) == {"triton"}
    assert set(table.rows[0].refused) == {"decode", "sm90", "v2"}


def test_rungs_that_are_asked_for() -> None:
    assert set(served(select(GPU, trace, rungs={"attention": ["v1"]})).values()) == {"v1"}
    assert set(served(select(GPU, trace, "triton", {"attention": ["standard"]})).values()) == {"standard"}
    assert set(served(select(GPU, trace, rungs={"attention": ["reference"]})).values()) == {"reference"}


def test_several_rungs_serve_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.kernels, "v1", kernel("v1", 80, "causal: no"))
    table = select(GPU, trace, rungs={"attention": ["v1", "v2"]})
    assert set(served(table).values()) == {"v2"}
    assert table.rows[0].reason == "asked for"


def test_a_rung_that_was_asked_for_and_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.kernels, "v2", kernel("v2", 80, "softcap: no"))
    with pytest.raises(KernelRefused, match=r"v2 for attention \(decode\) was asked for and refuses: v2: softcap: no"):
        select(GPU, trace, rungs={"attention": ["v2"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(KernelRefused, match=r"needs compute capability 9.0, this device has 8.6"):
        select(GPU, trace, rungs={"attention": ["sm90"]})
    with pytest.raises(KernelRefused, match="attention has no kernel fused here; there are v1, v2"):
        select(GPU, trace, rungs={"attention": ["fused"]})


def test_a_family_of_another_device_is_an_error() -> None:
    with pytest.raises(KernelRefused, match=r"kernels='triton' serve no cpu device; here are cpu"):
        select(torch.device("cpu"), trace, "triton")


def test_the_reference_is_never_taken_silently_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernels", {"triton": kernel("triton", 80, "q: no")})
    with pytest.raises(KernelRefused, match=r"on this GPU \(triton: q: no\); kernels='reference'"):
        select(GPU, trace)
    monkeypatch.setattr(attention, "kernels", {})
    with pytest.raises(KernelRefused, match="none is registered"):
        select(GPU, trace)
    cpu: Any = select(torch.device("cpu"), trace)
    assert set(served(cpu).values()) == {"reference"}


def test_what_must_not_depend_on_neighbours_is_served_by_one_kernel_that_promises_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`decode` promises it too, but is not for prefills, and another one's bits would differ."""
    for name in ("decode", "triton"):
        monkeypatch.setitem(attention.kernels, name, kernel(name, 80, steady=True))
    table = select(GPU, trace, invariant=True)
    assert served(table) == dict.fromkeys(CLASSES_OF_WORK, "triton")
    assert table.ops("decode").attention() == "triton, steady"  # type: ignore[attr-defined]
    refused = table.rows[0].refused
    assert refused["decode"] == "serves decode, mixed alone, and all work must be served alike"
    assert "not batch-invariant" in refused["sm90"]
    assert table.rows[0].reason == "the best that accepts, batch-invariant"
    assert served(select(GPU, trace))["decode"] == "decode"
    named = select(GPU, trace, rungs={"attention": ["decode"]}, invariant=True)
    assert served(named) == dict.fromkeys(CLASSES_OF_WORK, "decode")
    assert named.ops("prefill").attention() == "decode, steady"  # type: ignore[attr-defined]


def test_a_kernel_that_refuses_one_class_of_work_serves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **arguments: Any) -> str | None:
        return "q: too long" if arguments["q"].shape[0] > 1 else None

    for name in ("v2", "triton"):
        monkeypatch.setitem(attention.kernels, name, kernel(name, 80, steady=True))
    monkeypatch.setitem(attention.kernels, "v2", replace(attention.kernels["v2"], accepts=short))

    def by_work(work: str, ops: Ops) -> None:
        new = 1 if work == "decode" else 4
        ops.attention(**attention_inputs("meta", torch.bfloat16, 4, 2, 64, 16, None, (new,), (5,)))  # type: ignore[attr-defined]

    assert served(select(GPU, by_work, invariant=True)) == dict.fromkeys(CLASSES_OF_WORK, "triton")


def test_what_promises_nothing_is_refused_by_name() -> None:
    with pytest.raises(KernelRefused, match=r"sm90 for attention \(decode\) was asked for .* is not batch-invariant"):
        select(GPU, trace, rungs={"attention": ["sm90"]}, invariant=True)
    with pytest.raises(KernelRefused, match=r"reference: is not batch-invariant"):
        select(GPU, trace, "reference", invariant=True)
    with pytest.raises(
        KernelRefused, match=r"no kernel of attention .* on this cuda device is batch-invariant: decode"
    ):
        select(GPU, trace, invariant=True)
    with pytest.raises(KernelRefused, match=r"on this cpu device is batch-invariant: none is registered"):
        select(torch.device("cpu"), trace, invariant=True)
