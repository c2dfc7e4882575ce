"""A row's result is the same, bit for bit, alone and in any batch, whole or in chunks, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_checks import DTYPES, assert_close, kernel, name_of, random_weight

from ridgeline.core.step import Spans
from ridgeline.kernels.cpu.pack import pack
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention import attention_inputs

ROWS = 130


def by_rows(dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions of rows [T, 600] -> [T, ...]."""
    wide, gated = pack(random_weight(200, 600, dtype)), pack(random_weight(2 * 136, 600, dtype))
    scale, bias = torch.randn(600).to(dtype), torch.randn(200).to(dtype)
    router, gate_up = torch.randn(8, 600).to(dtype), (torch.randn(8, 96, 600) / 25).to(dtype)
    down = (torch.randn(8, 600, 48) / 7).to(dtype)
    return {
        "linear": lambda x: kernel("linear")(x, wide, bias, "gelu"),
        "gated_linear": lambda x: kernel("gated_linear")(x, gated, "silu"),
        "gate": lambda x: kernel("gate")(x, "silu"),
        "norm": lambda x: kernel("norm")(x, x.clone(), scale, 1e-5)[0],
        "layer_norm": lambda x: kernel("layer_norm")(x, None, scale, scale, 1e-5)[0],
        "moe": lambda x: kernel("moe")(x, router, gate_up, down, 2, True),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", ["linear", "gated_linear", "gate", "norm", "layer_norm", "moe"])
@pytest.mark.usefixtures("threads")
def test_rows(op: str, dtype: torch.dtype) -> None:
    run = by_rows(dtype)[op]
    x = torch.randn(ROWS, 600).to(dtype)
    torch.set_num_threads(2)
    whole = run(x)
    for row in (0, 1, 63, ROWS - 1):
        assert torch.equal(run(x[row : row + 1])[0], whole[row])
    for size in range(2, 71):
        first = size % 5
        assert torch.equal(run(x[first : first + size]), whole[first : first + size]), size
    torch.set_num_threads(1)
    assert torch.equal(run(x), whole)


def pieces(arguments: dict[str, Any], request: int, bounds: list[int]) -> torch.Tensor:
    """One request's rows through attention alone, in chunks that end at `bounds`."""
    starts, visible = arguments["query_starts"].tolist(), arguments["lengths"].tolist()
    first, last = starts[request], starts[request + 1]
    parts = []
    for begin, end in zip([0, *bounds], [*bounds, last - first], strict=True):
        length = visible[request] - (last - first) + end
        parts.append(
            kernel("attention")(
                arguments["q"][first + begin : first + end],
                arguments["k"],
                arguments["v"],
                arguments["block_tables"][request : request + 1],
                torch.tensor([0, end - begin], dtype=torch.int32),
                torch.tensor([length], dtype=torch.int32),
                Spans((end - begin,), (length,)),
                arguments["scale"],
                arguments["window"],
            )
        )
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 64), ((4, 1), 40), ((16, 8), 128)])
@pytest.mark.usefixtures("threads")
def test_attention(heads: tuple[int, int], width: int, window: int | None, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    new, visible = (1, 75, 1, 40), (90, 75, 33, 140)
    arguments = dict(attention_inputs("cpu", dtype, *heads, width, 16, window, new, visible))
    whole = kernel("attention")(**arguments)
    starts = arguments["query_starts"].tolist()
    for request, count in enumerate(new):
        own = whole[starts[request] : starts[request + 1]]
        assert torch.equal(pieces(arguments, request, []), own)
        if count > 1:
            assert torch.equal(pieces(arguments, request, [1, 17, 30]), own)
            assert torch.equal(pieces(arguments, request, list(range(1, count))), own)
    torch.set_num_threads(1)
    assert torch.equal(kernel("attention")(**arguments), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.usefixtures("threads")
def test_attention_over_segments(window: int | None, dtype: torch.dtype) -> None:
    """One KV head: alone on two threads a long request is split, on one thread or in a batch it is not."""
    new, visible = (1, 3, 1, 40, 1, 1), (1700, 513, 1024, 1040, 511, 3)
    arguments = dict(attention_inputs("cpu", dtype, 4, 1, 64, 64, window, new, visible))
    torch.set_num_threads(1)
    whole = kernel("attention")(**arguments)
    expected = REGISTRY["attention"].reference(**arguments)
    assert_close(REGISTRY["attention"], whole, expected, dtype)
    starts = arguments["query_starts"].tolist()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for request, count in enumerate(new):
            own = whole[starts[request] : starts[request + 1]]
            assert torch.equal(pieces(arguments, request, []), own)
            assert torch.equal(pieces(arguments, request, list(range(1, count))), own)
        assert torch.equal(kernel("attention")(**arguments), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attention_does_not_know_the_page_size(dtype: torch.dtype) -> None:
    """The same keys in pages of 64 and in pages of 16, 20, 256."""
    arguments = dict(attention_inputs("cpu", dtype, 4, 2, 64, 64, None, (9,), (200,)))
    whole = kernel("attention")(**arguments)
    for block in (16, 20, 256):
        count = -(-200 // block)
        paged = {}
        for name in ("k", "v"):
            keys = arguments[name][arguments["block_tables"][0, :4].long()].transpose(0, 1).reshape(2, 256, 64)[:, :200]
            room = torch.full((2, count * block, 64), float("nan"), dtype=dtype)
            room[:, :200] = keys
            paged[name] = room.view(2, count, block, 64).transpose(0, 1).contiguous()
        table = torch.arange(count, dtype=torch.int32)[None]
        assert torch.equal(kernel("attention")(**{**arguments, **paged, "block_tables": table}), whole), block


def test_sample_is_the_same_alone() -> None:
    logits = torch.randn(5, 20_000)
    settings = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.5, 0.3]),
        "top_k": torch.tensor([0, 0, 5, 0, 0]),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 0.8, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]),
        "seeds": torch.randint(-(1 << 62), 1 << 62, (5,)),
        "positions": torch.arange(5),
    }
    whole = kernel("sample")(logits, **settings, greedy=False, cut=True)
    for row in range(5):
        own = {name: value[row : row + 1] for name, value in settings.items()}
        assert kernel("sample")(logits[row : row + 1], **own, greedy=False, cut=True)[0] == whole[row]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_propose_is_the_same_alone(dtype: torch.dtype) -> None:
    """Tokens and probabilities, and whether all rows of the batch are greedy or not."""
    logits = torch.randn(5, 5003).to(dtype)
    settings = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.5, 0.3]),
        "seeds": torch.randint(-(1 << 62), 1 << 62, (5,)),
        "positions": torch.arange(5),
    }
    whole = kernel("propose")(logits, **settings, greedy=False, count=4)
    for row in range(5):
        own = {name: value[row : row + 1] for name, value in settings.items()}
        alone = kernel("propose")(logits[row : row + 1], **own, greedy=row == 0, count=4)
        for mine, its in zip(alone, whole):
            assert torch.equal(mine[0], its[row])
