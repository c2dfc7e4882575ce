"""attention on Triton with every feature beside every other, and rows whose bits no neighbour changes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from attention_matrix import COVER, inputs_of, name_of
from attention_rows import rows_of
from triton_checks import plain_product

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.kernels.triton import attention as kernels
from ridgeline.kernels.triton.attention import Machine, Tile, attention_triton
from ridgeline.ops.attention import attention, attention_inputs

PATHS = ("as it comes", "split", "long", "fixed pieces")


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that fit the interpreter: it takes as long for each, whatever its size."""
    monkeypatch.setattr(kernels, "LONG", dict.fromkeys(kernels.LONG, Tile(32, 32, 4, 2)))
    monkeypatch.setattr(kernels, "LOADED", dict.fromkeys(kernels.LOADED, Tile(32, 32, 4, 2)))
    monkeypatch.setattr(kernels, "SPLIT", dict.fromkeys(kernels.SPLIT, Tile(16, 32, 4, 2)))
    monkeypatch.setattr(kernels, "FIXED", dict.fromkeys(kernels.FIXED, Tile(32, 32, 4, 2)))
    monkeypatch.setattr(kernels, "SPLIT_ROWS", 32)
    monkeypatch.setattr(kernels, "PIECES", dict.fromkeys(kernels.PIECES, kernels.Pieces(16, 32)))
    monkeypatch.setattr(kernels, "MERGED_AT_ONCE", 2)


def force(path: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1, 227 * 1024) if device == "cpu" else kernels._machine(torch.device("cuda", 0))
    if path == "long":
        monkeypatch.setattr(kernels, "FEW_ROWS", 0)
        machine = machine._replace(multiprocessors=0)
    elif path == "split":
        monkeypatch.setattr(kernels, "FEW_ROWS", 1 << 30)
    monkeypatch.setattr(kernels, "_machine", lambda _: machine)


@pytest.mark.parametrize("index", range(len(COVER)), ids=[name_of(choice) for choice in COVER])
def test_matrix(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = COVER[index]
    if device == "cpu":
        small(monkeypatch)
        if choice["dtype"] == torch.bfloat16:  # which NumPy does not have
            choice = {**choice, "dtype": torch.float32}
    inputs = inputs_of(choice, device)
    tolerance = attention.tolerance[str(choice["dtype"]).removeprefix("torch.")]
    want, logs = attention.reference(**{**inputs, "return_lse": True})
    for path in PATHS if device == "cuda" else (PATHS[index % len(PATHS)],):
        with monkeypatch.context() as patch:
            force(path, device, patch)
            got = kernels.run(32 if path == "fixed pieces" else None, **inputs)
        if inputs["return_lse"]:
            torch.testing.assert_close(got[1], logs, atol=1e-3, rtol=1e-3)
            got = got[0]
        torch.testing.assert_close(got, want, atol=tolerance.absolute, rtol=tolerance.relative)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "head_dim"), [((8, 2), 64), ((2, 2), 128), ((4, 1), 256)])
def test_a_row_never_depends_on_its_neighbours(
    device: str, heads: tuple[int, int], head_dim: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fixed pieces: the same bits alone, in a batch, beside prefills, in a chunk of any size."""
    if device == "cpu":
        if head_dim != 64:
            pytest.skip("one head dim will do in the interpreter")
        small(monkeypatch)
        monkeypatch.setattr(np, "matmul", plain_product)
    lengths = (70, 33, 101) if device == "cpu" else (1700, 511, 901)
    attend = partial(kernels.run, 32 if device == "cpu" else 256)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    inputs = dict(
        attention_inputs(
            device, dtype, *heads, head_dim, 16, window, lengths, lengths, softcap=20.0, sinks=True, return_lse=True
        )
    )
    whole, logs = attend(**inputs)
    starts = inputs["query_starts"].tolist()
    far, near, last = lengths
    for parts in (
        [(0, far - 1, far)],
        [(0, far - 1, far), (1, near - 1, near), (2, last - 1, last)],
        [(2, 5, 6), (0, far - 30, far - 1), (1, 0, near), (0, 3, 4)],
        [(0, 17, far)],
        [(1, 7, 10), (2, 60, 61)],
    ):
        out, lse = attend(**rows_of(inputs, parts))
        at = 0
        for request, first, end in parts:
            place = slice(starts[request] + first, starts[request] + end)
            assert torch.equal(out[at : at + end - first], whole[place]), (parts, request)
            assert torch.equal(lse[at : at + end - first], logs[place])
            at += end - first


def test_contiguous_keys_may_lie_among_others(device: str) -> None:
    """Keys and values as a projection leaves them: strided, next to queries."""
    inputs = dict(attention_inputs(device, torch.float32, 4, 2, 32, None, None, (5, 40), (9, 40)))
    want = attention_triton(**inputs)
    wide = torch.randn(inputs["k"].shape[0], 8, 32, device=device)
    wide[:, 4:6], wide[:, 6:8] = inputs["k"], inputs["v"]
    assert torch.equal(attention_triton(**{**inputs, "k": wide[:, 4:6], "v": wide[:, 6:8]}), want)


def test_rows_of_nobody_keep_their_logarithms(device: str) -> None:
    inputs = dict(attention_inputs(device, torch.float32, 4, 2, 32, None, None, (2, 0), (20, 3), return_lse=True))
    padded = {**inputs, "q": torch.cat((inputs["q"], inputs["q"]))}
    got, lse = attention_triton(**padded)
    want, logs = attention_triton(**inputs)
    assert torch.equal(got[:2], want)
    assert torch.equal(lse[:2], logs)
    assert got[2:].isnan().all()  # conftest fills fresh memory with NaN
    assert lse[2:].isnan().all()


def test_far_scores_and_a_closed_sink(device: str) -> None:
    """Scores whose exponentials overflow, and sinks of -inf (nothing) and +80 (nearly all)."""
    inputs = dict(attention_inputs(device, torch.float32, 3, 3, 32, 16, None, (3, 1), (20, 40), return_lse=True))
    inputs["q"] = inputs["q"] * 200
    inputs["sinks"] = torch.tensor([float("-inf"), 80.0, 0.0], device=device)
    got, want = attention_triton(**inputs), attention.reference(**inputs)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = dict(attention_inputs("cpu", torch.float32, 4, 2, 64, 16, None, (3,), (20,)))
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(InvalidArgument, match="q: must be on a CUDA device for triton, not on cpu"):
        attention_triton(**inputs)
    odd = dict(attention_inputs("cpu", torch.float32, 4, 2, 60, 16, None, (3,), (20,)))
    with pytest.raises(KernelRefused, match=r"q: triton takes head dims multiples of 8 up to 256, not 60; .* would do"):
        attention_triton(**odd)
