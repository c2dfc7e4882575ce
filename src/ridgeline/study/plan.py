"""What a model will cost on a machine, before anything runs: memory, floors of prefill and decode, latencies.

Knows the forward pass on meta tensors, the KV layout, a machine's table of rates. Every figure is a floor (no
kernel can do less) unless its name says otherwise. It must not know one model from another, nor run anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.core.errors import DoesNotFit, InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.engine.memory import LIBRARY_BYTES, LiveBytes, device_memory_bytes, size
from ridgeline.kv.layout import KVLayout
from ridgeline.models import ModelSpec, build_model, parse_config
from ridgeline.models.checkpoint import locate
from ridgeline.models.spec import read_config
from ridgeline.ops import Ops
from ridgeline.perf.card import Card
from ridgeline.perf.hardware import THIS, Hardware, find, known, named
from ridgeline.perf.limit import OwnProduct, matrix_rate, measure_limit
from ridgeline.perf.meter import Meter
from ridgeline.perf.predict import StepSeconds
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline

DTYPES = ("float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
BLOCK_SIZE = 64
CHUNK_TOKENS = 8192
"""Most tokens in a step of the engine on a GPU: what activations are sized by."""


@dataclass(frozen=True, slots=True)
class OpFigures:
    """All calls of one op in one phase: class, FLOPs, bytes, seconds at the floor."""

    name: str
    kind: str
    flops: float
    bytes: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class": self.kind,
            "flops": self.flops,
            "bytes": self.bytes,
            "flop_per_byte": ratio(self.flops, self.bytes),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class Phase:
    """One step: what it computes and moves, how long at least, and which roof it hits."""

    cost: Cost
    seconds: float
    bound: str
    ops: tuple[OpFigures, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "flops": self.cost.flops,
            "bytes": self.cost.bytes,
            "flop_per_byte": ratio(self.cost.flops, self.cost.bytes),
            "seconds": self.seconds,
            "bound": self.bound,
        }


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The same load by a calibration card: seconds, and their error bars (relative).

    steps: that the prompts take, no more tokens in each than were measured. beyond: whether the load lies beyond the
    card's grid; then the bars are wider.
    """

    sha256: str
    device: str
    ttft_s: float
    tpot_s: float
    ttft_error: float
    tpot_error: float
    steps: int
    beyond: bool

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True)
class Plan:
    """A model on a machine at one load. Times in seconds, sizes in bytes. calibrated: by a card, if there is one."""

    model: str
    hardware: Hardware
    dtype: str
    prompt_len: int
    output_len: int
    batch: int
    parameters: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    utilization: float
    prefill: Phase
    decode: Phase
    notes: tuple[str, ...] = field(default=())
    calibrated: Calibrated | None = None

    @property
    def resident_requests(self) -> int:
        return self.kv_capacity_tokens // (self.prompt_len + self.output_len)

    @property
    def ttft_s(self) -> float:
        return self.prefill.seconds

    @property
    def tpot_s(self) -> float:
        return self.decode.seconds

    @property
    def e2e_s(self) -> float:
        """The prompt's step makes the first token, each of the others takes a decode step."""
        return self.ttft_s + (self.output_len - 1) * self.tpot_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.batch * self.output_len / self.e2e_s

    @property
    def cost_per_million_tokens(self) -> float | None:
        """US dollars a million output tokens, if the machine's price is known."""
        price = self.hardware.price_per_hour
        return None if price is None else price / 3600 / self.output_tokens_per_s * 1e6

    @property
    def simple_rule(self) -> dict[str, float]:
        """The rule of thumb: S * 2P / FLOPS for the prompts, 2P bytes / bandwidth a token (P parameters)."""
        flops = self.hardware.flops(self.dtype)
        ttft = self.batch * self.prompt_len * 2 * self.parameters / flops
        tpot = self.weight_bytes / self.hardware.memory_bytes_per_s
        return {"ttft_s": ttft, "tpot_s": tpot, "e2e_s": ttft + self.output_len * tpot}

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        return {
            "model": self.model,
            "hardware": self.hardware.id,
            "dtype": self.dtype,
            "prompt_len": self.prompt_len,
            "output_len": self.output_len,
            "batch": self.batch,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "memory_utilization": self.utilization,
            "resident_requests": self.resident_requests,
            "machine_balance_flop_per_byte": self.hardware.balance(self.dtype),
            "prefill": self.prefill.as_dict(),
            "decode": self.decode.as_dict(),
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "e2e_s": self.e2e_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "cost_per_million_tokens": self.cost_per_million_tokens,
            "simple_rule": self.simple_rule,
            "calibrated": None if self.calibrated is None else self.calibrated.as_dict(),
            "ops": [{"phase": name, **one.as_dict()} for name, phase in phases.items() for one in phase.ops],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class BatchRow:
    """FLOP/byte of the four cells [prefill, decode] x [attention, FFN] at one batch, and what follows."""

    batch: int
    prefill_attention: float
    prefill_ffn: float
    decode_attention: float
    decode_ffn: float
    tpot_s: float
    tokens_per_s: float
    fits: bool


@dataclass(frozen=True)
class Sweep:
    """When batching helps: the cells against batch. critical_batch: where decode's FFN reaches the ridge.

    Weights are shared by all tokens of a step, within a request (prefill) and across requests (decode): their
    FLOP/byte grows with the batch. Keys and values belong to one request: only its own queries share them.
    """

    model: str
    hardware: Hardware
    dtype: str
    prompt_len: int
    output_len: int
    rows: tuple[BatchRow, ...]
    critical_batch: int | None

    @property
    def balance(self) -> float:
        return self.hardware.balance(self.dtype)

    def lines(self) -> list[str]:
        """What the table says, in sentences."""
        first, last = self.rows[0], self.rows[-1]
        grown = last.decode_ffn / first.decode_ffn
        flat = last.decode_attention / first.decode_attention
        result = [
            f"Decode's FFN reuses each weight across requests: {grown:,.0f}x the FLOP/byte from batch {first.batch} to "
            f"{last.batch}. Its attention reuses nothing across requests: {flat:.1f}x.",
        ]
        if self.critical_batch is None:
            result.append(
                f"Decode's FFN stays memory-bound up to batch {last.batch}: every further request is nearly free."
            )
        else:
            result.append(
                f"From batch {self.critical_batch} on decode's FFN is compute-bound: beyond it a larger batch takes "
                "longer in proportion."
            )
        beyond = next((row.batch for row in self.rows if not row.fits), None)
        if beyond is not None:
            result.append(f"The KV cache of batch {beyond} no longer fits.")
        return result

    def as_dict(self) -> dict[str, Any]:
        names = BatchRow.__slots__
        return {
            "model": self.model,
            "hardware": self.hardware.id,
            "dtype": self.dtype,
            "prompt_len": self.prompt_len,
            "output_len": self.output_len,
            "machine_balance_flop_per_byte": self.balance,
            "critical_batch": self.critical_batch,
            "batches": [{name: getattr(row, name) for name in names} for row in self.rows],
        }


def ratio(flops: float, bytes_: float) -> float | None:
    """FLOP per byte; None of nothing."""
    return flops / bytes_ if bytes_ else None


def dtype_named(name: str) -> str:
    """bf16, BF16, bfloat16 … as torch spells it. InvalidArgument for what is none."""
    plain = SHORT.get(name.lower(), name.lower())
    if plain not in DTYPES:
        raise InvalidArgument("dtype", f"must be one of {', '.join((*DTYPES, *SHORT))}, not {name!r}")
    return plain


def batches(text: str) -> list[int]:
    """ "8" or "1..512": one batch, or powers of two from the first to the last. InvalidArgument otherwise."""
    first, dots, last = text.partition("..")
    try:
        low, high = int(first), int(last) if dots else int(first)
    except ValueError:
        raise InvalidArgument("batch", f"must be a number or a range such as 1..512, not {text!r}") from None
    if not 1 <= low <= high:
        raise InvalidArgument("batch", f"must be at least 1 and rise, not {text!r}")
    result = [low]
    while result[-1] * 2 <= high:
        result.append(result[-1] * 2)
    return result if result[-1] == high else [*result, high]


def datasheet(machine: Hardware) -> Hardware | None:
    """The table's machine of the same name as a measured one; None for a machine of the table, or if none is."""
    return named(machine.name.removeprefix("this ")) if machine.id == THIS else None


def datasheet_of(device: str) -> Hardware | None:
    """The table's machine for a device ("cuda:0"), by the name that its driver tells; None for a CPU."""
    return named(torch.cuda.get_device_name(device)) if torch.device(device).type == "cuda" else None


def machines(names: Sequence[str] | None) -> list[Hardware]:
    """The machines of these names; "this" (the default) is measured now."""
    return [this_machine() if name.strip().lower() == THIS else find(name) for name in names or [THIS]]


def planner(model: str | None, dtype: str = "auto") -> Planner:
    """A Planner for a checkpoint, a config file or a hub id; the embedded model if None."""
    place = locate(model, weights=False)
    spec = parse_config(read_config(place), str(place))
    name = place.stem.removesuffix(".config") if place.suffix == ".json" else place.name
    return Planner(spec, name, chosen_dtype(dtype, spec))


def chosen_dtype(dtype: str, spec: ModelSpec) -> str:
    """auto is the checkpoint's own."""
    return dtype_named(spec.dtype if dtype == "auto" else dtype)


class Planner:
    """A model on meta tensors in one dtype, priced on any machine at any load."""

    def __init__(self, spec: ModelSpec, name: str, dtype: str, max_positions: int | None = None) -> None:
        self.spec, self.name, self.dtype = spec, name, dtype
        kind = getattr(torch, dtype)
        self.model = build_model(spec, torch.device("meta"), kind, max_positions or spec.max_positions)
        self.price = Price(self.model, BLOCK_SIZE, kind)
        self.layout = KVLayout(spec.layers, spec.kv_heads, spec.head_dim, kind.itemsize, BLOCK_SIZE)

    @property
    def weight_bytes(self) -> int:
        return self.model.store.nbytes

    def seconds(self, hardware: Hardware) -> StepSeconds:
        """Floors of steps on a machine, for a simulation."""
        roofline = Roofline.of(hardware, self.dtype)
        return StepSeconds(self.price, lambda name, kind, cost: roofline.seconds(cost, kind))

    def capacity_tokens(self, hardware: Hardware, utilization: float, tokens: int, rows: int) -> int:
        """Tokens of KV cache beside weights and the activations of a step of `tokens` tokens; 0 if none fit."""
        length = min(tokens, self.spec.max_positions)
        activations = self.activation_bytes(tokens, length, rows) + LIBRARY_BYTES
        room = hardware.memory_bytes * utilization - self.weight_bytes - activations
        return self.layout.blocks_within(max(int(room), 0)) * BLOCK_SIZE

    def phase(self, roofline: Roofline, new: int, visible: int, batch: int) -> Phase:
        """One step of `batch` equal requests, each with `new` tokens of which the last sees `visible` keys."""
        spans = Spans((new,) * batch, (visible,) * batch)
        meter = self.price.meter(spans, rows=batch)
        seconds: dict[str, float] = {}
        for name, cost in meter.calls:
            seconds[name] = seconds.get(name, 0.0) + roofline.seconds(cost, meter.kinds[name])
        ops = tuple(
            OpFigures(name, meter.kinds[name], cost.flops, cost.bytes, seconds[name])
            for name, cost in meter.by_op().items()
        )
        bound = roofline.bound((cost, meter.kinds[name]) for name, cost in meter.calls)
        return Phase(meter.total, sum(seconds.values()), bound, ops)

    def activation_bytes(self, tokens: int, visible: int, rows: int) -> int:
        """Peak of live op outputs in the largest step, and fp32 logits beside the sampled rows."""
        live = LiveBytes()
        new = min(tokens, visible)
        self.price.trace(Spans((new,), (visible,)), rows, False, Ops({}, live))
        return live.peak_bytes + 4 * rows * self.spec.vocabulary

    def plan(
        self,
        hardware: Hardware,
        prompt_len: int,
        output_len: int,
        batch: int,
        utilization: float = 0.9,
        card: Card | None = None,
    ) -> Plan:
        """DoesNotFit, saying by how many bytes and what would fit; InvalidArgument for lengths beyond the model's, and
        for a card of another model or dtype."""
        self._check(prompt_len, output_len, batch, utilization)
        if card is not None:
            card.check(self.name, self.dtype)
        roofline = Roofline.of(hardware, self.dtype)
        usable = hardware.memory_bytes * utilization
        most = max(min(CHUNK_TOKENS, batch * prompt_len), 1)
        activations = self.activation_bytes(most, max(prompt_len, 1), min(batch, most)) + LIBRARY_BYTES
        room = usable - self.weight_bytes - activations
        if room < 0:
            raise DoesNotFit(self._too_large(hardware, usable, activations, utilization))
        capacity = self.layout.blocks_within(int(room)) * BLOCK_SIZE
        length = prompt_len + output_len
        if batch * length > capacity:
            lacking = batch * length * self.layout.bytes_per_token - room
            raise DoesNotFit(
                f"{batch} requests of {length:,} tokens need {size(batch * length * self.layout.bytes_per_token)} of "
                f"KV cache on {hardware.name}, {size(lacking)} more than the {size(room)} beside weights "
                f"({size(self.weight_bytes)}) and activations ({size(activations)}); batch {capacity // length} "
                f"fits, or {capacity // batch:,} tokens a request"
            )
        middle = prompt_len + output_len // 2
        return Plan(
            model=self.name,
            hardware=hardware,
            dtype=self.dtype,
            prompt_len=prompt_len,
            output_len=output_len,
            batch=batch,
            parameters=self.model.store.parameters,
            weight_bytes=self.weight_bytes,
            activation_bytes=activations,
            kv_bytes_per_token=self.layout.bytes_per_token,
            kv_capacity_tokens=capacity,
            utilization=utilization,
            prefill=self.phase(roofline, prompt_len, prompt_len, batch),
            decode=self.phase(roofline, 1, middle, batch),
            calibrated=None if card is None else _calibrated(card, prompt_len, middle, batch),
        )

    def sweep(
        self,
        hardware: Hardware,
        prompt_len: int,
        output_len: int,
        asked: Sequence[int],
        utilization: float = 0.9,
    ) -> Sweep:
        """The four cells at every batch; the batches may exceed memory, which the rows say."""
        self._check(prompt_len, output_len, asked[0], utilization)
        roofline = Roofline.of(hardware, self.dtype)
        most = max(min(CHUNK_TOKENS, prompt_len), 1)
        room = hardware.memory_bytes * utilization - self.weight_bytes
        room -= self.activation_bytes(most, most, 1) + LIBRARY_BYTES
        capacity = self.layout.blocks_within(max(int(room), 0)) * BLOCK_SIZE
        middle = prompt_len + output_len // 2
        rows = []
        for batch in asked:
            decode = self.phase(roofline, 1, middle, batch)
            rows.append(
                BatchRow(
                    batch=batch,
                    prefill_attention=self._attention_intensity(prompt_len, prompt_len, batch),
                    prefill_ffn=self._ffn_intensity(prompt_len * batch),
                    decode_attention=self._attention_intensity(1, middle, batch),
                    decode_ffn=self._ffn_intensity(batch),
                    tpot_s=decode.seconds,
                    tokens_per_s=batch / decode.seconds,
                    fits=batch * (prompt_len + output_len) <= capacity,
                )
            )
        critical = self._critical_batch(roofline.ridge, asked[-1])
        return Sweep(self.name, hardware, self.dtype, prompt_len, output_len, tuple(rows), critical)

    def _attention_intensity(self, new: int, visible: int, batch: int) -> float:
        cost = self.price.attention(Spans((new,) * batch, (visible,) * batch))
        return cost.flops / cost.bytes

    def _ffn_intensity(self, tokens: int) -> float:
        """FLOP/byte of all layers' feed-forward parts on this many tokens."""
        meter = Meter()
        ops = Ops({}, meter)
        x = torch.empty(tokens, self.spec.hidden, dtype=self.model.store.dtype, device="meta")
        for layer in self.model.layers:
            layer.mlp(x, ops)
        return meter.total.flops / meter.total.bytes

    def _critical_batch(self, ridge: float, most: int) -> int | None:
        """Smallest batch at which decode's FFN is compute-bound, None if beyond `most` (FLOP/byte rises with batch)."""
        if self._ffn_intensity(most) < ridge:
            return None
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._ffn_intensity(middle) >= ridge else (middle + 1, high)
        return low

    def _check(self, prompt_len: int, output_len: int, batch: int, utilization: float) -> None:
        for name, value in (("prompt_len", prompt_len), ("output_len", output_len), ("batch", batch)):
            if value < 1:
                raise InvalidArgument(name, f"must be at least 1, not {value}")
        if not 0 < utilization <= 1:
            raise InvalidArgument("gpu_memory_utilization", f"must be in (0, 1], not {utilization}")
        longest = self.spec.max_positions
        if prompt_len + output_len > longest:
            raise InvalidArgument(
                "prompt_len", f"{prompt_len} + {output_len} tokens are beyond the {longest} positions of {self.name}"
            )

    def _too_large(self, hardware: Hardware, usable: float, activations: int, utilization: float) -> str:
        need = self.weight_bytes + activations
        enough = [one.id for one in known().values() if one.memory_bytes * utilization > need]
        ways = [f"{', '.join(enough)} would hold it" if enough else "no machine of the table holds it alone"]
        half = self.model.store.parameters * 2
        if self.dtype == "float32" and half + activations < usable:
            ways.append("bfloat16 would fit")
        return (
            f"{self.name} in {self.dtype} needs {size(self.weight_bytes)} for weights and {size(activations)} for "
            f"activations, {size(need - usable)} more than the {size(usable)} of {hardware.name} at utilization "
            f"{utilization:g}; " + ", and ".join(ways)
        )


def _calibrated(card: Card, prompt_len: int, middle: int, batch: int) -> Calibrated:
    """Prompts in steps as the engine of the card fills them; decode as one step of the whole batch."""
    seconds = error = 0.0
    beyond = False
    steps = _filled(batch, prompt_len, int(card.body.most))
    for spans, rows in steps:
        one = card.device_s(spans, rows) + card.host_s(spans) + card.loop_s(spans)
        seconds += one
        error += one * card.error(spans)
        beyond |= not card.covers(spans)
    decode = Spans((1,) * batch, (middle,) * batch)
    return Calibrated(
        sha256=card.sha256,
        device=card.device,
        ttft_s=seconds,
        tpot_s=card.device_s(decode, batch) + card.host_s(decode) + card.loop_s(decode),
        ttft_error=error / seconds,
        tpot_error=card.error(decode),
        steps=len(steps),
        beyond=beyond or not card.covers(decode),
    )


def _filled(batch: int, prompt_len: int, most: int) -> list[tuple[Spans, int]]:
    """`batch` prompts in steps of at most `most` tokens, one prompt after another: (spans, prompts that end)."""
    steps: list[tuple[Spans, int]] = []
    new: list[int] = []
    visible: list[int] = []
    ended = 0

    def close() -> None:
        nonlocal ended
        steps.append((Spans(tuple(new), tuple(visible)), ended))
        new.clear()
        visible.clear()
        ended = 0

    for _ in range(batch):
        done = 0
        while done < prompt_len:
            tokens = min(prompt_len - done, most - sum(new))
            done += tokens
            new.append(tokens)
            visible.append(done)
            ended += done == prompt_len
            if sum(new) == most:
                close()
    if new:
        close()
    return steps


def this_machine() -> Hardware:
    """This machine, measured on the spot in about a second: read rate beyond caches, matrix products, memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    total, _ = device_memory_bytes(device)
    limit = measure_limit(device, 0, torch.float32)
    own = _own_product(device)
    rates = {"float32": max(limit.flops_per_s, matrix_rate(device, torch.float32, own))}
    for name in ("bfloat16", "float16") if device.type == "cuda" else ("bfloat16",):
        rates[name] = matrix_rate(device, getattr(torch, name), own)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, sms = properties.name, properties.multi_processor_count
        card = named(name)
    else:
        name, sms, card = "this CPU", torch.get_num_threads(), None
    measured = {"matrix, memory": "measured just now"}
    if card is not None:
        return replace(
            card, id=THIS, name=f"this {name}", matrix={**card.matrix, **rates}, memory_bytes=total,
            memory_bytes_per_s=limit.dram_bytes_per_s, sms=sms, source={**card.source, **measured},
        )  # fmt: skip
    return Hardware(
        id=THIS, name=name, matrix=rates, vector_flops=rates["float32"], memory_bytes=total,
        memory_bytes_per_s=limit.dram_bytes_per_s, sms=sms, device=device.type, source=measured,
    )  # fmt: skip


def _own_product(device: torch.device) -> OwnProduct | None:
    """Our own matrix product where it may be faster than torch's: a floor must not lie above what is reached."""
    if device.type != "cpu":
        return None
    from ridgeline.kernels.cpu.linear import linear_cpu

    return OwnProduct(linear_cpu, True)
