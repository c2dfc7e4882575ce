"""The offline face: LLM(model).generate(prompts), in the caller's process.

Knows the engine, intake and delivery, by their contracts. It must not know devices or schedules.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import CheckpointError, InvalidArgument, RidgelineError
from ridgeline.core.request import CompletionOutput, FinishReason, RequestOutput, SamplingParams
from ridgeline.engine.build import Built, build
from ridgeline.text.chat import ChatTemplate
from ridgeline.text.delivery import Delivery
from ridgeline.text.intake import Intake, Prompt
from ridgeline.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("ridgeline")

GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class StreamPart:
    """What a step added to one completion: new text, new tokens, and why it ended if it did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    output: RequestOutput


class LLM:
    """A model, loaded and ready.

    model: a checkpoint directory, a hub id, or None for the embedded model. Keyword arguments are the
    fields of `EngineConfig` (vLLM's names); an unknown one raises InvalidArgument.

    Use it in a `with` block, or call `close()`; deleting it gives the memory back as well.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        self._built: Built | None = None
        config = EngineConfig.from_mapping({"model": None if model is None else str(model), **settings})
        self._built = build(config)
        directory = self._built.directory if self._built.directory.is_dir() else self._built.directory.parent
        source = Path(config.tokenizer) if config.tokenizer else directory
        if not source.is_dir():
            raise CheckpointError(f"{source}: no such tokenizer directory")
        self.tokenizer: Tokenizer | None = load_tokenizer(source)
        self._generation = _generation_config(directory)
        resolved, spec = self._built.config, self._built.spec
        eos = self._generation.get("eos_token_id")
        extra = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        self.intake = Intake(
            self.tokenizer,
            spec.vocabulary,
            tuple(dict.fromkeys((*spec.eos_ids, *extra))),
            resolved.max_model_len,
            resolved.max_logprobs,
            resolved.seed,
        )
        self._count = 0

    @property
    def built(self) -> Built:
        """Everything behind the face: configuration, ledger, kernels, engine. An error once closed."""
        if self._built is None:
            raise RidgelineError("this LLM is closed; make a new one")
        return self._built

    def get_default_sampling_params(self) -> SamplingParams:
        """Defaults with what the checkpoint's generation_config.json says."""
        given = {name: self._generation.get(name) for name in GENERATION_FIELDS}
        if self._generation.get("do_sample") is False:
            given["temperature"] = 0.0
        known = {field.name for field in fields(SamplingParams)}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None and name in known})

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
        outputs: list[RequestOutput | None] = [None] * len(asked)
        try:
            for place, output in self.complete(jobs):
                outputs[place] = output
                if bar is not None:
                    bar.update(1)
        finally:
            if bar is not None:
                bar.close()
        errors = [output.error for output in outputs if output is not None and output.error is not None]
        if len(errors) == len(asked):
            raise errors[0]
        for error in errors:
            logger.warning("a prompt was refused: %s", error)
        return [output for output in outputs if output is not None]

    def complete(self, jobs: Iterable[tuple[Prompt, SamplingParams, int]]) -> Iterator[tuple[int, RequestOutput]]:
        """Run (prompt, sampling_params, priority) jobs; yields (place, output) as each one ends.

        Jobs are taken as there is room, so the iterable may be endless; a refused job yields an output
        with `error` (a RidgelineError in the prompt's place is such a job). Closing the iterator ends what
        is still running.
        """
        engine = self.built.engine
        room = 2 * self.built.config.max_num_seqs
        numbered = enumerate(jobs)
        places: dict[str, int] = {}
        open_jobs: dict[str, Delivery] = {}
        owners: dict[str, Delivery] = {}
        more = True
        try:
            while more or open_jobs:
                while more and len(owners) < room:
                    job = next(numbered, None)
                    if job is None:
                        more = False
                        break
                    place, (prompt, params, priority) = job
                    try:
                        delivery, requests = self._delivery(prompt, params, priority)
                    except RidgelineError as error:
                        yield place, _refused(f"refused-{place}", prompt, error)
                        continue
                    places[delivery.output.request_id] = place
                    open_jobs[delivery.output.request_id] = delivery
                    for request in requests:
                        owners[request.request_id] = delivery
                        engine.add(request)
                if not open_jobs:
                    continue
                for delivery, name, _ in self._events(owners):
                    if delivery.output.finished and delivery.output.request_id in open_jobs:
                        del open_jobs[delivery.output.request_id]
                        yield places.pop(delivery.output.request_id), delivery.output
                    if name not in delivery.unfinished:
                        owners.pop(name, None)
        finally:
            self._end(open_jobs.values())

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamPart]:
        """Complete one prompt, yielding each completion's new text as it comes.

        Raises InvalidArgument before the first part. Closing the iterator ends the request.
        """
        params = self._params(sampling_params, 1)[0]
        delivery, requests = self._delivery(prompt, params, 0)
        for request in requests:
            self.built.engine.add(request)
        return self._parts(delivery)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the checkpoint's chat template."""
        template = None if self.tokenizer is None else ChatTemplate.of(self.tokenizer)
        if self.tokenizer is None or template is None:
            raise InvalidArgument("messages", "this model has no chat template; use generate() with a prompt")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = template.render(conversation, add_generation_prompt=add_generation_prompt)
            prompts.append({"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm)

    def close(self) -> None:
        """Give back all memory. Calling it again does nothing."""
        if self._built is not None:
            built, self._built = self._built, None
            built.engine.close()
            on_gpu = built.config.device.startswith("cuda")
            del built
            _collect(on_gpu)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_built", None) is not None:
            self.close()

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence) or len(given) != count:
            raise InvalidArgument("sampling_params", f"must be one SamplingParams or a list of {count}")
        return list(given)

    def _delivery(self, prompt: Prompt, params: SamplingParams, priority: int) -> tuple[Delivery, list[Any]]:
        self.built  # noqa: B018 - a closed LLM refuses here
        if isinstance(prompt, RidgelineError):
            raise prompt
        request_id = str(self._count)
        text, requests = self.intake.requests(request_id, prompt, params, priority)
        self._count += 1
        return Delivery(request_id, text, requests, self.tokenizer), requests

    def _parts(self, delivery: Delivery) -> Iterator[StreamPart]:
        outputs = delivery.output.outputs
        shown = [0] * len(outputs)
        names = delivery.unfinished
        owners = dict.fromkeys(names, delivery)
        try:
            while not delivery.output.finished:
                for _, name, text in self._events(owners):
                    index = names.index(name)
                    completion = outputs[index]
                    ids = tuple(completion.token_ids[shown[index] :])
                    shown[index] += len(ids)
                    if ids or text or completion.finish_reason:
                        yield StreamPart(index, text, ids, completion.finish_reason, delivery.output)
        finally:
            self._end([delivery])

    def _events(self, owners: Mapping[str, Delivery]) -> Iterator[tuple[Delivery, str, str]]:
        """One step of the engine: (delivery, request id, its new text) for each event of these owners."""
        engine = self.built.engine
        events = engine.step()
        now = engine.clock.now()
        for event in events:
            name = event.request.request_id
            delivery = owners.get(name)
            if delivery is None:
                continue
            text = ""
            delivery.scheduled(now, event.request)
            if event.prompt_scores:
                delivery.prompt_scores(event.prompt_scores)
            if event.token is not None:
                text, stopped = delivery.push(name, event.token, now)
                if stopped is not None:
                    engine.finish(name, stopped.at_token, stopped.stop)
            if event.finish is not None:
                text += delivery.finish(name, event.finish, event.request.stop_reason, now)
            yield delivery, name, text

    def _end(self, deliveries: Iterable[Delivery]) -> None:
        """Take what is left of these prompts out of the engine; all their blocks return."""
        if self._built is None:
            return
        engine = self._built.engine
        for delivery in deliveries:
            for name in delivery.unfinished:
                engine.abort(name)
                delivery.finish(name, FinishReason.ABORT, None, engine.clock.now())


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


def _generation_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's generation_config.json, or nothing if it has none."""
    file = directory / "generation_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return values


def _progress_bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="prompts", unit="prompt", dynamic_ncols=True)


def _collect(on_gpu: bool) -> None:
    import gc

    gc.collect()
    if on_gpu:
        import torch

        torch.cuda.empty_cache()
