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
DECODE_ROWS = 16
"""Rows that the decode kernel's tile holds."""


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


def tiled(call: Call, rows: int, packed: bool) -> Cost:
    """FlashAttention-2's order: a tile of `rows` query rows reads every key that any of them sees, once.

    q is read once and the output written once. packed: the query heads of a KV head share a tile, so that it holds
    rows // group tokens and their keys are read once for all of them.
    """
    width = call.q.shape[2] * call.q.element_size()
    tokens = max(rows // call.group, 1) if packed else rows
    keys = 0
    for new, visible in zip(call.spans.new, call.spans.visible):
        for first in range(0, new, tokens):
            keys += visible - new + min(first + tokens, new) if call.causal else visible
    heads = call.k.shape[1] if packed else call.q.shape[1]
    queries = call.q.shape[0] * call.q.shape[1] * width
    return Cost(0.0, queries + 2 * keys * heads * width, queries)


def carried(call: Call, columns: int, rows: int) -> Cost:
    """FlashAttention's Algorithm 1: keys outside, queries inside; O, l and m go through memory in between.

    columns, rows: B_c and B_r. K and V are read once a head. In each pass over a block of keys Q is read; O, l and m
    (fp32) are read in all passes but the first, and written in all but the last, which writes the output.
    """
    heads, head_dim = call.q.shape[1:]
    item, state = call.q.element_size() * head_dim, 4 * head_dim + 8
    read = write = 0
    for new, visible in zip(call.spans.new, call.spans.visible):
        read += 2 * visible * item
        for first in range(0, new, rows):
            count = min(rows, new - first)
            seen = visible - new + first + count if call.causal else visible
            passes = max(-(-seen // columns), 1)
            read += count * (passes * item + (passes - 1) * state)
            write += count * ((passes - 1) * state + item)
    return Cost(0.0, heads * read, heads * write)


def _v1(call: Call) -> Cost:
    from ridgeline.kernels.cuda import attention_v1

    blocks = attention_v1.built(attention_v1.sram(call.q.device), call.q.shape[2])
    return carried(call, blocks.columns, blocks.rows)


def _v2(call: Call) -> Cost:
    from ridgeline.kernels.cuda import attention_v2

    short = call.q.shape[0] <= attention_v2.SHORT_ROWS * call.lengths.shape[0]
    tile = (attention_v2.SHORT if short else attention_v2.LONG)[call.q.shape[2]]
    return tiled(call, tile.rows, packed=False)


def _sm90(call: Call) -> Cost:
    from ridgeline.kernels.cuda import attention_sm90

    tile = attention_sm90.choose(call.q.shape[0], call.lengths.shape[0], call.q.shape[2])
    return tiled(call, tile.rows, packed=False)


def _triton(call: Call) -> Cost:
    from ridgeline.kernels.triton import attention as triton

    block = max(64, 1 << (call.q.shape[2] - 1).bit_length())
    return tiled(call, triton.LONG[call.q.element_size(), block].rows, packed=True)


def _decode(call: Call) -> Cost | None:
    """Every key of a request once for all its rows, if one tile holds them; partial sums of splits are left out."""
    rows = max(call.spans.new, default=1) * call.group
    return tiled(call, rows, packed=True) if rows <= DECODE_ROWS else None


TRAFFIC: dict[str, Callable[[Call], Cost | None]] = {
    "v1": _v1,
    "v2": _v2,
    "sm90": _sm90,
    "triton": _triton,
    "decode": _decode,
}
"""Counts for rungs that declare none themselves."""
