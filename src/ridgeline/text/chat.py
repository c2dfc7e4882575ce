"""Chat templates: from messages to the one text that the model was trained to continue.

Knows the dialect of Jinja that Hugging Face checkpoints use. The template comes from the checkpoint
and never from a request; it still runs in a sandbox, since a checkpoint is a download. Must not know
tokenizers' ids, requests or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ridgeline.core.errors import CheckpointError, InvalidArgument
from ridgeline.text.tokenizer import Tokenizer, check_unicode

MAX_RENDERED_CHARACTERS = 16_000_000

# Whatever code of a template may raise on messages that it does not expect.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


_RESERVED = ("self", "messages", "documents", "bos_token", "eos_token", "raise_exception", "strftime_now")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training: here, its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template with the special tokens that it may name. Safe to share between threads."""

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        other_tokens: Mapping[str, str] | None = None,
        max_characters: int = MAX_RENDERED_CHARACTERS,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`other_tokens` are further names for the template ("pad_token" → "<pad>").

        `max_characters` bounds the rendered text; `now` is the clock of `strftime_now`. Raises
        CheckpointError if `source` is not a valid template.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise CheckpointError("chat template: nested too deeply") from error
        tokens = {**(other_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        # A token that the checkpoint lacks stays undefined, so that `is defined` tells the truth.
        self._tokens = {name: token for name, token in tokens.items() if token}
        self._max_characters = max_characters

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The chat template of a checkpoint, None if it has none. Raises CheckpointError."""
        if tokenizer.chat_template is None:
            return None
        tokens = dict(tokenizer.special_tokens)
        bos, eos = tokens.pop("bos_token", ""), tokens.pop("eos_token", "")
        return cls(tokenizer.chat_template, bos, eos, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, with BOS already in it where the template writes one.

        Each message is {"role": str, "content": str or list of {"type": "text", "text": str}} and may
        carry more keys, which the template sees; parts are joined by line breaks; content may be
        missing where there are tool_calls. `variables` are the template's own switches
        (enable_thinking=False). Raises InvalidArgument: "messages" for messages of another form or
        that the template refuses, "tools", "chat_template_kwargs" for a name that is taken.
        """
        given = [_checked_message(number, message) for number, message in enumerate(_checked_list(messages))]
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise InvalidArgument("tools", "expected a list of objects, each a JSON schema of a function")
        for name in variables:
            if name in self._tokens or name in _RESERVED:
                raise InvalidArgument("chat_template_kwargs", f"{name!r} is not the request's to set")
        scope = {
            **self._tokens,
            **variables,
            "messages": given,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._rendered(scope)
        except _TEMPLATE_ERRORS as error:
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument("messages", f"the model's chat template refuses them: {error}") from error
        check_unicode(text, "messages")
        return text

    def _rendered(self, scope: dict[str, Any]) -> str:
        parts: list[str] = []
        room = self._max_characters
        for part in self._template.generate(scope):
            room -= len(part)
            if room < 0:
                raise InvalidArgument("messages", f"rendered, they are longer than {self._max_characters} characters")
            parts.append(part)
        return "".join(parts)


def _checked_list(messages: object) -> Sequence[object]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidArgument("messages", "expected a list of at least one message")
    return messages


def _checked_message(number: int, message: object) -> dict[str, Any]:
    """A copy of `message` with its content as one text. Raises InvalidArgument("messages")."""
    if not isinstance(message, Mapping):
        raise InvalidArgument("messages", f"message {number} is {type(message).__name__}, expected an object")
    if not isinstance(message.get("role"), str):
        raise InvalidArgument("messages", f"message {number} needs a role that is a string")
    copy = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        copy["content"] = "\n".join(_text_of_part(number, part) for part in content)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InvalidArgument(
            "messages",
            f"message {number} needs content: a string or a list of text parts, got {content!r:.80}",
        )
    return copy


def _text_of_part(number: int, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidArgument(
        "messages", f'message {number} has a content part of type {kind!r}; only "text" parts are read'
    )
