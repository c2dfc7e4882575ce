"""The offline face: LLM(model).generate(prompts), in the caller's process.

Knows the engine, intake and delivery, by their contracts. It must not know devices or schedules.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import CheckpointError, InvalidArgument, RidgelineError
from ridgeline.core.request import CompletionOutput, FinishReason, Request, RequestOutput, SamplingParams
from ridgeline.engine.build import Built, build
from ridgeline.engine.interrupt import Uninterrupted
from ridgeline.models.checkpoint import locate
from ridgeline.schedule import Event
from ridgeline.text.delivery import Delivery
from ridgeline.text.generation import default_params, end_ids, generation_config
from ridgeline.text.intake import Intake, Prompt
from ridgeline.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ridgeline.text.chat import ChatTemplate

logger = logging.getLogger("ridgeline")


@dataclass(frozen=True, slots=True)
class StreamPart:
    """What a step added to one completion: new text, new tokens, and why it ended if it did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    output: RequestOutput


@dataclass(slots=True, eq=False)
class _Job:
    """A prompt under way: its requests, and where their outputs gather.

    place: its number among the jobs of one call; ended: where that call learns of its end.
    """

    delivery: Delivery
    requests: list[Request]
    place: int
    ended: deque[_Job]


class LLM:
    """A model, loaded and ready.

    model: a checkpoint directory, a hub id, or None for the embedded model. Keyword arguments are the
    fields of `EngineConfig` (vLLM's names); an unknown one raises InvalidArgument.

    Use it in a `with` block, or call `close()`; deleting it gives the memory back as well. Calls may be
    nested (a `stream` beside another, a `generate` inside of a loop over `complete`): each step serves
    all. They must come from one thread at a time. Ctrl-C ends a call between two steps, and the LLM is
    as good as before.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        self._built: Built | None = None
        self._jobs: dict[str, _Job] = {}
        self._count = 0
        config = EngineConfig.from_mapping({"model": None if model is None else str(model), **settings})
        where = locate(config.model, config.revision)
        directory = where if where.is_dir() else where.parent
        source = Path(config.tokenizer) if config.tokenizer else directory
        if not source.is_dir():
            raise CheckpointError(f"{source}: no such tokenizer directory")
        self.tokenizer: Tokenizer | None = load_tokenizer(source)
        self._template: ChatTemplate | None = None
        if self.tokenizer is not None and self.tokenizer.chat_template is not None:
            from ridgeline.text.chat import ChatTemplate  # jinja2 takes memory and time that few models need

            self._template = ChatTemplate.of(self.tokenizer)
        generation = generation_config(directory)
        self._defaults = default_params(generation, directory)
        also_ends = end_ids(generation, directory)
        with _LoadingBar() as bar:
            self._built = build(replace(config, model=str(where)), bar.show, bar.compiling, bar.capturing)
        resolved, spec = self._built.config, self._built.spec
        self.intake = Intake(
            self.tokenizer,
            spec.vocabulary,
            [token for token in (*spec.eos_ids, *also_ends) if token < spec.vocabulary],
            resolved.max_model_len,
            resolved.max_logprobs,
            resolved.seed,
        )
        for line in self._built.lines():
            logger.info(line)

    @property
    def built(self) -> Built:
        """Everything behind the face: configuration, ledger, kernels, engine. An error once closed."""
        if self._built is None:
            raise RidgelineError("this LLM is closed; make a new one")
        return self._built

    def get_default_sampling_params(self) -> SamplingParams:
        """Defaults with what the checkpoint's generation_config.json says."""
        return self._defaults

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts: text, a list of token ids, or {"prompt": …} / {"prompt_token_ids": [...]}.

        sampling_params: one for all, or one a prompt. Returns one RequestOutput a prompt, in order. A
        prompt that cannot be run gets an output with `error` set and finish_reason "error", and the
        others finish; if no prompt of the call can be run, the first error is raised.
        """
        asked = _as_list(prompts)
        params = self._params(sampling_params, len(asked))
        if priority is not None and len(priority) != len(asked):
            raise InvalidArgument("priority", f"has {len(priority)} values for {len(asked)} prompts")
        jobs = zip(asked, params, priority or [0] * len(asked))
        bar = _progress_bar(len(asked)) if use_tqdm else None
        outputs: dict[int, RequestOutput] = {}
        start, tokens = time.perf_counter(), 0
        try:
            with closing(self.complete(jobs)) as completed:
                for place, output in completed:
                    outputs[place] = output
                    if bar is not None:
                        tokens += sum(len(one.token_ids) for one in output.outputs)
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tok/s", refresh=False)
                        bar.update(1)
        finally:
            if bar is not None:
                bar.close()
        errors = [output.error for output in outputs.values() if output.error is not None]
        if len(errors) == len(asked):
            raise outputs[0].error or errors[0]
        for error in errors:
            logger.warning("a prompt was refused: %s", error)
        return [outputs[place] for place in range(len(asked))]

    def complete(
        self, jobs: Iterable[tuple[Prompt | RidgelineError, SamplingParams, int]]
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Run (prompt, sampling_params, priority) jobs; yields (place, output) as each one ends.

        Jobs are taken as there is room, so the iterable may be endless; a refused job yields an output
        with `error` (a RidgelineError in the prompt's place is such a job). Closing the iterator ends what
        is still running.
        """
        room = 2 * self.built.config.max_num_seqs
        numbered = enumerate(jobs)
        ended: deque[_Job] = deque()
        under_way: dict[int, _Job] = {}
        more, requests = True, 0
        try:
            while more or under_way:
                while more and requests < room:
                    taken = next(numbered, None)
                    if taken is None:
                        more = False
                        break
                    place, (prompt, params, priority) = taken
                    try:
                        job = self._job(prompt, params, priority, place, ended)
                    except RidgelineError as error:
                        yield place, _refused(f"refused-{place}", prompt, error)
                        continue
                    under_way[place] = job
                    requests += len(job.requests)
                    self._start(job)
                if under_way and not ended:  # a call nested in the loop over this one may have stepped
                    self._step()
                while ended:
                    job = ended.popleft()
                    del under_way[job.place]
                    requests -= len(job.requests)
                    yield job.place, job.delivery.output
        finally:
            self._end(under_way.values())

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[StreamPart, None, None]:
        """Complete one prompt, yielding each completion's new text as it comes.

        Raises InvalidArgument before the first part. Closing the iterator ends the request.
        """
        return self._parts(self._job(prompt, self._params(sampling_params, 1)[0], 0, 0, deque()))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the checkpoint's chat template.

        Like `generate`: of several, one that cannot be run gets an output with `error` set.
        """
        if self.tokenizer is None or self._template is None:
            raise InvalidArgument("messages", "this model has no chat template; use generate() with a prompt")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts: list[Any] = []
        for conversation in conversations:
            try:
                text = self._template.render(conversation, add_generation_prompt=add_generation_prompt)
                ids = self.tokenizer.encode(text, add_special_tokens=False)
                prompts.append({"prompt": text, "prompt_token_ids": ids})
            except InvalidArgument as error:
                prompts.append(error)
        return self.generate(prompts, sampling_params, use_tqdm)

    def close(self) -> None:
        """Give back all memory. Calling it again does nothing."""
        if self._built is None:
            return
        self._end(list(self._jobs.values()))
        built, self._built = self._built, None
        built.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # At the interpreter's end its memory goes back anyway, and half of the modules are gone.
        if getattr(self, "_built", None) is not None and not sys.is_finalizing():
            self.close()

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence) or len(given) != count:
            raise InvalidArgument("sampling_params", f"must be one SamplingParams or a list of {count}")
        return list(given)

    def _job(self, prompt: Any, params: SamplingParams, priority: int, place: int, ended: deque[_Job]) -> _Job:
        """A prompt made ready. Raises RidgelineError; the engine has not seen it then."""
        self.built  # noqa: B018 - a closed LLM refuses here
        if isinstance(prompt, RidgelineError):
            raise prompt
        request_id = str(self._count)
        text, requests = self.intake.requests(request_id, prompt, params, priority)
        self._count += 1
        return _Job(Delivery(request_id, text, requests, self.tokenizer), requests, place, ended)

    def _parts(self, job: _Job) -> Generator[StreamPart, None, None]:
        delivery, outputs = job.delivery, job.delivery.output.outputs
        try:
            self._start(job)
            while True:
                finished = delivery.output.finished
                for index, text, ids in delivery.news():
                    yield StreamPart(index, text, ids, outputs[index].finish_reason, delivery.output)
                if finished:
                    return
                if not delivery.output.finished:  # another call's step may have been the last
                    self._step()
        finally:
            self._end([job])

    def _start(self, job: _Job) -> None:
        engine = self.built.engine
        with Uninterrupted():
            for request in job.requests:
                engine.add(request)
                self._jobs[request.request_id] = job

    def _step(self) -> None:
        """One step of the engine; its events reach the jobs of every call, whoever stepped."""
        engine = self.built.engine
        if not engine.has_work:
            raise RuntimeError("a prompt waits for the engine, which does not know it")
        with Uninterrupted():
            try:
                events = engine.step()
            except BaseException:
                self._end(list(self._jobs.values()), FinishReason.ERROR)  # what the step has written is unknown
                raise
            now = engine.clock.now()
            for event in events:
                self._deliver(event, now)

    def _deliver(self, event: Event, now: float) -> None:
        name = event.request.request_id
        job = self._jobs.get(name)
        if job is None:
            return
        delivery = job.delivery
        delivery.scheduled(event.request)
        if event.prompt_scores:
            delivery.prompt_scores(event.prompt_scores)
        ended = event.finish is not None
        if event.token is not None:
            _, stopped = delivery.push(name, event.token, now)
            if stopped is not None:
                self.built.engine.finish(name, stopped.at_token, stopped.stop)
                ended = True
        if event.finish is not None:
            delivery.finish(name, event.finish, event.request.stop_reason, now)
        if ended:
            del self._jobs[name]
            if delivery.output.finished:
                job.ended.append(job)

    def _end(self, jobs: Iterable[_Job], reason: FinishReason = FinishReason.ABORT) -> None:
        """Take what is left of these jobs out of the engine; all their blocks return."""
        if self._built is None:
            return
        engine = self._built.engine
        with Uninterrupted():
            for job in jobs:
                for name in job.delivery.unfinished:
                    engine.abort(name)
                    job.delivery.finish(name, reason, None, engine.clock.now())
                    self._jobs.pop(name, None)
                    if job.delivery.output.finished:
                        job.ended.append(job)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt (text, ids, mapping) or several, as a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidArgument("prompts", f"must be a prompt or a list of prompts, not {type(prompts).__name__}")
    if prompts and all(isinstance(one, int) and not isinstance(one, bool) for one in prompts):
        return [prompts]
    if not prompts:
        raise InvalidArgument("prompts", "the list is empty")
    return list(prompts)


def _refused(request_id: str, prompt: Any, error: RidgelineError) -> RequestOutput:
    completion = CompletionOutput(0, "", [], finish_reason=str(FinishReason.ERROR), stop_reason=str(error))
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(request_id, text, [], [completion], finished=True, error=error)


class _LoadingBar:
    """A bar on the terminal for what takes longer than a second: weights to load, steps to capture; and
    one for kernels to compile."""

    def __enter__(self) -> _LoadingBar:
        self._bar: Any = None
        self._graphs: Any = None
        self._kernels: Any = None
        return self

    def compiling(self, name: str) -> None:
        """A CPU kernel is about to be compiled: about a second each, once on a machine."""
        if self._kernels is None:
            from tqdm import tqdm

            form = "{desc}: {n} in {elapsed}"
            text = "compiling kernels, once on this machine"
            self._kernels = tqdm(desc=text, bar_format=form, leave=False, disable=None)
        self._kernels.update(1)

    def show(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="loading", unit="tensor", delay=1.0, leave=False, disable=None)
        self._bar.update(done - self._bar.n)

    def capturing(self, done: int, total: int) -> None:
        if self._graphs is None:
            from tqdm import tqdm

            self._graphs = tqdm(total=total, desc="capturing", unit="size", delay=1.0, leave=False, disable=None)
        self._graphs.update(done - self._graphs.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (self._bar, self._graphs, self._kernels):
            if bar is not None:
                bar.close()


def _progress_bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="prompts", unit="prompt", dynamic_ncols=True)
