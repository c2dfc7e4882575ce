"""Split-KV attention on a GPU: FlashAttention's error rule, every way of cutting keys, trees, graphs, invariance."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_rows import rows_of
from cuda_attention_checks import FEATURES, hold, ragged

from ridgeline.kernels.cuda import decode, decode_wide, merge, split
from ridgeline.kernels.cuda.decode import attention_decode
from ridgeline.ops.attention import attention, attention_inputs

pytestmark = pytest.mark.gpu
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (64, 96, 128, 192, 256)
GROUPS = (1, 3, 4, 8, 16, 71)
SHORT = ((1, 1), (1, 17), (1, 4097), (3, 799), (1, 8192), (0, 9), (2, 113), (1, 203), (5, 3), (1, 0))
"""(new rows, keys) of one batch: single tokens and drafts, odd sizes, rows that see nothing."""


@pytest.fixture(params=[None, 256], ids=["shares", "pieces"])
def attend(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """With equal shares, and with pieces of a fixed size."""
    return partial(decode.run, request.param)


def short(head_dim: int, dtype: torch.dtype, group: int, page: int | None, **more: Any) -> dict[str, Any]:
    """Arguments of a batch of few rows a request."""
    new, visible = zip(*SHORT)
    kv_heads, window = (1 if group > 8 else 2), more.pop("window", None)
    return dict(
        attention_inputs(
            "cuda", dtype, kv_heads * group, kv_heads, head_dim, page, window, new, visible, return_lse=True, **more
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_and_head_dims(feature: str, head_dim: int, dtype: str) -> None:
    """Long requests and trees: the wide kernel on Hopper."""
    for page in (None, 16) if dtype == "bf16" else (64,):
        hold(attention_decode, ragged("cuda", DTYPES[dtype], 4, 2, head_dim, page, feature))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "more", [{}, {"window": 33}, {"softcap": 3.0}, {"sinks": True, "window": 700}, {"causal": False}], ids=str
)
def test_short_queries(head_dim: int, more: dict[str, Any], attend: Callable[..., Any]) -> None:
    """Few rows: the narrow kernel."""
    for dtype, page in ((torch.bfloat16, 64), (torch.float16, None)):
        hold(attend, short(head_dim, dtype, 4, page, **more))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("page", [16, 32, 48, 64, 80, 128, 256, None])
def test_groups_and_pages(group: int, page: int | None) -> None:
    hold(attention_decode, short(128, torch.bfloat16, group, page))


@pytest.mark.parametrize("count", [31, 32, 33, 300])
def test_many_requests(count: int, attend: Callable[..., Any]) -> None:
    """Warps count up to 32 requests by themselves, blocks the others."""
    new, visible = (1,) * count, tuple(37 * index % 501 for index in range(count))
    hold(
        attend,
        attention_inputs("cuda", torch.bfloat16, 8, 2, 64, 16, None, new, visible, return_lse=True),
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(
    ("new", "visible", "tails"),
    [
        ((32,), (2000,), (32,)),
        ((64, 7), (3000, 300), (64, 7)),
        ((1, 2, 1), (5, 60, 7), (1, 2, 1)),  # few rows: the narrow kernel has trees, too
        ((101,), (1500,), (100,)),
        ((128, 0, 3), (128, 5, 9000), (128, 0, 1)),
    ],
)
def test_trees(
    new: tuple[int, ...],
    visible: tuple[int, ...],
    tails: tuple[int, ...],
    window: int | None,
    head_dim: int,
    attend: Callable[..., Any],
) -> None:
    arguments = attention_inputs(
        "cuda", torch.bfloat16, 8, 2, head_dim, 64, window, new, visible, tails=tails, return_lse=True
    )
    hold(attend, arguments)


@pytest.mark.parametrize("plan", [(16, 3, 4, 2), (32, 2, 4, 1), (16, 2, 2, 3), (64, 2, 2, 1), (16, 4, 8, 1)])
def test_every_layout_of_a_block(plan: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode.PLANS, 128, decode.Narrow(128, *plan))
    hold(attention_decode, short(128, torch.bfloat16, 4, 64))


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_row_is_its_own_business(rows: int) -> None:
    """With pieces of a fixed size a request alone gets the bits that it gets among 32."""
    attend = partial(decode.run, 1024)
    draw = random.Random(rows)
    visible = tuple(draw.randrange(rows, 9000) for _ in range(32))
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 32, 8, 128, 64, None, (rows,) * 32, visible))
    together = attend(**arguments)
    for index in range(32):
        mine = slice(index * rows, (index + 1) * rows)
        assert torch.equal(attend(**rows_of(arguments, [(index, 0, rows)])), together[mine]), index


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 300, 6000])
def test_a_row_does_not_know_its_chunk(head_dim: int, window: int | None) -> None:
    """Decoded alone or in a batch, or part of a prompt cut anywhere: the same bits. Pieces of 128 keys, so that there
    are more than are added at once."""
    attend = partial(decode.run, 128)
    lengths = (7000, 511, 2901)
    arguments = dict(
        attention_inputs(
            "cuda", torch.bfloat16, 8, 2, head_dim, 64, window, lengths, lengths,
            softcap=20.0, sinks=True, return_lse=True,
        )
    )  # fmt: skip
    whole, logs = attend(**arguments)
    starts = arguments["query_starts"].tolist()
    far, near, last = lengths
    for parts in (
        [(0, far - 1, far)],
        [(0, far - 1, far), (1, near - 1, near), (2, last - 1, last)],
        [(2, 5, 6), (0, far - 30, far - 1), (1, 0, near), (0, 3, 4)],
        [(0, 17, far)],
        [(0, 5000, 5003), (1, 7, 10), (2, 60, 61)],
    ):
        out, lse = attend(**rows_of(arguments, parts))
        at = 0
        for request, first, end in parts:
            place = slice(starts[request] + first, starts[request] + end)
            assert torch.equal(out[at : at + end - first], whole[place]), (parts, request)
            assert torch.equal(lse[at : at + end - first], logs[place])
            at += end - first


@pytest.mark.parametrize("rows", [1, 40])
def test_a_hundred_times_the_same_bits(rows: int, attend: Callable[..., Any]) -> None:
    visible = tuple(100 + 311 * index for index in range(20))
    arguments = attention_inputs("cuda", torch.bfloat16, 32, 8, 128, 64, None, (rows,) * 20, visible, return_lse=True)
    out, lse = attend(**arguments)
    for _ in range(100):
        again, again_lse = attend(**arguments)
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_in_a_graph(rows: int) -> None:
    """A captured call follows lengths and starts that change on the device, again and again."""
    new, visible = (rows,) * 4, (300, 17, 5000, 64)
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 32, 8, 128, 64, None, new, visible))
    attention_decode(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [attention_decode(**arguments) for _ in range(3)]
    starts = arguments["query_starts"].clone()
    for lengths, empty in (((300, 17, 5000, 64), False), ((12, 12, 13, 12), False), ((250, 16, 4999, 33), True)):
        arguments["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
        arguments["query_starts"].copy_(starts)
        if empty:  # the second request's rows go to the first
            arguments["query_starts"][1] = arguments["query_starts"][2]
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        exact = attention.reference(**{**arguments, **{name: arguments[name].float() for name in "qkv"}})
        for out in outs:
            assert torch.equal(out, outs[0])
            assert (out.float() - exact).abs().max().item() < 2e-2
        assert torch.equal(outs[0], attention_decode(**arguments))


def test_the_workspace_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums that nobody wrote are never read."""
    arguments = attention_inputs("cuda", torch.bfloat16, 32, 8, 128, 64, None, (1,) * 5, (1, 70, 9000, 333, 4000))
    empty = torch.empty

    def poisoned(*sizes: Any, **more: Any) -> torch.Tensor:
        return empty(*sizes, **more).fill_(float("nan"))

    wanted = attention_decode(**arguments)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(attention_decode(**arguments), wanted)


def sevens(like: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.full(like.shape, 7.0, dtype=like.dtype, device=like.device)


def test_rows_of_nobody_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 40):
        arguments = dict(attention_inputs("cuda", torch.bfloat16, 8, 2, 64, 16, None, (rows, rows), (50, 90)))
        wanted = attention_decode(**arguments)
        arguments["q"] = torch.cat([arguments["q"], torch.randn_like(arguments["q"])])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", sevens)
            got = attention_decode(**arguments)
        assert torch.equal(got[: 2 * rows], wanted)
        assert (got[2 * rows :] == 7).all()


def test_strided_queries_and_keys() -> None:
    """q, k and v as slices of one projection."""
    for new, visible in (((7, 3), (7, 3)), ((60, 50), (60, 50))):
        arguments = dict(attention_inputs("cuda", torch.bfloat16, 4, 2, 128, None, None, new, visible))
        whole = torch.randn(sum(new), 8, 128, dtype=torch.bfloat16, device="cuda")
        arguments |= {"q": whole[:, :4], "k": whole[:, 4:6], "v": whole[:, 6:], "return_lse": True}
        arguments["key_starts"] = arguments["query_starts"]
        hold(attention_decode, arguments)


def test_streams_side_by_side() -> None:
    """Calls on two streams do not share counters or workspace."""
    arguments = attention_inputs("cuda", torch.bfloat16, 32, 8, 128, 64, None, (1,) * 3, (9000, 70, 4000))
    wanted = attention_decode(**arguments)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outs = []
    for index in range(60):
        with torch.cuda.stream(streams[index % 2]):
            outs.append(attention_decode(**arguments))
    torch.cuda.synchronize()
    for out in outs:
        assert torch.equal(out, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 40])
def test_offsets_beyond_32_bits(rows: int) -> None:
    """A pool of more than 2^31 numbers, of which the last pages are used."""
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 2, 1, 128, 256, None, (rows,), (700,), return_lse=True))
    blocks = 2**31 // (256 * 128) + 8
    shift = blocks - arguments["k"].shape[0]
    for name in ("k", "v"):
        pool = torch.zeros(blocks, 1, 256, 128, dtype=torch.bfloat16, device="cuda")
        pool[shift:] = arguments[name]
        arguments[name] = pool
    arguments["block_tables"] = arguments["block_tables"] + shift
    hold(attention_decode, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_two_attentions(dtype: str) -> None:
    """A prefix and the rest, merged, are all; a side that saw nothing counts for nothing."""
    kind = DTYPES[dtype]
    whole = dict(attention_inputs("cuda", kind, 8, 2, 128, 64, None, (1, 1, 1), (500, 64, 900), return_lse=True))
    exact, exact_lse = attention.reference(**{**whole, **{name: whole[name].float() for name in "qkv"}})
    shared = torch.tensor([256, 64, 0], dtype=torch.int32, device="cuda")
    prefix = attention_decode(**{**whole, "lengths": shared, "causal": False})
    rest_tables = torch.stack([row.roll(-int(n) // 64) for row, n in zip(whole["block_tables"], shared)])
    rest = attention_decode(
        **{**whole, "lengths": whole["lengths"] - shared, "block_tables": rest_tables.contiguous(), "causal": False}
    )
    out, lse = merge.merge_attended(*prefix, *rest)
    assert (out.float() - exact).abs().max().item() < (2e-2 if dtype == "bf16" else 3e-3)
    assert (lse - exact_lse).abs().max().item() < 1e-3
    nothing = torch.full_like(prefix[0], float("nan")), torch.full_like(prefix[1], float("-inf"))
    again, same = merge.merge_attended(*rest, *nothing)
    assert torch.equal(again, rest[0].masked_fill(rest[1].isinf()[..., None], 0))
    assert torch.equal(same, rest[1])


@pytest.mark.parametrize("nodes", [9, 16, 17, 32, 33, 64, 100])
@pytest.mark.parametrize("visible", [100, 513, 8192])
def test_trees_of_one_request(visible: int, nodes: int) -> None:
    """What verifying a tree asks for: rows of one and of two warpgroups, one piece and several."""
    arguments = attention_inputs(
        "cuda", torch.bfloat16, 32, 8, 128, 64, None, (nodes,), (visible,), tails=(nodes,), return_lse=True
    )
    hold(attention_decode, arguments)
    out, lse = attention_decode(**arguments)
    for _ in range(20):
        again, again_lse = attention_decode(**arguments)
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("whole_from", [0, 1, 48])
@pytest.mark.parametrize("count", [1, 2, 33, 64, 261, 300])
def test_shares_as_small_as_may_be_and_whole(count: int, whole_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For equal lengths, which may be cut at borders, and for ragged ones; fewer tiles than blocks among them."""
    monkeypatch.setitem(decode.PLANS, 128, dataclasses.replace(decode.PLANS[128], whole_from=whole_from))
    for visible in ((1000,) * count, (4096,) * count, tuple(37 * index % 501 for index in range(count))):
        hold(
            attention_decode,
            attention_inputs("cuda", torch.bfloat16, 8, 2, 128, 64, None, (1,) * count, visible, return_lse=True),
        )


@pytest.mark.parametrize("whole_from", [0, 48])
def test_many_tiles_in_a_graph(whole_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths on the device decide how work is dealt: one graph, whose shares grow, or do not."""
    monkeypatch.setitem(decode.PLANS, 128, dataclasses.replace(decode.PLANS[128], whole_from=whole_from))
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 16, 8, 128, 64, None, (1,) * 32, (4096,) * 32))
    attention_decode(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode(**arguments)
    for lengths in ((4096,) * 32, (1024,) * 32, (0, *(4000,) * 31), tuple(4096 - 99 * index for index in range(32))):
        arguments["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        exact = attention.reference(**{**arguments, **{name: arguments[name].float() for name in "qkv"}})
        assert (out.float() - exact).abs().max().item() < 2e-2


def test_plans_fit_the_gpu() -> None:
    machine = split.machine(0)
    for head_dim in HEAD_DIMS:
        plan = decode._narrow(machine, head_dim)
        assert machine.holds(plan.shared_bytes, plan.blocks)
        for rows in (64, 128):
            wide = decode_wide.plan(machine, head_dim, rows, 64)
            assert wide is None or machine.holds(wide.shared_bytes, wide.blocks)
