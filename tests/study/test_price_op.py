"""Prices of single ops: the lectures' figures, hand arithmetic, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument
from ridgeline.perf.hardware import find
from ridgeline.study.price_op import Priced, price_op


def priced(op: str, machine: str = "a100-40", dtype: str = "bfloat16", **sizes: Any) -> Priced:
    return price_op(op, {key: str(value) for key, value in sizes.items()}, dtype, find(machine))


def test_standard_attention_is_62_flop_per_byte() -> None:
    """(4 d + 3) N^2 over 8 N^2 + 8 N d bytes, as the lecture counts: far below the ridge."""
    one = priced("attention", variant="standard", n=4096, d=128)
    assert one.cost.flops == (4 * 128 + 3) * 4096**2
    assert one.cost.bytes == 8 * 4096**2 + 8 * 4096 * 128
    assert one.flop_per_byte == pytest.approx(62.4, abs=0.1)
    assert one.as_dict()["bound"] == "memory"


def test_flash_attention_reads_and_writes_once() -> None:
    one = priced("attention", n=4096, d=128)
    assert one.cost.flops == 4 * 128 * 4096**2
    assert one.cost.bytes == 4 * 4096 * 128 * 2
    assert one.flop_per_byte == 2048
    assert one.as_dict()["bound"] == "compute"
    causal = priced("attention", n=4096, d=128, causal="true")
    assert causal.cost.flops == 4 * 128 * 4096 * 4097 / 2


def test_flash_never_moves_more_than_standard() -> None:
    for n in (1, 64, 4096):
        for causal in ("true", "false"):
            flash = priced("attention", n=n, d=128, heads=32, kv_heads=8, batch=3, causal=causal)
            standard = priced("attention", variant="standard", n=n, d=128, heads=32, kv_heads=8, batch=3)
            assert flash.cost.bytes < standard.cost.bytes


def test_matrix_products() -> None:
    square = priced("linear", m=4096, k=4096, n=4096)
    assert square.flop_per_byte == pytest.approx(1365.3, abs=0.1)
    assert square.as_dict()["bound"] == "compute"
    single = priced("linear", m=1, k=4096, n=4096)
    assert single.flop_per_byte == pytest.approx(1, abs=0.001)
    assert single.as_dict()["seconds"] == single.cost.bytes / 1555e9
    assert priced("linear", m=2, k=8, n=4, dtype="float32").cost.bytes == 4 * (16 + 32 + 8)


def test_other_ops() -> None:
    gated = priced("gated_linear", m=3, k=16, n=40)
    assert gated.cost.flops >= 2 * 3 * 16 * 80
    assert priced("norm", m=7, k=64).cost.bytes == 2 * (4 * 7 * 64 + 64)
    few, many = (priced("moe", m=m, k=64, n=32, experts=8, per_token=2) for m in (1, 512))
    assert many.cost.read_bytes > 3 * few.cost.read_bytes


@pytest.mark.parametrize(
    ("op", "sizes", "message"),
    [
        ("softmax", {}, "op: 'softmax' is not priced alone; attention, linear"),
        ("linear", {"m": 1, "k": 2}, "n: is needed to price linear"),
        ("linear", {"m": 1, "k": 2, "n": 3, "z": 4}, "z: is not a size of linear; known are m, k, n"),
        ("linear", {"m": 0, "k": 2, "n": 3}, "m: must be an integer of at least 1"),
        ("linear", {"m": "many", "k": 2, "n": 3}, "m: must be an integer"),
        ("attention", {"n": 8, "d": 4, "variant": "fast"}, "variant: must be one of flash, standard"),
        ("attention", {"n": 8, "d": 4, "causal": "maybe"}, "causal: must be true or false"),
        ("attention", {"n": 8, "d": 4, "heads": 6, "kv_heads": 4}, "kv_heads: 6 heads"),
        ("attention", {"n": 8, "d": 4, "queries": 9}, "queries: 9 are more"),
        ("moe", {"m": 1, "k": 2, "n": 3, "experts": 4, "per_token": 5}, "per_token: 5 are more"),
    ],
)
def test_errors(op: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        priced(op, **sizes)


def test_command() -> None:
    arguments = ["price", "linear", "m=1", "k=4096", "n=4096", "--hardware", "A10", "--json"]
    found = json.loads(CliRunner().invoke(application, arguments, catch_exceptions=False).stdout)
    assert found["bound"] == "memory"
    assert found["machine_balance_flop_per_byte"] == pytest.approx(208.3, abs=0.1)
    for bad in (["price", "linear", "m"], ["price", "linear", "m=1", "m=2"]):
        with pytest.raises(InvalidArgument):
            CliRunner().invoke(application, bad, catch_exceptions=False)
