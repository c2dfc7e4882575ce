"""KV memory as numbers: how large a block is, who holds which blocks, what may be shared.

Knows block numbers, token ids and digests. Must not know tensors (`pages` alone does, and is not imported
here), nor who runs when: that is the scheduler's.
"""

from ridgeline.kv.cache import KVCache
from ridgeline.kv.layout import KVLayout

__all__ = ["KVCache", "KVLayout"]
