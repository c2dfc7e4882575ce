"""The lecture's list of optimisations, each priced on one model, machine and load: with it and without.

Knows how to change a ModelSpec, a load, or the bytes of weights. It must not hold a formula for a step: every
figure is the forward pass on meta tensors, priced again after the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.models.spec import Experts
from ridgeline.ops import Op, Ops
from ridgeline.ops.weight import Weight
from ridgeline.perf.hardware import Hardware
from ridgeline.perf.meter import Meter
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline
from ridgeline.study.plan import Planner
from ridgeline.study.price_op import standard_attention

INT4_BYTES = 0.5 + 2 / 128
"""A weight in int4 with one 16-bit scale for each 128 of them."""
FP8_BYTES = 1.0
ACCEPTANCE, DRAFTED, DRAFT_SHARE = 0.7, 4, 0.05
"""Speculation as assumed: the chance that a drafted token is accepted, tokens drafted a step, a draft step's cost."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One row: an optimisation, the model without it or with it, and what that does. Times are floors in seconds.

    has: whether the model (or ridgeline) has it already; then the figures are those without it.
    """

    name: str
    has: bool
    assumption: str
    ttft_s: float
    tpot_s: float
    weight_bytes: float
    kv_bytes_per_token: float

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class _Weights(Meter):
    """A Meter that also adds up the bytes and FLOPs of ops that read weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_bytes: list[float] = []

    def before(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().before(op, args, kwargs)
        cost = self.calls[-1][1]
        held = sum(one.nbytes for one in (*args, *kwargs.values()) if isinstance(one, Weight))
        if op.name == "embed":
            held = 0  # rows that are looked up, not a matrix that is read
        if op.name == "moe":
            held = cost.read_bytes - args[0].numel() * args[0].element_size()
        self.weight_bytes.append(float(held))


def what_if(planner: Planner, hardware: Hardware, prompt_len: int, output_len: int, batch: int) -> list[WhatIf]:
    """All rows; the first is the model as it is. InvalidArgument for lengths beyond the model's."""
    if prompt_len + output_len > planner.spec.max_positions:
        raise InvalidArgument(
            "prompt_len", f"{prompt_len} + {output_len} tokens are beyond {planner.spec.max_positions}"
        )
    return list(_Study(planner, hardware, prompt_len, prompt_len + output_len // 2, batch).rows())


class _Study:
    def __init__(self, planner: Planner, hardware: Hardware, prompt: int, middle: int, batch: int) -> None:
        self.planner, self.hardware = planner, hardware
        self.prompt, self.middle, self.batch = prompt, middle, batch
        self.roofline = Roofline.of(hardware, planner.dtype)

    def rows(self) -> Iterator[WhatIf]:
        spec, planner = self.planner.spec, self.planner
        ttft, tpot = self.steps(planner)
        weights, kv = float(planner.weight_bytes), float(planner.layout.bytes_per_token)

        def row(name: str, has: bool, assumption: str, **changed: float) -> WhatIf:
            values = {"ttft_s": ttft, "tpot_s": tpot, "weight_bytes": weights, "kv_bytes_per_token": kv, **changed}
            return WhatIf(name, has, assumption, **values)

        yield row("as it is", True, f"batch {self.batch}, prompt {self.prompt}, decode at {self.middle}")
        yield row(
            "KV cache", True, "without: every step computes the whole sequence again",
            tpot_s=self.seconds(planner, self.middle, self.middle), kv_bytes_per_token=0.0,
        )  # fmt: skip
        if spec.kv_heads < spec.heads:
            other, note = spec.heads, f"without: {spec.heads} KV heads instead of {spec.kv_heads}"
        else:
            other = max(spec.heads // 8, 1)
            note = f"with: {other} KV heads instead of {spec.heads}, trained anew"
        grouped = self.variant(kv_heads=other)
        yield self.row_of(grouped, "GQA", spec.kv_heads < spec.heads, note)
        if spec.experts is None:
            experts = Experts(8, 2, max(spec.intermediate // 2, 1), True, frozenset(range(spec.layers)))
            mixture = self.variant(experts=experts, architecture="MixtralForCausalLM")
            yield self.row_of(mixture, "MoE", False, "with: 8 experts of half the width, 2 a token: 4x the weights")
        else:
            dense = self.variant(
                experts=None, intermediate=spec.experts.intermediate * spec.experts.count,
                architecture="LlamaForCausalLM", qk_norm=False,
            )  # fmt: skip
            yield self.row_of(dense, "MoE", True, "without: one dense FFN of all experts' width")
        yield row(
            "operator fusion", True, "without: scores, residual sums, gates and activations pass through memory",
            ttft_s=ttft + self.unfused_s(self.prompt, self.prompt), tpot_s=tpot + self.unfused_s(1, self.middle),
        )  # fmt: skip
        tokens = (1 - ACCEPTANCE ** (DRAFTED + 1)) / (1 - ACCEPTANCE)
        verify = self.seconds(planner, DRAFTED + 1, self.middle + DRAFTED)
        yield row(
            "speculative decoding", False,
            f"with: {DRAFTED} drafted tokens, accepted with {ACCEPTANCE:.0%} each; a draft costs {DRAFT_SHARE:.0%}",
            tpot_s=(verify + DRAFTED * DRAFT_SHARE * tpot) / tokens,
        )  # fmt: skip
        element = planner.model.store.dtype.itemsize
        for name, bytes_, rate in (("fp8 weights", FP8_BYTES, "float8"), ("int4 weights", INT4_BYTES, None)):
            share = bytes_ / element
            faster = self.hardware.matrix.get(rate, 0) / self.roofline.matrix_flops if rate else 1.0
            compute = max(faster, 1.0)
            note = f"with: {bytes_:.3g} bytes a weight" + (f", {compute:.0f}x the FLOP/s" if compute > 1 else "")
            yield row(
                name, False, note, ttft_s=self.scaled_s(self.prompt, self.prompt, share, 1 / compute),
                tpot_s=self.scaled_s(1, self.middle, share, 1 / compute), weight_bytes=weights * share,
            )  # fmt: skip
        yield row(
            "pruning", False, "with: half of every matrix gone, in whole rows",
            ttft_s=self.scaled_s(self.prompt, self.prompt, 0.5, 0.5), tpot_s=self.scaled_s(1, self.middle, 0.5, 0.5),
            weight_bytes=weights * 0.5,
        )  # fmt: skip

    def steps(self, planner: Planner) -> tuple[float, float]:
        """(prefill, decode) seconds."""
        return self.seconds(planner, self.prompt, self.prompt), self.seconds(planner, 1, self.middle)

    def seconds(self, planner: Planner, new: int, visible: int) -> float:
        return planner.phase(self.roofline, new, visible, self.batch).seconds

    def variant(self, **changes: Any) -> Planner:
        """The model with another spec."""
        return Planner(replace(self.planner.spec, **changes), self.planner.name, self.planner.dtype)

    def row_of(self, planner: Planner, name: str, has: bool, assumption: str) -> WhatIf:
        ttft, tpot = self.steps(planner)
        return WhatIf(name, has, assumption, ttft, tpot, planner.weight_bytes, planner.layout.bytes_per_token)

    def scaled_s(self, new: int, visible: int, bytes_: float, flops: float) -> float:
        """Seconds of a step whose weights take this share of their bytes, and their products of their FLOPs."""
        meter = _Weights()
        spans = Spans((new,) * self.batch, (visible,) * self.batch)
        self.planner.price.trace(spans, self.batch, True, Ops({}, meter))
        total = 0.0
        for (name, cost), held in zip(meter.calls, meter.weight_bytes):
            if held:
                cost = replace(cost, flops=cost.flops * flops, read_bytes=cost.read_bytes - held * (1 - bytes_))
            total += self.roofline.seconds(cost, meter.kinds[name])
        return total

    def unfused_s(self, new: int, visible: int) -> float:
        """What a step takes longer if every intermediate of a fused op is written and read again."""
        spans = Spans((new,) * self.batch, (visible,) * self.batch)
        return self.roofline.memory_s(Cost(read_bytes=sum(unfused_bytes(self.planner.price, spans).values())))


def unfused_bytes(price: Price, spans: Spans) -> dict[str, float]:
    """Bytes that each fused op of a step saves: those of its intermediates, written and read once more.

    attention: scores and probabilities of Algorithm 0, whose passes read Q, K and V no more often; norm: the sum with
    the residual; gated_linear and moe: gate and up before their product; rope_kv_write: queries and keys turned.
    """
    spec, element = price.model.spec, price.model.store.dtype.itemsize
    tokens = sum(spans.new)
    standard = sum(
        standard_attention(1, spec.heads, spec.kv_heads, new, visible, spec.head_dim, element).bytes
        for new, visible in zip(spans.new, spans.visible)
    )
    inner = spec.experts.intermediate * spec.experts.per_token if spec.experts else spec.intermediate
    twice = 2 * spec.layers * tokens * element
    return {
        "attention": max(standard * spec.layers - price.attention(spans).bytes, 0.0),
        "norm": twice * 2 * spec.hidden,
        "moe" if spec.experts else "gated_linear": twice * inner,
        "rope_kv_write": twice * (spec.heads + spec.kv_heads) * spec.head_dim,
    }
