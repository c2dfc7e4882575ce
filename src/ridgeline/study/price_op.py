"""The price of one op at sizes given by hand: FLOPs, bytes, FLOP/byte, and which roof it hits.

Knows how sizes become meta tensors for an op's own cost function. It must not hold a second formula for what an op
declares; the one exception is standard attention, which is an algorithm of seven passes over memory and not a floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.ops import REGISTRY
from ridgeline.ops.weight import Weight
from ridgeline.perf.hardware import Hardware
from ridgeline.perf.roofline import Roofline

REQUIRED = object()
VARIANTS = ("flash", "standard")


@dataclass(frozen=True)
class Priced:
    """One op at one size on one machine."""

    op: str
    kind: str
    values: Mapping[str, Any]
    dtype: str
    cost: Cost
    hardware: Hardware

    @property
    def flop_per_byte(self) -> float:
        return self.cost.flops / self.cost.bytes

    @property
    def roofline(self) -> Roofline:
        return Roofline.of(self.hardware, self.dtype)

    def as_dict(self) -> dict[str, Any]:
        roofline = self.roofline
        return {
            "op": self.op,
            "class": self.kind,
            **self.values,
            "dtype": self.dtype,
            "flops": self.cost.flops,
            "bytes": self.cost.bytes,
            "read_bytes": self.cost.read_bytes,
            "write_bytes": self.cost.write_bytes,
            "flop_per_byte": self.flop_per_byte,
            "hardware": self.hardware.id,
            "machine_balance_flop_per_byte": roofline.ridge,
            "seconds": roofline.seconds(self.cost, self.kind),
            "bound": roofline.bound([(self.cost, self.kind)]),
        }


def price_op(name: str, given: Mapping[str, str], dtype: str, hardware: Hardware) -> Priced:
    """Price `name` at the sizes `given` as text. InvalidArgument for an unknown op or key, or a size that is none."""
    if name not in SIZES:
        raise InvalidArgument("op", f"{name!r} is not priced alone; {', '.join(SIZES)} are")
    known = SIZES[name]
    for key in given:
        if key not in known:
            raise InvalidArgument(key, f"is not a size of {name}; known are {', '.join(known)}")
    values = {key: _value(key, given[key], default) if key in given else default for key, default in known.items()}
    missing = [key for key, value in values.items() if value is REQUIRED]
    if missing:
        raise InvalidArgument(missing[0], f"is needed to price {name}; known are {', '.join(known)}")
    cost = COSTS[name](values, getattr(torch, dtype))
    return Priced(name, REGISTRY[name].kind, values, dtype, cost, hardware)


def _value(key: str, text: str, default: Any) -> Any:
    if key == "variant":
        if text not in VARIANTS:
            raise InvalidArgument(key, f"must be one of {', '.join(VARIANTS)}, not {text!r}")
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise InvalidArgument(key, f"must be true or false, not {text!r}")
        return text.lower() in ("true", "1")
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise InvalidArgument(key, f"must be an integer of at least 1, not {text!r}")
    return number


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _attention(values: dict[str, Any], dtype: torch.dtype) -> Cost:
    """variant flash: the op's floor. variant standard: Algorithm 0 of the FlashAttention paper, S and P in memory."""
    batch, n, d = values["batch"], values["n"], values["d"]
    heads, queries = values["heads"], values["queries"] or n
    kv_heads = values["kv_heads"] or heads
    values.update(queries=queries, kv_heads=kv_heads)
    if heads % kv_heads:
        raise InvalidArgument("kv_heads", f"{heads} heads do not share {kv_heads} KV heads evenly")
    if queries > n:
        raise InvalidArgument("queries", f"{queries} are more than the n = {n} keys that they see")
    if values["variant"] == "standard":
        return standard_attention(batch, heads, kv_heads, queries, n, d, dtype.itemsize)
    q = _empty(batch * queries, heads, d, dtype=dtype)
    keys = _empty(batch * n, kv_heads, d, dtype=dtype)
    starts = _empty(batch + 1, dtype=torch.int32)
    return REGISTRY["attention"].floor(
        q=q,
        k=keys,
        v=keys,
        block_tables=None,
        query_starts=starts,
        lengths=_empty(batch, dtype=torch.int32),
        spans=Spans((queries,) * batch, (n,) * batch),
        scale=1.0,
        key_starts=starts,
        causal=values["causal"],
    )


def standard_attention(batch: int, heads: int, kv_heads: int, queries: int, n: int, d: int, item: int) -> Cost:
    """Algorithm 0: S = Q K^T written; S read, P = softmax(S) written; P and V read, O written; the whole rectangle.

    FLOPs a head: 2 d for each score, 3 for its softmax, 2 d for its value (the lecture's (4 d + 3) N^2).
    """
    scores, softmax, values = standard_parts(batch, heads, kv_heads, queries, n, d, item, 3)
    return scores + softmax + values


def standard_parts(
    batch: int, heads: int, kv_heads: int, queries: int, n: int, d: int, item: int, softmax_flops: int
) -> tuple[Cost, Cost, Cost]:
    """Algorithm 0's three kernels: S = Q K^T, P = softmax(S), O = P V. item: bytes of an element.

    softmax_flops: FLOPs for an element of S (3 in the lecture; 6 in 2007.00072, whose softmax scales as well).
    """
    scores = batch * heads * queries * n
    rows = batch * heads * queries * d * item
    keys = batch * kv_heads * n * d * item
    return (
        Cost(2 * d * scores, rows + keys, scores * item),
        Cost(softmax_flops * scores, scores * item, scores * item),
        Cost(2 * d * scores, scores * item + keys, rows),
    )


def _linear(values: dict[str, Any], dtype: torch.dtype) -> Cost:
    weight = Weight.dense_from(_empty(values["n"], values["k"], dtype=dtype))
    return REGISTRY["linear"].floor(_empty(values["m"], values["k"], dtype=dtype), weight)


def _gated_linear(values: dict[str, Any], dtype: torch.dtype) -> Cost:
    weight = Weight.dense_from(_empty(2 * values["n"], values["k"], dtype=dtype))
    return REGISTRY["gated_linear"].floor(_empty(values["m"], values["k"], dtype=dtype), weight)


def _norm(values: dict[str, Any], dtype: torch.dtype) -> Cost:
    x = _empty(values["m"], values["k"], dtype=dtype)
    residual = x if values["residual"] else None
    return REGISTRY["norm"].floor(x, residual, _empty(values["k"], dtype=dtype), 1e-5)


def _moe(values: dict[str, Any], dtype: torch.dtype) -> Cost:
    experts, inner, hidden = values["experts"], values["n"], values["k"]
    if values["per_token"] > experts:
        raise InvalidArgument("per_token", f"{values['per_token']} are more than the {experts} experts")
    return REGISTRY["moe"].floor(
        _empty(values["m"], hidden, dtype=dtype),
        _empty(experts, hidden, dtype=dtype),
        _empty(experts, 2 * inner, hidden, dtype=dtype),
        _empty(experts, hidden, inner, dtype=dtype),
        values["per_token"],
        True,
        "silu",
    )


SIZES: dict[str, dict[str, Any]] = {
    "attention": {
        "variant": "flash",
        "n": REQUIRED,
        "d": REQUIRED,
        "causal": False,
        "queries": None,
        "heads": 1,
        "kv_heads": None,
        "batch": 1,
    },
    "linear": {"m": REQUIRED, "k": REQUIRED, "n": REQUIRED},
    "gated_linear": {"m": REQUIRED, "k": REQUIRED, "n": REQUIRED},
    "norm": {"m": REQUIRED, "k": REQUIRED, "residual": True},
    "moe": {"m": REQUIRED, "k": REQUIRED, "n": REQUIRED, "experts": REQUIRED, "per_token": REQUIRED},
}
"""Sizes by op, with defaults. m: rows (tokens); k: inputs; n: outputs, or keys of attention; d: head dim."""

COSTS: dict[str, Callable[[dict[str, Any], torch.dtype], Cost]] = {
    "attention": _attention,
    "linear": _linear,
    "gated_linear": _gated_linear,
    "norm": _norm,
    "moe": _moe,
}
