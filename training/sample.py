"""Continues many rows of tokens at once with a model, its keys and values kept.

Knows a model, a batch of prefixes of one length and a temperature per row. Knows nothing of text.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from training.model import Llama, Memory


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast on a GPU; full precision elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def pick(logits: Tensor, temperature: Tensor, draw: torch.Generator | None) -> Tensor:
    """One token id per row, int64[rows], of logits [rows, vocabulary] at temperature [rows, 1]; 0 means greedy.

    The maximum of logits plus Gumbel noise is a draw from their softmax (Gumbel, 1954).
    """
    uniform = torch.rand(logits.shape, generator=draw, device=logits.device, dtype=torch.float32)
    noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    return (logits.float() + temperature * noise).argmax(-1)


@torch.no_grad()
def continuations(
    model: Llama,
    prefixes: Tensor,
    count: int,
    temperature: Tensor | float,
    draw: torch.Generator | None = None,
) -> Tensor:
    """Prefixes [rows, tokens] with `count` more tokens each: int64[rows, tokens + count].

    `temperature` is one number or float[rows]. A row that ends a document goes on with the next one.
    """
    rows, known = prefixes.shape
    device = prefixes.device
    warmth = torch.as_tensor(temperature, dtype=torch.float32, device=device).expand(rows)[:, None]
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else model.model.embed_tokens.weight.dtype
    memory = Memory(model.sizes, rows, known + count, device, dtype)
    weight = model.model.embed_tokens.weight
    ids = torch.empty(rows, known + count, dtype=torch.int64, device=device)
    ids[:, :known] = prefixes
    last = model.hidden(prefixes, memory)[:, -1]
    for place in range(known, known + count):
        ids[:, place] = pick(torch.nn.functional.linear(last, weight), warmth, draw)
        if place + 1 < known + count:
            last = model.hidden(ids[:, place : place + 1], memory)[:, -1]
    return ids
