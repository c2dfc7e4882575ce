"""What a further small model learns from: weights against their definitions, and that they do what they are for."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

from training import make
from training.boost import KINDS, WIDE, Kind, adaboost_weights, emphasis_of, missed, reaching, residual
from training.card import BEGIN, END, paying, second_section, with_second
from training.coverage import COVERED, NODES
from training.data import Packed
from training.distill import distillation_objective, endless_rows
from training.model import SSM, Llama, Sizes, parameter_count
from training.tokenizer import encode_files, save_tokenizer, train_tokenizer
from training.train import Recipe, train

CPU = torch.device("cpu")
TINY = Sizes(32, 16, 2, 1, 2, 48, vocab_size=300, max_position_embeddings=64)
TEXTS = [f"def name_{number}(x):\n    return x + {number}\n" for number in range(40)]
HERE = Path(make.__file__).parent


def logits(seed: int) -> torch.Tensor:
    return torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(seed))


def test_numbers_are_laid_out_without_loss() -> None:
    content = {
        "pairs": {"reports": [{"arms": {"a": {"trees": {"2": {"accepted": 1.5}}}}, "rows": 3}], "none": []},
        "x": None,
    }
    text = make.laid_out(content)
    assert json.loads(text) == content
    assert '"accepted": 1.5' in text
    assert max(map(len, text.splitlines())) < 80


def test_one_wide_model_costs_as_much_as_two() -> None:
    ratio = parameter_count(Llama(WIDE)) / (2 * parameter_count(Llama(SSM)))
    assert 0.99 <= ratio <= 1.0
    assert WIDE.num_hidden_layers == SSM.num_hidden_layers


@pytest.mark.parametrize("proposals", [1, 3])
def test_missed_is_what_no_earlier_model_proposes(proposals: int) -> None:
    teacher, earlier = logits(0), [logits(1), logits(2)]
    made = missed(teacher, earlier, proposals)
    for row, place in itertools.product(range(3), range(6)):
        known = {int(token) for one in earlier for token in one[row, place].argsort(descending=True)[:proposals]}
        assert made[row, place] == (int(teacher[row, place].argmax()) not in known)


def test_reaching_looks_ahead() -> None:
    positions = torch.tensor([[False, False, False, True, False], [False] * 4 + [True]])
    assert reaching(positions, 1).tolist() == positions.tolist()
    assert reaching(positions, 3).tolist() == [[False, True, True, True, False], [False, False, True, True, True]]


def test_missed_positions_weigh_as_much_as_all_others() -> None:
    wrong = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)) < 0.2
    weights = adaboost_weights(wrong)
    assert weights[wrong].sum().item() == pytest.approx(weights[~wrong].sum().item(), rel=1e-4)
    assert weights[~wrong].unique().tolist() == [1.0]
    assert adaboost_weights(torch.ones(2, 3, dtype=torch.bool)).unique().tolist() == [1.0]
    assert adaboost_weights(torch.zeros(2, 3, dtype=torch.bool)).unique().tolist() == [1.0]


def test_residual_is_the_target_without_what_is_proposed() -> None:
    teacher, tokens = logits(0), logits(1).topk(2).indices
    made, left = residual(teacher, tokens)
    rest = teacher.softmax(-1)
    for row, place in itertools.product(range(3), range(6)):
        rest[row, place, tokens[row, place]] = 0.0
    assert (left - rest.sum(-1)).abs().max() < 1e-6
    assert (made.softmax(-1) - rest / rest.sum(-1, keepdim=True)).abs().max() < 1e-6


def test_documents_are_drawn_with_replacement(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, TINY.vocab_size)
    encode_files(tokenizer, TEXTS, tmp_path / "texts")
    packed = Packed((tmp_path / "texts",), CPU)
    twin = packed.resampled(3)
    stream = twin.epoch(0)
    assert len(stream) == len(twin)
    assert int((stream == 0).sum()) == len(TEXTS)
    text = tokenizer.decode(stream.tolist())
    missing = sum(one not in text for one in TEXTS)
    assert 0.2 * len(TEXTS) < missing < 0.55 * len(TEXTS)
    assert len(packed) == len(packed.epoch(0)) == len(packed.tokens)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.rule != "all"])
def test_emphasis_weighs_positions_where_the_first_model_fails(name: str) -> None:
    torch.manual_seed(0)
    first = Llama(TINY)
    ids = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        for weight in first.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.2)
        teacher = copy.deepcopy(first)
        for weight in teacher.parameters():
            weight += 0.01 * torch.randn(weight.shape)
        wrong = missed(teacher(ids), [first(ids)], 1)
        assert 0 < wrong.sum() < wrong.numel() / 2
        emphasis = emphasis_of(KINDS[name], [first], CPU)
        assert emphasis is not None
        _, weights = emphasis(ids, teacher(ids))
        _, none = emphasis(ids, first(ids))  # the target is the first model: nothing is missed
    assert weights.shape == ids.shape
    assert weights.sum() > 0
    assert none.sum() < weights.sum()
    if KINDS[name].rule != "residual":
        assert (weights[wrong] > none[wrong]).all()
    assert emphasis_of(Kind("all"), [first], CPU) is None


def test_a_model_trained_on_what_was_missed_covers_it(tmp_path: Path) -> None:
    """A first model that knows nothing but one token, a second one trained by the filter: it learns the others."""
    encode_files(train_tokenizer(TEXTS, TINY.vocab_size), TEXTS, tmp_path / "texts")
    packed = Packed((tmp_path / "texts",), CPU)
    torch.manual_seed(0)
    teacher, second = Llama(TINY), Llama(TINY)
    with torch.no_grad():
        for weight in teacher.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
    rows = next(packed.batches(8, 32))[0]
    with torch.no_grad():
        common = int(teacher(rows).argmax(-1).flatten().mode().values)

    class Constant(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full_like(ids, common), 300).float()

    first = Constant()
    emphasis = emphasis_of(KINDS["filter"], [first], CPU)
    own = endless_rows(rows, 4)
    objective = distillation_objective(second, teacher, packed.batches(4, 32), own, CPU, emphasis)
    with torch.no_grad():
        wrong = missed(teacher(rows), [first(rows)], 1)
        before = missed(teacher(rows), [first(rows), second(rows)], 1)
    train(second, objective, Recipe(matrix_lr=0.02, other_lr=0.02, steps=30), lambda _: None)
    with torch.no_grad():
        after = missed(teacher(rows), [first(rows), second(rows)], 1)
    assert wrong.float().mean() > 0.3
    assert after.sum() < 0.8 * before.sum()


def report(gain: float) -> dict:
    tree = {"accepted": 2.0, "beside_first": [gain, gain, gain]}
    arm = {"covered": {str(count): 0.5 for count in COVERED}, "trees": {str(nodes): tree for nodes in NODES}}
    return {"texts": "HumanEval", "temperature": 0.8, "rows": 8, "continued_tokens": 4, "looping_rows": 1,
            "arms": {"SSM": arm, "SSM + boost, union": arm}}  # fmt: skip


def results(gain: float) -> dict:
    one = {"kind": {"start": "scratch"}, "steps": 9, "tokens_per_step": 8, "training_seconds": 1.0, "parameters": 7}
    cost = {"bytes": 14, "passes": 1}
    return {
        "second": {"boost": one, "wide": one},
        "pairs": {
            "reports": [report(gain)],
            "costs": {"SSM": cost, "SSM + boost": cost},
            "judged": {"SSM": 1.0, "wide": 1.3, "SSM + n-gram, union": 1.2, "SSM + boost, union": gain},
        },
    }


def test_a_second_model_ships_only_by_the_rule() -> None:
    """Neither a wide model nor n-grams count as a second small model."""
    assert paying(results(1.079)) is None
    assert paying(results(1.081)) == "boost"
    assert "No second model ships" in second_section(results(1.079))
    assert "`boost` ships" in second_section(results(1.081))
    assert "2.00, 1.079x" in second_section(results(1.079))


def test_the_readme_says_what_was_measured() -> None:
    readme = (HERE / "README.md").read_text()
    assert with_second(readme, json.loads((HERE / "results.json").read_text())) == readme
    other = with_second(readme, results(1.079))
    assert other != readme
    assert other.startswith(readme[: readme.index(BEGIN)])
    assert other.endswith(readme[readme.index(END) :])


@pytest.mark.slow
def test_stages_run_from_shipped_models_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole line on toys, the corpus aside: every kind trained, measured and kept; a kind that is there is left."""
    tokenizer = train_tokenizer(TEXTS, 300)
    work, assets, here = tmp_path / "work", tmp_path / "assets", tmp_path / "here"
    here.mkdir()
    toy = Sizes(32, 16, 2, 1, 2, 48, vocab_size=300, max_position_embeddings=128)
    monkeypatch.setattr(make, "TOY", toy)
    monkeypatch.setattr(make, "TOY_WIDE", toy)
    monkeypatch.setattr(make, "HERE", here)
    torch.manual_seed(0)
    for name in ("model", "ssm"):
        made = Llama(toy)
        with torch.no_grad():
            for weight in made.parameters():
                weight += 0.2 * torch.randn(weight.shape)
        make.write_model(made, assets / name)
        save_tokenizer(tokenizer, assets / name, 128)
    work.mkdir()
    for name in ("train", "functions", "bodies", "held_out"):
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    listing = {"packages": [], "files_kept": {}}
    for folder in (work, here):
        (folder / "corpus.json").write_text(json.dumps(listing))
    (here / "results.json").write_text(json.dumps({"ssm": {"steps": 3}, "target": {"kept": True}}))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"task_id": text, "prompt": text}) + "\n" for text in TEXTS[:6]))

    def run(*words: str) -> None:
        arguments = make.parse_arguments(
            [*words, "--work", str(work), "--assets", str(assets), "--prompts", str(prompts), "--toy", "--rows", "2",
             "--row-tokens", "64", "--continuation-seconds", "0", "--continued-rows", "4", "--second-seconds", "0.1",
             "--pair-rows", "6", "--pair-tokens", "12"]
        )  # fmt: skip
        for stage in arguments.stages:
            make.STAGES[stage](arguments)

    monkeypatch.setattr("training.distill.CONTINUED_ROW_TOKENS", 40)
    monkeypatch.setattr("training.distill.PREFIX_TOKENS", (8,))
    run("shipped", "encode", "continuations")
    run("second", "--kinds", "filter", "bag", "wide")
    run("second", "--kinds", "filter", "boost", "residual")
    assert "filter is there" in capsys.readouterr().out
    run("second", "--kinds", "filter", "--second-start", "first")
    beside: list[str] = []

    class Lane:
        """A process on another GPU, run here and now."""

        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            beside.append(env["CUDA_VISIBLE_DEVICES"])
            parsed = make.parse_arguments(command[3:])
            assert parsed.work.name == beside[-1]
            make.make_second(parsed)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(make.subprocess, "Popen", Lane)
    gone = json.loads((work / "results.json").read_text())
    gone["second"] = {label: one for label, one in gone["second"].items() if label not in ("bag", "wide", "residual")}
    (work / "results.json").write_text(json.dumps(gone))
    steps = gone["second"]["filter"]["steps"]
    run("second", "--gpus", "2", "5", "--second-steps", str(steps))
    assert beside == ["2", "5"]
    with pytest.raises(SystemExit):
        make.parse_arguments(["second", "--gpus", "0", "1"])
    run("pairs", "keep")
    kept = json.loads((here / "results.json").read_text())
    assert kept["target"] == {"kept": True}
    assert kept["second_corpus"]["same_as_shipped"] is True
    assert list(kept["second"]) == ["filter", "boost", "filter-tuned", "residual", "wide", "bag"]
    assert {one["steps"] for one in kept["second"].values()} <= {1, 2, 3}
    assert len({one["steps"] for one in kept["second"].values()}) == 1
    judged = kept["pairs"]["judged"]
    assert {"wide", "SSM + bag, voting", "SSM + filter-tuned, stacking", "SSM + n-gram, union"} <= set(judged)
    assert len(kept["pairs"]["reports"]) == 4
    assert (assets / "second").exists() == (paying(kept) is not None)
    section = second_section(kept)
    assert section.count("**") == 8
    assert "| SSM + boost, weighting |" in section
