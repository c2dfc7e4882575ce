"""What the live page is told: steps and ended requests, handed on to its board, and how the server stands.

Knows the engine's messages and the board. It must not know HTTP or prometheus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ridgeline import __version__
from ridgeline.core.request import RequestOutput
from ridgeline.core.step import Verified
from ridgeline.core.tree import TokenTree
from ridgeline.dashboard.board import Board, Facts, Now, Step
from ridgeline.engine.messages import Beat, Ready, Stepped
from ridgeline.perf.roofline import Roofline


class Live:
    """One board for the life of the server, engines come and go.

    state(): a word for the page, such as "ready". admitted(): outputs that hold a place, in the engine or before it.
    """

    def __init__(self, model: str, state: Callable[[], str], admitted: Callable[[], int]) -> None:
        self._model = model
        self._state = state
        self._admitted = admitted
        self._running = self._preemptions = 0
        nothing = Facts(
            model=model, device="", dtype="", version=f"ridgeline {__version__}", num_blocks=0, block_size=0,
            max_num_seqs=0, max_model_len=0,
        )  # fmt: skip
        self.board = Board(nothing)

    def engine(self, facts: Ready, word: Callable[[int], str] | None) -> None:
        """An engine is ready: the first, or one in the place of another.

        word(token): its text, for drafted trees; None if who sees the page must not see what others ask.
        """
        self._running = self._preemptions = 0
        self.board.facts = Facts(
            model=self._model,
            device=str(facts.settings.get("device", "")),
            dtype=str(facts.settings.get("dtype", "")),
            version=f"ridgeline {__version__}",
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
            max_num_seqs=facts.max_num_seqs,
            max_model_len=facts.max_model_len,
            roofline=_roofline(facts.roofs),
            roofs=str(facts.roofs.get("source", "")),
            word=word,
        )

    def heard(self, message: Stepped | Beat) -> None:
        """A step, or word from an engine between steps."""
        if isinstance(message, Beat):
            if not message.requests:
                self._running = 0
            return
        self._running = message.running
        if not message.kind:
            return
        preempted = max(message.preemptions - self._preemptions, 0)
        self._preemptions = message.preemptions
        self.board.step(
            Step(
                kind=message.kind,
                output_tokens=len(message.numbers),
                prompt_tokens=max(message.new_tokens - message.drafted - message.sampled, 0),
                device_s=message.device_s,
                predicted_s=message.predicted_s,
                running=message.running,
                waiting=message.waiting,
                free_blocks=message.free_blocks,
                preempted=preempted,
                flops=message.flops,
                bytes=message.bytes,
                rows=message.sampled,
                drafted=message.drafted,
                accepted=message.accepted,
                draft_s=message.draft_s,
                depths=tuple(message.depths),
                verified=_verified(message.tree),
            )
        )

    def ended(self, output: RequestOutput) -> None:
        """A request has come to its end, one way or another."""
        found = output.metrics
        reasons = [one.finish_reason or "abort" for one in output.outputs] or ["error"]
        for number, reason in enumerate(reasons):
            if number or found is None:
                self.board.finished(reason)
            else:
                self.board.finished(reason, found.num_prompt_tokens, found.num_cached_tokens, found.tpot_s)
        if found is not None and found.ttft_s is not None:
            self.board.first_token(found.ttft_s)

    def snapshot(self) -> dict[str, Any]:
        """For the page, now."""
        waiting = max(self._admitted() - self._running, 0)
        return self.board.snapshot(Now(self._state(), self._running, waiting))


def _verified(told: list[list[int]]) -> Verified | None:
    """A Stepped's tree."""
    if not told:
        return None
    (root,), tokens, parents, accepted = told
    return Verified(root, TokenTree(tokens, parents), accepted)


def _roofline(roofs: Mapping[str, Any]) -> Roofline | None:
    if not roofs:
        return None
    return Roofline(roofs["matrix_flops"], roofs["vector_flops"], roofs["bytes_per_s"])
