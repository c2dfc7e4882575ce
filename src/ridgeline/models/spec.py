"""What a config.json says, in our words: one frozen ModelSpec whatever the spelling.

Knows the spellings of Transformers 4 and 5. It must not know how a model is computed or where weights
lie; what differs between families is in their files (llama.py, opt.py …).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgeline.core.errors import CheckpointError, UnsupportedModel

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: its base and how it is stretched beyond the trained length.

    original_positions: length the model was trained at (llama3 and yarn may say another than the config's
    own); the other fields are those of the paper or release that introduced the kind (llama3: Llama 3.1;
    yarn: Peng et al., 2309.00071).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture's shape: experts, how many a token uses, their inner width, which layers are sparse."""

    count: int
    per_token: int
    intermediate: int
    renormalize: bool
    sparse_layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer's shape. Sizes count elements; windows are one a layer (None: full)."""

    architecture: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    activation: str
    norm_eps: float
    max_positions: int
    dtype: str
    tied: bool
    windows: tuple[int | None, ...]
    rope: Rope | None = None
    norm: str = "rms"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    position_offset: int | None = None
    experts: Experts | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


class Fields:
    """Typed reading of a config.json, with errors that name the key and the file."""

    def __init__(self, values: Mapping[str, Any], origin: str = "config.json") -> None:
        self.values = values
        self.origin = origin

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of `names` that is there and not null, as an integer >= least."""
        name, value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CheckpointError(f"{self.origin}: {name} must be an integer >= {least}, not {value!r}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        name, value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{self.origin}: {name} must be a number, not {value!r}")
        return float(value)

    def text(self, *names: str, default: str | None = None) -> str:
        name, value = self._first(names, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.origin}: {name} must be a string, not {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.origin}: {name} must be true or false, not {value!r}")
        return value

    def maybe(self, name: str) -> Any:
        return self.values.get(name)

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer or a list of them; () if the key is absent or null."""
        value = self.values.get(name)
        several = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in several):
            raise CheckpointError(f"{self.origin}: {name} must be integers >= 0, not {value!r}")
        return tuple(several)

    def over(self, **defaults: Any) -> Fields:
        """The same fields with a family's own defaults for keys that are not there (null is there)."""
        return Fields({**defaults, **self.values}, self.origin)

    def _first(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        if default is None:
            raise CheckpointError(f"{self.origin}: {names[0]} is missing")
        return names[0], default


def read_config(path: Path) -> dict[str, Any]:
    """A config.json (or a directory that holds one) as a mapping. CheckpointError if unreadable."""
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a checkpoint needs a config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return values


def head_fields(fields: Fields) -> tuple[int, int, int, int]:
    """(hidden, heads, kv_heads, head_dim) of the Llama spelling; head_dim may be absent or null."""
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{fields.origin}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if fields.maybe("head_dim") is None and hidden % heads:
        raise CheckpointError(f"{fields.origin}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return hidden, heads, kv_heads, fields.integer("head_dim", default=hidden // heads)


def experts_of(
    fields: Fields, count: tuple[str, ...], intermediate: int, renormalize: bool, sparse: frozenset[int]
) -> Experts:
    """A mixture; `count` are the names under which the number of experts may stand."""
    experts, used = fields.integer(*count), fields.integer("num_experts_per_tok")
    if used > experts:
        raise CheckpointError(f"{fields.origin}: num_experts_per_tok {used} is more than the {experts} experts")
    return Experts(experts, used, intermediate, renormalize, sparse)


def dtype_name(fields: Fields) -> str:
    """ "float32", "float16" or "bfloat16", from `dtype` (Transformers 5) or `torch_dtype` (4)."""
    name = fields.text("dtype", "torch_dtype", default="float32").removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise UnsupportedModel(f"{fields.origin}: dtype {name} is not supported (float32, float16, bfloat16)")
    return name


def token_ids(fields: Fields) -> tuple[int | None, tuple[int, ...]]:
    """(bos id, end-of-sequence ids)."""
    bos = fields.integer("bos_token_id", least=0) if fields.maybe("bos_token_id") is not None else None
    return bos, fields.integers("eos_token_id")


def rope_of(fields: Fields, max_positions: int) -> Rope:
    """Rotary settings from `rope_parameters` (Transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    key = "rope_parameters" if fields.maybe("rope_parameters") is not None else "rope_scaling"
    settings: Any = fields.maybe(key) or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{fields.origin}: {key} must be an object, not {settings!r}")
    inner = Fields(settings, f"{fields.origin}: rope")
    kind = inner.text("rope_type", "type", default="default")
    if kind not in ROPE_KINDS or any(isinstance(value, Mapping) for value in settings.values()):
        raise UnsupportedModel(
            f"{fields.origin}: rotary embedding of type {kind!r} is not supported; {', '.join(ROPE_KINDS)} are"
        )
    if inner.number("partial_rotary_factor", default=fields.number("partial_rotary_factor", default=1.0)) != 1:
        raise UnsupportedModel(f"{fields.origin}: partial_rotary_factor other than 1 is not supported")
    original = max_positions
    if kind in ("llama3", "yarn"):
        length = "original_max_position_embeddings"
        original = fields.integer(length, default=inner.integer(length, default=max_positions))
    truncate = inner.flag("truncate", True)
    optional = {
        name: None if inner.maybe(name) is None else inner.number(name)
        for name in ("attention_factor", "mscale", "mscale_all_dim")
    }
    factor = 1.0
    if kind == "yarn" and inner.maybe("factor") is None:
        factor = max_positions / original
    elif kind != "default":
        factor = inner.number("factor")
    return Rope(
        theta=inner.number("rope_theta", default=fields.number("rope_theta", default=10000.0)),
        kind=kind,
        factor=factor,
        original_positions=original,
        low_frequency=inner.number("low_freq_factor", default=1.0),
        high_frequency=inner.number("high_freq_factor", default=4.0),
        beta_fast=inner.number("beta_fast", default=32.0),
        beta_slow=inner.number("beta_slow", default=1.0),
        truncate=truncate,
        **optional,
    )


def window_of(fields: Fields) -> int | None:
    """`sliding_window`, None if there is none."""
    return None if fields.maybe("sliding_window") is None else fields.integer("sliding_window")


def windows_of(fields: Fields, layers: int, window: int | None, first_windowed: int = 0) -> tuple[int | None, ...]:
    """Each layer's window: from `layer_types` if the file has it, else `window` from a first layer on."""
    kinds = fields.maybe("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise CheckpointError(f"{fields.origin}: layer_types must be a list, not {kinds!r}")
    if kinds is None or window is None:
        return tuple(window if layer >= first_windowed else None for layer in range(layers))
    if len(kinds) != layers:
        raise CheckpointError(f"{fields.origin}: layer_types names {len(kinds)} layers, the model has {layers}")
    unknown = sorted({str(kind) for kind in kinds if kind not in ("full_attention", "sliding_attention")})
    if unknown:
        raise UnsupportedModel(f"{fields.origin}: layer_types {', '.join(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def architecture_of(values: Mapping[str, Any], known: Mapping[str, Any], origin: str) -> str:
    """The one supported architecture that a config names. UnsupportedModel lists what is supported."""
    if values.get("auto_map"):
        code = values["auto_map"]
        if not any(name in known for name in values.get("architectures") or ()):
            raise UnsupportedModel(
                f"{origin}: needs code from the checkpoint (auto_map {code!r}), which ridgeline never runs; "
                f"supported architectures: {', '.join(known)}"
            )
    names = values.get("architectures") or []
    for name in names:
        if name in known:
            return name
    named = ", ".join(map(str, names)) or "none"
    near = difflib.get_close_matches(named, known, n=1)
    raise UnsupportedModel(
        f"{origin}: architecture {named} is not supported; supported: {', '.join(known)}"
        + (f" (did you mean {near[0]}?)" if near else "")
    )
