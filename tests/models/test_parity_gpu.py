"""Every family on a GPU in bf16: as near to Transformers' fp32 as Transformers' own bf16 is, and its greedy tokens.

Mixtures are held to the same rule at every position. Where two experts are nearly even, rounding decides which
one a token goes to, and the logits jump: for Transformers' bf16 as for ours, but at other tokens. So the
fp32 model is run on the route that the rounded one took; what is left is rounding, as in a dense model. The
route itself is judged apart: where it is not the fp32 model's own, the probabilities must be as near to
even as rounding explains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checkpoints import CASES, Made, prompts
from forward import sequence_logits, steps_of
from routes import Route, Routed, by_sequence, heard, shortfall, watched

from ridgeline import LLM, SamplingParams
from ridgeline.core.step import StepPlan
from ridgeline.run.runner import Runner

KERNELS = pytest.importorskip("ridgeline.kernels.triton.moe")
pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OUTPUT = 64
MIXTURES = ("mixtral", "qwen3_moe")
SLACK = 0.02
"""Beyond twice the error of Transformers' bf16: one rounding of a logit of this size."""


@dataclass(frozen=True)
class Distance:
    """How far a bf16 model is from the fp32 one on the bf16 one's own route, at the worst position.

    logits: their largest difference. short: how far an expert that was taken lies behind one that was not, in
    fp32 probabilities. routers: the largest difference of a probability (0 where it was not looked at).
    """

    logits: float
    short: float
    routers: float = 0.0

    def check(self, theirs: Distance, told: str) -> None:
        """At most twice Transformers' error. Probabilities off by e swap experts that are at most 2 e apart."""
        print(f"{told}: ours {self}, Transformers' {theirs}")
        assert self.logits <= 2 * theirs.logits + SLACK
        assert self.short <= 4 * theirs.routers


def error_of(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have.float() - want).abs().max())


@torch.inference_mode()
def run(model: Any, tokens: list[int], route: Route | None = None) -> tuple[torch.Tensor, Routed]:
    """Transformers' logits, and what its routers said."""
    with watched(model, route) as routed:
        return model(input_ids=torch.tensor([tokens], device=DEVICE), use_cache=False).logits[0].float(), routed


def of_transformers(rounded: Any, exact: Any, sequences: list[list[int]]) -> Distance:
    logits, short, routers = 0.0, 0.0, 0.0
    for tokens in sequences:
        have, said = run(rounded, tokens)
        want, routed = run(exact, tokens, said.experts)
        logits, short = max(logits, error_of(have, want)), max(short, shortfall(routed))
        routers = max([routers, *map(error_of, said.probabilities, routed.probabilities)])
    return Distance(logits, short, routers)


def on_route(exact: Any, sequences: list[list[int]], routes: list[Route]) -> tuple[list[torch.Tensor], float]:
    """The fp32 model's logits of sequences on given routes, and the largest shortfall."""
    said = [run(exact, tokens, route) for tokens, route in zip(sequences, routes)]
    return [logits for logits, _ in said], max(shortfall(routed) for _, routed in said)


def of_ours(runner: Runner, exact: Any, sequences: list[list[int]], chunk: int | None = None) -> Distance:
    with heard(KERNELS) as calls:
        ours = sequence_logits(runner, sequences, chunk)
    steps = [[(i, last - first) for i, first, last in step] for step in steps_of(list(map(len, sequences)), chunk)]
    wanted, short = on_route(exact, sequences, by_sequence(calls, steps, len(sequences)))
    return Distance(max(map(error_of, ours, wanted)), short)


def generate(llm: LLM, asked: list[list[int]]) -> tuple[list[list[int]], list[Route]]:
    """Greedy tokens of prompts in one batch, and the routes that every token but the last one took."""
    steps: list[list[tuple[str, int]]] = []
    executor = llm.built.engine.executor
    original = executor.run

    def run_and_note(plan: StepPlan) -> Any:
        steps.append([(chunk.request_id, chunk.new) for chunk in plan.chunks])
        return original(plan)

    with pytest.MonkeyPatch.context() as patch, heard(KERNELS) as calls:
        patch.setattr(executor, "run", run_and_note)
        outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=OUTPUT), use_tqdm=False)
    places = {output.request_id: place for place, output in enumerate(outputs)}
    rows = [[(places[name], tokens) for name, tokens in step] for step in steps]
    completions = [output.outputs[0].token_ids for output in outputs]
    routes = by_sequence(calls, rows, len(asked))
    for prompt, tokens, route in zip(asked, completions, routes):
        route[:] = [layer[: len(prompt) + len(tokens) - 1] for layer in route]  # a step may run ahead of the end
    return completions, routes


@pytest.mark.parametrize("name", CASES)
def test_bf16(checkpoint: Callable[[str], Made], name: str) -> None:
    """Logits of whole prompts and of chunks of 7; greedy tokens of eight prompts in one batch, prefills chunked.

    A token may differ where the two best fp32 logits are closer than twice the largest error measured.
    """
    made = checkpoint(name)
    exact = copy.deepcopy(made.reference).to(DEVICE)
    rounded = copy.deepcopy(made.reference).to(DEVICE, torch.bfloat16)
    sequences = prompts((1, 5, 33, 100))
    theirs = of_transformers(rounded, exact, sequences)
    settings: dict[str, Any] = {"block_size": 16, "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 48}
    settings["enforce_eager"] = made.reference.config.model_type in MIXTURES  # a replayed step says no routes
    with LLM(made.directory, device=DEVICE, dtype="bfloat16", **settings) as llm:
        runner = llm.built.runner
        for chunk in (None, 7):
            of_ours(runner, exact, sequences, chunk).check(theirs, f"{name}, chunks of {chunk}")
        asked = prompts((1, 3, 7, 16, 17, 33, 64, 100))
        completions, routes = generate(llm, asked)
        assert "reference" not in {row.kernel for row in llm.built.table.rows}
        fed = [prompt + tokens[:-1] for prompt, tokens in zip(asked, completions)]
        theirs, ours = of_transformers(rounded, exact, fed), of_ours(runner, exact, fed)
        ours.check(theirs, f"{name}, with the output")
    wanted, short = on_route(exact, fed, routes)
    behind = 0.0
    for prompt, tokens, want in zip(asked, completions, wanted):
        assert len(tokens) == OUTPUT
        places = want[len(prompt) - 1 :]
        behind = max(behind, float((places.amax(-1) - places[torch.arange(OUTPUT), tokens]).max()))
    print(f"{name}: tokens at most {behind:.3f} behind the best, experts {short:.3f}")
    assert behind <= 2 * ours.logits
    assert short <= 4 * theirs.routers
