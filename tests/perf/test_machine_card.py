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
from ridgeline.perf.card import Card, in_tiles
from ridgeline.perf.machine_card import (
    Curve,
    Known,
    MachineCard,
    Plane,
    Point,
    between,
    card_of,
    nearest,
    read_between,
    read_card,
    trend,
)
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


def _point(times: float, floor_s: float = 1e-6) -> Point:
    """A call of so many times its floor under the rates of `machine`."""
    return Point(0.0, floor_s * 1e9, times * floor_s)


def machine(times: float = 2.0, **changed: Any) -> MachineCard:
    """A device on which every op takes so many times its floor."""
    flat = ((_point(times),) * 2,) * 2
    made = MachineCard(
        device="a device",
        dtype="float32",
        made="2026-11-28T00:00:00+00:00",
        read_bytes_per_s=1e9,
        matrix_flops=1e10,
        reads=((1024.0, 2e9), (4096.0, 1e9)),
        ops={name: (Curve(sizes, ((1.0, _point(times)), (64.0, _point(times)))),) for name, sizes in OPS.items()},
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
    names = [name for name, _ in price.meter(Spans((1,), (1,)), 1).calls]
    launch_s = {name: 0.25 if name == "norm" else 0.5 for name in names}
    around = {"step_s": 0.4, "request_s": 0.1, "gap_s": 0.01, "host_step_s": 0.2}
    card = machine(**around, start_s=5.0, launch_s=launch_s, launch_scale=2.0)
    found, bare = card.card(price, "small"), machine().card(price, "small")
    decode, prompt = Spans((1, 1), (16, 16)), Spans((8,), (8,))
    calls, norms = len(names), names.count("norm")
    assert found.device_s(decode, 2) - bare.device_s(decode, 2) == pytest.approx(0.4 + 0.01 * calls + 0.2)
    assert found.dispatch_s == pytest.approx(5 + 2 * (0.5 * (calls - norms) + 0.25 * norms))
    assert found.device_s(prompt, 1) == pytest.approx(found.dispatch_s)  # handed over op by op
    captured = replace(card, captured=(16, 64))
    replayed = captured.card(price, "small")
    whole = 0.4 + 0.1 + 0.01 * calls + bare.body(16) + bare.head(1) + bare.attention_s(prompt)
    assert replayed.device_s(prompt, 1) == pytest.approx(whole)
    taking = {**card.ops, "take": (replace(card.ops["embed"][0], sizes=(64.0,)),)}
    parts = [replace(one, ops=taking).parts(price, prompt) for one in (card, captured)]
    assert parts[0][:2] == parts[1][:2]  # mixtures and attention
    assert parts[0][2] < parts[1][2]
    assert captured.parts(price, decode) == card.parts(price, decode)
    assert found.host_s(decode) == pytest.approx(0.2)


def test_launches_that_were_not_measured_are_named(price: Price) -> None:
    launch_s = {name: 1e-5 for name in OPS if name != "norm"}
    with pytest.raises(InvalidArgument, match=r"what it takes to launch attention, norm"):
        machine(launch_s=launch_s).card(price, "small")


def test_calls_of_one_token_have_a_gap_and_a_scale_of_their_own(price: Price) -> None:
    """Less than nothing between them, but never below the floor."""
    card, alone, two = (
        machine(4.0, gap_s=1e-7, alone_gap_s=1e-7, step_s=1.0),
        Spans((1,), (16,)),
        Spans((1, 1), (16, 16)),
    )
    changed = replace(card, alone_gap_s=-2e-7, alone_scale=0.9)
    before, after = card.card(price, "small"), changed.card(price, "small")
    assert after.device_s(two, 2) == before.device_s(two, 2)
    calls = len(price.meter(alone, 1).calls)
    _, _, other_s = card.parts(price, alone)
    assert before.device_s(alone, 1) - after.device_s(alone, 1) == pytest.approx(3e-7 * calls + 0.1 * other_s)
    least = replace(card, alone_gap_s=-1.0, gap_s=0.0).card(price, "small")
    floor_s = sum(card.fastest.seconds(cost) for name, cost in price.meter(alone, 0).calls if name != "attention")
    assert least.body(1) == pytest.approx(floor_s)


def test_attention_goes_by_whole_tiles(price: Price) -> None:
    """Keys beyond a full tile count as another full one; the first, and full ones, as they are."""
    assert [in_tiles(one, 32) for one in (20, 32, 33, 64, 65)] == [20, 32, 64, 64, 96]
    rising = Plane(HEADS, (1.0, 8.0), (16.0, 128.0), ((_point(1.0, 1e-6), _point(1.0, 8e-6)),) * 2)
    card = machine(decode=(rising,), tile=32)
    made = card.card(price, "small")
    assert made.tile == 32
    seconds = {one: made.device_s(Spans((1,), (one,)), 1) for one in (20, 32, 40, 64)}
    assert seconds[40] == seconds[64]
    assert seconds[20] < seconds[32] < seconds[40]
    parts = [card.parts(price, Spans((1,), (one,)))[1] for one in (40, 64)]
    assert parts[0] == parts[1]
    assert made.device_s(Spans((40,), (40,)), 1) < made.device_s(Spans((40,), (64,)), 1)  # prompts are not rounded


def test_between_points_and_sizes() -> None:
    points = ((1.0, (8.0, 1.0)), (4.0, (2.0, 4.0)))
    assert [between(points, one)[0] for one in (0.5, 1, 2, 4, 9)] == pytest.approx([8, 8, 6, 2, 2])
    assert between(points, 3)[1] == pytest.approx(3)
    known = [((10.0, 10.0), 2.0), ((1000.0, 1000.0), 8.0)]
    assert nearest(known, (10.0, 10.0)) == 2.0
    assert nearest(known, (100.0, 100.0)) == pytest.approx(4.0)
    assert 2.0 < nearest(known, (20.0, 20.0)) < 4.0


def launched(sizes: tuple[float, float]) -> Known:
    """An op that starts in 3 µs and then takes 1.1 times its floor, which is the product of its sizes."""
    floor_s = sizes[0] * sizes[1] * 1e-12
    return Known(sizes, floor_s, 3e-6 + 1.1 * floor_s)


def test_a_start_and_a_multiple_are_told_apart() -> None:
    """Floors of half a nanosecond beside one of 20 µs: slowdowns of thousands, and the time between is exact."""
    known = [launched(sizes) for sizes in ((16.0, 32.0), (512.0, 1024.0), (3000.0, 7000.0))]
    line = trend(known, [1.0, 2.0, 3.0])
    assert (line.start_s, line.times) == pytest.approx((3e-6, 1.1))
    for sizes in ((20.0, 20.0), (2000.0, 1500.0), (8000.0, 8000.0)):
        wanted = launched(sizes)
        assert read_between(known, sizes, wanted.floor_s) == pytest.approx(wanted.seconds)
    slowdowns = [(one.sizes, one.seconds / one.floor_s) for one in known]
    wanted = launched((2000.0, 1500.0))
    assert wanted.floor_s * nearest(slowdowns, wanted.sizes) > 1.25 * wanted.seconds  # what a mean of those would say


def test_trends_have_no_negative_part() -> None:
    falling = [Known((1.0,), 1e-6, 5e-6), Known((2.0,), 2e-6, 4e-6)]
    assert trend(falling, [1.0, 1.0]).times == 0
    steep = [Known((1.0,), 1e-6, 1e-6), Known((2.0,), 2e-6, 9e-6)]
    assert trend(steep, [1.0, 1.0]).start_s == 0
    alone = trend(steep[1:], [1.0])
    assert (alone.start_s, alone.times) == pytest.approx((0.0, 4.5))


def test_starts_do_not_follow_the_rates() -> None:
    """Of two sizes, one is all start and one all traffic: memory of twice the rate halves the second alone."""
    curves = tuple(
        Curve(
            (size,),
            ((1.0, Point(0.0, floor_s * 1e9, 2e-6 + floor_s)), (64.0, Point(0.0, floor_s * 1e9, 2e-6 + floor_s))),
        )
        for size, floor_s in ((8.0, 1e-9), (64.0, 1e-3))
    )
    found = machine(ops={"norm": curves}).at(2e9, 1e10).ops["norm"]
    assert [one.points[0][1].seconds for one in found] == pytest.approx([2e-6, 0.5e-3], rel=0.01)


def test_between_contexts_and_batches_what_is_linear_is_exact() -> None:
    """Attention that takes a start and its traffic, known at four far corners."""
    rows, columns = (1.0, 64.0), (16.0, 4096.0)

    def point(row: float, column: float) -> Point:
        return Point(0.0, row * column, 5e-6 + 2e-9 * row * column)

    plane = Plane(HEADS, rows, columns, tuple(tuple(point(row, column) for column in columns) for row in rows))
    known = plane.at(8.0, 1024.0, Roofline(1e10, 1e10, 1e9))
    assert (known.floor_s, known.seconds) == pytest.approx((8192e-9, 5e-6 + 2e-9 * 8192))


def test_no_scale_takes_a_prediction_below_its_floor(price: Price) -> None:
    card = machine(2.0, decode_scale=0.05, attention_scale=0.05, prefill_scale=0.05)
    for spans, rows in ((Spans((1,) * 4, (64,) * 4), 4), (Spans((32,), (32,)), 1)):
        floor = sum(card.fastest.seconds(cost) for _, cost in price.meter(spans, rows).calls)
        assert card.card(price, "small").device_s(spans, rows) >= 0.999 * floor


def test_ops_attention_and_the_rest_have_scales_of_their_own(price: Price) -> None:
    spans = Spans((1,) * 4, (64,) * 4)
    mixtures_s, attention_s, other_s = machine().parts(price, spans)
    assert mixtures_s == 0
    assert machine().card(price, "small").device_s(spans, 4) == pytest.approx(attention_s + other_s, rel=1e-6)
    scaled = machine(attention_scale=1.5, decode_scale=0.8, mixture_scale=9.0).card(price, "small")
    assert scaled.device_s(spans, 4) == pytest.approx(1.5 * attention_s + 0.8 * other_s, rel=1e-6)


def test_windows_see_no_more_than_they_may() -> None:
    values = {**SHAPE, "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    price = Price(build_model(parse_config(values), torch.device("meta"), torch.float32, 256), 64, torch.float32)
    steep = Plane(HEADS, (1.0, 8.0), (16.0, 128.0), ((_point(1.0), _point(100.0)),) * 2)
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
