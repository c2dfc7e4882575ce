"""What a server may be told: addresses, keys, and every limit. Tests set short ones.

Knows names, defaults and their meaning (docs/serving.md has the table). It must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ridgeline.core.errors import InvalidArgument

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server. Sizes in bytes, times in seconds.

    served_model_name: names that requests may give; the first one answers. api_keys: none means open.
    engine: settings of EngineConfig. faults: let /debug/fault break the engine (tests and soaks only).
    otlp_traces_endpoint: URL that takes OpenTelemetry's traces over HTTP.
    slo: objectives in seconds, by "ttft" and "tpot"; requests that would miss them are queued or refused.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    engine: Mapping[str, Any] = field(default_factory=dict)
    faults: bool = False
    log_level: str = "info"
    slo: Mapping[str, float] = field(default_factory=dict)
    otlp_traces_endpoint: str | None = None

    max_body_bytes: int = 16 * MIB
    max_body_chunks: int = 65_536
    body_timeout_s: float = 60.0
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    header_timeout_s: float = 10.0
    keep_alive_s: float = 5.0
    max_connections: int = 4096
    max_json_depth: int = 64
    max_json_values: int = 1 << 20

    max_n: int = 128
    max_best_of: int = 20
    max_prompts: int = 128
    max_messages: int = 4096
    max_tools: int = 128
    max_stop: int = 4
    max_stop_characters: int = 1024
    max_stop_token_ids: int = 256
    max_logit_bias: int = 1024
    max_bad_words: int = 256
    max_top_logprobs: int = 20
    max_logprobs: int = 5
    max_schema_bytes: int = 256 * 1024
    grammar_timeout_s: float = 2.0
    grammar_memory_bytes: int = 256 * MIB
    max_tool_text_bytes: int = 128 * 1024

    max_queued: int | None = None
    max_queued_tokens: int | None = None
    retry_after_s: int = 1
    request_timeout_s: float = 600.0
    queue_timeout_s: float | None = None
    stall_timeout_s: float = 60.0
    max_stream_bytes: int = MIB
    drain_timeout_s: float = 30.0

    watchdog_s: float = 60.0
    ready_silence_s: float = 2.0
    health_silence_s: float = 10.0
    start_timeout_s: float = 1800.0
    max_restarts: int = 5
    restart_window_s: float = 600.0
    backoff_s: float = 0.5
    most_backoff_s: float = 30.0
    max_replays: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None or not (name.startswith("max_") or name.endswith(("_s", "_bytes"))):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise InvalidArgument(name, f"must be a number from 0, not {value!r}")
        if not 0 <= self.port <= 65_535:
            raise InvalidArgument("port", f"must be in [0, 65535], not {self.port}")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidArgument("api_key", "must be printable ASCII without spaces, at least one character")
