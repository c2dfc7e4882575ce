"""Tables of tiles: declared once, settled from files, never wrong silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from ridgeline.core.errors import RidgelineError
from ridgeline.kernels import tables
from ridgeline.kernels.select import load_kernels
from ridgeline.kernels.tables import Shape, Tunable


class Tile(NamedTuple):
    rows: int
    registers: tuple[int, int]
    stages: int = 2


DEVICE = "NVIDIA H900 NVL"


@pytest.fixture
def tunable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tunable:
    """A table of our own in a registry and a cache of our own."""
    monkeypatch.setattr(tables, "TUNABLES", {})
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "shipped")
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shipped").mkdir()
    return Tunable(
        "mine",
        "long",
        {(2, 64): Tile(64, (40, 232)), (2, 128): Tile(128, (24, 240))},
        {"rows": (64, 128, 256), "registers": ((24, 240), (40, 232))},
        shape=lambda key: Shape(key[1], key[0]),
        work="prefill",
        exists=lambda key, tile: tile.rows * key[1] <= 128 * 128,
    )


def test_candidates_begin_with_the_present_entry_and_exist(tunable: Tunable) -> None:
    found = list(tunable.candidates((2, 128)))
    assert found[0] == Tile(128, (24, 240))
    assert len(found) == len(set(found)) == 4
    assert all(one.rows <= 128 and one.stages == 2 for one in found)
    assert len(list(tunable.candidates((2, 64)))) == 6


def test_a_kept_table_comes_after_the_shipped_one(tunable: Tunable) -> None:
    assert tables.settle(DEVICE) == tables.Settled(DEVICE)
    assert tables.slug(DEVICE) == "h900-nvl"
    assert tables.shipped_file(DEVICE).name == "h900-nvl.json"
    both = {"mine/long": {(2, 64): Tile(256, (40, 232)), (2, 128): Tile(64, (24, 240))}}
    tables.write(tables.shipped_file(DEVICE), DEVICE, both, {"rounds": 3})
    tables.write(tables.kept_file(DEVICE), DEVICE, {"mine/long": {(2, 64): Tile(128, (24, 240))}}, {})
    done = tables.settle(DEVICE)
    assert done.taken == {"mine/long": str(tables.kept_file(DEVICE))}
    assert tunable.table == {(2, 64): Tile(128, (24, 240)), (2, 128): Tile(64, (24, 240))}
    content = json.loads(tables.shipped_file(DEVICE).read_text())
    assert content["device"] == DEVICE
    assert content["made"] == {"rounds": 3}
    tables.settle("another device")
    assert tunable.table == dict(tunable.defaults)


def test_writing_again_keeps_the_other_entries(tunable: Tunable) -> None:
    file = tables.kept_file(DEVICE)
    tables.write(file, DEVICE, {"mine/long": {(2, 64): Tile(128, (40, 232))}}, {})
    tables.write(file, DEVICE, {"mine/long": {(2, 128): Tile(64, (40, 232))}}, {})
    tables.settle(DEVICE)
    assert tunable.table == {(2, 64): Tile(128, (40, 232)), (2, 128): Tile(64, (40, 232))}


def test_a_table_of_other_choices_is_passed_over_and_said(tunable: Tunable) -> None:
    file = tables.kept_file(DEVICE)
    tables.write(file, DEVICE, {"mine/long": {(2, 64): Tile(256, (40, 232))}}, {})
    content = json.loads(file.read_text())
    content["tables"]["mine/long"]["edition"] = "an older one"
    content["tables"]["gone/long"] = {"edition": "x", "entries": {}}
    file.write_text(json.dumps(content))
    done = tables.settle(DEVICE)
    assert set(done.passed_over) == {"mine/long", "gone/long"}
    assert "ridgeline kernels tune" in done.passed_over["mine/long"]
    assert tunable.table == dict(tunable.defaults)


@pytest.mark.parametrize(
    "values",
    [
        {"rows": 96, "registers": [40, 232], "stages": 2},
        {"rows": 256, "registers": [24, 240], "stages": 3},
        {"rows": 64, "stages": 2},
    ],
)
def test_an_entry_that_is_no_variant_is_an_error(tunable: Tunable, values: dict[str, object]) -> None:
    file = tables.kept_file(DEVICE)
    tables.write(file, DEVICE, {"mine/long": {}}, {})
    content = json.loads(file.read_text())
    content["tables"]["mine/long"]["entries"] = {"2,64": values}
    file.write_text(json.dumps(content))
    with pytest.raises(RidgelineError, match="mine/long"):
        tables.settle(DEVICE)


@pytest.mark.parametrize("text", ["", "[]", '{"tables": {"mine/long": 3}}', '{"tables": 1}'])
def test_a_damaged_file_is_named(tunable: Tunable, text: str) -> None:
    file = tables.kept_file(DEVICE)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(RidgelineError) as caught:
        tables.settle(DEVICE)
    assert str(file) in str(caught.value)


def test_keys_are_written_as_text() -> None:
    for key in (64, (2, 128)):
        assert tables.key_of(tables.key_text(key)) == key


def test_every_declared_default_is_right_in_itself_and_shipped_tables_are_of_this_edition() -> None:
    pytest.importorskip("triton")
    load_kernels("cuda")
    for tunable in tables.TUNABLES.values():
        for key, entry in tunable.defaults.items():
            assert tunable.exists(key, entry), (tunable.id, key, entry)
            assert len(list(tunable.candidates(key))) > 1, f"{tunable.id} {key} leaves nothing to choose"
    before = {name: dict(one.table) for name, one in tables.TUNABLES.items()}
    try:
        for file in tables.FOLDER.glob("*.json"):
            done = tables.settle(json.loads(file.read_text())["device"])
            assert not done.passed_over
            assert done.taken
    finally:
        for name, table in before.items():
            tables.TUNABLES[name].table.update(table)


def test_a_table_that_does_not_count_is_told_once(
    tunable: Tunable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ridgeline.kernels import select

    file = tables.kept_file(DEVICE)
    tables.write(file, DEVICE, {"mine/long": {(2, 64): Tile(256, (40, 232))}}, {})
    file.write_text(file.read_text().replace(tunable.edition, "older"))
    select._settle.cache_clear()
    for _ in range(2):
        select._settle(DEVICE)
    (told,) = caplog.messages
    assert told.startswith("table mine/long is not used")
    select._settle.cache_clear()
