"""Bytes that each rung moves between the multiprocessors and memory, counted from its algorithm.

Knows the algorithms' traffic: standard's from the operators that it runs, the others' from what their kernels
declare. It must not know clocks. The count is that of the papers: what crosses the border of a
multiprocessor's own memory. Caches in between (a GPU's L2) serve part of it, which is what hardware counters
show (counters.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ridgeline.core.cost import Cost
from ridgeline.ops.attention_call import Call
from ridgeline.ops.op import Kernel

MOVES_NOTHING = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "lift_fresh"})
"""Operators that touch no element, beside those that torch itself calls views."""
OVERWRITERS = frozenset({"copy_", "fill_", "zero_"})
"""Operators that do not read their first argument, which they write."""


class Counter(TorchDispatchMode):
    """Adds up what torch's operators read and write: each input once, each output once."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = 0
        self.write_bytes = 0
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in MOVES_NOTHING and not func.is_view:
            self.launches += 1
            self.read_bytes += sum(map(_own_bytes, _tensors(args[name in OVERWRITERS :])))
            self.write_bytes += sum(map(_own_bytes, _tensors(result)))
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in _tensors(part)]
    return []


def _own_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that lie in memory: a dimension of stride zero is there once."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride or not size)
    return count * tensor.element_size()


def operators(run: Callable[[], Any]) -> Cost:
    """Traffic of a function that is torch operators and nothing else. FLOPs are left out."""
    counter = Counter()
    with counter:
        run()
    return Cost(0.0, counter.read_bytes, counter.write_bytes, launches=counter.launches)


def counted(kernel: Kernel, call: Call, run: Callable[[], Any]) -> Cost | None:
    """What a rung moves for these arguments: its own declaration, else torch's operators; None if neither says.

    run: the rung on real tensors; it is called once if its operators are to be counted.
    """
    if kernel.traffic is not None:
        return kernel.traffic(**call._asdict())
    if kernel.call.__module__.startswith("ridgeline.kernels.torch") or kernel.name in ("reference", "blocked"):
        return operators(run)
    table = TRAFFIC.get(kernel.name)
    return None if table is None else table(call)


def tiled(call: Call, rows: int) -> Cost:
    """FlashAttention-2's order: a tile of `rows` query rows of one head reads every key that it sees, once.

    q is read once and the output written once. Query heads of one KV head that share a tile (packed groups) count
    as its rows. Under a causal mask a tile reads up to its last row's key.
    """
    width = call.q.shape[2] * call.q.element_size()
    keys = 0.0
    for new, visible in zip(call.spans.new, call.spans.visible):
        tiles = -(-new // rows)
        if not call.causal:
            keys += tiles * visible
            continue
        keys += sum(visible - new + min((tile + 1) * rows, new) for tile in range(tiles))
    read = call.q.shape[0] * call.q.shape[1] * width + 2 * keys * call.q.shape[1] * width
    return Cost(0.0, read, call.q.shape[0] * call.q.shape[1] * width)


def carried(call: Call, key_rows: int) -> Cost:
    """FlashAttention's Algorithm 1: keys outside, queries inside, O, l and m read and written in every pass.

    key_rows: B_c. K and V are read once a head; Q, O (in the call's dtype), l and m (fp32) in each of the T_c passes.
    """
    heads, head_dim = call.q.shape[1:]
    item = call.q.element_size()
    read = write = 0.0
    for new, visible in zip(call.spans.new, call.spans.visible):
        passes = -(-visible // key_rows)
        row = head_dim * item + 8
        read += heads * (2 * visible * head_dim * item + passes * new * (head_dim * item + row))
        write += heads * (passes + 1) * new * row
    return Cost(0.0, read, write)


TRAFFIC: dict[str, Callable[[Call], Cost]] = {}
"""Counts for rungs that declare none themselves."""
