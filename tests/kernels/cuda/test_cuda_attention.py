"""The rungs of attention in CUDA, on a GPU: FlashAttention's error rule, determinism, graphs, offsets."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_attention_checks import FEATURES, RAGGED, hold, ragged

from ridgeline.kernels.cuda import nvrtc
from ridgeline.ops.attention import attention, attention_inputs

pytestmark = pytest.mark.gpu
RUNGS = ("v1", "v2", "sm90")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def kernel_for(name: str, arguments: dict[str, Any]) -> Any:
    """A rung's function; skips if this rung says that it does not take the call."""
    importlib.import_module(f"ridgeline.kernels.cuda.attention_{name}")
    rung = attention.kernels[name]
    reason = rung.accepts(**arguments)
    if reason is not None:
        pytest.skip(reason)
    return rung.call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("rung", RUNGS)
def test_features_and_head_dims(rung: str, feature: str, head_dim: int, dtype: str) -> None:
    for page in (None, 16) if dtype == "bf16" else (64,):
        arguments = ragged("cuda", DTYPES[dtype], 4, 2, head_dim, page, feature)
        hold(kernel_for(rung, arguments), arguments)


@pytest.mark.parametrize("page", [32, 48, 64, 128, 256])
@pytest.mark.parametrize("rung", RUNGS)
def test_pages(rung: str, page: int) -> None:
    arguments = ragged("cuda", torch.bfloat16, 6, 1, 128, page, "window")
    hold(kernel_for(rung, arguments), arguments)


@pytest.mark.parametrize("size", RAGGED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rung", RUNGS)
def test_requests_alone(rung: str, causal: bool, size: tuple[int, int]) -> None:
    arguments = attention_inputs(
        "cuda", torch.bfloat16, 3, 3, 128, None, None, (size[0],), (size[1],), causal=causal, return_lse=True
    )
    if size[0]:
        hold(kernel_for(rung, arguments), arguments)


@pytest.mark.parametrize("rung", RUNGS)
def test_a_hundred_times_the_same_bits(rung: str) -> None:
    arguments = ragged("cuda", torch.bfloat16, 4, 2, 128, None, "causal")
    kernel = kernel_for(rung, arguments)
    out, lse = kernel(**arguments)
    for _ in range(100):
        again, again_lse = kernel(**arguments)
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("rung", RUNGS)
def test_in_a_graph(rung: str) -> None:
    """A captured call follows lengths that change on the device."""
    new, visible = (40, 1, 200), (300, 17, 200)
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 4, 2, 64, None, None, new, visible))
    kernel = kernel_for(rung, arguments)
    kernel(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(**arguments)
    arguments["lengths"].copy_(torch.tensor((120, 9, 30), dtype=torch.int32))
    arguments["query_starts"].copy_(torch.tensor((0, 100, 101, 241), dtype=torch.int32))
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, kernel(**arguments))
    assert not out.isnan().any()


def test_on_a_thread_that_has_not_used_the_gpu() -> None:
    arguments = attention_inputs("cuda", torch.bfloat16, 2, 2, 64, None, None, (5, 9), (50, 9))
    kernel = kernel_for("v2", arguments)
    wanted = kernel(**arguments)
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(kernel(**arguments)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted)


def test_a_launch_that_does_not_fit_the_machine_code_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "two.cu"
    source.write_text('extern "C" __global__ void two(float* a, int n) { a[n] = 1.0f; }')
    tensor = torch.zeros(4, device="cuda")
    nvrtc.Kernel(str(source), "two", (nvrtc.POINTER, nvrtc.INT32), {}).launch((1, 1, 1), 1, 0, tensor, 2)
    assert tensor.tolist() == [0, 0, 1, 0]
    with pytest.raises(RuntimeError, match="parameters"):
        nvrtc.Kernel(str(source), "two", (nvrtc.POINTER, nvrtc.INT64), {}).launch((1, 1, 1), 1, 0, tensor, 2)
    with pytest.raises(RuntimeError, match=r"launch of two.*failed"):
        nvrtc.Kernel(str(source), "two", (nvrtc.POINTER, nvrtc.INT32), {}).launch((1, 1, 1), 2048, 0, tensor, 2)


@pytest.mark.parametrize("rung", RUNGS)
def test_rows_of_nobody_are_left(rung: str) -> None:
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 2, 2, 64, None, None, (5, 9), (50, 9)))
    kernel = kernel_for(rung, arguments)
    wanted = kernel(**arguments)
    arguments["q"] = torch.cat([arguments["q"], torch.randn_like(arguments["q"])])
    assert torch.equal(kernel(**arguments)[:14], wanted)


@pytest.mark.parametrize("rung", RUNGS)
def test_strided_queries_and_keys(rung: str) -> None:
    """q, k and v as slices of one projection."""
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 4, 2, 128, None, None, (77, 30), (77, 30)))
    rows = 107
    whole = torch.randn(rows, 8, 128, dtype=torch.bfloat16, device="cuda")
    arguments |= {"q": whole[:, :4], "k": whole[:, 4:6], "v": whole[:, 6:], "return_lse": True}
    arguments["key_starts"] = arguments["query_starts"]
    hold(kernel_for(rung, arguments), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("rung", RUNGS)
def test_offsets_beyond_32_bits(rung: str) -> None:
    """A pool of more than 2^31 numbers, of which the last pages are used."""
    arguments = dict(attention_inputs("cuda", torch.bfloat16, 2, 1, 128, 256, None, (70,), (700,)))
    kernel = kernel_for(rung, arguments)
    blocks = 2**31 // (256 * 128) + 8
    for name in ("k", "v"):
        pool = torch.zeros(blocks, 1, 256, 128, dtype=torch.bfloat16, device="cuda")
        pool[-arguments[name].shape[0] :] = arguments[name]
        shift = blocks - arguments[name].shape[0]
        arguments[name] = pool
    arguments["block_tables"] = arguments["block_tables"] + shift
    hold(kernel, arguments)
