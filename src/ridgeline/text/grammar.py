"""Grammars of outputs, each a JSON schema: compiled, checked and advanced.

Knows llguidance (Earley parsing over a lexer of derivatives; Microsoft, 2025) and a tokenizer's table of bytes. It
must not know requests or tensors: a constraint gives a bitmask and takes the token that was chosen.

A schema comes from a stranger. `check` is therefore run in a process that may be killed (text/grammar_child.py),
with limits of llguidance's own on top; engines compile only what passed there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import llguidance

from ridgeline.core.errors import InvalidArgument
from ridgeline.text.tokenizer import Tokenizer

MOST_COMPILED = 64
WHITESPACE = r"[ \n]{0,2}"
"""Between tokens of JSON: enough for how models write it, too little to go on for ever."""
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
}
_TOO_COMPLEX = ("too big", "too large", "too complex", "fuel", "limit", "too many", "exceed", "maximum")


class GrammarTooComplex(InvalidArgument):
    """A schema that is valid and takes too much to compile or to follow."""


def limits() -> llguidance.LLParserLimits:
    """What one grammar may take, in llguidance's own units."""
    return llguidance.LLParserLimits(**_LIMITS)


def compiled(schema: str) -> str:
    """llguidance's grammar for a JSON schema (JSON text). InvalidArgument("response_format") for what is none."""
    options: Any = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=options)
    except (ValueError, RecursionError) as error:
        raise refusal(str(error)) from None


def refusal(message: str) -> InvalidArgument:
    """What llguidance found wrong, as ours; its first line, cut."""
    first = message.strip().splitlines()[0] if message.strip() else "invalid"
    kind = GrammarTooComplex if any(word in message.lower() for word in _TOO_COMPLEX) else InvalidArgument
    return kind("response_format", f"the schema cannot be used: {first:.100}")


class Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        table = tokenizer.token_bytes
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id if tokenizer.eos_id is not None else width - 1
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [table.piece(token) for token in range(width)]
        self.special_token_ids = sorted(token for token in table.special_ids if token < width)

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(plain, add_special_tokens=False, allow_special_in_text=False)


class Grammars:
    """Compiles for one tokenizer, and keeps the most recent. width: of the logits. One thread at a time."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        self.width = width
        vocabulary = Vocabulary(tokenizer, width)
        wrapped = llguidance.TokenizerWrapper(vocabulary)
        self._tokenizer = llguidance.LLTokenizer(wrapped, n_vocab=width, eos_token=[vocabulary.eos_token_id])
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def check(self, schema: str) -> None:
        """Raises InvalidArgument for a schema that is invalid, impossible to fulfil, or too complex."""
        matcher = self._matcher(schema)
        mask = matcher.compute_bitmask()
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()) or not any(mask):
            raise refusal(matcher.get_error() or "nothing fulfils it")

    def constraint(self, schema: str, ends: Sequence[int]) -> SchemaConstraint:
        """A fresh constraint for one output. ends: tokens that end it, allowed where it may end."""
        return SchemaConstraint(self._matcher(schema).deep_copy(), ends, self.width)

    def _matcher(self, schema: str) -> Any:
        matcher = self._kept.get(schema)
        if matcher is None:
            matcher = llguidance.LLMatcher(self._tokenizer, compiled(schema), log_level=0, limits=limits())
            if matcher.is_error():
                raise refusal(matcher.get_error())
            self._kept[schema] = matcher
            if len(self._kept) > MOST_COMPILED:
                self._kept.popitem(last=False)
        self._kept.move_to_end(schema)
        return matcher


class SchemaConstraint:
    """A grammar's place in one output (core.request.Constraint)."""

    def __init__(self, matcher: Any, ends: Sequence[int], width: int) -> None:
        self._matcher = matcher
        self._ends = frozenset(ends)
        self._words = -(-width // 32)
        self._mask: bytes | None = None

    def mask(self) -> bytes:
        """Computed once a token. A grammar that has become too complex to follow allows its ends only."""
        if self._mask is None:
            matcher = self._matcher
            bits = bytearray(self._words * 4)
            if not matcher.is_stopped():
                bits[:] = matcher.compute_bitmask()[: len(bits)]
            if matcher.is_error() or matcher.is_accepting() or not any(bits):
                if matcher.is_error():
                    bits = bytearray(self._words * 4)
                for token in self._ends:
                    bits[token // 8] |= 1 << token % 8
            if not any(bits):
                bits[0] = 1  # there is no end to allow: what comes next ends the output in `accept`
            self._mask = bytes(bits)
        return self._mask

    def accept(self, token: int) -> bool:
        """Advances. True if the output is complete, or cannot become so any more."""
        self._mask = None
        if token in self._ends:
            return True
        if not self._matcher.consume_token(token):
            return True
        return bool(self._matcher.is_stopped())
