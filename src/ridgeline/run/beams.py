"""Drafting several levels of trees without the host: a beam of rows for each request, level after level on the device.

Knows how a draft model runs on inputs at fixed places, and how to capture it. It must not know who decides on trees.
A draft begins with an ordinary pass (run/graphs.py), whose rows catch up with the text and propose the first level.
Each level behind it is one replay: the beam's rows are computed, children are proposed behind them, and `branch`
chooses among those the rows of the next level. The host reads the proposals of all levels at the end, once. Before
that it looks only at how likely the rows of every other level are, two levels late, so that the device never waits for
it: a draft that has become unlikely ends there.

A beam's nodes lie in the slots behind the request's tokens, level by level, and a row's mask names its ancestors among
them; so no node is computed twice, and what lies there is overwritten by the next draft.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ridgeline.core.step import Sampling, Spans
from ridgeline.kv.pages import Pages
from ridgeline.models.batch import Batch
from ridgeline.models.decoder import Decoder
from ridgeline.ops import Ops
from ridgeline.ops.attention_call import WORD_BITS
from ridgeline.run.capture import Works, capture_each, run
from ridgeline.run.graphs import Passed
from ridgeline.run.places import Layout, arrays, placed, tensors
from ridgeline.run.transfer import to_device, to_host

DEEPEST = 12
"""Levels of a draft."""

ROWS = 64
"""Of a level, all requests together, as long as each has one."""

WIDEST = 8
"""Rows of one request."""

LOOKS, LATE = 2, 2
"""Every so many levels the host looks at a draft, so many levels after the device has done one."""

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def beam_of(requests: int) -> int:
    """Rows of each of so many requests, a power of two."""
    room = max(1, min(WIDEST, ROWS // requests))
    return 1 << (room.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Begun:
    """What a draft of one request begins with. known: its tokens, all of which the first pass has seen; row: of that
    pass, its last; sampling: how the token behind them would be chosen."""

    known: int
    blocks: Sequence[int]
    row: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Levels:
    """Proposals of all requests: tokens and chances [levels, requests, beam, children] int32 and fp32; chosen [levels,
    requests, beam] int32, which child (beam row * children + rank) each row of the next level is, or -1. The first
    level has one row."""

    tokens: np.ndarray
    chances: np.ndarray
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class _Beam:
    """One number of requests: fixed places, graphs (None where nothing is captured), the host's side."""

    requests: int
    beam: int
    nbytes: int
    fields: dict[str, torch.Tensor]
    host: dict[str, np.ndarray]
    state: dict[str, torch.Tensor]
    record: torch.Tensor
    batch: Batch
    written: list[tuple[Sequence[int] | None, int]]
    """Of each row of the table: the list that it shows, and how much of it."""
    first: torch.cuda.CUDAGraph | None = None
    level: torch.cuda.CUDAGraph | None = None


class Beams:
    """A draft model's levels for 1 to `most` requests.

    passes: where the first pass leaves its proposals, [rows, children] int64 and fp32. classes: of probability, one
    more than `edges`. width: blocks of a request's table. Until `capture` is called, and on devices without graphs, the
    same levels run op by op.
    """

    def __init__(
        self,
        model: Decoder,
        pages: Pages,
        ops: Ops,
        device: torch.device,
        block_size: int,
        most: int,
        width: int,
        proposed: torch.Tensor,
        chances: torch.Tensor,
        edges: Sequence[float],
    ) -> None:
        self.model, self.pages, self.ops, self.device, self.block_size = model, pages, ops, device, block_size
        self.children = proposed.shape[1]
        self.width = width
        self._proposed, self._chances = proposed, chances
        self._edges = torch.tensor(list(edges), dtype=torch.float32, device=device)
        counts = [one for one in REQUESTS if one < most] + [min(most, REQUESTS[-1])]
        largest = max(self._layout(one)[1] for one in counts)
        pinned = device.type == "cuda"
        self._memory = torch.zeros(largest, dtype=torch.uint8, device=device)
        self._host = torch.zeros(largest, dtype=torch.uint8, pin_memory=pinned)
        self._writer = 0
        cells = DEEPEST * max(one * beam_of(one) for one in counts) * (2 * self.children + 1)
        self._record = torch.zeros(cells, dtype=torch.int32, device=device)
        self._told = torch.zeros(cells, dtype=torch.int32, pin_memory=pinned)
        likely = max(one * beam_of(one) for one in counts)
        self._likely = torch.zeros(DEEPEST, likely, dtype=torch.float32, pin_memory=pinned)
        self._looks = [torch.cuda.Event() for _ in range(DEEPEST)] if pinned else []
        self._sizes = {one: self._sized(one) for one in counts}
        self.sizes = tuple(counts)

    def _layout(self, requests: int) -> tuple[Layout, int]:
        """What the host writes for every draft: `above`, `tree` and `levels` begin anew with it."""
        beam = beam_of(requests)
        rows, words = requests * beam, words_of(beam)
        return placed(
            [
                ("seeds", "int64", (rows,)),
                ("rows", "int64", (requests,)),
                ("temperature", "float32", (rows,)),
                ("starts", "int32", (requests,)),
                ("levels", "int32", (requests,)),
                ("above", "float32", (requests, beam)),
                ("tree", "int32", (rows, words)),
                ("widths", "int32", (DEEPEST,)),
                ("odds", "float32", (self.children, len(self._edges) + 1)),
                ("tables", "int32", (requests, self.width)),
            ]
        )

    def _sized(self, requests: int) -> _Beam:
        beam, (layout, nbytes) = beam_of(requests), self._layout(requests)
        rows, cells = requests * beam, 2 * self.children + 1
        fields = tensors(self._memory, layout)
        longs = {
            name: torch.zeros(rows, dtype=torch.int64, device=self.device)
            for name in ("ids", "positions", "following", "slots")
        }
        shorts = {name: torch.zeros(requests, dtype=torch.int32, device=self.device) for name in ("lengths", "tails")}
        record = self._record[: DEEPEST * rows * cells].view(DEEPEST, requests, beam, cells)
        batch = Batch(
            spans=Spans(
                (beam,) * requests, (self.width * self.block_size,) * requests, ((1,) * beam,) * requests
            ),  # the longest that it may be
            kind="tree",
            ids=longs["ids"],
            positions=longs["positions"],
            slots=longs["slots"],
            block_tables=fields["tables"],
            query_starts=torch.arange(0, rows + 1, beam, dtype=torch.int32, device=self.device),
            lengths=shorts["lengths"],
            rows=None,
            tree=fields["tree"],
            tails=shorts["tails"],
        )
        host = arrays(self._host, layout)
        return _Beam(requests, beam, nbytes, fields, host, {**longs, **shorts}, record, batch, [(None, 0)] * requests)

    def slots(self, requests: int, depth: int) -> int:
        """Slots that each of so many requests needs behind its tokens for drafts of `depth` levels."""
        return beam_of(self._count(requests)) * (depth - 1)

    def beam(self, requests: int) -> int:
        """Rows that each of so many requests has in a level."""
        return beam_of(self._count(requests))

    def serves(self, requests: int) -> bool:
        return requests <= self.sizes[-1]

    def _count(self, requests: int) -> int:
        return self.sizes[bisect_left(self.sizes, requests)]

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture all sizes, as capture_each does."""
        beams = [self._sizes[requests] for requests in reversed(self.sizes)]

        def ready(one: _Beam) -> Works:
            self._write(one, [], (self.children,), np.zeros((self.children, len(self._edges) + 1)))
            to_device(self._memory[: one.nbytes], self._host[: one.nbytes])
            return partial(self._begin, one), partial(self._go_on, one)

        for one, graphs in zip(beams, capture_each(self.device, beams, ready, progress)):
            one.first, one.level = graphs
        self._writer = 0

    def release(self) -> None:
        """Give the graphs and their memory back."""
        for one in self._sizes.values():
            one.first = one.level = None

    @torch.inference_mode()
    def draft(
        self,
        begun: Sequence[Begun],
        passed: Passed,
        widths: Sequence[int],
        odds: Any,
        among: int = 0,
        least: float = 0.0,
    ) -> Levels:
        """As many levels as `widths` has entries, which say how many children count behind each row of a level, or
        fewer: none more is begun once the chances of the rows that it would compute, those of all requests together,
        are seen to be below `least`.

        begun: requests whose first pass is `passed`; it must have proposed. odds: [children, classes], the chance that
        a child of a rank and a class of probability is accepted. among: as many rows as each of so many requests
        would have, if not of these alone. Waits for the device.
        """
        assert passed.proposed is not None
        assert 0 < len(widths) <= DEEPEST
        one = self._sizes[self._count(max(len(begun), among))]
        self._write(one, begun, widths, odds)
        to_device(self._memory[: one.nbytes], self._host[: one.nbytes])
        levels = len(widths)
        for number in range(levels):
            looks = least > 0 and number >= LOOKS and number % LOOKS == 0
            if looks and number >= LOOKS + LATE and self._seen(one, number - LATE) < least:
                levels = number
                break
            work, graph = (self._go_on, one.level) if number else (self._begin, one.first)
            run(graph, work, one)
            if looks and number + LATE < levels:
                self._look(one, number)
        taken = levels * one.requests * one.beam * (2 * self.children + 1)
        told = self._told[:taken]
        to_host(told, self._record[:taken])
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return self._read(one, told.numpy(), len(begun), levels)

    def _look(self, one: _Beam, number: int) -> None:
        """Ask how likely the rows are that a level has chosen."""
        above = one.fields["above"]
        to_host(self._likely[number, : above.numel()], above.view(-1))
        if self._looks:
            self._looks[number].record(torch.cuda.current_stream(self.device))

    def _seen(self, one: _Beam, number: int) -> float:
        """The answer, awaited: of all requests together."""
        if self._looks:
            self._looks[number].synchronize()
        return float(self._likely[number, : one.requests * one.beam].sum())

    def _read(self, one: _Beam, told: np.ndarray, requests: int, levels: int) -> Levels:
        """A copy: the next draft overwrites what is told."""
        children = self.children
        cells = told.reshape(levels, one.requests, one.beam, 2 * children + 1)[:, :requests].copy()
        chances = np.ascontiguousarray(cells[..., children:-1]).view(np.float32)
        return Levels(cells[..., :children], chances, cells[..., -1])

    def _write(self, one: _Beam, begun: Sequence[Begun], widths: Sequence[int], odds: Any) -> None:
        host, beam, count = one.host, one.beam, len(begun)
        if self._writer != one.requests:
            self._writer = one.requests
            host["tables"].fill(0)
            one.written = [(None, 0)] * one.requests
        host["tree"].fill(0)
        host["levels"].fill(0)
        host["above"].fill(0)
        host["above"][:count, 0] = 1
        host["widths"].fill(0)
        host["widths"][: len(widths)] = widths
        host["odds"][:] = odds
        host["starts"][count:] = -1
        host["rows"][count:] = 0
        host["seeds"][count * beam :] = 0
        host["temperature"][count * beam :] = 0
        depth = len(widths)
        for number, request in enumerate(begun):
            host["starts"][number] = request.known
            host["rows"][number] = request.row
            place = slice(number * beam, (number + 1) * beam)
            host["seeds"][place] = request.sampling.seed
            host["temperature"][place] = request.sampling.params.temperature
            used = -(-(request.known + beam * (depth - 1)) // self.block_size)
            blocks, written = one.written[number]
            if blocks is not request.blocks:
                written = 0
            if written < used:
                host["tables"][number, written:used] = request.blocks[written:used]
            one.written[number] = (request.blocks, max(written, used))

    def _begin(self, one: _Beam) -> None:
        """The first pass's proposals to the beam's first rows."""
        rows = one.fields["rows"]
        self._branch(one, self._proposed[rows], self._chances[rows])

    def _go_on(self, one: _Beam) -> None:
        """One level."""
        hidden = self.model.forward(one.batch, self.pages.keys, self.pages.values, self.ops)
        logits = self.model.logits(hidden, self.ops)
        fields = one.fields
        proposed, chances = self.ops.propose(
            logits, fields["temperature"], fields["seeds"], one.state["following"], False, self.children
        )
        self._branch(one, proposed, chances)

    def _branch(self, one: _Beam, proposed: torch.Tensor, chances: torch.Tensor) -> None:
        fields, state = one.fields, one.state
        self.ops.branch(
            proposed, chances, fields["above"], fields["tree"], state["ids"], state["positions"], state["following"],
            state["slots"], state["lengths"], state["tails"], one.record, fields["levels"], fields["starts"],
            fields["tables"], fields["odds"], self._edges, fields["widths"], self.block_size,
        )  # fmt: skip


def words_of(beam: int) -> int:
    """Of a row's ancestor bits. One level more than is computed: the last choice has places too."""
    return -(-beam * DEEPEST // WORD_BITS)
