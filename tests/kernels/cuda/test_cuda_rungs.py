"""The rungs v1 and v2 without a GPU: the paper's block sizes, tiles that fit, and refusals by name."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.cuda import attention_v1 as v1
from ridgeline.kernels.cuda import attention_v2 as v2
from ridgeline.ops.attention import attention, attention_inputs

H100_BYTES = 227 * 1024


def on_meta(**more: Any) -> dict[str, Any]:
    """Arguments of a small call on meta tensors."""
    made = dict(attention_inputs("cpu", torch.bfloat16, 4, 2, more.pop("head_dim", 64), more.pop("block", None), None,
                                 (3, 5), (10, 9), **more))  # fmt: skip
    return {name: one.to("meta") if isinstance(one, torch.Tensor) else one for name, one in made.items()}


@pytest.mark.parametrize("head_dim", v1.LIMITS.head_dims)
@pytest.mark.parametrize("sram_bytes", [99 * 1024, 163 * 1024, H100_BYTES])
def test_block_sizes_are_the_papers(sram_bytes: int, head_dim: int) -> None:
    elements = sram_bytes // 2
    columns = ceil(elements / (4 * head_dim))
    assert v1.block_sizes(sram_bytes, head_dim) == (columns, min(columns, head_dim))


def test_block_sizes_of_the_papers_example() -> None:
    """M = 100 KB and d = 64 in the paper's terms; and this GPU's."""
    assert v1.block_sizes(100 * 1024, 64) == (200, 64)
    assert v1.block_sizes(H100_BYTES, 128) == (227, 128)
    assert v1.block_sizes(H100_BYTES, 256) == (114, 114)


@pytest.mark.parametrize("head_dim", v1.LIMITS.head_dims)
@pytest.mark.parametrize("sram_bytes", [163 * 1024, H100_BYTES])
def test_what_is_built_fits_and_is_not_more(sram_bytes: int, head_dim: int) -> None:
    paper, made = v1.block_sizes(sram_bytes, head_dim), v1.built(sram_bytes, head_dim)
    assert v1.shared_bytes(made, head_dim) <= sram_bytes
    assert 0 <= paper.columns - made.columns < 64
    assert made.rows <= paper.rows
    assert made.rows % 16 == made.columns % 64 == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelRefused, match=r"head dim 256.*v2 would do"):
        v1.built(99 * 1024, 256)


def test_block_sizes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    v1.main()
    assert "sm_90 (227 KiB), d = 128: B_c = 227, B_r = 128; built 192 x 128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "more"),
    [
        ("block_tables", {"block": 16}),
        ("softcap", {"softcap": 3.0}),
        ("sinks", {"sinks": True}),
        ("tree", {"tails": (2, 0)}),
        ("q", {"head_dim": 80}),
    ],
)
def test_v1_refuses_by_name(argument: str, more: dict[str, Any]) -> None:
    reason = attention.kernels["v1"].accepts(**on_meta(**more))
    assert reason is not None
    assert reason.startswith(f"{argument}: v1")
    assert reason.endswith("would do")
    if argument != "q":
        assert "v2" in reason.split(";")[-1]


@pytest.mark.parametrize(
    "more",
    [{}, {"block": 48}, {"softcap": 3.0}, {"sinks": True}, {"tails": (2, 0)}, {"head_dim": 192}, {"causal": False}],
)
def test_v2_takes_every_feature(more: dict[str, Any]) -> None:
    assert attention.kernels["v2"].accepts(**on_meta(**more)) is None


def test_v2_refuses_by_name() -> None:
    arguments = on_meta(head_dim=80)
    assert attention.kernels["v2"].accepts(**arguments).startswith("q: v2 takes head dims 64, 96, 128, 192, 256")
    arguments = {name: one.float() if name in "qkv" else one for name, one in on_meta().items()}
    assert attention.kernels["v2"].accepts(**arguments).startswith("q: v2 takes bfloat16 or float16")


@pytest.mark.parametrize("head_dim", v2.LIMITS.head_dims)
@pytest.mark.parametrize("memory", [(102400, 101376), (167936, 166912), (233472, 232448)])
@pytest.mark.parametrize("batch", [(4096, 1), (64, 1), (4096, 64), (70, 70)])
def test_tiles_fit_every_gpu(batch: tuple[int, int], memory: tuple[int, int], head_dim: int) -> None:
    """Shared memory of a multiprocessor and of a block: sm_86, sm_80, sm_90."""
    tile = v2.choose(*batch, 32, head_dim, *memory)
    assert tile.shared_bytes(head_dim) <= memory[1]
    assert tile.shared_bytes(head_dim) + 1024 <= memory[0]
