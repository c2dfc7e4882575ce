"""Which nodes of each request's draft tree the chosen tokens follow, and where their keys and values belong.

Knows rows, ancestor bits and slots. It must not know who drafted, nor pages: what it answers is `kv_compact`'s input.
The walk of TokenTree.walk, for all requests at once and without the host: a node is accepted if it and all of its
ancestors bear the token that was chosen behind their parents.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ridgeline.core.cost import Cost
from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.ops.attention_call import WORD_BITS
from ridgeline.ops.op import Tolerance, cuda, op
from ridgeline.ops.weight import nbytes


@op("movement", by_rows=True, float32=Tolerance(0, 0))
def accept(
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
    """Slots that move when a request's accepted nodes close their ranks: source and target, [B, nodes] int64 each.

    chosen: [T] int64, the token chosen behind each row; ids, positions, slots: [T] int64 of each row; parents: [T]
    int64, the row that a node follows, negative for rows that are no nodes. tree: [T, words] int32, query_starts:
    [B + 1] int32 and tails: [B] int32 as in `attention`, 32 * words >= nodes >= every tail; the row before a tail is
    its root.
    Column k is of the accepted node at depth k + 1: its slot and that of the request's node k, or -1 twice, if there is
    no such node or it lies there already.
    """
    requests = tails.shape[0]
    shape = (requests, nodes)
    if chosen.device.type == "meta":
        return slots.new_empty(shape), slots.new_empty(shape)
    node = torch.arange(nodes, device=chosen.device)
    first = (query_starts[1:] - tails).long()[:, None]
    inside = node < tails[:, None]
    row = (first + node).clamp(max=chosen.shape[0] - 1)
    followed = parents >= 0
    right = followed & (ids == chosen[parents.clamp(min=0)])
    wrong = ~(right[row] & inside)
    seen = (tree[row][:, :, node // WORD_BITS] >> (node % WORD_BITS)) & 1
    taken = ~((seen.bool() & wrong[:, None, :] & inside[:, None, :]).any(-1) | wrong)
    depth = positions[row] - positions[(first - 1).clamp(min=0)]
    # One column more, for the nodes that are not taken.
    column = torch.where(taken, depth - 1, nodes)
    source = slots.new_full((requests, nodes + 1), -1).scatter(1, column, slots[row])[:, :nodes]
    target = slots[row]
    moves = (source >= 0) & (source != target)
    return torch.where(moves, source, -1), torch.where(moves, target, -1)


@accept.cost
def _(
    chosen: torch.Tensor,
    ids: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tree: torch.Tensor,
    query_starts: torch.Tensor,
    tails: torch.Tensor,
    nodes: int,
) -> Cost:
    moved = 2 * 8 * tails.shape[0] * nodes
    return Cost(read_bytes=nbytes(chosen, ids, parents, positions, slots, query_starts, tails), write_bytes=moved)


def accept_inputs(
    device: Any, trees: list[TokenTree | None], chosen: list[list[int]], room: int = 0
) -> Mapping[str, Any]:
    """Arguments for requests with these trees, `chosen` behind each of their rows, and `room` rows of nobody. Slots
    are in any order; bits past the tails are set."""
    ids: list[int] = []
    parents: list[int] = []
    positions: list[int] = []
    bits: list[list[int]] = []
    starts = [0]
    tails = [0 if tree is None else len(tree) for tree in trees]
    words = max(1, -(-max(tails) // WORD_BITS))
    for request, tree in enumerate(trees):
        root, position = len(ids), 3 + 5 * request
        ids.append(1)
        parents.append(-1)
        positions.append(position)
        bits.append([-1] * words)
        for node in range(tails[request]):
            assert tree is not None
            ids.append(tree.tokens[node])
            parents.append(root + 1 + tree.parents[node])
            positions.append(position + tree.depths[node])
            beyond = (1 << WORD_BITS * words) - (1 << len(tree))
            bits.append(array("i", (tree.ancestors[node] | beyond).to_bytes(WORD_BITS * words // 8, "little")).tolist())
        starts.append(len(ids))
    total = len(ids) + room
    numbers = {
        "chosen": [token for one in chosen for token in one] + [1] * room,
        "ids": ids + [1] * room,
        "parents": parents + [-1] * room,
        "positions": positions + [0] * room,
        "slots": torch.randperm(2 * total)[:total].tolist(),
    }
    return {
        **{name: torch.tensor(values, device=device) for name, values in numbers.items()},
        "tree": torch.tensor(bits + [[-1] * words] * room, dtype=torch.int32, device=device),
        "query_starts": torch.tensor(starts, dtype=torch.int32, device=device),
        "tails": torch.tensor(tails, dtype=torch.int32, device=device),
        "nodes": WORD_BITS * words if room else max(max(tails), 1),
    }


@accept.examples
def _(device: Any, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
    for sizes, room in (((1,), 0), ((5, 0, 31), 4), ((70, 3), 9), ((256,), 0)):
        trees: list[TokenTree | None] = []
        chosen: list[list[int]] = []
        for size in sizes:
            sketch = Sketch()
            for number in range(size):
                parent = ROOT if number == 0 else int(torch.randint(max(number - 4, 0), number, ()))
                sketch.add(number, parent, 0.0)
            tree = sketch.tree()[0] if size else None
            trees.append(tree)
            # Behind every row the token of one of its children is chosen, if it has any.
            rows = [[] if tree is None else tree.children(node) for node in range(ROOT, size)]
            chosen.append([tree.tokens[one[-1]] if tree is not None and one else 999 for one in rows])
        yield accept_inputs(device, trees, chosen, room)


accept.kernel("torch", needs=cuda(0), invariant=True)(accept.reference)
