"""A machine's card: exact where it was measured, between its points in between; any model's Card follows from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.models import build_model, parse_config
from ridgeline.ops import REGISTRY, Weight
from ridgeline.perf.card import Card
from ridgeline.perf.machine_card import Curve, MachineCard, Plane, between, card_of, nearest, read_card
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
HEADS = (4.0, 2.0, 16.0)
OPS = {
    "linear": (64.0, 64.0),
    "gated_linear": (192.0, 64.0),
    "norm": (64.0,),
    "rope_kv_write": (128.0,),
    "embed": (64.0,),
    "sample": (288.0,),
}


def machine(times: float = 2.0, **changed: Any) -> MachineCard:
    """A device on which every op takes so many times its floor."""
    flat = ((times, times), (times, times))
    made = MachineCard(
        device="a device",
        dtype="float32",
        made="2026-11-28T00:00:00+00:00",
        read_bytes_per_s=1e9,
        matrix_flops=1e10,
        reads=((1024.0, 2e9), (4096.0, 1e9)),
        ops={name: (Curve(sizes, ((1.0, times), (64.0, times))),) for name, sizes in OPS.items()},
        decode=(Plane(HEADS, (1.0, 8.0), (16.0, 128.0), flat),),
        prefill=(Plane(HEADS, (8.0, 64.0), (1.0, 4.0), flat),),
        most_tokens=64,
        most_requests=8,
        longest=256,
    )
    return replace(made, **changed)


@pytest.fixture(scope="module")
def price() -> Price:
    return Price(build_model(parse_config(SHAPE), torch.device("meta"), torch.float32, 256), 64, torch.float32)


def floor_s(price: Price, card: MachineCard, spans: Spans, rows: int) -> float:
    return sum(card.roofline.seconds(cost) for _, cost in price.meter(spans, rows).calls)


@pytest.mark.parametrize(
    ("spans", "rows"),
    [
        (Spans((1,), (16,)), 1),
        (Spans((1,) * 4, (64,) * 4), 4),
        (Spans((1,) * 8, (128,) * 8), 8),
        (Spans((32,), (32,)), 1),
        (Spans((16,), (144,)), 1),
    ],
)
def test_so_many_times_the_floor(price: Price, spans: Spans, rows: int) -> None:
    card = machine(2.0)
    assert card.card(price, "small").device_s(spans, rows) == pytest.approx(
        2 * floor_s(price, card, spans, rows), rel=0.02
    )


def test_other_rates_change_what_they_bound(price: Price) -> None:
    """A decode step waits for memory, a long prompt for arithmetic."""
    card, decode, prompt = machine(), Spans((1,), (64,)), Spans((64,), (64,))
    base, faster = card.card(price, "small"), card.at(2e9, 1e10).card(price, "small")
    assert faster.device_s(decode, 1) == pytest.approx(base.device_s(decode, 1) / 2, rel=0.01)
    computed = card.at(1e9, 1e12).card(price, "small")
    assert computed.device_s(prompt, 1) < base.device_s(prompt, 1)
    assert computed.device_s(decode, 1) == pytest.approx(base.device_s(decode, 1), rel=0.01)


def test_what_lies_around_ops(price: Price) -> None:
    card = machine(step_s=1.0, request_s=0.1, start_s=5.0, call_s=0.5, decode_scale=1.0, host_step_s=0.2)
    found, bare = card.card(price, "small"), machine().card(price, "small")
    decode, prompt = Spans((1, 1), (16, 16)), Spans((8,), (8,))
    assert found.device_s(decode, 2) - bare.device_s(decode, 2) == pytest.approx(1.2)
    calls = len(price.meter(Spans((1,), (1,)), 1).calls)
    assert found.dispatch_s == pytest.approx(5 + 0.5 * calls)
    assert found.device_s(prompt, 1) == pytest.approx(found.dispatch_s)  # handed over op by op
    assert found.host_s(decode) == pytest.approx(0.2)


def test_between_points_and_sizes() -> None:
    points = ((1.0, 8.0), (4.0, 2.0))
    assert [between(points, one) for one in (0.5, 1, 2, 4, 9)] == pytest.approx([8, 8, 4, 2, 2])
    known = [((10.0, 10.0), 2.0), ((1000.0, 1000.0), 8.0)]
    assert nearest(known, (10.0, 10.0)) == 2.0
    assert nearest(known, (100.0, 100.0)) == pytest.approx(4.0)
    assert 2.0 < nearest(known, (20.0, 20.0)) < 4.0


def test_windows_see_no_more_than_they_may() -> None:
    values = {**SHAPE, "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    price = Price(build_model(parse_config(values), torch.device("meta"), torch.float32, 256), 64, torch.float32)
    steep = Plane(HEADS, (1.0, 8.0), (16.0, 128.0), ((1.0, 100.0), (1.0, 100.0)))
    card = machine(decode=(steep,))
    near, far = (card.attention_s(price, Spans((1,), (length,))) for length in (40, 200))
    assert near == far


def test_an_op_that_was_not_measured_is_named(price: Price) -> None:
    card = machine(ops={name: curves for name, curves in machine().ops.items() if name != "norm"})
    with pytest.raises(InvalidArgument, match=r"says nothing of the op norm, only of linear"):
        card.card(price, "small")


def test_points_name_all_that_was_measured() -> None:
    points = set(machine().points())
    assert ("linear", (64.0, 64.0), 64.0, 0.0) in points
    assert ("attention", HEADS, 8.0, 128.0) in points
    assert ("linear", (64.0, 65.0), 64.0, 0.0) not in points


def test_it_survives_its_file(price: Price, tmp_path: Path) -> None:
    path = tmp_path / "cards" / "machine.json"
    card = machine()
    card.save(path)
    again = read_card(path)
    assert isinstance(again, MachineCard)
    assert (again, again.sha256) == (card, card.sha256)
    made = card_of(again, price, "small", "float32")
    assert isinstance(made, Card)
    assert made.model == "small"
    made.save(path)
    assert read_card(path) == made
    with pytest.raises(InvalidArgument, match=r"is of a device in float32, not in bfloat16"):
        card_of(again, price, "small", "bfloat16")
    with pytest.raises(InvalidArgument, match=r"is of small in float32, not of other"):
        card_of(made, price, "other", "float32")


@pytest.mark.parametrize("change", [{"version": 0}, {"more": 1}, {"residual": None}])
def test_what_is_no_card_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    values = {**machine().as_dict(), **change}
    if change == {"residual": None}:
        del values["residual"]
    path = tmp_path / "card.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InvalidArgument, match="calibrate again"):
        read_card(path)
    path.write_text("{")
    with pytest.raises(InvalidArgument, match="cannot read"):
        read_card(path)


def test_floors_are_by_the_cards_own_rates() -> None:
    x = torch.empty(4, 64, device="meta")
    weight = Weight.dense_from(torch.empty(64, 64, device="meta"))
    card = machine(3.0)
    one = card.op_s(REGISTRY["linear"], (x, weight), {})
    assert one == pytest.approx(3 * Roofline(1e10, 1e10, 1e9).seconds(REGISTRY["linear"].floor(x, weight)))
    assert math.isclose(card.op_s(REGISTRY["linear"], (torch.empty(0, 64, device="meta"), weight), {}), 0.0)
