"""What a checkpoint recommends in generation_config.json: how to sample, and further ends of sequence.

Knows that file. It must not know engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ridgeline.core.errors import CheckpointError, InvalidArgument
from ridgeline.core.request import SamplingParams

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's generation_config.json, or nothing if it has none. Raises CheckpointError."""
    file = directory / "generation_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return values


def default_params(generation: Mapping[str, Any], directory: Path) -> SamplingParams:
    """SamplingParams() with the checkpoint's recommendations. Raises CheckpointError."""
    given = {name: generation[name] for name in FIELDS if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    try:
        return SamplingParams(**given)
    except InvalidArgument as error:
        raise CheckpointError(f"{directory / 'generation_config.json'}: {error}") from None


def end_ids(generation: Mapping[str, Any], directory: Path) -> list[int]:
    """The ends of sequence that generation_config.json names beside those of config.json. Raises CheckpointError."""
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        file = directory / "generation_config.json"
        raise CheckpointError(f"{file}: eos_token_id must be a token id or a list of them, not {value!r}")
    return ids
