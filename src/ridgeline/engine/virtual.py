"""An engine without a device: the real scheduler and the real KV cache on a virtual clock.

Knows what build.py knows of schedulers and caches. It must not know models: a step takes the seconds it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ridgeline.core.clock import VirtualClock
from ridgeline.core.step import StepPlan
from ridgeline.engine.engine import Engine
from ridgeline.engine.priced_executor import PricedExecutor
from ridgeline.kv.cache import KVCache
from ridgeline.schedule import Scheduler, make_policy


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An engine's shape under vLLM's names. num_blocks: blocks of block_size tokens in the KV pool."""

    num_blocks: int
    block_size: int = 64
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    vocabulary: int = 32000


def build_virtual(
    setting: Setting, seconds: Callable[[StepPlan], float], host_s: Callable[[StepPlan], float] = lambda plan: 0.0
) -> Engine:
    """An Engine whose steps take seconds(plan) on its device and host_s(plan) around it.

    Raises DoesNotFit if the pool does not hold one request of max_model_len.
    """
    clock = VirtualClock()
    cache = KVCache(
        block_size=setting.block_size,
        num_blocks=setting.num_blocks,
        enable_prefix_caching=setting.enable_prefix_caching,
    )
    scheduler = Scheduler(
        cache,
        make_policy(setting.scheduling_policy),
        max_num_seqs=setting.max_num_seqs,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        max_model_len=setting.max_model_len,
        enable_chunked_prefill=setting.enable_chunked_prefill,
    )
    return Engine(scheduler, PricedExecutor(seconds, clock, setting.vocabulary, host_s), clock)
