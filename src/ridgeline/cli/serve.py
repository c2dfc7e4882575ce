"""`ridgeline serve [MODEL]`: an OpenAI-compatible server.

Knows option names (vLLM's) and where keys come from. It must not know how anything is served (server/).
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ridgeline.cli import options
from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import InvalidArgument


def command(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint directory or hub id; the embedded model if left out.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must bear (repeatable; also RIDGELINE_API_KEYS, commas between)."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key a line.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name of the model in requests.")] = None,
    slo: Annotated[
        str | None, typer.Option(help="Objectives, ttft=500ms,tpot=50ms: who would miss them, waits.")
    ] = None,
    max_queued: Annotated[int | None, typer.Option(help="Outputs that may wait; 4 times max_num_seqs.")] = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds for requests in flight after SIGTERM.")] = 30.0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other limit: name=value (docs/serving.md has them).")
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="Where traces go: URL of an OpenTelemetry collector (OTLP over HTTP).")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    faults: Annotated[bool, typer.Option("--allow-faults", hidden=True)] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    block_size: options.BlockSize = 64,
    enable_prefix_caching: options.PrefixCaching = None,
    enable_chunked_prefill: options.ChunkedPrefill = True,
    scheduling_policy: options.SchedulingPolicy = "fcfs",
    load_format: options.LoadFormat = "auto",
    kernels: options.Kernels = "auto",
    attention_backend: options.AttentionBackend = "auto",
    speculative_config: options.SpeculativeConfig = None,
    seed: Annotated[int | None, typer.Option(help="Of requests without one.")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
) -> None:
    """Serve MODEL to OpenAI clients, on this machine only unless --host says otherwise."""
    engine = options.engine_settings(
        model=model,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        scheduling_policy=scheduling_policy,
        load_format=load_format,
        kernels=kernels,
        attention_backend=attention_backend,
        speculative_config=options.speculation(speculative_config),
        seed=seed,
        enforce_eager=enforce_eager,
    )
    EngineConfig.from_mapping(engine)
    values: dict[str, Any] = {
        "host": host,
        "port": port,
        "api_keys": _keys(api_key or [], api_key_file),
        "served_model_name": tuple(served_model_name or ()),
        "slo": _objectives(slo),
        "max_queued": max_queued,
        "request_timeout_s": request_timeout,
        "drain_timeout_s": drain_timeout,
        "otlp_traces_endpoint": otlp_traces_endpoint,
        "log_level": log_level,
        "faults": faults,
        "engine": engine,
    }
    if log_level not in ("debug", "info", "warning", "error"):
        raise InvalidArgument("log_level", f"must be debug, info, warning or error, not {log_level!r}")
    try:
        from ridgeline.server.serve import serve
        from ridgeline.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise InvalidArgument("serve", f"needs {error.name}: pip install 'ridgeline[serve]'") from None
    values.update(_others(setting or [], ServerSettings))
    sys.exit(serve(ServerSettings(**values)))


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    keys = [*given, *(one for one in os.environ.get("RIDGELINE_API_KEYS", "").split(",") if one)]
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            raise InvalidArgument("api_key_file", f"{file} cannot be read") from None
    return tuple(dict.fromkeys(keys))


def _objectives(text: str | None) -> dict[str, float]:
    if not text:
        return {}
    from ridgeline.workload.measure import objectives_named

    return dict(objectives_named(text))


def _others(given: list[str], kind: Any) -> dict[str, Any]:
    """Limits by name. InvalidArgument for an unknown one, or a value of another type."""
    known = {
        one.name: one.type for one in fields(kind) if one.name.startswith("max_") or one.name.endswith(("_s", "_bytes"))
    }
    values: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if name not in known or not equals:
            raise InvalidArgument("set", f"{one!r} must be name=value, of {', '.join(sorted(known))}")
        try:
            values[name] = float(value) if "float" in str(known[name]) else int(value)
        except ValueError:
            raise InvalidArgument(name, f"must be a number, not {value!r}") from None
    return values
