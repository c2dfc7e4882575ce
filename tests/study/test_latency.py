"""Whole-model inference with each rung, on a tiny shape: the schema, the pairs, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ridgeline.core.errors import DoesNotFit, InvalidArgument, KernelRefused
from ridgeline.models import parse_config
from ridgeline.models.spec import read_config
from ridgeline.study import latency
from ridgeline.study.latency import Sample, Settings

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_settings(tiny: Path, **changes: object) -> Settings:
    values = {"batches": (1, 3), "sequence": 12, "new": 3, "rounds": 2, "device": "cpu", "dtype": "float32"}
    return Settings(model=str(tiny / "config.json"), **{**values, **changes})  # type: ignore[arg-type]


def test_rungs_side_by_side(tiny: Path) -> None:
    told: list[tuple[int, int]] = []
    result = latency.run(
        tiny_settings(tiny), ["blocked", "reference"], lambda done, total, _: told.append((done, total))
    )
    assert json.loads(json.dumps(result)) == result
    assert [done for done, _ in told] == list(range(told[-1][1] + 1))
    assert result["settings"]["alternating"]
    assert result["weights"] == "random"
    assert [cell["batch"] for cell in result["cells"]] == [1, 3]
    for cell in result["cells"]:
        assert list(cell["results"]) == ["blocked", "reference"]
        for one in cell["results"].values():
            assert len(one["total_s_samples"]) == 2
            assert 0 < one["first_token_s"][0] < one["total_s"][0]
            assert 0 < one["decode_step_s"][0] < one["total_s"][0]
    (words,) = latency.tables(result)
    assert len(words.rows) == 4
    assert {len(row) for row in words.rows} == {len(words.columns)}
    assert latency.remarks(result) == []


def test_speedups_are_over_standard_by_pairs() -> None:
    made = {
        "standard": [Sample(2.0, 4.0, 10.0, [[1, 2], [3, 4]]), Sample(4.0, 4.0, 12.0, [[1, 2], [3, 4]])],
        "v2": [Sample(1.0, 2.0, 5.0, [[1, 2], [9, 4]]), Sample(1.0, 2.0, 6.0, [[1, 9], [3, 4]])],
    }
    results = latency._judged(16, made)
    assert results["v2"]["first_token_over_standard"][0] == 3.0
    assert results["v2"]["decode_step_over_standard"][0] == 2.0
    assert results["v2"]["total_over_standard"] == [2.0, 2.0, 2.0]
    assert results["v2"]["first_tokens_as_standard"] == 0.75
    assert results["v2"]["report_speedup"] == 1.27
    assert "total_over_standard" not in results["standard"]


def test_without_room_for_all_they_take_turns(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines do not fit: each is built, measured and closed by itself, and the result says so."""
    alive: list[str] = []
    real = latency._model

    class Crowded:
        def __init__(self, model: str, backend: str, settings: Settings) -> None:
            self.backend, self.inner = backend, real(model, backend, settings)

        def __enter__(self) -> object:
            if alive:
                raise DoesNotFit("one at a time")
            alive.append(self.backend)
            return self.inner.__enter__()

        def __exit__(self, *error: object) -> None:
            alive.remove(self.backend)
            self.inner.__exit__(*error)  # type: ignore[arg-type]

    monkeypatch.setattr(latency, "_model", Crowded)
    result = latency.run(tiny_settings(tiny, batches=(2,), rounds=1), ["blocked", "reference"])
    assert not result["settings"]["alternating"]
    assert all(len(one["total_s_samples"]) == 1 for one in result["cells"][0]["results"].values())
    assert "one after the other" in latency.remarks(result)[0]


def test_the_shape_that_ships_is_llama_2_7b() -> None:
    spec = parse_config(read_config(latency.shape()), "shape")
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (32, 4096, 32, 32, 128)


def test_refusals(tiny: Path) -> None:
    for values in ({"batches": ()}, {"batches": (0,)}, {"sequence": 0}, {"rounds": 0}, {"new": 0}):
        with pytest.raises(InvalidArgument):
            tiny_settings(tiny, **values)
    with pytest.raises(InvalidArgument, match="attention_backend"):
        latency.run(tiny_settings(tiny), ["v3"])
    with pytest.raises(KernelRefused):
        latency.run(tiny_settings(tiny), ["sm90"])
