"""attention: every path through the kernels against fp64, with poison wherever nothing may be read."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton_checks import check_attention, kinds, paged

from ridgeline.kernels.triton import attention as kernels
from ridgeline.kernels.triton import ragged
from ridgeline.kernels.triton.attention import LIMITS, Machine, Tile, attention_triton
from ridgeline.ops.attention import attention

PATHS = ("as it comes", "split", "long", "small pieces", "fixed pieces")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each way through the kernels, whatever the shapes; in the interpreter with small tiles too."""
    name = str(request.param)
    if device == "cpu":
        monkeypatch.setattr(kernels, "LONG", dict.fromkeys(kernels.LONG, Tile(16, 16, 4, 2)))
        monkeypatch.setattr(kernels, "LOADED", dict.fromkeys(kernels.LOADED, Tile(16, 16, 4, 2)))
        monkeypatch.setattr(kernels, "SPLIT", dict.fromkeys(kernels.SPLIT, Tile(16, 32, 4, 2)))
        monkeypatch.setattr(kernels, "SPLIT_ROWS", 16)
        monkeypatch.setattr(kernels, "MIXED_ROWS", 16)
    machine = Machine(1, 227 * 1024) if device == "cpu" else kernels._machine(torch.device("cuda", 0))
    if name == "long":
        monkeypatch.setattr(kernels, "FEW_ROWS", 0)
        machine = machine._replace(multiprocessors=0)
    elif name != "as it comes":
        monkeypatch.setattr(kernels, "FEW_ROWS", 1 << 30)
    if name == "small pieces":
        pieces = kernels.Pieces(16 if device == "cpu" else 64, 16)
        monkeypatch.setattr(kernels, "PIECES", dict.fromkeys(kernels.PIECES, pieces))
        monkeypatch.setattr(kernels, "MERGED_AT_ONCE", 2)
    monkeypatch.setattr(kernels, "_machine", lambda _: machine)
    return name


@pytest.fixture
def attend(path: str, device: str) -> Callable[..., Any]:
    """The op by that way."""
    return partial(kernels.run, 32 if device == "cpu" else 256) if path == "fixed pieces" else attention_triton


BATCHES: dict[str, list[list[tuple[int, int]]]] = {
    "cpu": [
        [(1, 1)],
        [(13, 47)],
        [(3, 90), (1, 1), (0, 0), (13, 47), (0, 7), (1, 65)],
        [(1, 40), (1, 16), (1, 100)],
        [(2, 30), (0, 3)],  # as many rows as requests, but not one each
        [(5, 3), (1, 0)],  # rows that see nothing
    ],
    "cuda": [
        [(1, 1)],
        [(113, 203)],
        [(799, 1631)],
        [(1023, 1024), (1, 1), (0, 0), (0, 9), (3, 799), (1, 4000)],
        [(1, 40 * n + 1) for n in range(70)],
        [(5, 100 * n + 5) for n in range(9)],
        [(2, 300), (0, 3)],
        [(5, 3), (1, 0)],
    ],
}


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_ragged_batches(device: str, path: str, attend: Callable[..., Any], group: int) -> None:
    for index, spans in enumerate(BATCHES[device]):
        window = (None, 20)[index % 2]
        kv_heads = 1 if group == 8 else 2
        if device == "cpu":
            if (index + group + PATHS.index(path)) % 2:
                continue  # each batch meets each path, and each path each group
            dtype, block = kinds(device)[index % 2], (16, 64, 48)[(index + group) % 3]
        else:  # few combinations, since each is compiled
            dtype = {1: torch.float32, 3: torch.float16}.get(group, torch.bfloat16)
            block = {1: 16, 3: 48}.get(group, 64)
        check_attention(attend, paged(device, dtype, kv_heads * group, kv_heads, 64, block, spans, window))


@pytest.mark.parametrize("head_dim", [8, 40, 64, 96, 128, 192, 256])
def test_head_dims(device: str, head_dim: int) -> None:
    spans = BATCHES[device][1 if device == "cpu" else 3]
    for dtype in kinds(device):
        check_attention(attention_triton, paged(device, dtype, 4, 1, head_dim, 64, spans))


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256, 80])
@pytest.mark.parametrize("window", [None, 1, 33])
def test_blocks_and_windows(device: str, path: str, attend: Callable[..., Any], block: int, window: int | None) -> None:
    if device == "cpu" and (block // 16 + PATHS.index(path) + bool(window)) % 2:
        pytest.skip("half of the combinations will do in the interpreter")
    if device == "cuda" and block not in (16, 64) and path != "as it comes":
        pytest.skip("each combination is compiled: few will do")
    spans = [(1, 30), (9, 70), (1, 129)] if device == "cpu" else [(1, 3000), (200, 900), (1, 129), (400, 2000)]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    check_attention(attend, paged(device, dtype, 4, 2, 64, block, spans, window))


@pytest.mark.parametrize("group", [16, 71])
def test_many_heads_a_kv_head(device: str, group: int) -> None:
    spans = [(1, 20), (3, 33)]
    check_attention(attention_triton, paged(device, torch.float16, group, 1, 64, 16, spans))


def test_more_requests_than_a_scan_reads(
    device: str, attend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 300
    if device == "cpu":
        for module in (kernels, ragged):
            monkeypatch.setattr(module, "SCAN", tl.constexpr(4))
        count = 9
    spans = [(int(n % 3 == 0), 1 + 7 * n % 40) for n in range(count)]
    check_attention(attend, paged(device, torch.float32, 1, 1, 16, 16, spans))


def test_queries_may_be_strided(device: str) -> None:
    inputs = paged(device, torch.float32, 4, 2, 32, 16, [(3, 20), (1, 9)])
    want = attention_triton(**inputs)
    wide = torch.randn(4, 8, 32, device=device)
    wide[:, 2:6] = inputs["q"]
    assert torch.equal(attention_triton(**{**inputs, "q": wide[:, 2:6]}), want)


def test_repeats_bit_for_bit(device: str, attend: Callable[..., Any]) -> None:
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    inputs = paged(device, dtype, 4, 2, 64, 16, BATCHES[device][2 if device == "cpu" else 3])
    first = attend(**inputs)
    for _ in range(1 if device == "cpu" else 20):
        assert torch.equal(attend(**inputs), first)


def alone(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """Request `index` of a decode batch by itself, in a table of the same width."""
    part = slice(index, index + 1)
    return {
        **inputs,
        "q": inputs["q"][part],
        "block_tables": inputs["block_tables"][part],
        "query_starts": torch.tensor([0, 1], dtype=torch.int32, device=inputs["q"].device),
        "lengths": inputs["lengths"][part],
    }


def test_fixed_pieces_make_decoding_batch_invariant(device: str) -> None:
    attend = partial(kernels.run, 64 if device == "cpu" else 512)
    spans = [(1, 7), (1, 150), (1, 64)] if device == "cpu" else [(1, 300 * n + 5) for n in range(40)]
    inputs = paged(device, torch.float16, 8, 2, 64, 16, spans)
    together = attend(**inputs)
    for index in range(len(spans)):
        assert torch.equal(attend(**alone(inputs, index))[0], together[index])


def test_rows_of_nobody_are_left_as_they_are(device: str) -> None:
    """A step padded to a captured size: requests without rows, and rows behind the last request."""
    inputs = paged(device, torch.float32, 4, 2, 32, 16, [(1, 20), (1, 9), (0, 0), (0, 0)])
    padded = {**inputs, "q": torch.cat((inputs["q"], torch.full_like(inputs["q"], float("nan"))))}
    got = attention_triton(**padded)
    assert torch.equal(got[:2], attention_triton(**inputs))
    assert got[2:].isnan().all()  # conftest fills fresh memory with NaN


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [
    [(1, 900), (1, 40), (1, 3000), (1, 1)],
    [(1, 900), (600, 2000), (5, 700)],
    [(700, 2900)],
])  # fmt: skip
def test_captured_graph_follows_lengths(spans: list[tuple[int, int]]) -> None:
    """One graph, captured once, serves other lengths, starts and tables of the same shapes."""
    torch.manual_seed(0)
    inputs = paged("cuda", torch.bfloat16, 32, 8, 128, 64, spans)
    attention_triton(**inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_triton(**inputs)
    rows = [new for new, _ in spans]
    rows[0], rows[-1] = rows[-1], rows[0]
    others = [(new, max(new, keys // 2 + 3)) for new, (_, keys) in zip(rows, spans)]
    for changed in (spans, others):
        fresh = paged("cuda", torch.bfloat16, 32, 8, 128, 64, changed)
        inputs["q"].copy_(fresh["q"])
        blocks = fresh["k"].shape[0]
        assert blocks <= inputs["k"].shape[0]
        for name in ("k", "v"):
            inputs[name].fill_(float("nan"))
            inputs[name][:blocks].copy_(fresh[name])
        inputs["block_tables"].zero_()
        inputs["block_tables"][:, : fresh["block_tables"].shape[1]].copy_(fresh["block_tables"])
        inputs["query_starts"].copy_(fresh["query_starts"])
        inputs["lengths"].copy_(fresh["lengths"])
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check_attention(lambda **_: out, fresh)


@pytest.mark.gpu
def test_pages_past_two_gigabytes() -> None:
    torch.manual_seed(0)
    inputs = paged("cuda", torch.bfloat16, 8, 2, 128, 64, [(1, 500), (40, 300)])
    blocks = (1 << 32) // (2 * 64 * 128) + 64
    inputs["block_tables"] += blocks - inputs["k"].shape[0]
    for name in ("k", "v"):
        pages = torch.zeros(blocks, 2, 64, 128, device="cuda", dtype=torch.bfloat16)
        pages[-inputs[name].shape[0] :] = inputs[name]
        inputs[name] = pages
    check_attention(attention_triton, inputs)


def test_refuses() -> None:
    inputs = dict(next(iter(attention.inputs("cpu", torch.float32))))
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    accepts = LIMITS.accepts
    assert accepts(**meta) is None
    for name in ("q", "k", "v"):
        meta[name] = torch.empty(*meta[name].shape[:-1], 100, device="meta")
    assert "multiples of 8" in str(accepts(**meta))
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    doubled = {name: meta[name].double() for name in ("q", "k", "v")}
    assert "float64" in str(accepts(**{**meta, **doubled}))
    assert "q's dtype" in str(accepts(**{**meta, "q": meta["q"].half()}))
    assert "int32" in str(accepts(**{**meta, "lengths": meta["lengths"].long()}))
    odd = torch.empty(4, 1, 24, 128, device="meta")
    assert "multiples of 16" in str(accepts(**{**meta, "k": odd, "v": odd}))
