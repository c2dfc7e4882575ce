"""What is said of token trees: hand-made rounds against counts made by hand, sums against the requests' own
metrics, and pictures with a box for every token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ridgeline import LLM, SamplingParams
from ridgeline.cli import options
from ridgeline.cli.main import application
from ridgeline.core.errors import InvalidArgument
from ridgeline.core.request import CompletionOutput, RequestMetrics, RequestOutput
from ridgeline.core.speculation import Speculation
from ridgeline.core.step import StepRecord
from ridgeline.core.tree import TokenTree
from ridgeline.perf.limit import LimitCurve
from ridgeline.speculate.speculator import Round
from ridgeline.speculate.tree_size import Sizes
from ridgeline.study import explain as explaining
from ridgeline.study import pictures
from ridgeline.study.speculation import (
    SPACES,
    HeardStep,
    Recorder,
    Report,
    drafters,
    readable,
    reasons,
    report,
    speculated,
)
from ridgeline.study.tree_picture import token_tree

PAYS = Sizes(3, 4, 1500.0, 1000.0, 4e-5, 3e-4)
PROBE = Sizes(1, 1, 1000.0, 1000.0, 0.0, 0.0)
TREE = Speculation("tree")


def a_round(
    tree: TokenTree,
    accepted: list[int],
    own: int,
    before: int,
    name: str = "0",
    ranks: list[int] | None = None,
    sources: list[int] | None = None,
    sizes: Sizes = PAYS,
    cut: dict[tuple[int, int], int] | None = None,
) -> Round:
    tokens = [tree.tokens[node] for node in accepted] + [own]
    flat = [0] * len(tree)
    chances = [0.5] * len(tree)
    return Round(
        name, tree, ranks or flat, chances, sources or flat, accepted, tokens, sizes, 1e-3, 2e-3, 1, before, cut or {}
    )


def an_output(prompt: list[int], tokens: list[int], steps: int, name: str = "0") -> RequestOutput:
    metrics = RequestMetrics(0.0, 0.0, 0.1, 0.2, len(prompt), 0, len(tokens), 0, steps)
    return RequestOutput(name, "text", prompt, [CompletionOutput(0, "", tokens)], True, metrics=metrics)


def two_rounds() -> Report:
    """Five tokens: one of the prompt's step, three of a tree, one of a second whose other nodes lie behind the end."""
    #  ROOT ─ 10 ─ 11 ─ 12     (ranks 0 0 0)
    #        └ 20 ─ 21         (rank 1, then 0)
    first = a_round(
        TokenTree([10, 11, 12, 20, 21], [-1, 0, 1, -1, 3]), [3, 4], 99, 4, ranks=[0, 0, 0, 1, 0],
        sources=[0, 0, 1, 1, 1], cut={(4, 99): 2},
    )  # fmt: skip
    second = a_round(TokenTree([30, 31], [-1, 0]), [0, 1], 32, 7)
    outputs = [an_output([1, 2, 3], [5, 20, 21, 99, 30], 3)]
    return report(TREE, ("a", "b"), [(first, 1.5e-3), (second, None)], [], outputs)


def test_counts_by_depth_rank_and_drafter() -> None:
    found = two_rounds().requests[0]
    assert (found.drafted, found.accepted, found.past_end) == (7, 3, 1)
    assert found.tokens_per_step == pytest.approx(5 / 3)
    counts = found.acceptance
    shown = {
        name: {key: (one.drafted, one.tried, one.accepted) for key, one in getattr(counts, name).items()}
        for name in ("by_depth", "by_rank", "by_both", "by_source")
    }
    assert shown["by_depth"] == {1: (3, 3, 2), 2: (3, 2, 2), 3: (1, 0, 0)}
    assert shown["by_rank"] == {0: (6, 4, 3), 1: (1, 1, 1)}
    assert shown["by_both"] == {(1, 0): (2, 2, 1), (1, 1): (1, 1, 1), (2, 0): (3, 2, 2), (3, 0): (1, 0, 0)}
    assert shown["by_source"] == {0: (4, 3, 2), 1: (3, 2, 2)}
    assert counts.by_depth[3].rate is None
    assert counts.by_rank[0].rate == 0.75


def test_seconds_and_what_they_saved() -> None:
    found = two_rounds().requests[0]
    first, second = found.verified
    assert first.saved_s == pytest.approx(3 * 1.5e-3 - 3e-3)
    assert second.saved_s is None  # its step also held a prompt
    assert (second.tokens, second.accepted) == (1, 1)
    assert found.saved_s == pytest.approx(first.saved_s)
    assert (found.draft_s, found.step_s) == (pytest.approx(2e-3), pytest.approx(4e-3))


def test_how_paths_end() -> None:
    found = two_rounds().requests[0]
    assert [one.ending for one in found.verified] == ["cut", "end"]
    assert found.cut_ranks == {2: 1}
    tree = TokenTree([10, 11], [-1, 0])
    rounds = [(a_round(tree, accepted, 99, 4), 1e-3) for accepted in ([], [0], [0, 1])]
    found = report(TREE, ("a",), rounds, [], [an_output([1, 2, 3], [9] * 20, 9)]).requests[0]
    assert [one.ending for one in found.verified] == ["unknown", "unknown", "leaf"]
    assert found.endings == {"leaf": 1, "cut": 0, "unknown": 2, "end": 0}


def test_reasons_in_words() -> None:
    tree = TokenTree([10], [-1])
    weighed = report(
        TREE, ("a",), [(a_round(tree, [], 9, 4), 1e-3), (a_round(tree, [], 9, 5, sizes=PROBE), 1e-3)], [],
        [an_output([1, 2, 3], [9] * 9, 9)],
    ).requests[0]  # fmt: skip
    said = weighed.reasons
    assert said[0].startswith("1,500 tokens/s were expected with trees and 1,000 without (1.50x, means of 1 round)")
    assert "depth 3 and 4 nodes a request" in said[1]
    assert "40 µs of a step, for which a chance of 6.0% pays" in said[2]  # 1,500 tokens/s for 40 µs
    assert "40 µs" in said[2]
    assert "less than 51% chance was not drafted further" in said[3]
    assert said[4].startswith("1 round tried one node in order to learn")
    assert reasons([], TREE) == ("no tree was verified",)
    fixed = Speculation.of({"method": "tree", "tree": [3, 2]})
    assert reasons(weighed.verified, fixed) == (
        "the shape was prescribed, <3, 2> children by depth: nothing was weighed",
    )
    capped = Speculation.of({"method": "tree", "num_speculative_tokens": 8})
    assert reasons(weighed.verified, capped) == ("at most 8 nodes were prescribed: nothing was weighed",)


def a_step(
    kind: str, sizes: Sizes | None, drafted: int = 0, accepted: int = 0, plain: float | None = 1e-3
) -> HeardStep:
    record = StepRecord(
        0, kind, ((1 + drafted, 9),), 1, 0, 9, 0, 0.0, 1e-4, 2e-3, sampled=1, drafted=drafted, accepted=accepted,
        draft_s=5e-4,
    )  # fmt: skip
    return HeardStep(record, plain, sizes)


def test_the_workload_as_a_whole() -> None:
    none_pays = Sizes(0, 0, 1000.0, 1000.0, 0.0, 0.0)
    steps = (
        a_step("prefill", None),
        a_step("tree", PAYS, 4, 3),
        a_step("tree", PAYS, 4, 1, plain=None),
        a_step("decode", PAYS),
        a_step("decode", none_pays),
        a_step("decode", None),
    )
    found = Report(TREE, ("a",), (), steps)
    assert found.without == {"none pays": 1, "nothing likely": 1, "no room": 1}
    assert found.by_kind["tree"] == (2, pytest.approx(2 * 2.1e-3), pytest.approx(1e-3))
    assert found.saved_s == pytest.approx(-5e-4 + (4e-3 - 2.6e-3) - 3 * 5e-4)
    assert found.reasons[0] == f"steps with trees gave {6 / 5.2e-3:,.0f} tokens/s where the sizer expected 1,500"
    with pytest.raises(InvalidArgument, match=r"no tree to draw.*prescribe one"):
        found.tree()


def test_the_tree_to_look_at() -> None:
    found = two_rounds()
    assert found.tree()[1].number == 1  # both have two accepted nodes, the first is the larger
    assert found.tree(2)[1].number == 2
    with pytest.raises(InvalidArgument, match=r"round: must be in \[1, 2\].*not 3"):
        found.tree(3)


def test_readable() -> None:
    assert readable(" x\n\t") == "·x↵⇥"
    assert readable("\n" + " " * 12 + "def", 16) == "↵·¹²def"
    assert readable("a\x00b") == "a\\x00b"
    assert readable("internationalization", 11) == "intern…tion"


@given(st.text(max_size=60), st.integers(8, 30))
def test_readable_is_short_and_printable(text: str, longest: int) -> None:
    shown = readable(text, longest)
    assert len(shown) <= longest
    assert all(char.isprintable() and char not in SPACES for char in shown)


# Pictures


def drawn(
    tree: TokenTree, path: list[int], texts: dict[int, str], folder: Path, names: tuple[str, ...] = ("a",)
) -> Any:
    """(figure, boxes by name) of a tree as an SVG file."""
    one = a_round(tree, path, 999, 3, sources=[node % len(names) for node in range(len(tree))])
    found = report(TREE, names, [(one, 1e-3)], [], [an_output([1, 2, 3], [9] * 99, 9)])
    request, verified = found.tree()
    figure = token_tree(request, verified, lambda token: texts.get(token, f"t{token}"), names)
    pictures.save(figure, folder / "tree.svg")
    root = ElementTree.parse(folder / "tree.svg").getroot()
    return figure, [
        one.get("id") for one in root.iter() if (one.get("id") or "").split("-")[0] in ("node", "own", "root")
    ]


@pytest.mark.parametrize("nodes", [1, 7, 64])
def test_a_box_for_every_token(nodes: int, tmp_path: Path) -> None:
    parents: list[int] = []
    path: list[int] = []
    for node in range(nodes):  # depth first, up and down
        path = path[: node * 5 % (len(path) + 1)] if node % 3 == 0 else path
        parents.append(path[-1] if path else -1)
        path = [*path, node]
    tree = TokenTree(range(100, 100 + nodes), parents)
    path = tree.path(min(nodes - 1, 2))
    figure, boxes = drawn(tree, path, {}, tmp_path)
    assert sorted(boxes) == sorted(["own", "root", *(f"node-{node}" for node in range(nodes))])
    shown = [one.get_text() for one in figure.axes[0].texts]
    assert all(f"t{token}" in shown for token in tree.tokens)
    assert shown.count("50%") == nodes
    width, height = figure.get_size_inches()
    for text in figure.axes[0].texts:
        assert 0 <= text.get_position()[0] <= width
        assert 0 <= text.get_position()[1] <= height


def test_any_text_can_be_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Formulas, controls, letters that the font lacks, comments that would end early in XML."""
    texts = {1: "$x$", 2: "\x00\x1b", 3: "中文", 4: "--> <b> & ]]>", 5: " " * 40 + "x", 6: "\ud800", 7: "_" * 99}
    tree = TokenTree.chain(list(texts))
    figure, boxes = drawn(tree, [0, 1], texts, tmp_path, ("/models/big", "n-grams"))
    assert len(boxes) == len(texts) + 2
    shown = [one.get_text() for one in figure.axes[0].texts]
    assert {"$x$", "\\x00\\x1b", "\\u4e2d\\u6587", "·⁴⁰x", "by big", "by n-grams"} <= set(shown)
    assert not [one for one in recwarn if "lyph" in str(one.message)]


# The command


@pytest.fixture
def slow_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = LimitCurve("cpu", ((1 << 15, 1e13),), 1e15)
    monkeypatch.setattr(explaining, "measure_curve", lambda device, dtype, own: slow)


@pytest.mark.parametrize(
    "config",
    [{"method": "tree", "tree": [3, 2, 1]}, {"method": "tree"}, {"method": "draft_model"}, {"method": "ngram"}],
    ids=["widths", "tree", "draft_model", "ngram"],
)
def test_sums_agree_with_the_metrics_of_requests(config: dict[str, Any]) -> None:
    """Two requests at a time, one of which ends early by a token that is made to end it."""
    prompts = ["def add(a, b):\n    return a", "x = [1, 2, 3, 1, 2, 3, 1, 2, 3"]
    with LLM(max_num_seqs=2, max_model_len=128, enable_prefix_caching=False, speculative_config=config) as llm:
        newline = llm.intake.prompt_ids("\n")[1][-1]
        params = [
            SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[newline]),
            SamplingParams(temperature=0.8, seed=3, max_tokens=24),
        ]
        with Recorder(llm.built) as heard:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.built.speculator is not None
        assert not llm.built.speculator.listeners
        assert not llm.built.engine.listeners
        speculation = llm.built.speculator.speculation
    found = report(speculation, drafters(speculation), heard.rounds, heard.steps, outputs)
    for request, output in zip(found.requests, outputs):
        metrics = output.metrics
        assert metrics is not None
        assert request.drafted == metrics.num_draft_tokens
        assert request.accepted == metrics.num_accepted_tokens
        assert sum(one.tokens for one in request.verified) + metrics.num_steps - len(request.verified) == len(
            output.outputs[0].token_ids
        )
        counts = request.acceptance
        for table in (counts.by_depth, counts.by_rank, counts.by_both, counts.by_source):
            assert sum(one.drafted for one in table.values()) == request.drafted
            assert sum(one.accepted for one in table.values()) == request.accepted + request.past_end
        known = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        for one in request.verified:
            assert known[one.round.before : one.round.before + one.tokens] == list(one.round.tokens[: one.tokens])
            assert one.cut_rank is None or one.cut_rank >= 0
    if "tree" in config:
        assert found.verified
    assert sum(one.record.drafted for one in found.steps) == sum(one.drafted for one in found.requests)


def test_two_runs_side_by_side() -> None:
    with LLM(max_num_seqs=1, max_model_len=64, speculative_config={"method": "tree", "tree": [2, 1]}) as llm:
        found = speculated(llm, ["def add(a, b):"], SamplingParams(temperature=0, max_tokens=12), rounds=1)
        assert llm.built.engine.speculator is llm.built.speculator
    request = found.requests[0]
    assert request.same_tokens
    assert request.decode_s is not None
    assert request.plain_decode_s is not None
    assert request.measured_saved_s == pytest.approx(request.plain_decode_s - request.decode_s)
    assert found.drafters == ("the embedded drafter",)


@pytest.mark.usefixtures("slow_limit")
def test_command(tmp_path: Path) -> None:
    common = ["explain", "--prompt", "def add(a, b):\n", "--max-tokens", "12", "--rounds", "1"]
    config = ["--speculative-config", '{"method": "tree", "tree": [3, 2, 1]}']
    picture = tmp_path / "tree.svg"
    arguments = [*common, *config, "--plot", str(picture), "--json"]
    found = json.loads(CliRunner().invoke(application, arguments, catch_exceptions=False).stdout)
    trees = found["speculation"]
    assert {"method", "drafters", "steps", "steps_without_trees", "acceptance", "reasons", "requests"} <= set(trees)
    request = trees["requests"][0]
    assert request["num_generated_tokens"] <= 12
    assert request["num_draft_tokens"] == sum(one["drafted"] for one in request["acceptance"]["by_depth"])
    assert request["num_rounds"] == len(request["rounds"]) == sum(request["endings"].values())
    assert request["reasons"] == ["the shape was prescribed, <3, 2, 1> children by depth: nothing was weighed"]
    step = next(one for one in found["steps"] if one["kind"] == "tree")
    parts = ("floor_s", "kernels_s", "gaps_s", "host_s", "draft_s")
    assert sum(step[name] for name in parts) == pytest.approx(step["step_s"])
    assert step["draft_s"] > 0
    assert step["drafted_per_step"] == pytest.approx(step["tokens_per_step"] - 1)
    ElementTree.parse(picture)


@pytest.mark.usefixtures("slow_limit")
def test_command_on_a_terminal() -> None:
    arguments = ["explain", "--prompt", "def add(a, b):\n", "--output-len", "12", "--rounds", "1"]
    config = ["--speculative-config", '{"method": "tree", "tree": [3, 1]}']
    runner = CliRunner(env={"COLUMNS": "160"})
    shown = " ".join(runner.invoke(application, [*arguments, *config], catch_exceptions=False).stdout.split())
    for part in ("a tree step of", "drafting", "accepted of tried", "the embedded drafter proposed"):
        assert part in shown


def test_what_trees_did_stands_without_the_limit_of_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    low = LimitCurve("cpu", ((1 << 15, 1e6),), 1e6)  # nothing is as slow as that: all ops come out above it
    monkeypatch.setattr(explaining, "measure_curve", lambda device, dtype, own: low)
    arguments = ["explain", "--prompt", "x = 1", "--max-tokens", "8", "--rounds", "1", "--json"]
    config = ["--speculative-config", '{"method": "tree", "tree": [2]}']
    found = json.loads(CliRunner().invoke(application, [*arguments, *config], catch_exceptions=False).stdout)
    assert found["steps"] == []
    assert "above what this machine can do" in found["steps_refused"]
    assert found["speculation"]["requests"][0]["num_rounds"] > 0
    with pytest.raises(explaining.MeasurementError):
        CliRunner().invoke(application, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculative-config", "tree", "--prompt-len", "9"], "prompt_len: goes with random prompts"),
        (["--temperature", "1"], "temperature: goes with --prompt"),
        (["--round", "1"], "round: goes with --speculative-config and --plot"),
        (["--speculative-config", "trees"], "speculative_config: must be tree, draft_model, ngram or a JSON object"),
        (["--speculative-config", "[1]"], "speculative_config: must be tree"),
    ],
)
def test_refused_at_once(arguments: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        CliRunner().invoke(application, ["explain", *arguments], catch_exceptions=False)


def test_the_option() -> None:
    assert options.speculation(None) is None
    assert options.speculation("ngram") == {"method": "ngram"}
    assert options.speculation('{"method": "tree", "tree": [2]}') == {"method": "tree", "tree": [2]}
