"""The engine in a process of its own: takes messages between steps, and tells what each step brought.

Knows the channel, the engine and how to build it. It must not know HTTP or text, with one exception: grammars
are compiled and advanced here, because their masks belong to the step.

Run as `python -m ridgeline.engine.process FD`, FD being one end of a pair of Unix sockets. It ends with its owner.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import InvalidArgument, RidgelineError
from ridgeline.core.request import Constraint, Request, SamplingParams
from ridgeline.core.step import StepRecord, TokenScore
from ridgeline.engine.build import Built, build
from ridgeline.engine.faults import FaultyExecutor
from ridgeline.engine.forecast import Forecast, Foretold, forecast_of
from ridgeline.engine.isolation import GuardedConstraint, Isolation
from ridgeline.engine.messages import (
    Abort,
    Beat,
    Channel,
    ChannelError,
    Failed,
    Fault,
    Finish,
    Loading,
    Message,
    Ready,
    Refused,
    Start,
    Stepped,
    Stop,
    Submit,
)
from ridgeline.models.checkpoint import locate
from ridgeline.schedule import Event
from ridgeline.text.generation import end_ids, generation_config
from ridgeline.text.grammar import Grammars
from ridgeline.text.tokenizer import load_tokenizer

logger = logging.getLogger("ridgeline.engine")

LOWEST_LOGPROB = -9999.0
"""Stands for a probability of zero, which JSON has no number for."""
IDLE_S = 0.1
TREE_S = 0.5
"""A drafted tree is told of at most so often: it is there to be looked at."""
MOST_ASSUMED_CONTEXT = 1024
"""Tokens behind a request in the owner's forecasts; what is measured corrects the level."""
DEAD_CONTEXT = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "unspecified launch failure")
"""What an error says after which a CUDA context is of no use: only a new process is."""


class Loop:
    """One engine and one owner, until either ends."""

    def __init__(self, channel: Channel, built: Built, start: Start, forecast: Forecast | None) -> None:
        self.channel = channel
        self.built = built
        self.isolation = Isolation(built.engine)
        self.faults: FaultyExecutor | None = None
        if start.faults:
            self.faults = built.engine.executor = FaultyExecutor(built.engine.executor)
        self.beat_s = start.beat_s
        self.requests: dict[int, Request] = {}
        self._new: set[int] = set()  # not heard of yet
        self._prompts_told: dict[int, int] = {}
        self._record: StepRecord | None = None
        self._forecast = forecast
        self._foretold: Foretold | None = None
        self._steps = 0
        self._beat_s = self._tree_s = 0.0
        self._stopping = False
        self._grammars: Grammars | None = None
        self._compiler: ThreadPoolExecutor | None = None
        self._broken: list[int] = []
        self._compiling: list[tuple[Submit, Future[Any]]] = []
        built.engine.listeners.append(self._listen)
        if forecast is not None:
            built.engine.predict = forecast.predict

    def _listen(self, record: StepRecord) -> None:
        self._record = record
        self._foretold = None if self._forecast is None else self._forecast.learn(record)

    def run(self) -> None:
        """Until Stop comes. ChannelError if the owner is gone; an error of the engine that it cannot survive."""
        while not self._stopping:
            busy = self.isolation.has_work
            for message in self.channel.receive(0.0 if busy else 0.002 if self._compiling else IDLE_S):
                self._take(message)
            self._compiled()
            if self.isolation.has_work:
                self._step()
            if time.monotonic() - self._beat_s >= self.beat_s or (busy and not self.isolation.has_work):
                self._beat()

    def _beat(self) -> None:
        cache = self.built.engine.scheduler.cache
        free = cache.free_blocks
        self._beat_s = time.monotonic()
        self._say(Beat(self._steps, len(self.requests), free, cache.num_blocks - free))

    def _say(self, message: Message) -> None:
        self.channel.send(message)

    # What the owner says

    def _take(self, message: Message) -> None:
        match message:
            case Submit(grammar=""):
                self._submit(message, [None] * len(message.numbers))
            case Submit():
                self._compile(message)
            case Abort():
                for number in message.numbers:
                    self.requests.pop(number, None)
                    self._gone(number)
                    self.isolation.abort(str(number))
                self._compiling = [
                    (submit, done)
                    for submit, done in self._compiling
                    if not set(submit.numbers) <= set(message.numbers)
                ]
            case Finish():
                self.requests.pop(message.number, None)
                self._gone(message.number)
                self.isolation.finish(str(message.number), message.at_token, message.stop)
            case Fault():
                if self.faults is not None:
                    self.faults.order(message.kind, message.value)
            case Stop():
                self._stopping = True
            case _:
                raise ChannelError(f"{type(message).__name__} is not for an engine")

    def _submit(self, submit: Submit, constraints: list[Any]) -> None:
        """Requests whose parameters the owner has checked; what is wrong with them all the same ends them alone."""
        try:
            params = SamplingParams.from_mapping(submit.params)
            requests: list[Request] = []
            for number, seed, constraint in zip(submit.numbers, submit.seeds, constraints):
                if constraint is not None:
                    constraint = self._guarded(number, constraint)
                request = Request(
                    request_id=str(number),
                    tokens=list(submit.ids),
                    prompt_len=len(submit.ids),
                    params=params,
                    max_tokens=submit.max_tokens,
                    seed=seed,
                    eos_ids=frozenset(submit.eos_ids),
                    stop_ids=frozenset(params.stop_token_ids or ()),
                    bad_word_ids=tuple(tuple(word) for word in submit.bad_word_ids),
                    arrival_s=submit.arrival_s,
                    priority=submit.priority,
                    salt=submit.salt,
                    leader=requests[0] if requests else None,
                    grammar=constraint,
                )
                self._check_ids(request)
                requests.append(request)
            for request in requests:
                self.isolation.add(request)
                self.requests[int(request.request_id)] = request
                self._new.add(int(request.request_id))
        except RidgelineError:
            logger.exception("a request that the owner let pass was refused")
            for number in submit.numbers:
                if self.requests.pop(number, None) is not None:
                    self.isolation.abort(str(number))
                self._say(Failed(number, "internal_error"))

    def _check_ids(self, request: Request) -> None:
        """Once more what intake has checked: an id outside of the vocabulary would be a read out of bounds."""
        vocabulary = self.built.spec.vocabulary
        if not request.tokens or min(request.tokens) < 0 or max(request.tokens) >= vocabulary:
            raise InvalidArgument("prompt", "a token id is outside of the vocabulary")
        for ids in (request.params.logit_bias or (), request.stop_ids, request.eos_ids, *request.bad_word_ids):
            if ids and (min(ids) < 0 or max(ids) >= vocabulary):
                raise InvalidArgument("logit_bias", "a token id is outside of the vocabulary")

    # Grammars

    def _guarded(self, number: int, constraint: Constraint) -> Constraint:
        """Its failure ends its request alone, after the step."""
        if self.faults is not None:
            constraint = self.faults.constraint(constraint)
        return GuardedConstraint(constraint, self.built.spec.vocabulary, lambda: self._broken.append(number))

    def _end_broken(self) -> None:
        """Requests whose grammars failed in a step."""
        broken, self._broken = self._broken, []
        for number in broken:
            if self.requests.pop(number, None) is not None:
                self._gone(number)
                self.isolation.abort(str(number))
                self._say(Failed(number, "internal_error"))

    def _compile(self, submit: Submit) -> None:
        """Compile beside the steps; the request is queued when that is done."""
        if self._compiler is None:
            self._compiler = ThreadPoolExecutor(1, "grammars")
        self._compiling.append((submit, self._compiler.submit(self._constraints, submit)))

    def _constraints(self, submit: Submit) -> list[Any]:
        if self._grammars is None:
            source = self.built.tokenizer_directory
            tokenizer = None if source is None else load_tokenizer(source)
            if tokenizer is None:
                raise InvalidArgument("response_format", "the checkpoint has no tokenizer")
            self._grammars = Grammars(tokenizer, self.built.spec.vocabulary)
        ends = submit.eos_ids or list(self.built.spec.eos_ids)
        return [self._grammars.constraint(submit.grammar, ends) for _ in submit.numbers]

    def _compiled(self) -> None:
        while self._compiling and self._compiling[0][1].done():
            submit, done = self._compiling.pop(0)
            try:
                self._submit(submit, done.result())
            except RidgelineError:
                logger.warning("a grammar that the owner let pass was refused")
                for number in submit.numbers:
                    self._say(Failed(number, "internal_error"))

    # What the engine says

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            events = self.isolation.step()
        except Exception as error:
            self._steps += 1
            self._failed(error)
            return
        self._steps += 1
        self._end_broken()
        if events or self._record is not None:
            self._tell(events, time.perf_counter() - began)

    def _failed(self, error: Exception) -> None:
        """A step has failed: find out because of whom, unless the device is lost with it."""
        logger.error("a step failed: %s: %.200s", type(error).__name__, error)
        if any(text in str(error) for text in DEAD_CONTEXT):
            raise error
        guilty = self.isolation.suspect()
        if guilty is not None:
            number = int(guilty.request_id)
            self.requests.pop(number, None)
            self._gone(number)
            self._say(Failed(number, "internal_error"))
        self._beat()

    def _gone(self, number: int) -> None:
        self._new.discard(number)
        self._prompts_told.pop(number, None)

    def _tell(self, events: list[Event], step_s: float) -> None:
        scheduler = self.built.engine.scheduler
        cache = scheduler.cache
        numbers: list[int] = []
        tokens: list[int] = []
        firsts: list[list[Any]] = []
        scores: list[list[Any]] = []
        prompts: list[list[Any]] = []
        ended: list[list[Any]] = []
        for event in events:
            request = event.request
            number = int(request.request_id)
            if number not in self.requests:
                continue
            if number in self._new:
                self._new.discard(number)
                firsts.append([number, request.scheduled_s, request.cached_tokens])
            if event.prompt_scores:
                self._tell_prompt(number, request, event, prompts)
            if event.token is not None:
                numbers.append(number)
                tokens.append(event.token.token)
                if event.token.logprob is not None:
                    scores.append([number, *_score(event.token)])
            if event.finish is not None:
                stop = request.stop_reason if isinstance(request.stop_reason, int) else None
                ended.append([number, str(event.finish), stop, request.preemptions])
                del self.requests[number]
                self._gone(number)
        record, self._record = self._record, None
        foretold, self._foretold = self._foretold, None
        self._say(
            Stepped(
                step=self._steps,
                numbers=numbers,
                tokens=tokens,
                firsts=firsts,
                scores=scores,
                prompts=prompts,
                ended=ended,
                kind="" if record is None else record.kind,
                new_tokens=0 if record is None else sum(new for new, _ in record.spans),
                step_s=step_s,
                device_s=0.0 if record is None else record.device_s,
                predicted_s=None if record is None else record.predicted_s,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                free_blocks=cache.free_blocks,
                cached_blocks=cache.idle_blocks,
                preemptions=scheduler.preemptions,
                prefix_queries=cache.queried_tokens,
                prefix_hits=cache.hit_tokens,
                flops=0.0 if foretold is None else foretold.flops,
                bytes=0.0 if foretold is None else foretold.bytes,
                floor_s=None if foretold is None else foretold.floor_s,
                sampled=0 if record is None else record.sampled,
                drafted=0 if record is None else record.drafted,
                accepted=0 if record is None else record.accepted,
                draft_s=0.0 if record is None else record.draft_s,
                depths=[] if record is None else [len(one.accepted) for one in record.verified],
                tree=[] if record is None else self._tree(record),
            )
        )

    def _tree(self, record: StepRecord) -> list[list[int]]:
        """One of a step's trees, if it is time for one."""
        now = time.monotonic()
        if not record.verified or now - self._tree_s < TREE_S:
            return []
        self._tree_s = now
        root, tree, accepted = record.verified[-1]
        return [[root], list(tree.tokens), list(tree.parents), list(accepted)]

    def _tell_prompt(self, number: int, request: Request, event: Event, prompts: list[list[Any]]) -> None:
        """Scores of the prompt, each once, though a search for a failure may bring them again."""
        told = self._prompts_told.get(number, 0)
        if request.leader is None and told < request.prompt_len - 1:
            given = event.prompt_scores[: request.prompt_len - 1 - told]
            prompts.append([number, [[one.token, *_score(one)] for one in given]])
            self._prompts_told[number] = told + len(given)


def _score(score: TokenScore) -> list[Any]:
    """Log-probability, rank, and the likeliest others."""
    return [_finite(score.logprob), score.rank, [[token, _finite(value)] for token, value in score.top]]


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else LOWEST_LOGPROB


def _floors(built: Built, forecast: Forecast) -> dict[str, Any]:
    config = built.config
    context = min(config.max_model_len // 2, MOST_ASSUMED_CONTEXT)
    return forecast.floors(config.max_num_seqs, config.max_num_batched_tokens, context)


def _ready(built: Built, tokenizer: str | None, load_s: float, roofs: dict[str, Any], floors: dict[str, Any]) -> Ready:
    config, spec = built.config, built.spec
    directory = built.directory if built.directory.is_dir() else built.directory.parent
    source = Path(tokenizer) if tokenizer else directory
    also = end_ids(generation_config(directory), directory)
    ends = [token for token in dict.fromkeys((*spec.eos_ids, *also)) if token < spec.vocabulary]
    settings = {name: value for name, value in asdict(config).items() if name != "reasons"}
    return Ready(
        directory=str(source),
        vocabulary=spec.vocabulary,
        eos_ids=ends,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_logprobs=config.max_logprobs,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        seed=config.seed,
        settings=settings,
        memory=asdict(built.ledger),
        lines=built.lines(),
        load_s=load_s,
        roofs=roofs,
        floors=floors,
    )


def _build(channel: Channel, settings: Mapping[str, Any]) -> Built:
    def progress(phase: str) -> Any:
        return lambda done, total: channel.send(Loading(phase, done, total))

    return build(
        EngineConfig.from_mapping(settings),
        progress("loading"),
        lambda name: channel.send(Loading("compiling", 0, 0)),
        progress("capturing"),
    )


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its owner is gone, even if a step hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))


def main(descriptor: int) -> int:
    """Exit status: 0 after Stop or when the owner is gone, 1 after Refused, 2 when the engine broke."""
    began = time.monotonic()
    _end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the owner decides when to end
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    logging.raiseExceptions = False
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        start = next(iter(channel.receive(60.0)), None)
        if not isinstance(start, Start):
            raise ChannelError("the first message must be Start")
        try:
            config = EngineConfig.from_mapping(start.settings)
            where = locate(config.model, config.revision)
            built = _build(channel, {**start.settings, "model": str(where)})
            built.tokenizer_directory = Path(config.tokenizer or (where if where.is_dir() else where.parent))
            forecast, roofs = forecast_of(built, start.roofs)
            floors = {} if forecast is None else _floors(built, forecast)
            ready = _ready(built, config.tokenizer, time.monotonic() - began, roofs, floors)
        except RidgelineError as error:
            channel.send(Refused(" ".join(str(error).split())))
            channel.close()
            return 1
        loop = Loop(channel, built, start, forecast)
        gc.collect()
        gc.freeze()  # what stays for good is not gone through again in the middle of a step
        channel.send(ready)
        loop.run()
        built.close()
    except ChannelError:
        return 0
    except Exception:
        logger.exception("the engine ends")
        channel.close()
        return 2
    channel.close()
    return 0


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # threads of kernels need no farewell
