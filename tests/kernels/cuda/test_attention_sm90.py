"""What is peculiar to rung `sm90`: anchors that are not peaks, tiles that are dealt, blocks that are let pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_attention_checks import exact, hold

from ridgeline.kernels.cuda import attention_sm90
from ridgeline.kernels.cuda.attention_sm90 import LONG, SHORT, Sections, Tile, choose
from ridgeline.ops.attention import attention_inputs

on_gpu = pytest.mark.gpu
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def call(
    new: tuple[int, ...], visible: tuple[int, ...], heads: int = 2, kv_heads: int = 1, dim: int = 128, **more: Any
) -> dict[str, Any]:
    dtype = more.pop("dtype", torch.bfloat16)
    page = more.pop("page", None)
    window = more.pop("window", None)
    return dict(attention_inputs("cuda", dtype, heads, kv_heads, dim, page, window, new, visible, **more))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 4.0, 60.0, 600.0])
def test_scores_far_from_any_anchor(scale: float, causal: bool, dtype: str) -> None:
    """Rows whose peaks grow from block to block, fall, and lie hundreds of powers of two from zero.

    One key takes nearly all of the weight there, so that results are near some value and plain PyTorch's error is
    no measure: it is the exact result that counts, to the precision of the dtype and of the scores.
    """
    arguments = call((700,), (900,), causal=causal, return_lse=True, dtype=DTYPES[dtype])
    slope = torch.linspace(-1, 1, 900, device="cuda")[:, None, None] * (1 if causal else -1)
    arguments["k"][:900] = (arguments["k"][:900].float() * 0.3 + slope).to(DTYPES[dtype])
    arguments["scale"] = scale / 128**0.5
    wanted, wanted_lse = exact(arguments)
    out, lse = attention_sm90.attention_sm90(**arguments)
    assert not out.isnan().any()
    error = (out.float() - wanted).abs().max().item()
    assert error < (1e-2 if dtype == "bf16" else 1.5e-3) * wanted.abs().max().item()
    assert torch.allclose(lse, wanted_lse, rtol=1e-4, atol=2e-3)


@on_gpu
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Wild scores in one row make its warp look twice; the bits of the others stay."""
    arguments = call((256,), (512,))
    out = attention_sm90.attention_sm90(**arguments)
    arguments["q"][37] *= 200
    again = attention_sm90.attention_sm90(**arguments)
    assert torch.equal(out[:37], again[:37])
    assert torch.equal(out[38:], again[38:])
    assert not torch.equal(out[37], again[37])


@on_gpu
@pytest.mark.parametrize("page", [None, 64])
def test_more_requests_than_lanes(page: int | None) -> None:
    """Dealing looks through 32 requests at a time; some have no rows, some see nothing, some several tiles."""
    new = tuple((7 * index) % 300 if index % 5 else 0 for index in range(75))
    visible = tuple(max(0, rows - 60 + 11 * (index % 40)) for index, rows in enumerate(new))
    for causal in (True, False):
        hold(attention_sm90.attention_sm90, call(new, visible, page=page, causal=causal, return_lse=True))


@on_gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_tiles_a_block_and_a_hundred_times_the_same_bits(dim: int) -> None:
    """Several tiles for every multiprocessor, in an order that differs from run to run."""
    arguments = call((1500, 333, 700), (1500, 900, 700), heads=16, kv_heads=4, dim=dim, return_lse=True)
    hold(attention_sm90.attention_sm90, arguments)
    out, lse = attention_sm90.attention_sm90(**arguments)
    for _ in range(100):
        again, again_lse = attention_sm90.attention_sm90(**arguments)
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)


@on_gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_tiles_for_long_and_short_requests(dim: int) -> None:
    arguments = call((450, 130, 1), (450, 700, 300), heads=6, kv_heads=3, dim=dim, return_lse=True)
    for tile in {LONG[dim], SHORT[dim]}:
        hold(lambda tile=tile, **given: attention_sm90.run(tile, **given), arguments)


@on_gpu
@pytest.mark.parametrize("megabytes", [1, 8])
@pytest.mark.parametrize("dim", [64, 256])
def test_sections_change_no_bit(dim: int, megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are an order of tiles and nothing more."""
    for causal in (False, True):
        arguments = call((1500, 333, 0, 700), (1500, 900, 5, 700), heads=16, kv_heads=8, dim=dim, causal=causal)
        wanted = attention_sm90.attention_sm90(**arguments)
        with monkeypatch.context() as patch:
            patch.setitem(attention_sm90.SECTIONS, dim, Sections(megabytes, megabytes))
            assert torch.equal(attention_sm90.attention_sm90(**arguments), wanted)


@on_gpu
@pytest.mark.parametrize("dim", [192, 256])
@pytest.mark.parametrize("page", [None, 64])
def test_a_tile_may_be_finished_before_the_next_one(dim: int, page: int | None) -> None:
    tile = LONG[dim]._replace(flush=True)
    for more in ({}, {"causal": False}, {"window": 100, "sinks": True}, {"tails": (40, 0, 0, 3)}):
        arguments = call((1500, 333, 0, 70), (1500, 900, 5, 70), 16, 4, dim, page=page, return_lse=True, **more)
        hold(lambda **given: attention_sm90.run(tile, **given), arguments)
        out, lse = attention_sm90.run(tile, **arguments)
        for _ in range(20):
            again, again_lse = attention_sm90.run(tile, **arguments)
            assert torch.equal(out, again)
            assert torch.equal(lse, again_lse)


@on_gpu
def test_dealing_in_turn_is_right_too() -> None:
    """A launch without a counter: what is captured before any other launch has none."""
    arguments = call((1500, 333, 700), (1500, 900, 700), heads=16, kv_heads=4)
    wanted = attention_sm90.attention_sm90(**arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_sm90, "_counter", lambda q: None)
        assert torch.equal(attention_sm90.attention_sm90(**arguments), wanted)


def test_tiles_follow_from_shapes() -> None:
    assert choose(16384, 32, 64) == SHORT[64]
    assert choose(16384, 1, 64) == LONG[64]


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_tiles_fit_a_multiprocessor(dim: int) -> None:
    for tile in (LONG[dim], SHORT[dim]):
        assert isinstance(tile, Tile)
        assert tile.shared_bytes(dim) <= 232448
        copying, multiplying = tile.registers
        assert 128 * (copying + tile.warpgroups * multiplying) <= 65536
