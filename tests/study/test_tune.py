"""The search of tiles, on a kernel of our own whose tiles cost what we say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.kernels import tables
from ridgeline.kernels.select import load_kernels
from ridgeline.kernels.tables import Shape, Tunable
from ridgeline.ops import REGISTRY
from ridgeline.ops.op import Kernel, anywhere
from ridgeline.study import tune
from ridgeline.study.attention.cases import Case
from ridgeline.study.tune import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


class Tile(NamedTuple):
    rows: int
    mood: str = "quick"


CASES = [Case("sweep", 1, 2, 2, 16, 8, 8, True, "float32"), Case("sweep", 1, 2, 2, 16, 16, 16, True, "float32")]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, Tile]:
    """A kernel of the reference that sleeps: rows 32 is the fastest, 64 is wrong, 128 does not compile."""
    load_kernels("cpu")
    reference = REGISTRY["attention"].reference
    found = {16: Tile(16)}
    sleeps = {16: 4e-3, 32: 0.0, 48: 2e-3}

    def call(**arguments: Any) -> torch.Tensor:
        rows = found[16].rows
        if rows == 128:
            raise RuntimeError("out of resource: shared memory")
        time.sleep(sleeps.get(rows, 0))
        return reference(**arguments) + (0.1 if rows == 64 else 0.0)

    monkeypatch.setattr(REGISTRY["attention"], "kernels", {"mine": Kernel("mine", anywhere(), call)})
    monkeypatch.setattr(tables, "TUNABLES", {})
    monkeypatch.setattr(tune, "cases", lambda tunable, key, settings: CASES)
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    Tunable("mine", "long", found, {"rows": (16, 32, 48, 64, 128)}, shape=lambda key: Shape(key, 4), work="prefill")
    return found


def settings(**changes: Any) -> Settings:
    return Settings(device="cpu", dtype="float32", **{"rounds": 5, **changes})


def test_the_fastest_right_variant_wins_and_is_kept(table: dict[int, Tile]) -> None:
    told: list[str] = []
    result = tune.run(settings(), lambda done, total, what: told.append(what))
    assert json.loads(json.dumps(result)) == result
    (entry,) = result["entries"]
    assert (entry["table"], entry["key"], entry["tried"]) == ("mine/long", "16", 3)
    assert entry["before"] == {"rows": 16, "mood": "quick"}
    assert entry["after"] == {"rows": 32, "mood": "quick"}
    assert entry["gain"][0] > 1.5
    assert list(entry["refused"].values()) == ["out of resource: shared memory"]
    assert "rows=64" in next(iter(entry["wrong"]))
    assert "an error of 0.1" in next(iter(entry["wrong"].values()))
    assert "finalists" in told[-2]
    kept = json.loads(Path(result["file"]).read_text())
    assert kept["tables"]["mine/long"]["entries"] == {"16": {"rows": 32, "mood": "quick"}}
    assert tune.words(result).rows[0][4] == "rows 16 -> 32"
    assert table[16].rows == 32, "the process goes on with what it found"
    again = tune.run(settings(keep=False))
    assert again["entries"][0]["after"] is None
    assert again["file"] is None
    assert tune.words(again).rows[0][4] == "stays"


def test_a_dry_run_writes_nothing(table: dict[int, Tile], tmp_path: Path) -> None:
    assert tune.run(settings(keep=False))["file"] is None
    assert not list(tmp_path.rglob("*.json"))


def test_a_search_that_is_stopped_keeps_what_it_found(table: dict[int, Tile], tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.run(settings(out=tmp_path / "table.json"), stop)
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["tables"]["mine/long"]["entries"]["16"]["rows"] == 32


def test_a_named_file_is_written_though_nothing_is_better(table: dict[int, Tile], tmp_path: Path) -> None:
    tune.run(settings(most=1, out=tmp_path / "table.json"))
    assert json.loads((tmp_path / "table.json").read_text())["tables"] == {}


def test_few_variants(table: dict[int, Tile]) -> None:
    (entry,) = tune.run(settings(most=1, keep=False))["entries"]
    assert (entry["tried"], entry["after"]) == (1, None)


def test_refusals(table: dict[int, Tile]) -> None:
    for changes, said in (
        ({"kernels": ["v2"]}, "kernel: 'v2' declares no tables on this device; mine do"),
        ({"head_dims": [64]}, "head_dim: no table has an entry"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            tune.run(settings(**changes))
        assert said in str(caught.value)
    for changes in ({"rounds": 0}, {"most": 0}, {"dtype": "int8"}):
        with pytest.raises(InvalidArgument):
            Settings(**changes)
    table[16] = Tile(128)
    with pytest.raises(KernelRefused, match="the present entry does not run"):
        tune.run(settings())


def test_a_device_without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TUNABLES", {})
    with pytest.raises(KernelRefused, match="nothing to tune on cpu"):
        tune.run(settings())


def test_cases_follow_the_work(table: dict[int, Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for work, new in (("prefill", {1024, 4096}), ("short", {64, 32}), ("decode", {1})):
        for lengths in ((), (128,)):
            tunable = object.__new__(Tunable)
            for name, value in (("work", work), ("shape", lambda key: Shape(64, 2)), ("lengths", lengths)):
                object.__setattr__(tunable, name, value)
            found = tune.cases(tunable, 64, Settings())
            assert {case.head_dim for case in found} == {64}
            assert {case.new for case in found} == (new if not lengths else {1 if work == "decode" else 128})
            assert not lengths or {case.visible for case in found} == {128}


@pytest.mark.gpu
def test_the_search_on_a_gpu(tmp_path: Path) -> None:
    """A few variants of one entry of each kernel that declares tables: all run, none is wrong."""
    load_kernels("cuda")
    for kernel in {one.kernel for one in tables.TUNABLES.values()}:
        asked = Settings(kernels=[kernel], head_dims=[64], most=3, rounds=3, out=tmp_path / "table.json")
        result = tune.run(asked)
        assert result["entries"]
        assert all(one["tried"] >= 1 and not one["wrong"] for one in result["entries"])
