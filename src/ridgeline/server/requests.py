"""What requests may say: one strict model a body, and one way to read it.

Knows fields, types and bounds, OpenAI's and vLLM's names. It must not know the model that is served: what depends on
it (vocabulary, context) is intake's to check.

A field that is null counts as left out. A field that is not here is a 400 that names it, unless it says nothing: null,
or OpenAI's own default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ridgeline.server.errors import ApiError, invalid, short
from ridgeline.server.messages import MESSAGES_SCHEMA
from ridgeline.server.settings import ServerSettings

WITHOUT_EFFECT = ("user", "metadata", "store")
DEFAULTS: Mapping[str, Any] = {
    "service_tier": "auto",
    "modalities": ["text"],
    "verbosity": "medium",
    "reasoning_effort": "medium",
    "logit_bias": None,
    "functions": [],
    "function_call": "none",
    "suffix": "",
    "use_beam_search": False,
    "truncate_prompt_tokens": None,
    "return_token_ids": False,
    "add_special_tokens": True,
    "spaces_between_special_tokens": True,
    "detokenize": True,
}
"""Fields that are not served, with the value that asks for nothing."""

Int64 = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
Count = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


class Strict(BaseModel):
    """No coercion, nothing unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class StreamOptions(Strict):
    """include_usage: a last chunk counts tokens. continuous_usage_stats: every chunk does (vLLM)."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: bool = False


class Sampled(Strict):
    """What both kinds of completion share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    n: int = 1
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    logit_bias: dict[str, Number] | None = None
    ignore_eos: bool = False
    min_tokens: Count = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Int64 = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None


class CompletionRequest(Sampled):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Count | None = 16
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None


class JsonSchema(Strict):
    """A named schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        return self


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    """Body of /v1/chat/completions. Messages are read by `server/messages.py`."""

    messages: Annotated[list[Any], Field(json_schema_extra=MESSAGES_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=1, le=(1 << 31) - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=(1 << 31) - 1)] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True


class TokenizeRequest(Strict):
    """Body of /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Any] | None, Field(json_schema_extra=MESSAGES_SCHEMA)] = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


Body = TypeVar("Body", bound=Strict)


def read(kind: type[Body], values: dict[str, Any]) -> Body:
    """A body as its model. ApiError 400 naming the first field that is wrong."""
    known = {one.alias or name for name, one in kind.model_fields.items()}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name not in known:
            if name in DEFAULTS and type(DEFAULTS[name]) is type(value) and DEFAULTS[name] == value:
                continue
            raise invalid(
                short(name), f"{short(name)} is not a parameter that this endpoint serves", "unknown_parameter"
            )
        given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _first(error, given) from None


def _first(error: ValidationError, given: Mapping[str, Any]) -> ApiError:
    found = error.errors(include_url=False, include_context=False)[0]
    where = [str(one) for one in found["loc"]]
    param = where[0] if where else None
    if param is None:
        return invalid(None, f"the body is not valid: {found['msg'][:120]}")
    if found["type"] == "missing" and len(where) == 1:
        return invalid(param, f"{param} is missing")
    value = given.get(param)
    if param == "model":
        return invalid(param, "model must be a string")
    message = found["msg"].removeprefix("Value error, ")
    inside = "" if len(where) < 2 else f" ({'.'.join(where[1:])[:80]})"
    shown = f", not {short(value)}" if isinstance(value, (str, int, float, bool)) else ""
    return invalid(param, f"{param}{inside}: {message[:120]}{shown}")


def check_limits(body: Sampled, settings: ServerSettings) -> None:
    """Whatever a setting bounds. ApiError 400 with the parameter and the limit."""
    _integer("n", body.n, 1, settings.max_n)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > settings.max_stop:
        raise invalid("stop", f"stop: at most {settings.max_stop} strings, got {len(stops)}")
    for stop in stops:
        if not 1 <= len(stop) <= settings.max_stop_characters:
            raise invalid("stop", f"stop: strings of 1 to {settings.max_stop_characters} characters")
    for name, most in (
        ("stop_token_ids", settings.max_stop_token_ids),
        ("bad_words", settings.max_bad_words),
        ("logit_bias", settings.max_logit_bias),
    ):
        count = len(getattr(body, name) or ())
        if count > most:
            raise invalid(name, f"{name}: at most {most} entries, got {count}")
    for word in body.bad_words or ():
        if not 1 <= len(word) <= settings.max_stop_characters:
            raise invalid("bad_words", f"bad_words: strings of 1 to {settings.max_stop_characters} characters")
    for token, value in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise invalid("logit_bias", f"logit_bias: {short(token)!r} is not a token id")
        if not -100 <= value <= 100 or not math.isfinite(value):
            raise invalid("logit_bias", f"logit_bias: values must be in [-100, 100], not {short(value)}")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options needs stream")
    if isinstance(body, CompletionRequest):
        _check_completion(body, settings)
    elif isinstance(body, ChatRequest):
        _check_chat(body, settings)


def _check_completion(body: CompletionRequest, settings: ServerSettings) -> None:
    if body.best_of is not None:
        _integer("best_of", body.best_of, 1, settings.max_best_of)
        if body.best_of < body.n:
            raise invalid("best_of", f"best_of: {body.best_of} is less than n, which is {body.n}")
        if body.stream and body.best_of > body.n:
            raise invalid("best_of", "best_of: the best are known at the end only, so it cannot be streamed")
    if body.logprobs is not None:
        _integer("logprobs", body.logprobs, 0, settings.max_logprobs)
    if body.max_tokens is not None and body.min_tokens > body.max_tokens:
        raise invalid("min_tokens", f"min_tokens: {body.min_tokens} is more than max_tokens {body.max_tokens}")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "max_tokens: 0 leaves nothing to answer without echo")
    if isinstance(body.prompt, list):
        several = bool(body.prompt) and not isinstance(body.prompt[0], int)
        if not body.prompt:
            raise invalid("prompt", "prompt: the list is empty")
        if several and len(body.prompt) > settings.max_prompts:
            raise invalid("prompt", f"prompt: at most {settings.max_prompts} prompts, got {len(body.prompt)}")


def _check_chat(body: ChatRequest, settings: ServerSettings) -> None:
    if body.top_logprobs is not None:
        _integer("top_logprobs", body.top_logprobs, 0, settings.max_top_logprobs)
        if not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs")
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if most is not None and body.min_tokens > most:
        raise invalid("min_tokens", f"min_tokens: {body.min_tokens} is more than the {most} that may be generated")
    if body.tools is not None:
        if not 1 <= len(body.tools) <= settings.max_tools:
            raise invalid("tools", f"tools: 1 to {settings.max_tools}, got {len(body.tools)}")
        names = [tool.function.name for tool in body.tools]
        if len(set(names)) != len(names):
            raise invalid("tools", "tools: two functions have one name")
    if body.tool_choice is not None and body.tool_choice != "none":
        if not body.tools:
            raise invalid("tool_choice", "tool_choice needs tools")
        if isinstance(body.tool_choice, NamedTool):
            wanted = body.tool_choice.function.name
            if wanted not in [tool.function.name for tool in body.tools]:
                raise invalid("tool_choice", f"tool_choice: {short(wanted)!r} is none of the tools")
    shaped = body.response_format is not None and body.response_format.type != "text"
    called = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    if body.bad_words and (shaped or called):
        raise invalid("bad_words", "bad_words: with response_format or a forced tool, they could leave no token at all")
    if shaped:
        forced = body.tools and body.tool_choice not in (None, "none", "auto")
        if forced:
            raise invalid("response_format", "response_format and a forced tool_choice exclude each other")


def _integer(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise invalid(name, f"{name}: must be in [{low}, {high}], not {short(value)}")
