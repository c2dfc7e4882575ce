"""From messages to token ids, so that nobody who types a special token speaks with its voice.

Knows a chat template and a tokenizer. It must not know HTTP. A special token's text inside of a message is marked
before the template is rendered, and what was marked is encoded as the plain characters that it is; a conversation
without such text is encoded in one piece, as it was in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.text.chat import ChatTemplate
from ridgeline.text.tokenizer import Tokenizer

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For checkpoints without a template: readable, and no checkpoint was trained on it."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text that is meant for others holds them


class Conversations:
    """A checkpoint's way from messages to ids. template: None for PLAIN_TEMPLATE. Safe for several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        own = template or ChatTemplate.of(tokenizer)
        self.has_template = own is not None
        self._template = own or ChatTemplate(PLAIN_TEMPLATE)
        self._tokenizer = tokenizer
        names = sorted({tokenizer.token_text(token) for token in tokenizer.special_ids} - {""}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """The prompt's text and ids. InvalidArgument as `ChatTemplate.render` raises it."""
        marked: list[str] = []
        given = self._marked(list(messages), marked)
        text = self._template.render(
            given,
            add_generation_prompt=add_generation_prompt,
            tools=self._marked(list(tools), marked) if tools else None,
            **(variables or {}),
        )
        if not self.has_template:
            return self._plain(text, marked)
        return self._encoded(text, marked, False)

    def _plain(self, text: str, marked: list[str]) -> tuple[str, list[int]]:
        """Without a template nobody has written BOS yet."""
        return self._encoded(text, marked, True)

    def _encoded(self, text: str, marked: list[str], add_special_tokens: bool) -> tuple[str, list[int]]:
        if not marked:
            return text, self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        whole: list[str] = []
        for place, piece in enumerate(re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)):
            literal = place % 2 == 1
            if literal:
                number = int(piece)
                if number >= len(marked):
                    raise InvalidArgument("messages", "the text holds a noncharacter (U+FDD0)")
                piece = marked[number]
            whole.append(piece)
            if piece:
                first = add_special_tokens and not ids
                ids += self._tokenizer.encode(piece, add_special_tokens=first, allow_special_in_text=not literal)
        return "".join(whole), ids

    def _marked(self, value: Any, marked: list[str]) -> Any:
        """A copy in which special tokens' texts are numbers between marks."""
        if isinstance(value, str):
            if _OPEN in value or _CLOSE in value:
                raise InvalidArgument("messages", "the text holds a noncharacter (U+FDD0 or U+FDD1)")
            if self._special is None:
                return value

            def mark(found: re.Match[str]) -> str:
                marked.append(found[0])
                return f"{_OPEN}{len(marked) - 1}{_CLOSE}"

            return self._special.sub(mark, value)
        if isinstance(value, Mapping):
            return {self._marked(key, marked): self._marked(one, marked) for key, one in value.items()}
        if isinstance(value, list):
            return [self._marked(one, marked) for one in value]
        return value
