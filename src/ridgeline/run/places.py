"""A decode step's inputs at addresses that never change, filled by one copy a step.

Knows plans, and how a step of R rows lies in one stretch of memory: the same on the host, where it is written,
and on the device, where captured steps read it. It must not know models or graphs.

A row is one request with one new token. Rows that nobody has are padding: token 0 of a request of length 0,
whose keys and values are written nowhere, so that whatever is computed for them is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ridgeline.core.step import UNREAD, Chunk, Sampling
from ridgeline.run.prepare import adjusts, cuts

ALIGNED = 16
"""Bytes that every field begins at a multiple of: kernels are compiled for aligned pointers."""


@dataclass(slots=True)
class Fields:
    """The inputs of R rows, tensors or arrays that share one stretch of memory.

    ids, sources (row of the last step's tokens that holds the id, or -1), positions, slots, seeds: [R] int64;
    next (position of the token to be chosen): [R] int64; temperature: [R] fp32; lengths: [R] int32;
    tables: [R, width] int32.
    """

    ids: Any
    sources: Any
    positions: Any
    slots: Any
    seeds: Any
    next: Any
    temperature: Any
    lengths: Any
    tables: Any


def layout(rows: int, width: int) -> tuple[list[tuple[str, str, int, int, tuple[int, ...]]], int]:
    """(name, dtype, first byte, end, shape) of each field, and the bytes of all."""
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        *((name, "int64", (rows,)) for name in ("ids", "sources", "positions", "slots", "seeds", "next")),
        ("temperature", "float32", (rows,)),
        ("lengths", "int32", (rows,)),
        ("tables", "int32", (rows, width)),
    ]
    found, end = [], 0
    for name, dtype, shape in shapes:
        start = -(-end // ALIGNED) * ALIGNED
        end = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        found.append((name, dtype, start, end, shape))
    return found, end


def on_device(memory: torch.Tensor, rows: int, width: int) -> Fields:
    """Views of a stretch of bytes (uint8) on a device."""
    fields, _ = layout(rows, width)
    return Fields(
        **{name: memory[start:end].view(getattr(torch, dtype)).view(shape) for name, dtype, start, end, shape in fields}
    )


class Staging:
    """The host's side of the inputs of steps of `rows` rows: what stays the same from step to step stays written.

    memory: uint8 on the host, at least `nbytes` long, pinned where the device is a GPU. It may be shared with
    other sizes as long as `forget` is called when another has written to it.
    """

    def __init__(self, memory: torch.Tensor, rows: int, width: int, block_size: int) -> None:
        fields, self.nbytes = layout(rows, width)
        array = memory.numpy()
        self.rows, self.block_size = rows, block_size
        self.fields = Fields(
            **{name: array[start:end].view(np.dtype(dtype)).reshape(shape) for name, dtype, start, end, shape in fields}
        )
        self.forget()

    def forget(self) -> None:
        """Nothing that was written is relied on any more: every row is padding."""
        fields = self.fields
        for one in (fields.ids, fields.positions, fields.seeds, fields.next, fields.temperature, fields.lengths):
            one.fill(0)
        fields.tables.fill(0)
        fields.sources.fill(-1)
        fields.slots.fill(-1)
        self._count = 0
        self._blocks: list[Sequence[int] | None] = [None] * self.rows
        self._written = [0] * self.rows
        self._plain: list[bool | None] = [None] * self.rows  # None: its settings are not written

    def fill(self, chunks: Sequence[Chunk], places: Mapping[str, int]) -> bool:
        """Write one chunk a row. True if each row's token can be chosen from its logits as they are.

        places: row of each request among the tokens that the last step sampled. Tables are appended to: a
        request's list of blocks only grows, and is replaced when an earlier entry changes.
        """
        fields, size = self.fields, self.block_size
        count = len(chunks)
        ids: list[int] = []
        sources: list[int] = []
        starts: list[int] = []
        slots: list[int] = []
        plain = True
        for row, chunk in enumerate(chunks):
            request_id, (token,), start, blocks, sampling, *_ = chunk
            ids.append(token)
            sources.append(places[request_id] if token == UNREAD else -1)
            starts.append(start)
            last = start // size
            slots.append(blocks[last] * size + start % size)
            if self._blocks[row] is not blocks:  # another request, or its table has changed
                self._blocks[row], self._written[row], self._plain[row] = blocks, 0, None
            written = self._written[row]
            if written <= last:
                fields.tables[row, written : last + 1] = blocks[written : last + 1]
                self._written[row] = last + 1
            if sampling is None:
                continue
            if self._plain[row] is None:
                fields.seeds[row], fields.temperature[row] = sampling.seed, sampling.params.temperature
                self._plain[row] = not needs_more(sampling)
            if sampling.forbidden or not self._plain[row]:
                plain = False
        fields.ids[:count] = ids
        fields.sources[:count] = sources
        fields.slots[:count] = slots
        fields.positions[:count] = starts
        np.add(fields.positions[:count], 1, out=fields.next[:count])
        fields.lengths[:count] = fields.next[:count]
        if count < self._count:  # rows of a larger step before become padding again
            gone = slice(count, self._count)
            fields.ids[gone] = 0
            fields.sources[gone] = fields.slots[gone] = -1
            fields.positions[gone] = fields.next[gone] = fields.lengths[gone] = 0
            fields.temperature[gone] = 0
            self._blocks[gone] = [None] * (self._count - count)
        self._count = count
        return plain


def needs_more(sampling: Sampling) -> bool:
    """Whether a row's token takes more than its logits, temperature and noise, or more than the token is asked for."""
    return adjusts(sampling) or cuts(sampling.params) or sampling.params.logprobs is not None
