"""Steps that hold prompt tokens, at a few fixed sizes, captured once as CUDA graphs and replayed.

Knows how such a step runs on inputs at fixed places (run/places.py). It must not know scheduling, nor which kernels
serve. Op by op the host takes longer to launch a small one than the device to compute it. A size is so many tokens of
so many requests, each with one new token or more; the rows beyond are one request more, of length 0. Its graph goes
from ids to the final hidden states of rows that are sampled; choosing their tokens is few launches, and done as in any
other step while the device computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ridgeline.core.step import Chunk, Spans
from ridgeline.kv.pages import Pages
from ridgeline.models.batch import Batch
from ridgeline.models.decoder import Decoder
from ridgeline.ops import Ops
from ridgeline.run.capture import Works, capture_each, run
from ridgeline.run.graphs import Inputs, Replayed, holding
from ridgeline.run.places import PassSize, PromptFields, PromptStaging, prompt_layout, prompt_on_device

TOKENS = (16, 32, *range(64, 1025, 64))
"""Of all requests together. Large products take as long as they have rows, so steps are fine; above, the device takes
longer than the host."""

REQUESTS = (8,)
"""Of a step, at most; and as many as there may be. Those without rows cost little, every graph some 15 MB."""


def tokens_up_to(most: int) -> tuple[int, ...]:
    """Numbers of tokens to capture for steps of at most so many."""
    most = min(most, TOKENS[-1])
    return (*(one for one in TOKENS if one < most), most)


def prompt_sizes_up_to(most_requests: int, most_tokens: int) -> tuple[PassSize, ...]:
    """Sizes to capture for steps with prompts of at most so many requests.

    Of each number of requests those that the one below does not serve: one of them has two tokens at least.
    """
    found, below = [], 0
    for count in (*(one for one in REQUESTS if one < most_requests), most_requests):
        found += [PassSize(one, count) for one in tokens_up_to(most_tokens) if one > below + 1]
        below = count
    return tuple(sorted(found))


@dataclass(slots=True)
class _Prompt:
    """One captured size: its device inputs, its graph (None where nothing is captured), its host sides by turn."""

    size: PassSize
    fields: PromptFields
    batch: Batch
    staging: tuple[PromptStaging, ...]
    forward: torch.cuda.CUDAGraph | None = None


class PromptGraphs:
    """Steps of a model with prompts, at fixed sizes.

    sizes: in any order. width: blocks of a request's table, enough for its longest sequence. sampled: [S] int64, where
    the tokens of the last step always are (DecodeGraphs.sampled). Until `capture` is called, and on devices without
    graphs, the same steps run op by op.
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
        sampled: torch.Tensor,
    ) -> None:
        self.model, self.pages, self.ops, self.device = model, pages, ops, device
        self.sizes = tuple(sorted(sizes))
        self._sampled = sampled
        self._inputs = Inputs(max(prompt_layout(one, width)[1] for one in self.sizes), device)
        most = max(one.requests for one in self.sizes)
        self.hidden = torch.zeros(most, model.spec.hidden, dtype=model.store.dtype, device=device)
        self._prompts = {one: self._placed(one, width, block_size) for one in self.sizes}

    @property
    def tokens(self) -> tuple[int, ...]:
        """Numbers of tokens that are captured, ascending."""
        return tuple(sorted({one.rows for one in self.sizes}))

    def _placed(self, size: PassSize, width: int, block_size: int) -> _Prompt:
        fields = prompt_on_device(self._inputs.memory, size, width)
        none = (0,) * size.requests
        batch = Batch(
            spans=Spans((size.rows, *none), (width * block_size, *none)),  # for checks alone
            kind="mixed",
            ids=fields.ids,
            positions=fields.positions,
            slots=fields.slots,
            block_tables=fields.tables,
            query_starts=fields.starts,
            lengths=fields.lengths,
            rows=fields.rows,
        )
        staging = tuple(PromptStaging(host, size, width, block_size) for host in self._inputs.host)
        return _Prompt(size, fields, batch, staging)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture all sizes, as capture_each does."""
        prompts = [self._prompts[size] for size in reversed(self.sizes)]

        def ready(one: _Prompt) -> Works:
            self._inputs.clear(one.staging)
            return (partial(self._forward, one),)

        for one, (graph,) in zip(prompts, capture_each(self.device, prompts, ready, progress)):
            one.forward = graph

    def release(self) -> None:
        """Give the graphs and their memory back."""
        for one in self._prompts.values():
            one.forward = None

    def size_for(self, chunks: Sequence[Chunk]) -> PassSize | None:
        """The smallest size that holds these, fewest tokens first; None if there is none."""
        return next(holding(self.sizes, sum(chunk.new for chunk in chunks), len(chunks)), None)

    def serves(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step fits: no scores of prompts, no trees."""
        return self.size_for(chunks) is not None and all(
            chunk.prompt_logprobs is None and chunk.tree is None for chunk in chunks
        )

    def launch(self, chunks: Sequence[Chunk], places: Mapping[str, int]) -> Replayed:
        """Start a step that is served. Its hidden states are those behind the chunks that are sampled, in their order;
        the next step with prompts overwrites them. `places` as in Staging.fill."""
        size = self.size_for(chunks)
        assert size is not None, "no size holds this step"
        one = self._prompts[size]
        count = self._inputs.send(one.staging, lambda side: side.fill(chunks, places))
        run(one.forward, self._forward, one)
        return Replayed(size.rows - sum(chunk.new for chunk in chunks), self.hidden[:count], None)

    def _forward(self, one: _Prompt) -> None:
        """Ids to `self.hidden`."""
        ids = self.ops.feed(one.fields.ids, one.fields.sources, self._sampled, self.model.spec.vocabulary)
        hidden = self.model.forward(replace(one.batch, ids=ids), self.pages.keys, self.pages.values, self.ops)
        self.hidden[: one.size.requests].copy_(hidden)
