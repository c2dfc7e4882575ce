"""What serves a batch-invariant engine on a GPU: a row's bits are the same alone and in any batch, op by op.

In the interpreter NumPy's product is replaced by one that adds up every row alike, as tensor cores do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton_checks import assert_near, kinds, paged, plain_product

from ridgeline.core.step import Spans
from ridgeline.kernels.select import load_kernels
from ridgeline.kernels.torch.sample import kept_steadily
from ridgeline.kernels.triton import attention as attention_kernels
from ridgeline.kernels.triton import product as product_kernels
from ridgeline.kernels.triton.attention import Tile as AttentionTile
from ridgeline.kernels.triton.machine import Machine
from ridgeline.kernels.triton.product import Tile, fitted, product, tile_of
from ridgeline.ops import REGISTRY
from ridgeline.ops.linear import ACTIVATIONS, linear
from ridgeline.ops.sample import kept
from ridgeline.ops.weight import Weight

load_kernels("cuda")
ROWS = 130
WIDTH = {"cpu": 200, "cuda": 1032}
Rows = Callable[[torch.Tensor], torch.Tensor]
SLOW = {"gated_linear": 7, "moe": 13}
"""Ops with a program a token: in the interpreter every so many sizes."""


@pytest.fixture(autouse=True)
def _products_by_row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(np, "matmul", plain_product)


def steady(name: str) -> Callable[..., Any]:
    """The call that a batch-invariant engine makes."""
    found = [kernel.invariant for kernel in REGISTRY[name].kernels.values() if kernel.need.device == "cuda"]
    (call,) = [one for one in found if one is not None][:1]
    return call


def usual(name: str) -> Callable[..., Any]:
    return REGISTRY[name].kernels["triton"].call


def by_rows(of: Callable[[str], Callable[..., Any]], device: str, dtype: torch.dtype) -> dict[str, Rows]:
    """Functions of rows [T, WIDTH] -> [T, ...]."""
    width = WIDTH[device]
    outputs, inner, experts = (40, 24, 5) if device == "cpu" else (2000, 520, 16)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

    matrix, both = Weight.dense_from(weight(outputs, width)), Weight.dense_from(weight(2 * inner, width))
    bias, scale = torch.randn(outputs, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
    router, gate_up, down = weight(experts, width), weight(experts, 2 * inner, width), weight(experts, width, inner)
    return {
        "linear": lambda x: of("linear")(x, matrix, bias, "gelu"),
        "gated_linear": lambda x: of("gated_linear")(x, both, "silu"),
        "gate": lambda x: of("gate")(x, "silu"),
        "norm": lambda x: of("norm")(x, x.clone(), scale, 1e-5)[0],
        "layer_norm": lambda x: of("layer_norm")(x, None, scale, scale, 1e-5)[0],
        "moe": lambda x: of("moe")(x, router, gate_up, down, 2, True),
    }


@pytest.mark.parametrize("op", ["linear", "gated_linear", "gate", "norm", "layer_norm", "moe"])
def test_rows(device: str, op: str) -> None:
    """One row, 2 to 64 of them, and all, beginning anywhere."""
    for dtype in kinds(device):
        run = by_rows(steady, device, dtype)[op]
        x = torch.randn(ROWS, WIDTH[device], device=device).to(dtype)
        whole = run(x)
        for row in (0, 1, 63, 64, ROWS - 1):
            assert torch.equal(run(x[row : row + 1])[0], whole[row]), row
        for size in range(2, 65, SLOW.get(op, 1) if device == "cpu" else 1):
            first = size % 7
            assert torch.equal(run(x[first : first + size]), whole[first : first + size]), size


def test_equally_likely_experts(device: str) -> None:
    """The first of them, whatever the batch; the others' weights are as likely as they should be."""
    x = torch.randn(9, WIDTH[device], device=device)
    router = torch.zeros(6, WIDTH[device], device=device)
    gate_up = torch.zeros(6, 48, WIDTH[device], device=device)
    down = torch.zeros(6, WIDTH[device], 24, device=device)
    for expert in range(6):
        gate_up[expert] = torch.randn(48, WIDTH[device], device=device) / WIDTH[device] ** 0.5
        down[expert] = torch.randn(WIDTH[device], 24, device=device)
    got = steady("moe")(x, router, gate_up, down, 2, False)
    alone = [
        REGISTRY["moe"].reference(x, router[:1], gate_up[one : one + 1], down[one : one + 1], 1, True) for one in (0, 1)
    ]
    torch.testing.assert_close(got, (alone[0] + alone[1]) / 6, atol=1e-4, rtol=1e-4)


def test_rope_and_pages(device: str) -> None:
    for inputs in REGISTRY["rope_kv_write"].inputs(device, torch.float16):
        inputs = dict(inputs)
        whole = steady("rope_kv_write")(**inputs)
        for row in range(whole.shape[0]):
            part = slice(row, row + 1)
            pages = {name: inputs[name].clone().zero_() for name in ("k_pages", "v_pages")}
            own = {name: inputs[name][part] for name in ("qkv", "positions", "slots")}
            assert torch.equal(steady("rope_kv_write")(**{**inputs, **own, **pages})[0], whole[row])
            block, place = divmod(int(inputs["slots"][row]), inputs["k_pages"].shape[2])
            for name, page in pages.items():
                assert torch.equal(page[block, :, place], inputs[name][block, :, place])


def chosen_rows(vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    settings = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.5, 0.3, 1.0]),
        "top_k": torch.tensor([0, 0, 5, 0, 0, 0]),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 0.8, 1.0, 0.5]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0]),
        "seeds": torch.randint(-(1 << 62), 1 << 62, (6,)),
        "positions": torch.arange(6),
    }
    logits = 3 * torch.randn(6, vocabulary, device=device)
    return {"logits": logits, **{name: value.to(device) for name, value in settings.items()}}


@pytest.mark.parametrize("vocabulary", [50, 1003, 5000])
def test_sampling(device: str, vocabulary: int) -> None:
    inputs = chosen_rows(vocabulary, device)
    whole = steady("sample")(**inputs, greedy=False, cut=True)
    assert torch.equal(whole, REGISTRY["sample"].reference(**inputs, greedy=False, cut=True))
    for row in range(6):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        cut = row not in (0, 1)
        assert steady("sample")(**own, greedy=row == 0, cut=cut)[0] == whole[row]


def test_a_row_that_is_not_cut_keeps_tokens_of_no_weight(device: str) -> None:
    """Beside rows that are, as alone."""
    scaled = torch.tensor([[0.0, -90.0, -200.0], [0.0, -90.0, -200.0]], device=device)
    none, all_of_it = torch.zeros(2, device=device), torch.tensor([1.0, 0.9], device=device)
    keep = kept_steadily(scaled, none.long(), all_of_it, none)
    assert keep.tolist() == [[True, True, True], [True, False, False]]


def test_cuts(device: str) -> None:
    """Flat rows, where a border lies between tokens that are nearly equal."""
    scaled = torch.randn(64, 3001, device=device) / 50
    top_k, top_p = torch.zeros(64, device=device).long(), torch.rand(64, device=device)
    min_p = torch.zeros(64, device=device)
    whole = kept_steadily(scaled, top_k, top_p, min_p)
    for size in range(1, 65):
        part = slice(64 - size, 64)
        assert torch.equal(kept_steadily(scaled[part], top_k[part], top_p[part], min_p[part]), whole[part]), size
    same = whole == kept(scaled, top_k, top_p, min_p)
    assert (~same).sum() <= 0.001 * same.numel()  # the order of the reference's sums, at borders


@pytest.mark.parametrize("vocabulary", [50, 1003])
def test_scores(device: str, vocabulary: int) -> None:
    """Ties in both directions of zero, too."""
    logits = torch.randn(7, vocabulary, device=device).round(decimals=1)
    logits[3] = 0.0
    tokens = torch.randint(vocabulary, (7,), device=device)
    whole = steady("score")(logits, tokens, 20)
    for row in range(7):
        for mine, its in zip(steady("score")(logits[row : row + 1], tokens[row : row + 1], 20), whole):
            assert torch.equal(mine[0], its[row])
    for mine, wanted in zip(whole[:3], REGISTRY["score"].reference(logits, tokens, 20)):
        torch.testing.assert_close(mine.float(), wanted.float(), atol=1e-5, rtol=1e-5)
    values, ids = whole[2:]
    assert torch.equal(ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :20])
    assert (values[:, 1:] <= values[:, :-1]).all()


@pytest.mark.parametrize("window", [None, 40])
def test_decoding(device: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request alone, and among up to 63 others."""
    if device == "cpu":
        monkeypatch.setattr(
            attention_kernels, "FIXED", dict.fromkeys(attention_kernels.FIXED, AttentionTile(32, 32, 4, 2))
        )
    monkeypatch.setattr(attention_kernels, "SPLIT_KEYS", 32 if device == "cpu" else 512)
    for dtype in (torch.float16,) if device == "cpu" else kinds(device):
        inputs = many(device, dtype, window)
        whole = steady("attention")(**inputs)
        for size in (1, 2, 9) if device == "cpu" else range(1, 64):
            for first in (0, 64 - size) if size > 1 else (5, 63):
                assert torch.equal(steady("attention")(**some(inputs, first, size)), whole[first : first + size])


def test_as_it_comes_a_neighbour_changes_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the mode keys are cut for the batch at hand, and some rows' last bits follow."""
    if device == "cpu":
        monkeypatch.setattr(attention_kernels, "PIECES", {4: attention_kernels.Pieces(8, 16)})
    inputs = many(device, torch.float32, None)
    whole = usual("attention")(**inputs)
    alone = [usual("attention")(**some(inputs, row, 1))[0] for row in (5, 60, 61, 62, 63)]
    assert any(not torch.equal(one, whole[row]) for one, row in zip(alone, (5, 60, 61, 62, 63)))


def many(device: str, dtype: torch.dtype, window: int | None) -> dict[str, Any]:
    """A decode batch of 64."""
    spans = [(1, 7 + 13 * n % 70 if device == "cpu" else 1 + 137 * n % 6000) for n in range(64)]
    heads, kv_heads = (2, 1) if device == "cpu" else (8, 2)
    return paged(device, dtype, heads, kv_heads, 64, 16, spans, window)


def some(inputs: Mapping[str, Any], first: int, size: int) -> dict[str, Any]:
    """Requests of a decode batch by themselves, in a table that is no wider than they need."""
    part = slice(first, first + size)
    spans = Spans((1,) * size, inputs["spans"].visible[part])
    width = max(-(-keys // inputs["k"].shape[2]) for keys in spans.visible)
    return {
        **inputs,
        "q": inputs["q"][part],
        "block_tables": inputs["block_tables"][part, :width].contiguous(),
        "query_starts": torch.arange(size + 1, dtype=torch.int32, device=inputs["q"].device),
        "lengths": inputs["lengths"][part],
        "spans": spans,
    }


# The product


def shapes(device: str) -> Iterator[tuple[int, int, int]]:
    """Tokens, inputs, outputs."""
    yield from (
        ((1, 72, 40), (65, 130, 33), (3, 200, 129))
        if device == "cpu"
        else ((1, 4096, 6144), (300, 14336, 4096), (65, 2056, 1001), (7, 1032, 20000))
    )


@pytest.mark.parametrize("bias", [False, True])
def test_product_against_fp64(device: str, bias: bool) -> None:
    for dtype in kinds(device):
        for tokens, inputs, outputs in shapes(device):
            x = torch.randn(tokens, inputs, device=device).to(dtype)
            weight = Weight.dense_from((torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype))
            shift = torch.randn(outputs, device=device).to(dtype) if bias else None
            wide = None if shift is None else shift.double()
            exact = linear.reference(x.double(), Weight.dense_from(weight.data.double()), wide)
            assert_near(product(x, weight, shift), exact, linear.reference(x, weight, shift))


def test_a_long_chain_of_steps_loses_nothing(device: str) -> None:
    """Sums in fp32: to 2^24 nothing is added by adding 1, however often, unless what was lost is remembered."""
    x = torch.zeros(1, 640, device=device)
    x[0, 0], x[0, 32::32] = 2.0**24, 1.0
    out = product(x, Weight.dense_from(torch.ones(40, 640, device=device)))
    assert (out.double() - (2**24 + 19)).abs().max().item() <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_product_activations(device: str, activation: str) -> None:
    x = torch.randn(5, 96, device=device).half()
    weight = Weight.dense_from((torch.randn(40, 96, device=device) / 10).half())
    exact = linear.reference(x.double(), Weight.dense_from(weight.data.double()), None, activation)
    assert_near(product(x, weight, None, activation), exact, linear.reference(x, weight, None, activation))


def test_product_of_strided_rows_and_of_none(device: str) -> None:
    x = torch.randn(5, 200, device=device).half()
    weight = Weight.dense_from(torch.randn(24, 96, device=device).half())
    assert torch.equal(product(x[:, 7:103], weight), product(x[:, 7:103].contiguous(), weight))
    assert product(x[:0, :96], weight).shape == (0, 24)


def test_tiles_follow_from_weight_and_gpu() -> None:
    hopper, small = Machine(132, 227 << 10), Machine(28, 99 << 10, False)
    assert tile_of(28672, 2, hopper) == product_kernels.WIDE[2]
    assert tile_of(4096, 2, hopper) == product_kernels.NARROW[2]
    assert tile_of(4096, 2, small) == product_kernels.WIDE[2]._replace(stages=4)
    assert fitted(Tile(64, 128, 4, 4), 64, 1, 2, 99 << 10).stages == 3
