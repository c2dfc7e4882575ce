"""linear for 2 to 32 tokens: plans and dispatch without a GPU, the order of inputs, and on a GPU the products."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels import select as selecting
from ridgeline.kernels.cuda import linear as kernels
from ridgeline.kernels.cuda.decode import MACHINES
from ridgeline.kernels.cuda.linear import FEW, Plan, _accepts, eights_of, few, linear_cuda, split_of
from ridgeline.kernels.triton.linear import linear_triton
from ridgeline.kernels.triton.product import product
from ridgeline.ops import Ops
from ridgeline.ops.linear import linear
from ridgeline.ops.weight import Weight

H200 = MACHINES["sm_90"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WIDE = Plan(64, 4, 4, True, 2)
"""For 9 to 32 tokens."""


# The order of inputs


def product_of_fragments(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """mma.sync.m16n8k16 from what the lanes hold, as PTX lays its operands out: left [32, 4, 2], right [32, 2, 2]
    (lane, register, half), to the lanes' sums [32, 4]."""
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane, half in itertools.product(range(32), range(2)):
        group, place = lane // 4, 2 * (lane % 4) + half
        for register in range(4):
            a[group + 8 * (register % 2), place + 8 * (register // 2)] = left[lane, register, half]
        for register in range(2):
            b[place + 8 * register, group] = right[lane, register, half]
    sums = a @ b
    lanes = np.arange(32)
    row, column = lanes // 4, 2 * (lanes % 4)
    return np.stack([sums[row + 8 * (part // 2), column + part % 2] for part in range(4)], axis=1)


def test_sixteen_bytes_of_a_row_are_fragments_of_two_products() -> None:
    """linear.cu's loads and registers, lane by lane: 32 inputs, 16 tokens, 8 rows of the weight, all in integers."""
    draw = np.random.default_rng(0)
    x, weight = draw.integers(-9, 9, (16, 32)), draw.integers(-9, 9, (8, 32))
    lanes = np.arange(32)
    inputs = 8 * (lanes % 4)[:, None] + np.arange(8)
    upper, lower, right = (
        matrix[(lanes // 4)[:, None] + first, inputs].reshape(32, 4, 2)
        for matrix, first in ((x, 0), (x, 8), (weight, 0))
    )
    sums = np.zeros((32, 4))
    for pair in (0, 2):
        left = np.stack([upper[:, pair], lower[:, pair], upper[:, pair + 1], lower[:, pair + 1]], axis=1)
        sums += product_of_fragments(left, right[:, pair : pair + 2])
    exact = x @ weight.T
    for lane, part in itertools.product(range(32), range(4)):
        assert sums[lane, part] == exact[lane // 4 + 8 * (part // 2), 2 * (lane % 4) + part % 2]


def test_an_input_that_only_one_operand_moves_is_found() -> None:
    """The emulation can fail: with the inputs in their usual places on one side the sums differ."""
    draw = np.random.default_rng(1)
    left, right = draw.integers(-9, 9, (32, 4, 2)), draw.integers(-9, 9, (32, 2, 2))
    assert not np.array_equal(product_of_fragments(left, right), product_of_fragments(left, right[:, ::-1]))


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("width", [8, 72, 512, 4096, 14336, 14344])
def test_every_input_is_taken_once(split: int, width: int) -> None:
    plan = FEW
    taken = np.zeros(width, dtype=int)
    run = 32 * plan.depth
    for rank, warp, piece in itertools.product(range(split), range(plan.warps), range(0, 32, 8)):
        for depth in range((rank * plan.warps + warp) * run + piece, width + piece, split * plan.warps * run):
            for at in range(depth, depth + run, 32):
                taken[at : at + 8] += at < width
    assert (taken == 1).all()


# Plans and dispatch


@pytest.mark.parametrize(
    ("tokens", "outputs", "width", "expected"),
    [
        (8, 6144, 4096, 1),
        (8, 4096, 4096, 1),
        (8, 4096, 14336, 1),
        (8, 128256, 4096, 1),
        (16, 6144, 4096, 2),
        (32, 4096, 14336, 2),
        (32, 128256, 4096, 1),
        (8, 1024, 4096, 4),
        (8, 1024, 1024, 1),  # four blocks a row would leave warps without inputs
    ],
)
def test_blocks_fill_the_multiprocessors(tokens: int, outputs: int, width: int, expected: int) -> None:
    plan = FEW if tokens <= 8 else WIDE
    assert split_of(plan, outputs, width, H200) == expected
    assert split_of(plan, outputs, width, MACHINES["sm_80"]) == 1
    assert split_of(replace(plan, split=2), outputs, width, H200) == 2


def test_plans_fit_every_machine() -> None:
    assert all(machine.holds(FEW.shared_bytes(1), 1) for machine in MACHINES.values())
    assert H200.holds(FEW.shared_bytes(1), FEW.blocks)
    assert [eights_of(tokens) for tokens in (1, 2, 8, 9, 16, 17, 32)] == [1, 1, 1, 2, 2, 4, 4]


def test_refuses() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight = meta(2, 64), Weight.dense_from(meta(128, 64))
    assert _accepts(x, weight, meta(128), "gelu") is None
    assert "dense" in str(_accepts(x, weight.to_panels()))
    assert "bf16 and fp16" in str(_accepts(x.float(), Weight.dense_from(meta(128, 64, dtype=torch.float32))))
    assert "dtype" in str(_accepts(x.half(), weight))
    assert "dtype" in str(_accepts(x, weight, meta(128, dtype=torch.float16)))
    assert "multiples of 8 inputs, not 60" in str(_accepts(meta(2, 60), Weight.dense_from(meta(128, 60))))
    assert "side by side" in str(_accepts(x, Weight.dense_from(meta(64, 128).T)))
    assert "gaps" in str(_accepts(x, weight, meta(256)[::2]))
    assert "tanh" in str(_accepts(x, weight, None, "tanh"))


def test_one_token_and_many_are_not_for_this_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Plan | str] = []
    monkeypatch.setattr(kernels, "few", lambda plan, *_: served.append(plan))
    monkeypatch.setattr(kernels, "linear_triton", lambda *_: served.append("triton"))
    weight = Weight.dense_from(torch.empty(8, 8))
    for tokens in (0, 1, 2, 8, 9, 32):
        linear_cuda(torch.empty(tokens, 8), weight)
    assert served == ["triton", "triton", FEW, FEW, "triton", "triton"]


@pytest.mark.parametrize(
    ("dtype", "width", "invariant", "expected"),
    [
        (torch.bfloat16, 64, False, "cuda"),
        (torch.float16, 64, False, "cuda"),
        (torch.bfloat16, 60, False, "triton"),
        (torch.float32, 64, False, "triton"),
        (torch.bfloat16, 64, True, "cuda"),
    ],
)
def test_what_serves(
    dtype: torch.dtype, width: int, invariant: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def trace(work: str, ops: Ops) -> None:
        weight = Weight.dense_from(torch.empty(16, width, dtype=dtype, device="meta"))
        ops.linear(torch.empty(2, width, dtype=dtype, device="meta"), weight)  # type: ignore[attr-defined]

    table = selecting.select(torch.device("cuda"), trace, invariant=invariant)
    assert {row.kernel for row in table.rows} == {expected}
    if invariant:
        assert table.ops("decode").linear is product  # type: ignore[attr-defined]


# Products


def planned(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """By the plan for so many tokens, also for those that another kernel serves."""
    return few(FEW if x.shape[0] <= 8 else WIDE, x, *others)


def weight_of(outputs: int, inputs: int, dtype: torch.dtype) -> Weight:
    """Random rows, between others that hold NaN."""
    whole = torch.full((outputs + 16, inputs), float("nan"), device="cuda", dtype=dtype)
    whole[8:-8] = torch.randn(outputs, inputs, device="cuda", dtype=dtype) / inputs**0.5
    return Weight.dense_from(whole[8:-8])


def tokens_of(tokens: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows between NaN on all sides."""
    whole = torch.full((tokens + 2, inputs + 16), float("nan"), device="cuda", dtype=dtype)
    whole[1:-1, 8:-8] = torch.randn(tokens, inputs, device="cuda", dtype=dtype)
    return whole[1:-1, 8:-8]


def hold(
    call: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """FlashAttention's rule: at most twice torch's own error against fp64, and what rounding does near 0.3."""
    poison = torch.full((x.shape[0], weight.out_features), float("nan"), device="cuda", dtype=x.dtype)
    del poison  # the next result of this size lies there
    got = call(x, weight, bias, activation)
    wide = None if bias is None else bias.double()
    exact = linear.reference(x.double(), Weight.dense_from(weight.data.double()), wide, activation)
    own = linear.reference(x, weight, bias, activation)
    shaken = exact.to(x.dtype)
    tiny = 2 * ((shaken + 0.3 - 0.3) - shaken).abs().max().item()
    error, allowed = ((one.double() - exact).abs().max().item() for one in (got, own))
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    assert not got.isnan().any()
    assert error <= 2 * allowed + tiny, f"error {error:.3g}, torch's own {allowed:.3g}, rounding {tiny:.3g}"
    return got


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 77, 1001, 4096])
def test_all_numbers_of_tokens(outputs: int, bias: bool, dtype: str) -> None:
    kind = DTYPES[dtype]
    for tokens in range(2, 33):
        inputs = (8, 40, 2056, 1536)[tokens % 4]
        shift = torch.randn(outputs, device="cuda", dtype=kind) if bias else None
        hold(planned, tokens_of(tokens, inputs, kind), weight_of(outputs, inputs, kind), shift)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (4096, 14336), (32064, 4096), (896, 4864)], ids=str)
def test_shapes_of_models(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape, torch.bfloat16)
    for tokens in (2, 7, 8, 9, 16, 17, 31, 32):
        hold(planned, tokens_of(tokens, shape[1], torch.bfloat16), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [one for one in kernels.ACTIVATIONS if one])
def test_activations(activation: str) -> None:
    for tokens, kind in ((5, torch.float16), (20, torch.bfloat16)):
        shift = torch.randn(40, device="cuda", dtype=kind)
        hold(planned, tokens_of(tokens, 96, kind), weight_of(40, 96, kind), shift, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [False, True], ids=["registers", "ring"])
@pytest.mark.parametrize("layout", [(16, 8, 2), (16, 4, 8), (32, 8, 4), (32, 16, 2), (64, 4, 2), (8, 2, 3)], ids=str)
def test_every_layout_of_a_block(layout: tuple[int, int, int], ring: bool) -> None:
    for tokens, split, early in ((3, 1, True), (16, 2, False), (29, 4, True)):
        plan = Plan(*layout, ring, 1, early, split)
        call = lambda *given, plan=plan: few(plan, *given)  # noqa: E731
        for inputs in (2056, 4096):
            hold(call, tokens_of(tokens, inputs, torch.bfloat16), weight_of(1001, inputs, torch.bfloat16))


@pytest.mark.gpu
def test_rows_wherever_they_begin() -> None:
    """Strides are taken as they are; rows that no 16-byte load can read are copied. The same bits all the same."""
    whole, weight = torch.randn(8, 200, device="cuda").half(), weight_of(24, 96, torch.float16)
    for rows in (whole[:, 8:104], whole[:, 7:103], whole[::2, 8:104], torch.randn(96, 8, device="cuda").half().T):
        assert torch.equal(linear_cuda(rows, weight), linear_cuda(rows.contiguous(), weight))
    with pytest.raises(KernelRefused, match="multiple of 16 bytes"):
        linear_cuda(whole[:, :96], Weight.dense_from(torch.empty(24 * 96 + 1, device="cuda").half()[1:].view(24, 96)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33, 64])
def test_other_numbers_of_tokens_go_where_they_went(tokens: int) -> None:
    x, weight = torch.randn(tokens, 4096, device="cuda").bfloat16(), weight_of(512, 4096, torch.bfloat16)
    assert torch.equal(linear_cuda(x, weight), linear_triton(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 8, 13, 32])
def test_equal_calls_give_equal_bits(tokens: int) -> None:
    """Beside other work on the GPU, too."""
    x = torch.randn(tokens, 4096, device="cuda").bfloat16()
    for outputs in (896, 4096, 6144):
        weight = weight_of(outputs, 4096, torch.bfloat16)
        first = linear_cuda(x, weight)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        for _ in range(30):
            with torch.cuda.stream(other):
                linear_cuda(x, weight)
            assert torch.equal(linear_cuda(x, weight), first)
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 8, 16, 32])
@pytest.mark.parametrize("early", [False, True], ids=["at its end", "at its start"])
def test_a_row_of_products_in_a_graph(tokens: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel comes before the one ahead has ended, and still reads what that one wrote: new inputs at every
    replay, results as op by op."""
    monkeypatch.setattr(kernels, "MOST", 32)
    monkeypatch.setattr(kernels, "FEW", replace(FEW if tokens <= 8 else WIDE, early=early))
    layers = [weight_of(2048, 2048, torch.bfloat16) for _ in range(12)]

    def chain(y: torch.Tensor) -> torch.Tensor:
        for number, weight in enumerate(layers):
            y = linear_cuda(y, weight)
            if number % 3 == 2:
                y = y + 1
        return y

    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(50):
        x.copy_(torch.randn(tokens, 2048, device="cuda"))
        graph.replay()
        got = out.clone()
        y = x
        for number, weight in enumerate(layers):
            y = linear_cuda(y, weight)
            torch.cuda.synchronize()
            if number % 3 == 2:
                y = y + 1
        assert torch.equal(got, y)


@pytest.mark.gpu
def test_a_weight_of_more_than_two_to_the_32_elements() -> None:
    outputs, inputs = (1 << 19) + 37, 8192
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB")
    data = torch.zeros(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    data[-64:] = torch.randn(64, inputs, device="cuda") / inputs**0.5
    x = torch.randn(8, inputs, device="cuda").bfloat16()
    got = linear_cuda(x, Weight.dense_from(data))
    assert not got[:, :-64].any()
    hold(lambda *_: got[:, -64:], x, Weight.dense_from(data[-64:]))
