"""What is computed: each op is its meaning in plain torch, its cost, its examples and its tolerance.

Importing this package fills the registry. It must not know which kernel serves an op.
"""

from ridgeline.ops.accept import accept
from ridgeline.ops.attention import attention
from ridgeline.ops.branch import branch
from ridgeline.ops.embed import embed
from ridgeline.ops.feed import feed
from ridgeline.ops.kv_move import kv_compact, kv_move
from ridgeline.ops.linear import linear
from ridgeline.ops.mlp import gate, gated_linear
from ridgeline.ops.moe import moe
from ridgeline.ops.norm import layer_norm, norm
from ridgeline.ops.op import REGISTRY, Op, Ops
from ridgeline.ops.propose import propose
from ridgeline.ops.restrict import restrict
from ridgeline.ops.rope import rope_kv_write
from ridgeline.ops.sample import adjust, sample, score
from ridgeline.ops.take import take
from ridgeline.ops.weight import Weight

__all__ = [
    "REGISTRY",
    "Op",
    "Ops",
    "Weight",
    "accept",
    "adjust",
    "attention",
    "branch",
    "embed",
    "feed",
    "gate",
    "gated_linear",
    "kv_compact",
    "kv_move",
    "layer_norm",
    "linear",
    "moe",
    "norm",
    "propose",
    "restrict",
    "rope_kv_write",
    "sample",
    "score",
    "take",
]
