"""Cards: read between points, kept in files, refused when they are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans
from ridgeline.perf.card import Card, Grid, Line, computed_rows, load_card

CARD = Card(
    device="a device",
    model="a model",
    dtype="float32",
    made="2026-11-20T00:00:00+00:00",
    body=Line(((1, 1.0), (8, 1.7), (16, 3.3))),
    head=Line(((1, 0.5), (4, 0.8))),
    decode=Grid((1, 4), (10, 100), ((0.1, 1.0), (0.4, 4.0))),
    prefill=Grid((8, 16), (0, 32), ((0.2, 0.4), (0.8, 1.6)), power=True),
    longest=100,
    step_s=0.01,
    request_s=0.001,
    ops_scale=1.0,
    host_step_s=0.02,
    host_request_s=0.002,
    loop_step_s=0.001,
    loop_request_s=0.0001,
    residual=0.05,
)


def test_lines_and_grids_between_and_beyond() -> None:
    assert [CARD.body(n) for n in (0.5, 1, 8, 12, 24)] == pytest.approx([1.0, 1.0, 1.7, 2.5, 4.9])
    assert Line(((3, 7.0),))(100) == 7.0
    assert CARD.decode(1, 55) == pytest.approx(0.55)
    assert CARD.decode(2.5, 55) == pytest.approx(1.375)
    assert CARD.decode(4, 190) == pytest.approx(7.6)
    assert CARD.prefill(12, 0) == pytest.approx(0.2 * (12 / 8) ** 2)  # twice the tokens took four times as long
    assert CARD.prefill(32, 32) == pytest.approx(1.6 * 4)
    assert Line(((1, 0.0), (2, 4.0))).power(1.5) == pytest.approx(2.0)


def test_a_step_is_the_sum_of_its_parts() -> None:
    decode = Spans((1, 1), (10, 100))
    parts = 0.01 + 2 * 0.001 + CARD.body(2) + CARD.head(2) + CARD.decode(2, 55)
    assert CARD.device_s(decode, 2) == pytest.approx(parts)
    assert CARD.host_s(decode) == pytest.approx(0.024)
    assert CARD.loop_s(decode) == pytest.approx(0.0012)
    mixed = Spans((1, 12), (40, 24))
    parts = 0.012 + CARD.body(13) + CARD.head(1) + CARD.decode(1, 40) + CARD.prefill(12, 12) - 0.2
    assert CARD.device_s(mixed, 1) == pytest.approx(parts)
    assert replace(CARD, ops_scale=2.0).device_s(mixed, 1) == pytest.approx(2 * parts - 0.012)


def test_captured_prompts_take_a_whole_size_and_no_host() -> None:
    """Only as long as a size holds them; decoding is as it was."""
    bare = replace(CARD, dispatch_s=50.0)
    card = replace(bare, captured=(10, 16))
    prompt, long, decode = Spans((12,), (12,)), Spans((17,), (17,)), Spans((1, 1), (10, 100))
    mixed = Spans((1, 8), (40, 24))
    assert bare.device_s(prompt, 1) == 50
    for spans, rows, requests in ((prompt, 16, 1), (mixed, 10, 2)):
        parts = 0.01 + 0.001 * requests + card.body(rows) + card.head(1) + card.attention_s(spans)
        assert card.device_s(spans, 1) == pytest.approx(parts)
        assert computed_rows(spans, card.captured) == rows
    assert card.device_s(long, 1) == bare.device_s(long, 1) == 50
    assert card.device_s(decode, 2) == bare.device_s(decode, 2) < 50


def test_what_was_measured_is_known() -> None:
    assert CARD.covers(Spans((1, 1), (10, 100)))
    assert not CARD.covers(Spans((1,) * 5, (10,) * 5))
    assert not CARD.covers(Spans((1,), (101,)))
    assert not CARD.covers(Spans((17,), (17,)))
    within, beyond = Spans((1,), (100,)), Spans((1,), (150,))
    assert (CARD.error(within), CARD.error(beyond)) == (0.05, pytest.approx(0.075))


def test_a_card_of_something_else_is_refused() -> None:
    CARD.check("a model", "float32")
    for other in (("another model", "float32"), ("a model", "bfloat16")):
        with pytest.raises(InvalidArgument, match=r"is of a model in float32, not of"):
            CARD.check(*other)


def test_a_card_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "cards" / "card.json"
    CARD.save(path)
    assert load_card(path) == CARD
    captured = replace(CARD, captured=(16, 32))
    captured.save(path)
    assert load_card(path) == captured
    CARD.save(path)
    assert load_card(path).sha256 == CARD.sha256 != replace(CARD, step_s=0.02).sha256


def test_what_is_no_card_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    values = CARD.as_dict()
    for text in ("", "[]", "{}", json.dumps({**values, "version": 0})):
        path.write_text(text)
        with pytest.raises(InvalidArgument, match="card"):
            load_card(path)
    path.write_text(json.dumps({**values, "speed": 3}))
    with pytest.raises(InvalidArgument, match="fields speed are missing or unknown"):
        load_card(path)
    with pytest.raises(InvalidArgument, match="cannot read"):
        load_card(tmp_path / "none.json")
