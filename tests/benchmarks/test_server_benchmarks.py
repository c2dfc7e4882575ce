"""The server's benchmarks: what they count, how they judge, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pester, server_cpu, server_soak
from benchmarks.serving import cpu_s, resident_bytes, slope, total


def test_slope_is_not_moved_by_strays() -> None:
    points = [(float(at), 5.0 * at + 100) for at in range(60)]
    points[10], points[40] = (10.0, 9e9), (40.0, -9e9)
    assert slope(points) == pytest.approx(5.0)
    assert slope([(0.0, 1.0)]) == 0.0


def test_growth_is_judged_behind_the_warm_up() -> None:
    warming = [(float(at), 1e6 * min(at, 20)) for at in range(100)]
    growth, size = server_soak.grown(warming)
    assert (growth, size) == (0.0, 20e6)
    leaking = [(float(at), 1e8 + 1e6 * at) for at in range(100)]
    assert server_soak.grown(leaking)[0] == pytest.approx(79e6)


def test_counters_add_up_over_their_labels() -> None:
    metrics = {'a_total{reason="x"}': 2.0, 'a_total{reason="y"}': 3.0, "a_total_more": 7.0}
    assert total(metrics, "a_total") == 5.0


def test_this_process_uses_time_and_memory() -> None:
    import os

    assert cpu_s([os.getpid(), 1 << 30]) > 0
    size = resident_bytes(os.getpid())
    assert size is not None
    assert size > 1 << 20
    assert resident_bytes(1 << 30) is None


def test_every_second_pestering_request_lacks_room_and_the_others_are_wrong() -> None:
    sent = pester.refusals("m", 16)
    assert len(sent) == 12
    assert all(json.loads(body)["n"] == 16 for body, _ in sent[::2])
    with pytest.raises(ValueError):
        json.loads(sent[1][0])
    assert [headers["Content-Type"] for _, headers in sent[1::2]].count("text/plain") == 1


@pytest.mark.parametrize(
    ("status", "body", "end"),
    [
        (429, {"error": {"code": "server_overloaded"}}, server_soak.BUSY),
        (500, {"error": {"code": "engine_restarted"}}, server_soak.RESTARTED),
        (503, {"error": {"code": "starting"}}, server_soak.STARTING),
        (500, {"error": {"code": "internal_error"}}, "status 500"),
        (503, {"error": {"code": "shutting_down"}}, "status 503"),
        (502, {"detail": "x"}, "no error body"),
    ],
)
def test_ends_of_a_soak(status: int, body: dict[str, Any], end: str) -> None:
    assert server_soak.explained(status, json.dumps(body).encode())[0] == end


@pytest.mark.parametrize(
    ("count", "reason", "may_stop", "end"),
    [
        (8, "length", False, server_soak.WHOLE),
        (3, "stop", True, server_soak.WHOLE),
        (3, "stop", False, "short"),
        (7, "length", True, "short"),
        (8, None, False, "short"),
    ],
)
def test_a_whole_answer(count: int, reason: str | None, may_stop: bool, end: str) -> None:
    assert server_soak.checked(count, reason, may_stop, 8)[0] == end


@pytest.mark.slow
def test_the_speed_lines_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    server_cpu.main(["--quick", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["targets"]) == 6
    assert all(one["met"] is not None for one in result["targets"])
    assert result["summary"]["many"]["ends"] == {"ok": 40}
    answers = result["summary"]["refused"]["answers"]
    assert answers["429"] > 0
    assert answers["400"] > answers["404"] > 0
    assert set(answers) <= {"200", "400", "404", "415", "429", "sent", "milliseconds"}


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    server_soak.main(["--quick", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [one["met"] for one in result["targets"][:5]] == [True] * 5
    summary = result["summary"]
    assert sum(summary["ends"].values()) == summary["sent"]
    assert set(summary["ends"]) <= set(server_soak.EXPECTED)
    assert summary["kills"] == summary["restarts"] == 1
