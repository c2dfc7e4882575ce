"""Other people's attention, each through a backend that is pinned: what the rungs are held against.

Knows how torch's scaled_dot_product_attention, Flex, FlashAttention-3 and FlashInfer are called. It must not
know rungs. A peer that cannot run is refused with its reason, and never replaced by another.

Peers see the same memory as the rungs. A layout that differs is a view of it: over random numbers that asks the
same work, though paged keys seen so are not the same keys (`same_keys` says which peers answer the same question).
FlashAttention-3 and FlashInfer are not dependencies: FA3_LIBRARY names a compiled library of the first (as vLLM
builds it), FlashInfer is used if it can be imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.ops.attention_call import Call
from ridgeline.study.attention.cases import Case
from ridgeline.study.timing import Works

FA3_VARIABLE = "FA3_LIBRARY"
FLASHINFER_WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer. prepare(case, calls) -> the same work on each of the calls; raises KernelRefused.

    missing() -> why this machine cannot run it, or None. same_keys: it reads paged keys in their true order.
    """

    name: str
    what: str
    devices: tuple[str, ...]
    prepare: Callable[[Case, Sequence[Call]], Works]
    missing: Callable[[], str | None] = lambda: None
    same_keys: bool = False


def peers(device: torch.device) -> dict[str, Peer]:
    """Peers by name that exist for a type of device, whether or not this machine has them."""
    return {one.name: one for one in PEERS if device.type in one.devices}


def chosen(wanted: Sequence[str], device: torch.device) -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers to run, and those left out with the reason. All are tried if none is named; "none" asks for none.

    Raises InvalidArgument for an unknown name, KernelRefused for a named peer that cannot run.
    """
    known = peers(device)
    if list(wanted) == ["none"]:
        return {}, {}
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"on {device.type} there are {', '.join(known)}"
            raise InvalidArgument("peers", f"there is no peer {name!r}; {hint}")
    running: dict[str, Peer] = {}
    left_out: dict[str, str] = {}
    for name in wanted or known:
        reason = known[name].missing()
        if reason is None:
            running[name] = known[name]
        elif wanted:
            raise KernelRefused(f"peer {name}: {reason}")
        else:
            left_out[name] = reason
    return running, left_out


def batched(case: Case, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as [batch, heads, tokens, head dim] views of the call's memory."""
    q = call.q.view(case.batch, case.new, case.heads, case.head_dim).transpose(1, 2)
    if case.page is None:
        k, v = (
            one.view(case.batch, case.visible, case.kv_heads, case.head_dim).transpose(1, 2) for one in (call.k, call.v)
        )
        return q, k, v
    if case.visible % case.page:
        raise KernelRefused(f"takes contiguous keys, which pages of {case.page} with {case.visible} keys are not")
    shape = (case.batch, case.kv_heads, case.visible, case.head_dim)
    return q, call.k.view(shape), call.v.view(shape)


def _torch(backend: SDPBackend) -> Callable[[Case, Sequence[Call]], Works]:
    """scaled_dot_product_attention with one backend and no other."""

    def prepare(case: Case, calls: Sequence[Call]) -> Works:
        causal, grouped = _plain_mask(case), case.heads != case.kv_heads
        attend = torch.nn.functional.scaled_dot_product_attention

        def bound(call: Call) -> Callable[[], Any]:
            q, k, v = batched(case, call)
            return lambda: attend(q, k, v, is_causal=causal, scale=call.scale, enable_gqa=grouped)

        return Works([bound(call) for call in calls], lambda: sdpa_kernel(backend))

    return prepare


def _plain_mask(case: Case) -> bool:
    """Whether torch must be told "causal". Its triangle starts at the top left, so only squares and single rows do."""
    if case.causal and 1 < case.new != case.visible:
        raise KernelRefused(f"has no causal mask for {case.new} queries aligned with the last of {case.visible} keys")
    return case.causal and case.new > 1


def _flex(case: Case, calls: Sequence[Call]) -> Works:
    """FlexAttention, compiled for this very shape (blocks that its causal mask hides are skipped)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if _plain_mask(case):

        def visible(b: Any, h: Any, row: Any, column: Any) -> Any:
            return row >= column

        mask = create_block_mask(visible, None, None, case.new, case.visible, device=str(calls[0].q.device))
    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads

    def bound(call: Call) -> Callable[[], Any]:
        q, k, v = batched(case, call)
        return lambda: compiled(q, k, v, block_mask=mask, scale=call.scale, enable_gqa=grouped)

    return Works([bound(call) for call in calls])


def _no_fa3() -> str | None:
    path = os.environ.get(FA3_VARIABLE)
    if not path:
        return f"no library given: {FA3_VARIABLE} (or --fa3-library) names FlashAttention-3's compiled extension"
    if not Path(path).is_file():
        return f"{FA3_VARIABLE} names {path}, which is no file"
    if _fa3_op() is None:
        torch.ops.load_library(path)
    return None if _fa3_op() is not None else f"{path} has no FlashAttention-3 forward operator"


def _fa3_op() -> Any:
    try:
        return torch.ops._vllm_fa3_C.fwd
    except AttributeError:
        return None


def fa3_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    most_queries: int,
    most_keys: int,
    pages: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Any, ...]:
    """What its forward takes, in order: q [T, H, D]; k and v [S, Hk, D] with key_starts, or in pages with lengths."""
    return (
        q, k, v, None, None, None, None,  # new keys and values, q's other part, where to write
        query_starts, key_starts, None, None, lengths, most_queries, most_keys,
        pages, None, None, None, None, None, None, None, None,  # batches, padding, rotations, scales
        scale, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,  # windows, schedule, sinks, ranks
    )  # fmt: skip


def _fa3(case: Case, calls: Sequence[Call]) -> Works:
    """FlashAttention-3's forward for ragged batches: q [T, H, D], keys in rows or in pages."""
    forward = _fa3_op()

    def bound(call: Call) -> Callable[[], Any]:
        k, v, used = call.k, call.v, None
        if case.page is not None:
            # Its pages are [page, KV heads, D]: the same memory, the two middle dimensions swapped.
            shape = (call.k.shape[0], case.page, case.kv_heads, case.head_dim)
            k, v, used = call.k.view(shape), call.v.view(shape), call.lengths
        arguments = fa3_arguments(
            call.q, k, v, call.query_starts, call.key_starts, used, case.new, case.visible, call.block_tables,
            call.scale, case.causal,
        )  # fmt: skip
        return lambda: forward(*arguments)[0]

    return Works([bound(call) for call in calls])


def _no_flashinfer() -> str | None:
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        return f"cannot be imported ({error})"
    return None


def _flashinfer(case: Case, calls: Sequence[Call]) -> Works:
    """FlashInfer's wrappers in CUDA-graph mode, planned outside of what is timed; they share one workspace."""
    import flashinfer

    device = calls[0].q.device
    space = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    sizes = (case.heads, case.kv_heads, case.head_dim)

    def ragged(call: Call) -> Callable[[], Any]:
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD")
        wrapper.plan(
            call.query_starts,
            call.key_starts,
            *sizes,
            causal=case.causal,
            sm_scale=call.scale,
            q_data_type=call.q.dtype,
        )
        return lambda: wrapper.run(call.q, call.k, call.v)

    def paged(call: Call) -> Callable[[], Any]:
        assert call.block_tables is not None
        assert case.page is not None
        width = call.block_tables.shape[1]
        starts = torch.arange(0, (case.batch + 1) * width, width, dtype=torch.int32, device=device)
        pages = call.block_tables.flatten()
        last = torch.full((case.batch,), (case.visible - 1) % case.page + 1, dtype=torch.int32, device=device)
        if case.new > 1:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND")
            wrapper.plan(
                call.query_starts, starts, pages, last, *sizes, case.page,
                causal=case.causal, sm_scale=call.scale, q_data_type=call.q.dtype,
            )  # fmt: skip
        else:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                space, "HND", use_cuda_graph=True, use_tensor_cores=case.heads // case.kv_heads >= 4,
                paged_kv_indptr_buffer=torch.empty_like(starts), paged_kv_indices_buffer=torch.empty_like(pages),
                paged_kv_last_page_len_buffer=torch.empty_like(last),
            )  # fmt: skip
            wrapper.plan(starts, pages, last, *sizes, case.page, sm_scale=call.scale, q_data_type=call.q.dtype)
        return lambda: wrapper.run(call.q, (call.k, call.v))

    return Works([(ragged if case.page is None else paged)(call) for call in calls])


PEERS = (
    Peer("math", "torch, operator by operator", ("cpu", "cuda"), _torch(SDPBackend.MATH)),
    Peer("torch-cpu", "torch's fused CPU kernel", ("cpu",), _torch(SDPBackend.FLASH_ATTENTION)),
    Peer("efficient", "torch, memory-efficient (xFormers)", ("cuda",), _torch(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("fa2", "torch, FlashAttention-2", ("cuda",), _torch(SDPBackend.FLASH_ATTENTION)),
    Peer("cudnn", "torch, cuDNN", ("cuda",), _torch(SDPBackend.CUDNN_ATTENTION)),
    Peer("flex", "torch, FlexAttention compiled", ("cuda",), _flex),
    Peer("fa3", "FlashAttention-3", ("cuda",), _fa3, _no_fa3),
    Peer("flashinfer", "FlashInfer", ("cuda",), _flashinfer, _no_flashinfer, same_keys=True),
)
