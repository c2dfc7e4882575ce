"""What all handlers share: settings, the engine, admission, metrics, and the model's words.

Knows every part by its face. It must not know paths or responses.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ridgeline.core.errors import CheckpointError
from ridgeline.core.request import SamplingParams
from ridgeline.engine.messages import Beat, Ready, Stepped
from ridgeline.server.admission import Admission
from ridgeline.server.errors import ApiError, invalid, short, shutting_down, starting
from ridgeline.server.grammar_client import GrammarChecker
from ridgeline.server.live import Live
from ridgeline.server.metrics import Metrics
from ridgeline.server.settings import ServerSettings
from ridgeline.server.supervisor import Phase, Supervisor
from ridgeline.server.traces import Traces
from ridgeline.text.conversation import Conversations
from ridgeline.text.generation import default_params, generation_config
from ridgeline.text.intake import Intake
from ridgeline.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("ridgeline.server")
EMBEDDED_NAME = "ridgeline"
INLINE_CHARACTERS = 16_384
"""Texts up to this length are tokenized at once; longer ones in a thread."""


class Face:
    """How the served model is spoken to. Made once the engine has said what it is."""

    def __init__(self, facts: Ready, settings: ServerSettings) -> None:
        directory = Path(facts.directory)
        tokenizer = load_tokenizer(directory)
        if tokenizer is None:
            raise CheckpointError(f"{directory.name}: has no tokenizer files, so it cannot be served")
        self.facts = facts
        self.tokenizer: Tokenizer = tokenizer
        self.conversations = Conversations(tokenizer)
        self.defaults: SamplingParams = default_params(generation_config(directory), directory)
        self.intake = Intake(
            tokenizer, facts.vocabulary, facts.eos_ids, facts.max_model_len, facts.max_logprobs, facts.seed
        )
        self.grammars = GrammarChecker(facts.directory, facts.vocabulary, settings)
        widths = (len(tokenizer.token_bytes.piece(token)) for token in range(tokenizer.vocab_size))
        self.most_characters = facts.max_model_len * max(max(widths, default=1), 1)
        self.random = random.SystemRandom()

    def check_length(self, text: str, param: str) -> None:
        """Refuse at once what no tokenizer could make fit. ApiError 400."""
        self.check_length_of(len(text), param)

    def check_length_of(self, characters: int, param: str) -> None:
        """`check_length` for so many characters."""
        if characters > self.most_characters:
            least = characters * self.facts.max_model_len // self.most_characters
            raise invalid(
                param,
                f"{param}: at least {least} tokens; the context holds {self.facts.max_model_len}",
                "context_length_exceeded",
            )


class State:
    """One server."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.began_s = time.monotonic()
        self.names = settings.served_model_name or (_name_of(settings),)
        self.metrics = Metrics(self.names[0])
        self.admission = Admission(settings)
        self.supervisor = Supervisor(settings, self._ready, self._heard, self.metrics.itl.observe)
        self.face: Face | None = None
        self.draining = False
        endpoint = settings.otlp_traces_endpoint
        self.traces = None if endpoint is None else Traces(endpoint, self.names[0])
        self.threads = ThreadPoolExecutor(2, "intake")
        self.streams: set[object] = set()
        supervisor, admission = self.supervisor, self.admission
        self.live = Live(self.names[0], lambda: self.condition, lambda: admission.rows)
        for name, text, value in (
            ("engine_restarts", "Engine processes that died.", lambda: supervisor.restarts),
            ("requests_replayed", "Requests sent to a new engine.", lambda: supervisor.replayed),
            ("requests_refused", "Requests refused because the queue was full.", lambda: admission.refused),
            ("engine_steps", "Steps run.", lambda: supervisor.steps_before + supervisor.steps),
            ("engine_silence_seconds", "Since the engine last spoke.", lambda: supervisor.silent_s),
            ("outputs_admitted", "Outputs that hold a place.", lambda: admission.rows),
            ("ready", "Whether a request would be served.", lambda: float(self.ready)),
        ):
            self.metrics.watch(f"ridgeline:{name}", text, value)

    def _ready(self, facts: Ready) -> None:
        self.face = Face(facts, self.settings)
        self.admission.open(facts)
        self.metrics.engine(facts)
        # With several keys, what one asks is no business of another's, though both may see the page.
        self.live.engine(facts, self.face.tokenizer.token_text if len(self.settings.api_keys) < 2 else None)
        for line in facts.lines:
            logger.info("engine", extra={"fields": {"engine": line}})
        seconds = round(time.monotonic() - self.began_s, 2)
        logger.info("ready", extra={"fields": {"seconds": seconds, "model": self.names[0]}})

    def _heard(self, message: Stepped | Beat) -> None:
        if isinstance(message, Stepped):
            self.admission.heard(message)
        self.metrics.heard(message)
        self.live.heard(message)

    # What handlers ask

    def open_face(self, model: object = None) -> Face:
        """The model, if it can be asked something now. ApiError 503, 404 for another model's name."""
        wait_s = self.settings.retry_after_s
        if self.draining:
            raise shutting_down(wait_s)
        if self.supervisor.phase is not Phase.READY or self.face is None:
            raise starting(wait_s)
        if model is not None:
            self.check_model(model)
        return self.face

    def check_model(self, model: object) -> None:
        if model not in self.names:
            raise ApiError(404, f"the model {short(model)!r} is not served here", "model", "model_not_found")

    @property
    def ready(self) -> bool:
        """Whether a request that came now would be served."""
        return (
            not self.draining
            and self.supervisor.phase is Phase.READY
            and self.supervisor.stuck_s <= self.settings.ready_silence_s
        )

    @property
    def healthy(self) -> bool:
        """Whether this process does its work: the engine makes progress, or is being started."""
        supervisor = self.supervisor
        if supervisor.phase is Phase.FAILED:
            return False
        return supervisor.phase is not Phase.READY or supervisor.stuck_s <= self.settings.health_silence_s

    @property
    def condition(self) -> str:
        """How the server is, in a word for people."""
        if self.draining:
            return "draining"
        silent = self.supervisor.phase is Phase.READY and not self.ready
        return "silent" if silent else str(self.supervisor.phase)

    async def drain(self) -> None:
        """Let nobody in; wait for those who are, then end the rest."""
        self.draining = True
        limit = time.monotonic() + self.settings.drain_timeout_s
        while (self.supervisor.jobs or self.streams) and time.monotonic() < limit:
            await asyncio.sleep(0.05)
        error = shutting_down(self.settings.retry_after_s)
        self.admission.empty(error)
        for job in self.supervisor.jobs:
            self.supervisor.abort(job)
            job.fail(error)

    async def close(self) -> None:
        if self.face is not None:
            self.face.grammars.close()
        await self.supervisor.stop()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)
        self.threads.shutdown(wait=False, cancel_futures=True)


def _name_of(settings: ServerSettings) -> str:
    model = settings.engine.get("model")
    if model is None:
        return EMBEDDED_NAME
    text = str(model)
    return Path(text).resolve().name if Path(text).exists() else text
