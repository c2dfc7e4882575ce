"""A step's inputs at addresses that never change, filled by one copy a step.

Knows plans, and how a step of R rows lies in one stretch of memory: the same on the host, where it is written,
and on the device, where captured steps read it. It must not know models or graphs.

In a decode step a row is one request with one new token. Rows that nobody has are padding: token 0 of a request of
length 0, whose keys and values are written nowhere, so that whatever is computed for them is harmless. A step of
ragged requests (prompts, tree verification, drafting) has all its padding rows in one request more, of length 0 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from ridgeline.core.step import UNREAD, Chunk, Sampling
from ridgeline.ops.attention_call import WORD_BITS
from ridgeline.run.prepare import adjusts, cuts, fill_tokens

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


Layout = list[tuple[str, str, int, int, tuple[int, ...]]]
"""(name, dtype, first byte, end, shape) of each field."""


def layout(rows: int, width: int) -> tuple[Layout, int]:
    """Where the fields of a decode step lie, and the bytes of all."""
    return placed(
        [
            *((name, "int64", (rows,)) for name in ("ids", "sources", "positions", "slots", "seeds", "next")),
            ("temperature", "float32", (rows,)),
            ("lengths", "int32", (rows,)),
            ("tables", "int32", (rows, width)),
        ]
    )


def placed(shapes: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[Layout, int]:
    found: Layout = []
    end = 0
    for name, dtype, shape in shapes:
        start = -(-end // ALIGNED) * ALIGNED
        end = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        found.append((name, dtype, start, end, shape))
    return found, end


def on_device(memory: torch.Tensor, rows: int, width: int) -> Fields:
    """Views of a stretch of bytes (uint8) on a device."""
    return Fields(**tensors(memory, layout(rows, width)[0]))


def tensors(memory: torch.Tensor, fields: Layout) -> dict[str, torch.Tensor]:
    return {
        name: memory[start:end].view(getattr(torch, dtype)).view(shape) for name, dtype, start, end, shape in fields
    }


def arrays(memory: torch.Tensor, fields: Layout) -> dict[str, np.ndarray]:
    array = memory.numpy()
    return {name: array[start:end].view(np.dtype(dtype)).reshape(shape) for name, dtype, start, end, shape in fields}


class Staging:
    """The host's side of the inputs of steps of `rows` rows: what stays the same from step to step stays written.

    memory: uint8 on the host, at least `nbytes` long, pinned where the device is a GPU. It may be shared with
    other sizes as long as `forget` is called when another has written to it.
    """

    def __init__(self, memory: torch.Tensor, rows: int, width: int, block_size: int) -> None:
        fields, self.nbytes = layout(rows, width)
        self.rows, self.block_size = rows, block_size
        self.fields = Fields(**arrays(memory, fields))
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


@dataclass(frozen=True, slots=True, order=True)
class PassSize:
    """A size of steps of ragged requests. rows: new tokens and nodes of all requests; requests: at most."""

    rows: int
    requests: int

    def nodes(self, most: int) -> int:
        """Nodes that a request's tree may have, `most` at the most."""
        return min(self.rows - 1, most)

    def words(self, most: int) -> int:
        """Of a row's ancestor bits."""
        return max(1, -(-self.nodes(most) // WORD_BITS))


@dataclass(slots=True)
class PassFields:
    """The inputs of a pass of T rows of B requests, of which the last is padding, in one stretch of memory.

    ids, positions, slots, parents (row that a node follows, or -1), seeds, next (position of the token to be chosen):
    [T] int64; temperature: [T] fp32; starts: [B + 1] int32; lengths, tails: [B] int32; tree: [T, words] int32;
    tables: [B, width] int32.
    """

    ids: Any
    positions: Any
    slots: Any
    parents: Any
    seeds: Any
    next: Any
    temperature: Any
    starts: Any
    lengths: Any
    tails: Any
    tree: Any
    tables: Any


def pass_layout(size: PassSize, words: int, width: int) -> tuple[Layout, int]:
    """Where the fields of a pass lie, and the bytes of all. The padding request is one more than the size says."""
    requests = size.requests + 1
    return placed(
        [
            *((name, "int64", (size.rows,)) for name in ("ids", "positions", "slots", "parents", "seeds", "next")),
            ("temperature", "float32", (size.rows,)),
            ("starts", "int32", (requests + 1,)),
            ("lengths", "int32", (requests,)),
            ("tails", "int32", (requests,)),
            ("tree", "int32", (size.rows, words)),
            ("tables", "int32", (requests, width)),
        ]
    )


def pass_on_device(memory: torch.Tensor, size: PassSize, words: int, width: int) -> PassFields:
    """Views of a stretch of bytes (uint8) on a device."""
    return PassFields(**tensors(memory, pass_layout(size, words, width)[0]))


class Tables:
    """Block tables [B, width] on the host, of which what was written stays written: a request's list of blocks only
    grows, and is replaced when an earlier entry changes."""

    def __init__(self, tables: np.ndarray) -> None:
        self._tables = tables
        self.forget()

    def forget(self) -> None:
        self._tables.fill(0)
        self._blocks: list[Sequence[int] | None] = [None] * len(self._tables)
        self._written = [0] * len(self._tables)

    def write(self, request: int, blocks: Sequence[int], used: int) -> None:
        """The first `used` blocks of a request."""
        if self._blocks[request] is not blocks:
            self._blocks[request], self._written[request] = blocks, 0
        written = self._written[request]
        if written < used:
            self._tables[request, written:used] = blocks[written:used]
            self._written[request] = used


class PassStaging:
    """The host's side of the inputs of passes of one size. Block tables that were written stay written.

    memory: as in Staging, shared with other sizes in the same way.
    """

    def __init__(self, memory: torch.Tensor, size: PassSize, words: int, width: int, block_size: int) -> None:
        fields, self.nbytes = pass_layout(size, words, width)
        self.size, self.words, self.block_size = size, words, block_size
        self.fields = PassFields(**arrays(memory, fields))
        self._tables = Tables(self.fields.tables)
        self.clear(0, 0)

    def forget(self) -> None:
        """Nothing that was written is relied on any more: every row is padding."""
        self._tables.forget()
        self.clear(0, 0)

    def clear(self, rows: int, requests: int) -> None:
        """Rows and requests from these on are padding."""
        fields = self.fields
        for one in (fields.ids, fields.positions, fields.seeds, fields.next, fields.temperature, fields.tree):
            one[rows:] = 0
        fields.slots[rows:] = fields.parents[rows:] = -1
        fields.lengths[requests:] = fields.tails[requests:] = 0
        fields.starts[requests:] = rows  # what nobody has is the last request's
        fields.starts[-1] = self.size.rows

    def fill(self, chunks: Sequence[Chunk], settings: Iterable[tuple[int, Sampling]], drafts: bool = False) -> bool:
        """Write chunks one after the other, and how the tokens behind some rows are chosen: (row, how).

        True if each of those can be chosen from its logits as they are; of drafts, whose cuts are the target's
        business, if those are not adjusted.
        """
        fields, size = self.fields, self.block_size
        ids: list[int] = []
        positions: list[int] = []
        parents: list[int] = []
        slots: list[int] = []
        starts: list[int] = []
        tails: list[int] = []
        masks: list[bytes] = []
        width = 4 * self.words
        for request, chunk in enumerate(chunks):
            tokens, start, blocks, tree, visible = (
                chunk.token_ids, chunk.start, chunk.blocks, chunk.tree, chunk.visible
            )  # fmt: skip
            starts.append(len(ids))
            ids += tokens
            known = len(ids)
            positions += range(start, start + len(tokens))
            parents += [-1] * len(tokens)
            masks.append(bytes(width * len(tokens)))
            if tree is not None and len(tree):
                ids += tree.tokens
                positions += tree.positions(start + len(tokens) - 1)
                parents += [known + parent for parent in tree.parents]
                masks.append(tree.masks(width))
            tails.append(len(ids) - known)
            slots += [blocks[place // size] * size + place % size for place in range(start, visible)]
            self._tables.write(request, blocks, -(-visible // size))
        rows, requests = len(ids), len(chunks)
        fields.ids[:rows], fields.positions[:rows], fields.slots[:rows] = ids, positions, slots
        fields.parents[:rows] = parents
        fields.tree[:rows] = np.frombuffer(b"".join(masks), np.int32).reshape(rows, self.words)
        fields.starts[:requests], fields.tails[:requests] = starts, tails
        fields.lengths[:requests] = [chunk.visible for chunk in chunks]
        self.clear(rows, requests)
        seeds, following, temperature = [0] * rows, [0] * rows, [0.0] * rows
        plain = True
        for row, sampling in settings:
            seeds[row], following[row] = sampling.seed, sampling.position
            temperature[row] = sampling.params.temperature
            plain = plain and not (adjusts(sampling) if drafts else needs_more(sampling))
        fields.seeds[:rows], fields.next[:rows], fields.temperature[:rows] = seeds, following, temperature
        return plain


@dataclass(slots=True)
class PromptFields:
    """The inputs of a step with prompts of T tokens of B requests, of which the last is padding, in one stretch of
    memory.

    ids, sources (as in Fields), positions, slots: [T] int64; rows: [B - 1] int64, the last tokens of the requests that
    are sampled, one after the other, and 0; starts: [B + 1] int32; lengths: [B] int32; tables: [B, width] int32.
    """

    ids: Any
    sources: Any
    positions: Any
    slots: Any
    rows: Any
    starts: Any
    lengths: Any
    tables: Any


def prompt_layout(size: PassSize, width: int) -> tuple[Layout, int]:
    """Where the fields of a step with prompts lie, and the bytes of all. The padding request is one more."""
    requests = size.requests + 1
    return placed(
        [
            *((name, "int64", (size.rows,)) for name in ("ids", "sources", "positions", "slots")),
            ("rows", "int64", (size.requests,)),
            ("starts", "int32", (requests + 1,)),
            ("lengths", "int32", (requests,)),
            ("tables", "int32", (requests, width)),
        ]
    )


def prompt_on_device(memory: torch.Tensor, size: PassSize, width: int) -> PromptFields:
    """Views of a stretch of bytes (uint8) on a device."""
    return PromptFields(**tensors(memory, prompt_layout(size, width)[0]))


class PromptStaging:
    """The host's side of the inputs of steps with prompts of one size. Block tables that were written stay written.

    memory: as in Staging, shared with other sizes in the same way.
    """

    def __init__(self, memory: torch.Tensor, size: PassSize, width: int, block_size: int) -> None:
        fields, self.nbytes = prompt_layout(size, width)
        self.size, self.block_size = size, block_size
        self.fields = PromptFields(**arrays(memory, fields))
        self._tables = Tables(self.fields.tables)
        self.fill((), {})

    def forget(self) -> None:
        """Nothing that was written is relied on any more: every row is padding."""
        self._tables.forget()
        self.fill((), {})

    def fill(self, chunks: Sequence[Chunk], places: Mapping[str, int]) -> int:
        """Write chunks one after the other; how many of them are sampled. places: as in Staging.fill."""
        fields = self.fields
        starts = list(accumulate((chunk.new for chunk in chunks), initial=0))
        rows, requests = starts[-1], len(chunks)
        fill_tokens((fields.ids, fields.positions, fields.slots), chunks, starts, self.block_size)
        fields.sources.fill(-1)
        sampled = []
        for request, chunk in enumerate(chunks):
            last = starts[request + 1] - 1
            if chunk.token_ids[-1] == UNREAD:
                fields.sources[last] = places[chunk.request_id]
            if chunk.sampling is not None:
                sampled.append(last)
            self._tables.write(request, chunk.blocks, -(-chunk.visible // self.block_size))
        fields.rows.fill(0)
        fields.rows[: len(sampled)] = sampled
        fields.lengths.fill(0)
        fields.lengths[:requests] = [chunk.visible for chunk in chunks]
        fields.starts[: requests + 1] = starts
        fields.starts[requests:-1] = rows  # what nobody has is the last request's
        fields.starts[-1] = self.size.rows
        fields.ids[rows:] = fields.positions[rows:] = 0
        fields.slots[rows:] = -1
        return len(sampled)


def needs_more(sampling: Sampling) -> bool:
    """Whether a row's token takes more than its logits, temperature and noise, or more than the token is asked for."""
    return adjusts(sampling) or cuts(sampling.params) or sampling.params.logprobs is not None
