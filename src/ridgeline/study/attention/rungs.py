"""The rungs of the ladder: kernels registered for the op `attention`, asked by name.

Knows the op's registry. It must not know any kernel: what a rung takes, it says itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention_call import Call
from ridgeline.ops.op import Kernel, Need
from ridgeline.study.attention.cases import Case
from ridgeline.study.attention.tensors import shapes

LADDER = ("standard", "v1", "v2", "sm90", "triton", "decode", "cuda", "blocked", "fused", "cpu", "reference")
"""The order in which rungs are shown; others come after them by name."""
STANDARD = "standard"
WAITING = ("blocked", "reference")
"""Rungs that read lengths on the host, and so cannot be captured in a CUDA graph."""


def rungs(device: torch.device) -> dict[str, Kernel]:
    """Every kernel of attention that this device can run, in the ladder's order."""
    load_kernels(device.type)
    found = REGISTRY["attention"].kernels
    serving = {name: kernel for name, kernel in found.items() if kernel.need.refuse(*facts(device)) is None}
    order = [*LADDER, *sorted(serving)]
    return {name: serving[name] for name in sorted(serving, key=order.index)}


def facts(device: torch.device) -> tuple[str, int]:
    """Type and compute capability (90 for 9.0) of a device, as `Need.refuse` wants them."""
    if device.type != "cuda":
        return device.type, 0
    major, minor = torch.cuda.get_device_capability(device)
    return device.type, 10 * major + minor


def chosen(wanted: Sequence[str], device: torch.device) -> dict[str, Kernel]:
    """The rungs of these names, all that serve if none is named.

    Raises InvalidArgument for a name that nobody registered, KernelRefused for one that this device cannot run.
    """
    serving = rungs(device)
    if not wanted:
        return serving
    everything = {**REGISTRY["attention"].kernels, "reference": reference()}
    for name in wanted:
        if name not in everything:
            near = difflib.get_close_matches(name, everything, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(everything)}"
            raise InvalidArgument("rungs", f"attention has no kernel {name!r}; {hint}")
        if name != "reference" and name not in serving:
            reason = everything[name].need.refuse(*facts(device))
            raise KernelRefused(f"kernel {name} {reason}; this device runs {', '.join(serving)}")
    return {name: everything[name] for name in wanted}


def reference() -> Kernel:
    """The op's own plain torch as if it were a rung."""
    return Kernel("reference", Need("any"), REGISTRY["attention"].reference)


def refusal(kernel: Kernel, case: Case) -> str | None:
    """Why a rung does not take a case, or None."""
    return None if kernel.accepts is None else kernel.accepts(**shapes(case)._asdict())


def bound(kernel: Kernel, case: Case, call: Call) -> Callable[[], torch.Tensor]:
    """The rung on these tensors, ready to be called again and again.

    `standard` sorts requests by shape on the host before it runs Algorithm 0; here all are alike, so it is given its
    matrices at once, as one writes it for a batch of sequences, and can be captured like the others.
    """
    if kernel.name == STANDARD and kernel.call.__module__.startswith("ridgeline."):
        return _standard(case, call)
    arguments = call._asdict()

    def run() -> torch.Tensor:
        return kernel.call(**arguments)

    return run


def _standard(case: Case, call: Call) -> Callable[[], torch.Tensor]:
    """Algorithm 0 on matrices [B, H, n, D] that lie as it likes them, heads before tokens: made before it is timed.

    Keys of a group are repeated, and pages gathered, at every call: that is work which others do not need.
    """
    from ridgeline.kernels.torch.attention_standard import dense

    q = call.q.view(case.batch, case.new, case.heads, case.head_dim).transpose(1, 2).contiguous()
    hidden = None
    if case.causal and case.new > 1:
        row = torch.arange(case.visible - case.new, case.visible, device=q.device)[:, None]
        hidden = torch.arange(case.visible, device=q.device)[None, :] > row
    tables = None if call.block_tables is None else call.block_tables.long()
    k, v = call.k, call.v
    if tables is None:
        shape = (case.batch, case.visible, case.kv_heads, case.head_dim)
        k, v = (side.view(shape).transpose(1, 2).contiguous() for side in (k, v))

    def matrix(side: torch.Tensor) -> torch.Tensor:
        if tables is not None:
            side = side[tables].transpose(1, 2).flatten(2, 3)[:, :, : case.visible]
        return side if call.group == 1 else side.repeat_interleave(call.group, 1)

    def run() -> torch.Tensor:
        return dense(q, matrix(k), matrix(v), call.scale, hidden)[0]

    return run
