"""The rule by which a completion counts as Python: only an unfinished last statement may be cut."""

from __future__ import annotations

import pytest

from training.evaluate import completion_parses

PROMPT = 'def scale(values, factor):\n    """Multiply."""\n'


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    made = []\n    return made\n", 2),
        ("    made = []\n    return made\n\n\ndef other(x", 2),
        ("    made = []\n    for value in values:\n        made.append(value)\n    return [\n        made,\n", 3),
        ("    made = []\n    made += values\n    if made:\n", 2),
        ("    made = []\n    made += values\n    try:\n        made.sort()\n", 2),
        ('    made = []\n    made += values\n    text = """open\nstill (open\n', 2),
        ("    made = []\n    made += values\n\n\n@cached\n", 2),
        ("    # one\n    return values\n    bro", 2),
    ],
)
def test_an_unfinished_last_statement_is_cut(completion: str, kept: int) -> None:
    verdict = completion_parses(PROMPT, completion)
    assert (verdict.ok, verdict.kept_lines, verdict.reason) == (True, kept, "")


@pytest.mark.parametrize(
    "completion",
    [
        "    made = []\n    made += values\n    return made made\n    return 1\n",
        "    made = []\n    made += values\n      return made\n",
        "    made = []\n    made += values\n    return )\n",
        "    made = []\n    made += values\n    text = 'open\n",
        "    made = []\n    made += values\n    if made:\n    return made\n",
        "    made = []\n    made += values\n    (made,\n    x = = 1\n",
    ],
)
def test_an_error_is_never_cut_away(completion: str) -> None:
    verdict = completion_parses(PROMPT, completion)
    assert not verdict.ok
    assert verdict.reason == "syntax error"


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("", 0),
        ("    return values", 0),
        ("    return values\n", 1),
        ("    return values\n\n\ndef other(x):\n", 1),
        ("    return [\n        1,\n        2,\n", 0),
    ],
)
def test_fewer_than_two_lines_do_not_count(completion: str, kept: int) -> None:
    verdict = completion_parses(PROMPT, completion)
    assert (verdict.ok, verdict.kept_lines, verdict.reason) == (False, kept, "fewer than two lines")


def test_a_line_that_the_model_ended_is_complete() -> None:
    completion = "    made = list(values)\n    return made"
    assert not completion_parses(PROMPT, completion).ok
    assert completion_parses(PROMPT, completion, ended=True).kept_lines == 2
    assert not completion_parses(PROMPT, completion + " made", ended=True).ok
