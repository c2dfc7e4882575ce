"""The Grafana dashboard asks for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ridgeline.server.settings import ServerSettings
from ridgeline.server.state import State

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "ridgeline.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"


def served_names() -> set[str]:
    """Names of samples and of metrics, with and without what the exposition format appends."""
    text = State(ServerSettings()).metrics.text().decode()
    return set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))


def test_every_expression_is_of_metrics_that_are_served() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    names = served_names()
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(expressions) > 25
    for expression in expressions:
        asked = re.findall(r"\b(?:vllm|ridgeline):\w+", expression)
        assert asked, expression
        for name in asked:
            assert name.removesuffix("_bucket") in names, name
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_table_of_metrics_is_complete_and_true() -> None:
    """Every served metric stands in docs/serving.md, and none that is not served."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Metrics", 1)[1].split("\n## ", 1)[0]
    told = {name.removesuffix("_total") for name in re.findall(r"`((?:vllm|ridgeline):\w+)", section)}
    served = {name.removesuffix("_total") for name in served_names() if not name.endswith("_created")}
    assert told == served
