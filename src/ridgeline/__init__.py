"""ridgeline: an LLM inference engine that runs at the limit of the hardware and knows what that limit is.

>>> from ridgeline import LLM, SamplingParams
>>> llm = LLM()
>>> llm.generate("def add(a, b):", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.core.config import EngineConfig
    from ridgeline.core.request import CompletionOutput, RequestOutput, SamplingParams
    from ridgeline.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "ridgeline.llm",
    "EngineConfig": "ridgeline.core.config",
    "SamplingParams": "ridgeline.core.request",
    "RequestOutput": "ridgeline.core.request",
    "CompletionOutput": "ridgeline.core.request",
}


def __getattr__(name: str) -> Any:
    """Public names load what they need when they are first used: `import ridgeline` is instant."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ridgeline' has no attribute {name!r}")
