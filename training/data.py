"""Token files as an endless run of packed batches on one device.

Knows documents as runs of token ids and packs them end to end. Knows nothing of text, models or losses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Packed:
    """Documents of one or more token files, shuffled anew each epoch, laid end to end and cut into rows.

    Each document opens with the separator, which so also closes the one before. Every row is made to open with it
    too, as every request does when the model is used.
    """

    def __init__(self, stems: Sequence[Path], device: torch.device, separator: int = 0) -> None:
        tokens, starts, offset = [], [], 0
        for stem in stems:
            part = np.load(stem.with_name(stem.name + ".tokens.npy"))
            tokens.append(part)
            starts.append(np.load(stem.with_name(stem.name + ".starts.npy")) + offset)
            offset += len(part)
        self.tokens = torch.from_numpy(np.concatenate(tokens).astype(np.int16)).to(device)
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        ends = torch.cat((self.starts[1:], torch.tensor([offset], device=device)))
        self.lengths = ends - self.starts
        self.separator = separator

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def __len__(self) -> int:
        """Tokens of one epoch, separators included."""
        return int(self.lengths.sum())

    def resampled(self, seed: int) -> Packed:
        """As many documents, drawn from these with replacement: some twice or more, about 37 % not at all."""
        draw = torch.Generator(device=self.device).manual_seed(seed)
        chosen = torch.randint(len(self.starts), (len(self.starts),), generator=draw, device=self.device)
        twin = copy.copy(self)
        twin.starts, twin.lengths = self.starts[chosen], self.lengths[chosen]
        return twin

    def epoch(self, seed: int) -> Tensor:
        """All documents in an order drawn from `seed`: int16[tokens]."""
        draw = torch.Generator(device=self.device).manual_seed(seed)
        order = torch.randperm(len(self.starts), generator=draw, device=self.device)
        lengths = self.lengths[order]
        begins = torch.cumsum(lengths, 0) - lengths
        count = len(self)
        shift = torch.repeat_interleave(self.starts[order] - begins, lengths, output_size=count)
        return self.tokens[shift + torch.arange(count, device=self.device)]

    def batches(self, rows: int, row_tokens: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (inputs, targets), each int64[rows, row_tokens]; targets are one position ahead."""
        reach = rows * row_tokens
        while True:
            stream = self.epoch(seed)
            if len(stream) <= reach:
                stream = stream.repeat(reach // len(stream) + 2)
            for first in range(0, len(stream) - reach, reach):
                inputs = stream[first : first + reach].view(rows, row_tokens).long()
                targets = stream[first + 1 : first + reach + 1].view(rows, row_tokens).long()
                inputs[:, 0] = self.separator
                yield inputs, targets
            seed += 1

    def prefixes(self, rows: int, count: int, draw: torch.Generator) -> Tensor:
        """Openings to continue, int64[rows, count]: half at starts of documents, half anywhere; all open with the
        separator."""
        device = self.device
        opening = self.starts[torch.randint(len(self.starts), (rows,), generator=draw, device=device)]
        anywhere = torch.randint(len(self.tokens), (rows,), generator=draw, device=device)
        first = torch.where(torch.arange(rows, device=device) % 2 == 0, opening, anywhere)
        first = first.clamp(max=len(self.tokens) - count)
        ids = self.tokens[first[:, None] + torch.arange(count, device=device)].long()
        ids[:, 0] = self.separator
        return ids
