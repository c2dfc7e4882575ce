"""Decode steps, and passes over draft trees, at a few fixed sizes, captured once as CUDA graphs and replayed.

Knows how a step runs on inputs at fixed places, and how to capture it. It must not know scheduling, nor
which kernels serve. A step of n requests runs at the smallest size that holds them; the rows beyond are padding
(run/places.py), a cost that the step's result names.

A size has two graphs. The first goes from ids to final hidden states; the second from hidden states to chosen
tokens. Rows whose token takes more than that (cuts of the distribution, penalties, forbidden tokens,
log-probabilities) leave the second one out: their logits are computed as in any other step.

Passes (PassGraphs) are of requests with one or a few new tokens and a tree each, or none. Their second graph either
verifies (choose, walk, move what was accepted to where it belongs: all on the device) or drafts (the best few tokens
behind every row).

All sizes share one pool of memory for what lies between two kernels, since no two of them ever run at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import torch

from ridgeline.core.step import UNREAD, Chunk, Sampling, Spans
from ridgeline.core.tree import MOST_NODES
from ridgeline.kv.pages import Pages
from ridgeline.models.batch import Batch
from ridgeline.models.decoder import Decoder
from ridgeline.ops import Ops
from ridgeline.ops.attention_call import WORD_BITS
from ridgeline.run.capture import Works, capture_each, run
from ridgeline.run.places import (
    Fields,
    PassFields,
    PassSize,
    PassStaging,
    Staging,
    layout,
    on_device,
    pass_layout,
    pass_on_device,
)
from ridgeline.run.transfer import to_device

FINEST = 8
"""Sizes above 8 are multiples of this, and no further apart than a quarter of the power of two below them."""


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Numbers of rows to capture for steps of at most `most` requests: 1, 2, 4, 8, 16, 24, 32, ... and `most`.

    Above 8, less than a fifth of a step, or fewer than 8 rows, is padding.
    """
    sizes = [1]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(min(last + (last if last < FINEST else max(FINEST, (1 << (last.bit_length() - 1)) // 4)), most))
    return tuple(sizes)


ROWS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Of a pass, all requests together."""

REQUESTS = (1, 8, 64, 256)
"""Of a pass, at most. Those without rows cost a search in a few kernels, so there need not be many sizes."""


def pass_sizes_up_to(most_requests: int, most_rows: int) -> tuple[PassSize, ...]:
    """Sizes to capture for passes of at most so many requests, new tokens and nodes included in their rows.

    Of each number of requests those that the one below does not serve: with a node at least, beside a token each.
    """
    most_requests, most_rows = min(most_requests, REQUESTS[-1]), min(most_rows, ROWS[-1])
    rows = [one for one in ROWS if one < most_rows] + [most_rows]
    requests = [one for one in REQUESTS if one < most_requests] + [most_requests]
    found, below = [], 0
    for count in requests:
        found += [PassSize(one, count) for one in rows if one > below + 1]
        below = count
    return tuple(sorted(found))


def holding(sizes: Sequence[PassSize], rows: int, requests: int) -> Iterator[PassSize]:
    """Those of ascending sizes that hold so many rows of so many requests, fewest rows first."""
    return (size for size in sizes[bisect_left(sizes, PassSize(rows, requests)) :] if size.requests >= requests)


class Side(Protocol):
    """The host's side of one size (run/places.py)."""

    nbytes: int

    def forget(self) -> None: ...


Written = TypeVar("Written")
OneSide = TypeVar("OneSide", bound=Side)


class Inputs:
    """The inputs of steps of all sizes of a kind: a stretch of memory on the device, at whose beginning each size lies,
    and two on the host that take turns."""

    TURNS = 2
    """One may still be on its way to the device while the other is written."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.device = device
        self.memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.host = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(self.TURNS)]
        self._sent: list[torch.cuda.Event | None] = [None] * self.TURNS
        self._writer: list[Side | None] = [None] * self.TURNS
        self._turn = 0

    def send(self, sides: Sequence[OneSide], fill: Callable[[OneSide], Written]) -> Written:
        """Let one of a size's sides (one a turn) be filled, and copy it to the device without waiting for that."""
        turn = self._turn = (self._turn + 1) % self.TURNS
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()
        side = sides[turn]
        if self._writer[turn] is not side:
            self._writer[turn] = side
            side.forget()
        written = fill(side)
        to_device(self.memory[: side.nbytes], self.host[turn][: side.nbytes])
        if self.device.type == "cuda":
            sent = self._sent[turn] = sent or torch.cuda.Event()
            sent.record(torch.cuda.current_stream(self.device))
        return written

    def clear(self, sides: Sequence[Side]) -> None:
        """Padding alone, before a capture."""
        side = self._writer[0] = sides[0]
        side.forget()
        to_device(self.memory[: side.nbytes], self.host[0][: side.nbytes])


@dataclass(slots=True)
class _Size:
    """One captured size: its device inputs, its graphs (None where nothing is captured), its host sides by turn."""

    rows: int
    fields: Fields
    batch: Batch
    staging: tuple[Staging, ...]
    forward: torch.cuda.CUDAGraph | None = None
    choice: torch.cuda.CUDAGraph | None = None


@dataclass(slots=True)
class Replayed:
    """A step that has been launched: how many rows were padding, and its n tokens [n] on the device or None, if
    they are still to be chosen from `hidden` [n, D]."""

    padding: int
    hidden: torch.Tensor
    tokens: torch.Tensor | None


class DecodeGraphs:
    """Decode steps of a model at fixed sizes.

    sizes: rows of each, ascending. width: blocks of a request's table, enough for its longest sequence.
    Nothing is captured until `capture` is called; until then, and on devices without graphs, the same steps
    run op by op.
    """

    def __init__(
        self,
        model: Decoder,
        pages: Pages,
        ops: Ops,
        device: torch.device,
        block_size: int,
        sizes: Sequence[int],
        width: int,
    ) -> None:
        self.model, self.pages, self.ops, self.device = model, pages, ops, device
        self.sizes = tuple(sizes)
        most, spec = self.sizes[-1], model.spec
        self._inputs = Inputs(layout(most, width)[1], device)
        starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(most, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(most, spec.hidden, dtype=model.store.dtype, device=device)
        self._zeros = torch.zeros(most, dtype=torch.int64, device=device)
        self._floats = torch.zeros(most, dtype=torch.float32, device=device)
        self._sizes: dict[int, _Size] = {}
        for rows in self.sizes:
            fields = on_device(self._inputs.memory, rows, width)
            batch = Batch(
                spans=Spans((1,) * rows, (width * block_size,) * rows),
                kind="decode",
                ids=fields.ids,
                positions=fields.positions,
                slots=fields.slots,
                block_tables=fields.tables,
                query_starts=starts[: rows + 1],
                lengths=fields.lengths,
                rows=None,
            )
            staging = tuple(Staging(host, rows, width, block_size) for host in self._inputs.host)
            self._sizes[rows] = _Size(rows, fields, batch, staging)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture all sizes, as capture_each does."""
        sizes = [self._sizes[rows] for rows in reversed(self.sizes)]

        def ready(size: _Size) -> Works:
            self._inputs.clear(size.staging)
            return partial(self._forward, size), partial(self._choose, size)

        for size, graphs in zip(sizes, capture_each(self.device, sizes, ready, progress)):
            size.forward, size.choice = graphs

    def release(self) -> None:
        """Give the graphs and their memory back."""
        for size in self._sizes.values():
            size.forward = size.choice = None

    def serves(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one of decoding that fits: one new token each, no scores of prompts."""
        return len(chunks) <= self.sizes[-1] and all(
            len(chunk.token_ids) == 1 and chunk.prompt_logprobs is None and chunk.tree is None for chunk in chunks
        )

    def launch(self, chunks: Sequence[Chunk], places: Mapping[str, int]) -> Replayed:
        """Start a step that is served: row i of it is chunk i. `places` as in Staging.fill."""
        count = len(chunks)
        size = self._sizes[self.sizes[bisect_left(self.sizes, count)]]
        plain = self._inputs.send(size.staging, lambda side: side.fill(chunks, places))
        run(size.forward, self._forward, size)
        tokens = None
        if plain:
            run(size.choice, self._choose, size)
            tokens = self.sampled[:count]
        return Replayed(size.rows - count, self.hidden[:count], tokens)

    def _forward(self, size: _Size) -> None:
        """Ids to `self.hidden`."""
        fields, batch = size.fields, size.batch
        ids = self.ops.feed(fields.ids, fields.sources, self.sampled, self.model.spec.vocabulary)
        hidden = self.model.forward(replace(batch, ids=ids), self.pages.keys, self.pages.values, self.ops)
        self.hidden[: size.rows].copy_(hidden)

    def _choose(self, size: _Size) -> None:
        """`self.hidden` to `self.sampled`: greedy rows and warm ones, none of them cut."""
        rows, fields = size.rows, size.fields
        logits = self.model.logits(self.hidden[:rows], self.ops)
        zeros, floats = self._zeros[:rows], self._floats[:rows]
        chosen = self.ops.sample(
            logits, fields.temperature, zeros, floats, floats, fields.seeds, fields.next, False, False
        )
        self.sampled[:rows].copy_(chosen)


@dataclass(slots=True)
class _Pass:
    """One captured size of a pass; see _Size."""

    size: PassSize
    nodes: int
    fields: PassFields
    batch: Batch
    staging: tuple[PassStaging, ...]
    forward: torch.cuda.CUDAGraph | None = None
    choice: torch.cuda.CUDAGraph | None = None


@dataclass(slots=True)
class Passed:
    """A pass that has been launched, t rows long: how many more were padding, and on the device final hidden states
    [t, D] and what the second graph made of them, unless some row takes more than its logits.

    tokens: [t] chosen, if passes verify: what was accepted lies where it belongs by then. proposed, chances: [t,
    children] tokens and probabilities, if they draft. They are overwritten by the next pass.
    """

    padding: int
    hidden: torch.Tensor
    tokens: torch.Tensor | None = None
    proposed: torch.Tensor | None = None
    chances: torch.Tensor | None = None


class PassGraphs:
    """Passes of a model over a few new tokens and the tree of each request, at fixed sizes.

    sizes: in any order. width: blocks of a request's table, enough for its longest sequence. children: how many
    tokens a draft model proposes behind each row; None for a target, which verifies.
    Until `capture` is called, and on devices without graphs, the same passes run op by op.
    """

    def __init__(
        self,
        model: Decoder,
        pages: Pages,
        ops: Ops,
        device: torch.device,
        block_size: int,
        sizes: Sequence[PassSize],
        width: int,
        children: int | None = None,
    ) -> None:
        self.model, self.pages, self.ops, self.device = model, pages, ops, device
        self.children = None if children is None else min(children, model.spec.vocabulary)
        windows = [window for window in model.spec.windows if window is not None]
        # A window must hold a tree's whole mask: ops/attention_call.py.
        self.most_nodes = min([MOST_NODES, *(window // WORD_BITS * WORD_BITS for window in windows)])
        self.sizes = tuple(sorted(sizes)) if self.most_nodes else ()
        rows = max((one.rows for one in self.sizes), default=1)
        total = max((pass_layout(one, one.words(self.most_nodes), width)[1] for one in self.sizes), default=0)
        self._inputs = Inputs(total, device)
        self.hidden = torch.zeros(rows, model.spec.hidden, dtype=model.store.dtype, device=device)
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=device)
        self.proposed = torch.zeros(rows, self.children or 1, dtype=torch.int64, device=device)
        self.chances = torch.zeros(rows, self.children or 1, dtype=torch.float32, device=device)
        self._zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self._floats = torch.zeros(rows, dtype=torch.float32, device=device)
        self._passes = {one: self._placed(one, width, block_size) for one in self.sizes}
        self._asked: tuple[Sequence[Chunk], PassSize | None] | None = None

    def _placed(self, size: PassSize, width: int, block_size: int) -> _Pass:
        nodes, words = size.nodes(self.most_nodes), size.words(self.most_nodes)
        fields = pass_on_device(self._inputs.memory, size, words, width)
        none = (0,) * size.requests
        batch = Batch(
            # The host's view is for checks alone: all rows and the longest tree as the first request's.
            spans=Spans((size.rows, *none), (width * block_size, *none), ((1,) * nodes, *((),) * size.requests)),
            kind="tree",
            ids=fields.ids,
            positions=fields.positions,
            slots=fields.slots,
            block_tables=fields.tables,
            query_starts=fields.starts,
            lengths=fields.lengths,
            rows=None,
            tree=fields.tree,
            tails=fields.tails,
        )
        staging = tuple(PassStaging(host, size, words, width, block_size) for host in self._inputs.host)
        return _Pass(size, nodes, fields, batch, staging)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture all sizes, as capture_each does."""
        passes = [self._passes[size] for size in reversed(self.sizes)]

        def ready(one: _Pass) -> Works:
            self._inputs.clear(one.staging)
            return partial(self._forward, one), partial(self._choose, one)

        for one, graphs in zip(passes, capture_each(self.device, passes, ready, progress)):
            one.forward, one.choice = graphs

    def release(self) -> None:
        """Give the graphs and their memory back."""
        for one in self._passes.values():
            one.forward = one.choice = None

    def size_for(self, chunks: Sequence[Chunk]) -> PassSize | None:
        """The smallest size that holds these, fewest rows first; None if there is none."""
        if self._asked is None or self._asked[0] is not chunks:  # whoever asks launches them next
            trees = [0 if chunk.tree is None else len(chunk.tree.tokens) for chunk in chunks]
            rows, nodes = sum([len(chunk.token_ids) for chunk in chunks]) + sum(trees), max(trees, default=0)
            holders = holding(self.sizes, rows, len(chunks))
            self._asked = chunks, next((size for size in holders if self._passes[size].nodes >= nodes), None)
        return self._asked[1]

    def serves(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one of verification that fits: a known token and perhaps a tree each, whose rows are all
        chosen, no scores of prompts."""
        return self.size_for(chunks) is not None and all(
            len(chunk.token_ids) == 1
            and chunk.token_ids[0] != UNREAD
            and chunk.sampling is not None
            and chunk.prompt_logprobs is None
            for chunk in chunks
        )

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk], settings: Iterable[tuple[int, Sampling]], whole: bool = True) -> Passed:
        """Start a pass for which there is a size: the rows of chunk after chunk, its tokens and then its nodes.

        settings: (row, how the token behind it is chosen), of the rows for which that matters. whole: False leaves
        the second graph out.
        """
        size = self.size_for(chunks)
        assert size is not None, "no size holds this pass"
        one, count = self._passes[size], sum(chunk.new for chunk in chunks)
        plain = self._inputs.send(
            one.staging, lambda side: side.fill(chunks, settings, drafts=self.children is not None)
        )
        run(one.forward, self._forward, one)
        passed = Passed(size.rows - count, self.hidden[:count])
        if whole and plain:
            run(one.choice, self._choose, one)
            if self.children is None:
                passed.tokens = self.sampled[:count]
            else:
                passed.proposed, passed.chances = self.proposed[:count], self.chances[:count]
        return passed

    def _forward(self, one: _Pass) -> None:
        """Ids to `self.hidden`."""
        hidden = self.model.forward(one.batch, self.pages.keys, self.pages.values, self.ops)
        self.hidden[: one.size.rows].copy_(hidden)

    def _choose(self, one: _Pass) -> None:
        """`self.hidden` to `self.sampled`, and accepted slots to their places; or to `self.proposed`."""
        rows, fields, ops = one.size.rows, one.fields, self.ops
        logits = self.model.logits(self.hidden[:rows], ops)
        if self.children is not None:
            proposed, chances = ops.propose(logits, fields.temperature, fields.seeds, fields.next, False, self.children)
            self.proposed[:rows].copy_(proposed)
            self.chances[:rows].copy_(chances)
            return
        zeros, floats = self._zeros[:rows], self._floats[:rows]
        chosen = ops.sample(logits, fields.temperature, zeros, floats, floats, fields.seeds, fields.next, False, False)
        self.sampled[:rows].copy_(chosen)
        source, target = ops.accept(
            chosen, fields.ids, fields.parents, fields.positions, fields.slots, fields.tree, fields.starts,
            fields.tails, one.nodes,
        )  # fmt: skip
        ops.kv_compact([*self.pages.keys, *self.pages.values], source, target)
