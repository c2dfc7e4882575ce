"""`accept` in one launch: a program for each request, a lane for each node of its tree.

Knows rows, ancestor bits and slots. It must not know pages. What the host would walk from node to node is decided for
all nodes at once: those that bear the chosen token are a bitmask, and a node is accepted whose ancestors are all in it.
"""

import torch
import triton
import triton.language as tl

from ridgeline.kernels.triton.dependent import dependent, ready, starting
from ridgeline.ops.accept import accept
from ridgeline.ops.attention_call import WORD_BITS
from ridgeline.ops.op import cuda


@triton.jit(
    do_not_specialize=["nodes", "tree_stride"],
    do_not_specialize_on_alignment=["chosen", "ids", "parents", "positions", "slots", "tree", "starts", "tails"],
)
def _accept_kernel(
    chosen: tl.tensor,
    ids: tl.tensor,
    parents: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    tree: tl.tensor,
    starts: tl.tensor,
    tails: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    nodes: tl.tensor,
    tree_stride: tl.tensor,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    starting(EARLY)
    ready(EARLY)
    request = tl.program_id(0)
    tail = tl.load(tails + request)
    first = tl.load(starts + request + 1) - tail
    node = tl.arange(0, BLOCK)
    inside = node < tail
    row = first + node
    parent = tl.load(parents + row, mask=inside, other=-1)
    behind = tl.load(chosen + parent, mask=parent >= 0, other=-1)
    right = (parent >= 0) & (tl.load(ids + row, mask=inside, other=0) == behind)
    taken = inside
    for word in range((tail + 31) // 32):
        here = (node // 32 == word) & inside
        bit = tl.full((BLOCK,), 1, tl.int64) << (node % 32).to(tl.int64)
        wrong = tl.sum(tl.where(here & (right == 0), bit, 0), axis=0)
        ancestors = tl.load(tree + row * tree_stride + word, mask=inside, other=0).to(tl.int64)
        taken = taken & ((ancestors & wrong) == 0)
    depth = tl.load(positions + row, mask=inside, other=0) - tl.load(positions + first - 1, mask=tail > 0, other=0)
    moves = taken & (depth != node + 1)
    place = request.to(tl.int64) * nodes + depth - 1
    tl.store(source + place, tl.load(slots + row, mask=moves, other=0), mask=moves)
    tl.store(target + place, tl.load(slots + first + depth - 1, mask=moves, other=0), mask=moves)


@accept.kernel("triton", needs=cuda(80), invariant=True)
def accept_triton(
    chosen: torch.Tensor,
    ids: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tree: torch.Tensor,
    query_starts: torch.Tensor,
    tails: torch.Tensor,
    nodes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    requests = tails.shape[0]
    assert nodes <= WORD_BITS * tree.shape[1], "every node has a bit"
    source, target = torch.full((2, requests, nodes), -1, dtype=torch.int64, device=slots.device)
    if requests and nodes:
        _accept_kernel[(requests,)](
            chosen, ids, parents, positions, slots, tree, query_starts, tails, source, target, nodes, tree.stride(0),
            BLOCK=triton.next_power_of_2(nodes), num_warps=4, **dependent(slots.device),
        )  # fmt: skip
    return source, target
