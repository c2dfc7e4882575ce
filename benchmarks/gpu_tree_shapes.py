"""Width and depth of draft trees on a GPU: what drafting, verifying and sampling take by nodes, vocabulary and batch.

A wide tree of n nodes has n children of the root (one pass of the drafter), a deep one is a chain (n passes). The
target has Llama-3.1-8B's shape, the drafter the embedded drafter's, both with random weights and the same vocabulary.
Beside the times of a round stands what it would bring with the embedded pair's acceptance (--chances, by rank), and
where drafting alone takes longer than decoding the same tokens plainly.

    PYTHONPATH=src python3 -m benchmarks.gpu_tree_shapes --vocabularies 2048 32000 128256 152064 --out $OUT
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.models import TINY_SHAPE
from benchmarks.record import Record, parser, seconds
from benchmarks.trace import DATA
from ridgeline import LLM, SamplingParams
from ridgeline.core.request import Request
from ridgeline.core.step import Chunk, Sampling, StepPlan
from ridgeline.core.tree import MOST_NODES, ROOT, TokenTree
from ridgeline.models.checkpoint import embedded_model
from ridgeline.run.beams import DEEPEST
from ridgeline.run.prepare import sample_inputs
from ridgeline.speculate.acceptance import EDGES
from ridgeline.speculate.draft_model import Growth
from ridgeline.study.pictures import save, tree_shapes

GREEDY = SamplingParams(temperature=0.0)
MOST_ROWS = 512
"""Rows of logits in one step: as many as the engine's steps with trees have."""


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.vocabularies, options.batches, options.nodes = [256], [1, 2], [1, 4]
        options.rounds, options.context = 2, 16
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", rounds=9)
    result.add_argument("--device", default="cuda")
    result.add_argument("--kernels", default="auto")
    result.add_argument("--dtype", default="bfloat16")
    result.add_argument("--vocabularies", type=int, nargs="+", default=[2048, 32000, 128256, 152064])
    result.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    result.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    result.add_argument("--context", type=int, default=640)
    result.add_argument("--chances", type=float, nargs="+", default=[0.75, 0.12, 0.04, 0.02],
                        help="of a drafted node under an accepted parent, by rank")  # fmt: skip
    result.add_argument("--plots", type=Path, help="folder for pictures")
    return result


@dataclass(frozen=True)
class Shape:
    """One tree's times in seconds, medians. tokens: that a round is expected to bring a request."""

    batch: int
    nodes: int
    deep: bool
    draft_s: float
    verify_s: float
    sample_s: float
    tokens: float

    @property
    def round_s(self) -> float:
        return self.draft_s + self.verify_s

    @property
    def rate(self) -> float:
        return self.batch * self.tokens / self.round_s


def measure(options: argparse.Namespace) -> Record:
    record = Record("gpu-tree-shapes", options)
    target = json.loads((DATA / "llama-3.1-8b.config.json").read_text(encoding="utf-8"))
    drafter = json.loads((embedded_model("ssm") / "config.json").read_text(encoding="utf-8"))
    if options.quick:
        target.update(TINY_SHAPE)
        drafter.update({**TINY_SHAPE, "num_hidden_layers": 1})
    record.settings = {
        "target": "Llama-3.1-8B's shape, random weights",
        "drafter": "the embedded drafter's shape, random weights",
        "dtype": options.dtype,
        "context": options.context,
        "rounds": options.rounds,
        "chances_by_rank": options.chances,
    }
    for vocabulary in options.vocabularies:
        with tempfile.TemporaryDirectory(prefix="ridgeline-shapes-") as folder:
            places = []
            for name, values in (("target", target), ("drafter", drafter)):
                place = Path(folder) / name
                place.mkdir()
                values = {**values, "vocab_size": vocabulary, "eos_token_id": 0, "bos_token_id": 0}
                (place / "config.json").write_text(json.dumps(values), encoding="utf-8")
                places.append(str(place))
            llm = LLM(
                places[0],
                load_format="dummy",
                dtype=options.dtype,
                device=options.device,
                kernels=options.kernels,
                max_model_len=min(2048, int(drafter["max_position_embeddings"])),
                max_num_seqs=max(options.batches),
                speculative_config={"method": "tree", "model": places[1]},
                seed=0,
            )
        with llm:
            with_vocabulary(record, llm, vocabulary)
    return record


def with_vocabulary(record: Record, llm: LLM, vocabulary: int) -> None:
    """All shapes at one vocabulary, with their table and picture."""
    options = record.options
    lab = Lab(llm, options.context, options.rounds)
    shapes: list[Shape] = []
    plain: dict[int, float] = {}
    for batch in options.batches:
        plain[batch] = lab.verify(batch, None)
        for deep in (False, True):
            for nodes in options.nodes:
                if batch * (nodes + 1) <= max(MOST_ROWS, 2 * batch) and nodes <= min(MOST_NODES, vocabulary // 2):
                    shapes.append(lab.shape(batch, nodes, deep, options.chances))
    title = f"vocabulary {vocabulary}"
    record.observe(title)
    record.summary[title] = {
        "plain_s": plain,
        "shapes": [{**vars(one), "round_s": one.round_s, "tokens_per_s": one.rate} for one in shapes],
        "drafting_takes_longer_than_decoding": longer(shapes, plain),
    }
    record.timings[title] = {name: seconds(times) for name, times in lab.raw.items()}
    record.table(
        f"Vocabulary {vocabulary}, ms; plain steps " + ", ".join(f"{1e3 * one:.2f} at {n}" for n, one in plain.items()),
        ["batch", "shape", "nodes", "draft", "verify", "sample", "tokens", "tok/s", "÷ plain"],
        [
            [
                str(one.batch),
                "deep" if one.deep else "wide",
                str(one.nodes),
                *(f"{1e3 * value:.3f}" for value in (one.draft_s, one.verify_s, one.sample_s)),
                f"{one.tokens:.2f}",
                f"{one.rate:.0f}",
                f"{one.rate * plain[one.batch] / one.batch:.2f}",
            ]
            for one in shapes
        ],
    )
    if options.plots is not None:
        curves = {
            batch: {
                "wide" if deep else "deep": [one for one in shapes if one.batch == batch and one.deep != deep]
                for deep in (True, False)
            }
            for batch in options.batches
        }
        save(tree_shapes(curves, plain, title), options.plots / f"tree-shapes-{vocabulary}.png")


def longer(shapes: Sequence[Shape], plain: dict[int, float]) -> dict[str, int | None]:
    """By batch and shape, the fewest nodes whose drafting takes longer than decoding plainly what the round brings."""
    found: dict[str, int | None] = {}
    for one in shapes:
        name = f"{'deep' if one.deep else 'wide'}, batch {one.batch}"
        found.setdefault(name, None)
        if found[name] is None and one.draft_s > one.tokens * plain[one.batch]:
            found[name] = one.nodes
    return found


class Lab:
    """Steps and drafts of given shapes on blocks that nobody owns, timed on an idle engine."""

    def __init__(self, llm: LLM, context: int, rounds: int) -> None:
        built = llm.built
        assert built.speculator is not None
        self.runner, self.model, self.rounds = built.runner, built.speculator.models[0], rounds
        self.vocabulary, self.device = built.spec.vocabulary, self.runner.device
        self.context = min(context, built.config.max_model_len - MOST_NODES - 2)
        size = built.config.block_size
        each = -(-(self.context + MOST_NODES + 2) // size)
        several = max(1, built.config.num_blocks // each)
        self.tables = [list(range(place * each, (place + 1) * each)) for place in range(several)]
        self.raw: dict[str, list[float]] = {}

    def shape(self, batch: int, nodes: int, deep: bool, chances: Sequence[float]) -> Shape:
        tree = TokenTree.chain(range(1, nodes + 1)) if deep else TokenTree(range(1, nodes + 1), [ROOT] * nodes)
        if deep:
            tokens = 1 + sum(chances[0] ** depth for depth in range(1, nodes + 1))
        else:
            tokens = 1 + sum(chances[:nodes])
        name = f"batch {batch}, {'deep' if deep else 'wide'}, {nodes} nodes"
        draft_s = self.timed(f"{name}, draft", lambda: self.draft(batch, nodes, deep))
        return Shape(batch, nodes, deep, draft_s, self.verify(batch, tree), self.sample(batch, nodes, name), tokens)

    def timed(self, name: str, work: Callable[[], Any]) -> float:
        times = []
        for number in range(self.rounds + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            if number:
                times.append(time.perf_counter() - start)
        self.raw[name] = times
        return median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def verify(self, batch: int, tree: TokenTree | None) -> float:
        """The target's step, from a plan to tokens on the host."""
        depths = () if tree is None else tree.depths
        chunks = []
        for place in range(batch):
            behind = [self._sampling(self.context + 1 + depth) for depth in depths]
            blocks = self.tables[place % len(self.tables)]
            own = self._sampling(self.context + 1)
            chunks.append(Chunk(f"shape/{place}", [0], self.context, blocks, own, tree=tree, behind=behind))
        plan = StepPlan(0, tuple(chunks))
        shape = "plain" if tree is None else f"{'deep' if tree.depth > 1 else 'wide'}, {len(tree)} nodes"
        return self.timed(f"batch {batch}, {shape}, verify", lambda: self.runner.run(plan))

    def draft(self, batch: int, nodes: int, deep: bool) -> None:
        """The drafter's passes for such trees: on the device where it can draft them so, else level by level."""
        growths = []
        for place in range(batch):
            request = Request(f"shape/{place}", [0] * (self.context + 1), 1, GREEDY, 1)
            blocks = self.tables[place % len(self.tables)]
            self.model.caught_up(request, blocks)
            growths.append(Growth(request, blocks, nodes))
        widths = (1,) * nodes if deep else (nodes,)
        beams = self.model.beams
        if beams is not None and len(widths) <= DEEPEST and widths[0] <= beams.children:
            odds = [[0.5] * (len(EDGES) + 1)] * beams.children
            if self.model.levels(growths, widths, odds) is not None:
                widths = ()
        for _ in widths:
            for growth, proposed in zip(growths, self.model.propose(growths, 1 if deep else nodes)):
                extend(growth, proposed[0].tokens)
        for growth in growths:
            self.model.forget(growth.request.request_id)

    def sample(self, batch: int, nodes: int, name: str) -> float:
        """Choosing a token in every row of such a step's logits, with noise."""
        rows = batch * (nodes + 1)
        warm = SamplingParams(temperature=0.8, seed=1)
        inputs = sample_inputs([Sampling(warm, 1, row, [0], 1) for row in range(rows)], self.device)
        logits = torch.randn(rows, self.vocabulary, device=self.device).to(self.model.model.store.dtype)
        ops = self.runner.table.ops("tree")
        settings = (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.seeds, inputs.positions)
        return self.timed(f"{name}, sample", lambda: ops.sample(logits, *settings, inputs.greedy, inputs.cut))

    def _sampling(self, position: int) -> Sampling:
        return Sampling(GREEDY, 0, position, [0], 1)


def extend(growth: Growth, tokens: Sequence[int]) -> None:
    """What was proposed behind the last node that was computed; its best is computed next."""
    parent = growth.at[0]
    score = 1.0 if parent == ROOT else growth.sketch.scores[parent]
    added = [growth.sketch.add(token, parent, score * 0.99 ** (1 + rank)) for rank, token in enumerate(tokens)]
    growth.at = added[:1]


if __name__ == "__main__":
    main()
