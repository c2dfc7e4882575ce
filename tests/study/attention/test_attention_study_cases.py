"""The cases of each experiment: shapes, counts of work, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ridgeline.core.errors import InvalidArgument
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention_call import mistake
from ridgeline.study.attention import tensors
from ridgeline.study.attention.cases import REPORT_SPEEDUPS, Case, Choice, cases


def test_the_reports_experiment() -> None:
    found = cases("report", Choice())
    assert [case.batch for case in found] == [1, 4, 16, 64] == list(REPORT_SPEEDUPS)
    assert {(case.new, case.visible, case.heads, case.head_dim, case.causal, case.page) for case in found} == {
        (64, 64, 32, 128, False, None)
    }


def test_the_papers_grid() -> None:
    found = cases("sweep", Choice(grouped=True))
    assert all(case.batch * case.visible == 16384 for case in found)
    assert {(case.heads, case.kv_heads, case.head_dim) for case in found} == {
        (32, 32, 64), (16, 16, 128), (8, 8, 256), (32, 8, 128), (64, 8, 128)
    }  # fmt: skip
    assert len(found) == 5 * 2 * 6


def test_decode_is_paged_and_grouped() -> None:
    found = cases("decode", Choice())
    assert len(found) == 5 * 6
    assert all((case.new, case.heads, case.kv_heads, case.page) == (1, 32, 8, 64) for case in found)


def test_a_choice_replaces_what_the_experiment_does() -> None:
    choice = Choice(
        batches=(2,), sequences=(128, 128), head_dims=(64,), heads=8, kv_heads=2, causal=True, layout="paged"
    )
    (case,) = cases("sweep", choice)
    assert case == Case("sweep", 2, 8, 2, 64, 128, 128, True, "bfloat16", 64)


def test_flops_are_the_papers_count_and_bytes_the_ops_floor() -> None:
    full = Case("sweep", 2, 16, 16, 128, 1024, 1024, False, "bfloat16")
    causal = Case("sweep", 2, 16, 16, 128, 1024, 1024, True, "bfloat16")
    assert full.flops == 4 * 2 * 16 * 1024 * 1024 * 128
    assert causal.flops == full.flops / 2
    decode = Case("decode", 8, 32, 8, 128, 1, 4096, True, "bfloat16", 64)
    assert decode.flops == 4 * 8 * 32 * 4096 * 128
    for case in (full, causal, decode):
        floor = REGISTRY["attention"].floor(**tensors.shapes(case)._asdict())
        assert floor.bytes == case.floor_bytes
        assert floor.flops == pytest.approx(case.flops, rel=1e-3)


@pytest.mark.parametrize("page", [None, 16])
def test_tensors_are_a_call_that_the_op_takes(page: int | None) -> None:
    case = Case("sweep", 3, 4, 2, 16, 5, 40, True, "float32", page)
    call = tensors.make(case, torch.device("cpu"))
    assert mistake(call) is None
    assert mistake(tensors.shapes(case)) is None
    for name, real, shadow in zip(call._fields, call, tensors.shapes(case)):
        if isinstance(real, torch.Tensor):
            assert (real.shape, real.dtype) == (shadow.shape, shadow.dtype), name
    out = REGISTRY["attention"](**call._asdict())
    found = tensors.error_of(case, call, out)
    assert found.worst < 1e-5
    assert found.plain < 1e-5
    assert not found.wrong
    out[-1, 0, 0] += 1.0
    assert tensors.error_of(case, call, out)[0] == pytest.approx(1.0, abs=1e-4)
    out[-1, 0, 0] = float("nan")
    assert tensors.error_of(case, call, out).worst == float("inf")
    assert tensors.error_of(case, call, out).wrong


def test_what_is_allowed_follows_the_size_of_results() -> None:
    """Rows of one key in bf16 are values up to 4, which may be off by a unit of 1/64 there; by two they may not."""
    case = Case("sweep", 1, 2, 2, 64, 4, 4, True, "bfloat16")
    call = tensors.make(case, torch.device("cpu"))
    call.v[0, 0, 0] = 3.0
    out = REGISTRY["attention"](**call._asdict())
    out[0, 0, 0] = 3.0 + 2**-6
    assert not tensors.error_of(case, call, out).wrong
    out[0, 0, 0] = 3.0 + 2**-4
    assert tensors.error_of(case, call, out).wrong


@pytest.mark.parametrize(
    ("experiment", "choice", "parameter"),
    [
        ("speed", {}, "experiment"),
        ("report", {"dtype": "int8"}, "dtype"),
        ("report", {"batches": (0,)}, "batch"),
        ("sweep", {"sequences": (128, -1)}, "sequence"),
        ("sweep", {"head_dims": (0,)}, "head_dim"),
        ("sweep", {"heads": 0}, "heads"),
        ("decode", {"kv_heads": 8}, "kv_heads"),
        ("decode", {"heads": 8, "kv_heads": 3}, "kv_heads"),
        ("decode", {"page": 100}, "page"),
        ("decode", {"layout": "rows"}, "layout"),
    ],
)
def test_what_is_refused(experiment: str, choice: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        cases(experiment, Choice(**choice))
    assert caught.value.parameter == parameter
