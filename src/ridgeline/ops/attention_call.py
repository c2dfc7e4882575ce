"""A call of `attention` as data: its arguments by name, what is wrong with them, and what a kernel's limits are.

Knows shapes, dtypes, strides, devices and host integers. It must not know values that lie on a device, how
any kernel computes, nor which one is chosen. Every kernel of the op asks here, so that each refusal names
the argument, what is supported and which kernel would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.core.step import Spans
from ridgeline.ops.op import Need

WORD_BITS = 32
FEATURES = {
    "paged": "block_tables",
    "contiguous": "key_starts",
    "full": "causal",
    "window": "window",
    "softcap": "softcap",
    "sinks": "sinks",
    "tree": "tree",
    "lse": "return_lse",
}
"""What a call may ask for -> the argument that asks for it."""


class Call(NamedTuple):
    """The arguments of `attention`, in its order and under its names (ops/attention.py says what they mean)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_tables: torch.Tensor | None
    query_starts: torch.Tensor
    lengths: torch.Tensor
    spans: Spans
    scale: float
    window: int | None = None
    key_starts: torch.Tensor | None = None
    causal: bool = True
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    tree: torch.Tensor | None = None
    tails: torch.Tensor | None = None
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def page(self) -> int | None:
        """Keys of a page; None if keys are contiguous."""
        return self.k.shape[2] if self.key_starts is None else None

    @property
    def features(self) -> frozenset[str]:
        """What the call asks for, of FEATURES."""
        return _features(
            self.block_tables is not None,
            self.key_starts is not None,
            not self.causal,
            self.window is not None,
            self.softcap is not None,
            self.sinks is not None,
            self.tree is not None,
            self.return_lse,
        )


@cache
def _features(*asked: bool) -> frozenset[str]:
    return frozenset(name for name, one in zip(FEATURES, asked) if one)


def mistake(call: Call) -> tuple[str, str] | None:
    """What is wrong with a call, whatever the kernel: (argument, what it must be); None if nothing is."""
    q, k, v = call.q, call.k, call.v
    if q.dim() != 3:
        return "q", f"must be [tokens, heads, head dim], not {list(q.shape)}"
    if (call.block_tables is None) == (call.key_starts is None):
        given = "neither is" if call.key_starts is None else "both are"
        return (
            "block_tables",
            f"exactly one of block_tables (paged keys) and key_starts (contiguous keys), {given} given",
        )
    if call.block_tables is not None:
        if k.dim() != 4:
            return "k", f"must be [blocks, KV heads, block, head dim] with block_tables, not {list(k.shape)}"
    elif k.dim() != 3:
        return "k", f"must be [keys, KV heads, head dim] with key_starts, not {list(k.shape)}"
    head_dim = q.shape[2]
    if k.shape[-1] != head_dim:
        return "k", f"must have q's head dim {head_dim}, not {k.shape[-1]}"
    if v.shape != k.shape:
        return "v", f"must have k's shape {list(k.shape)}, not {list(v.shape)}"
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        return "k", f"must have KV heads that divide q's {q.shape[1]} heads, not {k.shape[1]}"
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            return name, f"must be of q's dtype {q.dtype}, not {tensor.dtype}"
        if tensor.device != q.device:
            return name, f"must be on q's device {q.device}, not {tensor.device}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and head_dim > 1:
            return name, f"must have neighbouring elements in its last dimension, not a stride of {tensor.stride(-1)}"
    if k.stride() != v.stride() and any(size > 1 and a != b for size, a, b in zip(k.shape, k.stride(), v.stride())):
        return "v", f"must have k's strides {k.stride()}, not {v.stride()}"
    requests = call.lengths.shape[0] if call.lengths.dim() else 0
    wrong = (
        _integers("block_tables", call.block_tables, 2, requests, q.device)
        or _integers("query_starts", call.query_starts, 1, requests + 1, q.device)
        or _integers("lengths", call.lengths, 1, requests, q.device)
        or _integers("key_starts", call.key_starts, 1, requests + 1, q.device)
    )
    if wrong is not None:
        return wrong
    if not (call.scale > 0 and math.isfinite(call.scale)):
        return "scale", f"must be a positive number, not {call.scale}"
    if call.window is not None:
        if call.window < 1:
            return "window", f"must be at least one key, or None, not {call.window}"
        if not call.causal:
            return "window", "needs causal=True: it counts back from a row's own position"
    if call.softcap is not None and not (call.softcap > 0 and math.isfinite(call.softcap)):
        return "softcap", f"must be a positive number, or None, not {call.softcap}"
    if call.sinks is not None:
        if call.sinks.dtype != torch.float32 or call.sinks.shape != (q.shape[1],) or not call.sinks.is_contiguous():
            found = f"{list(call.sinks.shape)} of {call.sinks.dtype}"
            return "sinks", f"must be one logit a head, contiguous [{q.shape[1]}] of torch.float32, not {found}"
        if call.sinks.device != q.device:
            return "sinks", f"must be on q's device {q.device}, not {call.sinks.device}"
    if call.tree is not None or call.tails is not None:
        return _wrong_tree(call, requests)
    return None


def _integers(
    name: str, tensor: torch.Tensor | None, dims: int, count: int, device: torch.device
) -> tuple[str, str] | None:
    """What is wrong with an argument of int32 whose first dimension has `count` entries."""
    if tensor is None:
        return None
    if tensor.dtype != torch.int32:
        return name, f"must be int32, not {tensor.dtype}"
    if tensor.dim() != dims or tensor.shape[0] != count:
        shape = f"[{count}]" if dims == 1 else f"[{count}, any]"
        return name, f"must be {shape} for the {count - (name.endswith('starts'))} requests, not {list(tensor.shape)}"
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return name, f"must have neighbouring elements in its last dimension, not a stride of {tensor.stride(-1)}"
    if tensor.device != device:
        return name, f"must be on q's device {device}, not {tensor.device}"
    return None


def _wrong_tree(call: Call, requests: int) -> tuple[str, str] | None:
    tree, tails, device = call.tree, call.tails, call.q.device
    if tree is None or tails is None:
        return ("tree", "must be given with tails") if tree is None else ("tails", "must be given with tree")
    if not call.causal:
        return "tree", "needs causal=True: rows before the tail are causal"
    wrong = _integers("tree", tree, 2, call.q.shape[0], device) or _integers("tails", tails, 1, requests, device)
    if wrong is not None:
        return wrong
    trees, words = call.spans.trees, tree.shape[1]
    if len(trees) != len(call.spans.new):
        return "spans", f"must tell the trees of all {len(call.spans.new)} requests with `tree`, not of {len(trees)}"
    for seen, new in zip(trees, call.spans.new):
        if len(seen) > new:
            return "tails", f"must be no more than a request's new rows, not {len(seen)} of {new}"
    longest = max(map(len, trees), default=0)
    needed = max(1, -(-longest // WORD_BITS))
    if words < needed:
        return "tree", f"must have {needed} words a row, as the longest tail of {longest} keys takes, not {words}"
    if call.window is not None and call.window < WORD_BITS * words:
        return (
            "window",
            f"must be at least {WORD_BITS * words} keys long, as many as `tree` has bits, not {call.window}",
        )
    return None


def checked(call: Call) -> Call:
    """The call itself. Raises InvalidArgument if it is wrong, whatever the kernel."""
    wrong = mistake(call)
    if wrong is not None:
        raise InvalidArgument(*wrong)
    return call


LIMITS: dict[str, Limits] = {}
"""The limits of every kernel of `attention` that has been loaded, by its name."""


def _sizes(sizes: range | tuple[int, ...]) -> str:
    if isinstance(sizes, range) and len(sizes) > 2:
        low = "" if sizes[0] == sizes.step else f" from {sizes[0]}"
        return f"any{low} to {sizes[-1]}" if sizes.step == 1 else f"multiples of {sizes.step}{low} up to {sizes[-1]}"
    return ", ".join(map(str, sizes))


def _dtypes(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(one).removeprefix("torch.") for one in dtypes)


@dataclass(frozen=True)
class Limits:
    """What a kernel of `attention` takes. Making one enters it in LIMITS, for others' refusals to name it.

    head_dims, pages: a tuple of sizes, or a range. features: of FEATURES. group: most query heads a KV
    head. more: any further reason for refusing a call that is within all of these, beginning with the
    argument's name.
    """

    name: str
    need: Need
    dtypes: tuple[torch.dtype, ...]
    head_dims: range | tuple[int, ...]
    features: frozenset[str]
    pages: range | tuple[int, ...] = ()
    group: int = 1 << 30
    more: Callable[[Call], str | None] | None = None

    def __post_init__(self) -> None:
        assert self.features <= FEATURES.keys(), self.features
        assert self.name not in LIMITS, f"attention has limits of {self.name} already"
        LIMITS[self.name] = self

    def beyond(self, call: Call) -> str | None:
        """The first limit that a call, right in itself, is beyond; None if the kernel takes it."""
        q = call.q
        missing = call.features - self.features
        if missing:
            feature = next(name for name in FEATURES if name in missing)
            return f"{FEATURES[feature]}: {self.name} does not do {feature} attention, only {self._does()}"
        if q.dtype not in self.dtypes:
            return f"q: {self.name} takes {_dtypes(self.dtypes)}, not {str(q.dtype).removeprefix('torch.')}"
        if q.shape[2] not in self.head_dims:
            return f"q: {self.name} takes head dims {_sizes(self.head_dims)}, not {q.shape[2]}"
        if call.group > self.group:
            return f"q: {self.name} takes up to {self.group} heads a KV head, not {call.group}"
        if call.page is not None and call.page not in self.pages:
            return f"k: {self.name} takes pages of {_sizes(self.pages)} keys, not {call.page}"
        return None if self.more is None else self.more(call)

    def _does(self) -> str:
        return ", ".join(name for name in FEATURES if name in self.features)

    def accepts(self, *args: Any, **kwargs: Any) -> str | None:
        """For Op.kernel: the reason for refusing these arguments (meta tensors will do), or None."""
        call = Call(*args, **kwargs)
        wrong = mistake(call)
        if wrong is not None:
            return f"{wrong[0]}: {wrong[1]}"
        reason = self.beyond(call)
        return None if reason is None else f"{reason}; {self._instead(call)}"

    def require(self, *args: Any, **kwargs: Any) -> Call:
        """The arguments as a Call. Raises InvalidArgument if they are wrong, KernelRefused if this kernel refuses."""
        call = checked(Call(*args, **kwargs))
        reason = self.beyond(call)
        if reason is not None:
            raise KernelRefused(f"{reason}; {self._instead(call)}")
        return call

    def _instead(self, call: Call) -> str:
        """Which other kernels of the same device would take the call."""
        others = [
            one.name for one in LIMITS.values() if one is not self and self._beside(one) and one.beyond(call) is None
        ]
        return f"{' or '.join(others or ['reference'])} would do"

    def _beside(self, other: Limits) -> bool:
        devices = {self.need.device, other.need.device}
        return len(devices) == 1 or "any" in devices
