"""What a user sets (EngineConfig) and what becomes of it on a machine (Resolved): both frozen.

Knows names, limits and defaults, vLLM's where vLLM has the setting. It must not know devices: the facts
that "auto" depends on come in as plain values, and every choice keeps its reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.speculation import Speculation

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
LOAD_FORMATS = ("auto", "safetensors", "dummy")
KERNELS = ("auto", "reference", "torch", "triton", "cuda", "cpu")
ATTENTION = ("standard", "v1", "v2", "sm90", "decode", "triton", "cpu", "fused", "blocked", "reference")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; None and "auto" are decided at start and explained.

    model: a checkpoint directory or hub id; None is the embedded model.
    dtype: auto, float32, float16, bfloat16. device: auto, cpu, cuda, cuda:N.
    max_model_len: longest sequence, prompt and output (None: the model's own, if it fits).
    max_num_seqs: requests in a step. max_num_batched_tokens: tokens in a step.
    kv_cache_memory_bytes: size of the KV pool (None: what gpu_memory_utilization leaves).
    gpu_memory_utilization: share of the device's memory that the engine may use, (0, 1].
    block_size: tokens in a KV block, 16 to 256.
    enable_prefix_caching, enable_chunked_prefill, kv_cache: see docs; all on by default.
    scheduling_policy: fcfs, priority, static.
    load_format: auto, safetensors, or dummy (random weights made on the device).
    enforce_eager: no CUDA graphs: decode steps and short prompts run op by op as all others do.
    async_scheduling: plan and dispatch a step before the one before it is read, so that the host works while
        the device does (None: on CUDA).
    seed: of requests without one (None: drawn from the system).
    kernels: which family of kernels serves ("auto": the best that accepts).
    attention_backend: which kernel of attention serves, whatever `kernels` says: a rung of docs/attention.md,
        or several with commas between, of which each class of work takes the first that accepts.
    batch_invariant: insist that a row never depends on its neighbours, to the bit: a seeded request then gives the
        same tokens alone, in any batch, with its prompt whole or in chunks, computed or found in the prefix cache. The
        CPU kernels give that anyway. On a GPU the Triton kernels serve all matrix products and attention, in tiles and
        pieces of keys that no batch changes, which costs speed (docs/log.md) and a workspace that grows with
        max_num_seqs * max_model_len. What cannot give it (kernels or an attention_backend named beside it, float16 on
        a CPU) is refused.
    max_logprobs: most alternatives that a request may ask for.
    speculative_config: draft token trees and verify them (docs/trees.md): {"method": "tree" | "draft_model" | "ngram",
        "model": a checkpoint or several, "num_speculative_tokens": "auto" or a number, "tree": [k1, ..., km],
        "verification": "coupled" | "multi_step" | "target_only"}. Outputs are the same with and without; with the last
        two, those of requests without a seed have the same law.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 64
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool = True
    kv_cache: bool = True
    scheduling_policy: str = "fcfs"
    load_format: str = "auto"
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    seed: int | None = None
    kernels: str = "auto"
    attention_backend: str = "auto"
    batch_invariant: bool = False
    max_logprobs: int = 20
    speculative_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, tuple(DTYPES))
        object.__setattr__(self, "dtype", DTYPES[self.dtype])
        _choice("load_format", self.load_format, LOAD_FORMATS)
        _choice("kernels", self.kernels, KERNELS)
        if self.attention_backend != "auto":
            for name in str(self.attention_backend).split(","):
                if name not in ATTENTION:
                    raise InvalidArgument(
                        "attention_backend",
                        f"must be auto, or of {', '.join(ATTENTION)} (commas between several), not {name!r}",
                    )
        device = self.device if isinstance(self.device, str) else str(self.device)
        kind, _, index = device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise InvalidArgument("device", f"must be auto, cpu, cuda or cuda:N, not {self.device!r}")
        object.__setattr__(self, "device", device)
        for name, low, high in (
            ("max_model_len", 1, 1 << 31),
            ("max_num_seqs", 1, 1 << 16),
            ("max_num_batched_tokens", 1, 1 << 24),
            ("kv_cache_memory_bytes", 1, 1 << 50),
            ("block_size", 16, 256),
            ("max_logprobs", 0, 1 << 31),
        ):
            value = getattr(self, name)
            if value is None and name != "max_num_seqs":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InvalidArgument(name, f"must be an integer in [{low}, {high}], not {value!r}")
        if self.block_size % 16:
            raise InvalidArgument("block_size", f"must be a multiple of 16 in [16, 256], not {self.block_size}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise InvalidArgument("gpu_memory_utilization", f"must be in (0, 1], not {share!r}")
        for name in ("model", "tokenizer", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidArgument(name, f"must be a path or a name, not {value!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise InvalidArgument("seed", f"must be an integer, not {self.seed!r}")
        flags = (
            "enable_prefix_caching", "enable_chunked_prefill", "kv_cache", "enforce_eager", "async_scheduling",
            "batch_invariant",
        )  # fmt: skip
        for name in flags:
            if name in ("enable_prefix_caching", "async_scheduling") and getattr(self, name) is None:
                continue
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(name, f"must be true or false, not {getattr(self, name)!r}")
        if self.enable_prefix_caching and not self.kv_cache:
            raise InvalidArgument("enable_prefix_caching", "there is no prefix to share with kv_cache=False")
        if self.async_scheduling and not self.kv_cache:
            raise InvalidArgument("async_scheduling", "kv_cache=False computes each token from those before, once read")
        if self.speculation is not None and not self.kv_cache:
            raise InvalidArgument("speculative_config", "needs kv_cache=True: drafts stand behind what is cached")

    @property
    def speculation(self) -> Speculation | None:
        """`speculative_config`, checked. Raises InvalidArgument."""
        return None if self.speculative_config is None else Speculation.of(self.speculative_config)

    @property
    def rungs(self) -> dict[str, tuple[str, ...]]:
        """Kernels that were asked for by name: op -> names, best first."""
        return {} if self.attention_backend == "auto" else {"attention": tuple(self.attention_backend.split(","))}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """From names and values; an unknown name raises InvalidArgument with the nearest known one."""
        known = [one.name for one in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise InvalidArgument(name, f"is not a setting of the engine; {hint}")
        return cls(**values)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgument(name, f"must be one of {', '.join(allowed)}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What the engine runs with. reasons: setting -> why it is so, for every setting that was "auto"."""

    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    kv_cache: bool
    enforce_eager: bool
    async_scheduling: bool
    scheduling_policy: str
    seed: int
    max_logprobs: int
    batch_invariant: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MemoryLedger:
    """Where the memory goes, in bytes, decided before the first request.

    total_bytes: the device's; usable_bytes: what may be in use of it, by the engine and others together;
    weights, kv, activations (the largest step), graphs (captured steps), rest (what others hold, and
    libraries). These five are never more than usable_bytes; what is left of it stays free. kv_tokens: slots
    of the KV pool, in blocks of block_size.
    """

    total_bytes: int
    usable_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    rest_bytes: int
    kv_tokens: int
    bytes_per_token: int
    block_size: int
    graph_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """What nobody has claimed of usable_bytes."""
        claimed = self.weight_bytes + self.kv_bytes + self.activation_bytes + self.graph_bytes + self.rest_bytes
        return self.usable_bytes - claimed

    def fits(self, tokens: int) -> int:
        """How many requests of `tokens` tokens are resident at once, each in whole blocks of its own."""
        return self.kv_tokens // self.block_size // max(-(-tokens // self.block_size), 1)
