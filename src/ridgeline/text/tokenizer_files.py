"""What a checkpoint says about its tokenizer beside the vocabulary itself.

Knows the JSON files that Hugging Face checkpoints carry (tokenizer_config.json,
special_tokens_map.json, added_tokens.json, the chat template files) and which of them has the last
word. Must not know how text is encoded: it hands plain values to the codecs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.core.errors import CheckpointError


@dataclass(frozen=True)
class AddedTokenEntry:
    """A token that was added to a vocabulary after its training, with how it matches in a text."""

    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """The merged statements of all files in one directory."""

    tokenizer_class: str | None = None
    named_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token" → "<s>"
    other_special_tokens: tuple[str, ...] = ()
    added_tokens: Mapping[int, AddedTokenEntry] = field(default_factory=dict)
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    chat_template: str | None = None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one if there is no such file.

    Raises CheckpointError if the file is not UTF-8, not JSON or not an object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_settings(directory: Path) -> TokenizerSettings:
    """Reads whatever of the side files `directory` holds.

    Raises CheckpointError naming the file that is damaged.
    """
    path = directory / "tokenizer_config.json"
    config = read_json_object(path)
    special = read_json_object(directory / "special_tokens_map.json")
    # As in transformers: a config that lists its added tokens is of the newer kind and needs no
    # special_tokens_map.json beside it; in the older kind the map has the last word.
    merged = {**special, **config} if "added_tokens_decoder" in config else {**config, **special}
    merged = {key: value for key, value in merged.items() if value is not None}

    named = {
        key: content
        for key, value in merged.items()
        if key.endswith("_token") and (content := _content(value)) is not None
    }
    others: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = merged.get(key, [])
        if isinstance(listed, dict):  # the form with a name for each: {"image_token": "<image>"}
            named |= {name: content for name, value in listed.items() if (content := _content(value))}
        elif isinstance(listed, list):
            others += [content for value in listed if (content := _content(value))]

    return TokenizerSettings(
        tokenizer_class=merged.get("tokenizer_class"),
        named_tokens=named,
        other_special_tokens=tuple(others),
        added_tokens=_added_tokens(directory, config, special_texts={*named.values(), *others}),
        add_bos_token=_flag(path, config, "add_bos_token"),
        add_eos_token=_flag(path, config, "add_eos_token"),
        add_prefix_space=_flag(path, config, "add_prefix_space"),
        legacy=_flag(path, config, "legacy"),
        chat_template=_chat_template(directory, config),
    )


def _content(token: object) -> str | None:
    """A token is written as its text or as an object with a `content`; anything else is none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _flag(path: Path, config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} is {value!r}, expected true or false")
    return value


def _added_tokens(directory: Path, config: Mapping[str, Any], special_texts: set[str]) -> dict[int, AddedTokenEntry]:
    """By id, ascending; `added_tokens_decoder` of the config, else the older added_tokens.json."""
    added: dict[int, AddedTokenEntry] = {}
    path = directory / "tokenizer_config.json"
    try:
        if "added_tokens_decoder" in config:
            for token_id, entry in config["added_tokens_decoder"].items():
                flags = {flag: bool(entry[flag]) for flag in _MATCHING if flag in entry}
                added[int(token_id)] = AddedTokenEntry(str(entry["content"]), **flags)
        else:
            path = directory / "added_tokens.json"
            for content, token_id in read_json_object(path).items():
                special = content in special_texts
                added[int(token_id)] = AddedTokenEntry(content, special=special, normalized=not special)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the list of added tokens is not of the known form: {error!r}") from error
    return dict(sorted(added.items()))


_MATCHING = ("special", "normalized", "lstrip", "rstrip", "single_word")


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own has priority; of several named templates, "default" is the one."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not readable as UTF-8 text: {error}") from error
    for holder in (config, read_json_object(directory / "chat_template.json")):
        template = holder.get("chat_template")
        if isinstance(template, list):
            template = next(
                (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"),
                None,
            )
        elif isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None
