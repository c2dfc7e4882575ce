"""Options that commands share, and how they become an LLM.

Knows option names (vLLM's). It must not know what a command prints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.speculation import METHODS

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Checkpoint directory or hub id; the embedded model if left out."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, prompt and output together.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Requests in a step.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Tokens in a step.")]
KVCacheMemoryBytes = Annotated[int | None, typer.Option(help="Size of the KV pool in bytes.")]
GPUMemoryUtilization = Annotated[float, typer.Option(help="Share of the GPU's memory to use.")]
BlockSize = Annotated[int, typer.Option(help="Tokens in a KV block, 16 to 256.")]
PrefixCaching = Annotated[
    bool | None, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Share KV of equal prefixes.")
]
ChunkedPrefill = Annotated[
    bool, typer.Option("--enable-chunked-prefill/--no-enable-chunked-prefill", help="Split long prompts over steps.")
]
SchedulingPolicy = Annotated[str, typer.Option(help="fcfs, priority or static.")]
LoadFormat = Annotated[str, typer.Option(help="auto, safetensors or dummy (random weights).")]
Kernels = Annotated[str, typer.Option(help="Family of kernels: auto, reference, torch, triton, cuda or cpu.")]
AttentionBackend = Annotated[
    str, typer.Option(help="Kernel of attention: auto, standard, v1, v2, sm90, decode, triton, cpu, fused or blocked.")
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option("--speculative-config", help='Draft token trees: JSON, {"method": "tree"}, or a method\'s name.'),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every setting with its reason, and where the memory goes.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw it: a PNG or SVG file, by its suffix.")]
CardFile = Annotated[Path | None, typer.Option("--card", help="Predict by what `ridgeline calibrate` measured.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def engine_settings(**values: Any) -> dict[str, Any]:
    """Options as settings of LLM; None means "not given" and is left out."""
    return {name: value for name, value in values.items() if value is not None}


def speculation(text: str | None) -> dict[str, Any] | None:
    """`--speculative-config` as a mapping: JSON, or the name of a method alone. InvalidArgument for anything else."""
    if text is None:
        return None
    if text in METHODS:
        return {"method": text}
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InvalidArgument("speculative_config", f"must be {', '.join(METHODS)} or a JSON object, not {text!r}")
    return values
