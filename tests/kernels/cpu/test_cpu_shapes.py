"""CPU kernels on odd shapes: widths that fill no vector, panels that do not align, more rows than a tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_checks import DTYPES, compare, kernel, name_of, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.core.step import Spans
from ridgeline.kernels.cpu.pack import pack
from ridgeline.ops import REGISTRY
from ridgeline.ops.attention import attention_inputs
from ridgeline.ops.weight import Weight

dtypes = st.sampled_from(DTYPES)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 13) | st.sampled_from((96, 97, 200)),
    inputs=st.integers(1, 70) | st.sampled_from((511, 512, 513, 1100)),
    outputs=st.integers(1, 200),
    bias=st.booleans(),
    activation=st.sampled_from((None, "relu", "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh")),
    dtype=dtypes,
)
def test_linear(tokens: int, inputs: int, outputs: int, bias: bool, activation: str | None, dtype: torch.dtype) -> None:
    arguments = {
        "x": torch.randn(tokens, inputs).to(dtype),
        "weight": random_weight(outputs, inputs, dtype),
        "bias": torch.randn(outputs).to(dtype) if bias else None,
        "activation": activation,
    }
    compare("linear", arguments, dtype, pack_weights=True)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 13) | st.just(100),
    inputs=st.integers(1, 70) | st.just(600),
    inner=st.integers(1, 200),
    activation=st.sampled_from(("silu", "gelu", "gelu_pytorch_tanh")),
    dtype=dtypes,
)
def test_gated_linear(tokens: int, inputs: int, inner: int, activation: str, dtype: torch.dtype) -> None:
    arguments = {
        "x": torch.randn(tokens, inputs).to(dtype),
        "weight": random_weight(2 * inner, inputs, dtype),
        "activation": activation,
    }
    compare("gated_linear", arguments, dtype, pack_weights=True)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), width=st.integers(1, 300), add=st.booleans(), dtype=dtypes)
def test_norms(tokens: int, width: int, add: bool, dtype: torch.dtype) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(tokens, width).to(dtype),
        "residual": torch.randn(tokens, width).to(dtype) if add else None,
        "weight": torch.randn(width).to(dtype),
        "eps": 1e-5,
    }
    compare("norm", arguments, dtype)
    if width > 1:
        compare("layer_norm", {**arguments, "bias": torch.randn(width).to(dtype)}, dtype)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    width=st.sampled_from((8, 24, 40, 64, 80, 128, 256)),
    block=st.sampled_from((16, 32, 48, 64, 20, 256)),
    window=st.none() | st.integers(1, 90),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 70)), min_size=1, max_size=4),
    dtype=dtypes,
)
def test_attention(
    kv_heads: int,
    group: int,
    width: int,
    block: int,
    window: int | None,
    spans: list[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    new, visible = [new for new, _ in spans], [new + before for new, before in spans]
    if not sum(new):
        return
    arguments = attention_inputs(
        "cpu", dtype, kv_heads * group, kv_heads, width, block, window, tuple(new), tuple(visible)
    )
    compare("attention", arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attention_takes_padded_rows_and_far_scores(dtype: torch.dtype) -> None:
    """Rows behind the last request belong to nobody; scores of a few hundred must not overflow."""
    arguments = dict(attention_inputs("cpu", dtype, 4, 2, 64, 16, None, (3, 0, 2), (40, 5, 2)))
    arguments["q"] = 60 * arguments["q"]
    expected = REGISTRY["attention"].reference(**arguments)
    arguments["q"] = torch.cat((arguments["q"], torch.full((4, 4, 64), float("nan"), dtype=dtype)))
    got = kernel("attention")(**arguments)[:5]
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    width=st.sampled_from((8, 16, 40, 64, 72, 128)),
    rotary=st.booleans(),
    normed=st.booleans(),
    dtype=dtypes,
)
def test_rope_kv_write(
    tokens: int, heads: int, kv_heads: int, width: int, rotary: bool, normed: bool, dtype: torch.dtype
) -> None:
    angles = torch.rand(50, width // 2) * 6
    slots = torch.randperm(6 * 16)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    arguments = {
        "qkv": torch.randn(tokens, (heads + 2 * kv_heads) * width).to(dtype),
        "positions": torch.randint(50, (tokens,)),
        "slots": slots,
        "cos": angles.cos() if rotary else None,
        "sin": angles.sin() if rotary else None,
        "q_norm": torch.randn(width).to(dtype) if normed else None,
        "k_norm": torch.randn(width).to(dtype) if normed else None,
        "eps": 1e-6,
        "k_pages": torch.randn(6, kv_heads, 16, width).to(dtype),
        "v_pages": torch.randn(6, kv_heads, 16, width).to(dtype),
        "heads": heads,
    }
    compare("rope_kv_write", arguments, dtype)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    hidden=st.integers(1, 80),
    inner=st.integers(1, 150),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 4),
    renormalize=st.booleans(),
)
def test_moe(tokens: int, hidden: int, inner: int, experts: int, top_k: int, renormalize: bool) -> None:
    arguments = {
        "x": torch.randn(tokens, hidden),
        "router": torch.randn(experts, hidden),
        "gate_up": torch.randn(experts, 2 * inner, hidden) / hidden**0.5,
        "down": torch.randn(experts, hidden, inner) / inner**0.5,
        "top_k": min(top_k, experts),
        "renormalize": renormalize,
    }
    compare("moe", arguments, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from((1, 5, 16, 17, 100, 9000)),
    temperature=st.sampled_from((0.0, 0.2, 1.0, 3.0)),
    top_k=st.sampled_from((0, 0, 1, 3, 50, 10_000)),
    top_p=st.sampled_from((1.0, 0.99, 0.9, 0.4, 1e-6)),
    min_p=st.sampled_from((0.0, 0.02, 0.3, 1.0)),
    forbidden=st.sampled_from((0.0, 0.5, 1.0)),
    coarse=st.booleans(),
    dtype=dtypes,
)
def test_sample(
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    forbidden: float,
    coarse: bool,
    dtype: torch.dtype,
) -> None:
    """Cut and whole rows beside each other, with ties (coarse logits) and forbidden tokens."""
    logits = 2 * torch.randn(3, tokens)
    logits = logits.round() if coarse else logits
    logits[torch.rand(3, tokens) < forbidden] = float("-inf")
    arguments = {
        "logits": logits.to(dtype),
        "temperature": torch.tensor([temperature, 1.0, temperature]),
        "top_k": torch.tensor([top_k, 0, 0]),
        "top_p": torch.tensor([top_p, 1.0, top_p]),
        "min_p": torch.tensor([min_p, 0.0, 0.0]),
        "seeds": torch.randint(-(1 << 62), 1 << 62, (3,)),
        "positions": torch.randint(1 << 40, (3,)),
        "greedy": False,
        "cut": True,
    }
    assert torch.equal(kernel("sample")(**arguments), REGISTRY["sample"].reference(**arguments))


@pytest.mark.parametrize("cut", [False, True])
def test_a_row_with_nan_gets_no_token(cut: bool) -> None:
    logits = torch.randn(3, 9000)
    logits[1, 8500] = float("nan")
    settings = {"top_k": torch.full((3,), 4 * cut), "top_p": torch.ones(3), "min_p": torch.zeros(3)}
    noise = {"seeds": torch.arange(3), "positions": torch.arange(3)}
    for temperature in (0.0, 1.0):
        chosen = kernel("sample")(logits, torch.full((3,), temperature), **settings, **noise, greedy=False, cut=cut)
        assert (chosen == 9000).tolist() == [False, True, False]


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 70),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
)
def test_pack_is_to_panels(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = Weight.dense_from(torch.randn(outputs, inputs).to(dtype))
    packed = pack(weight)
    assert (packed.format, packed.out_features, packed.in_features) == ("panels", outputs, inputs)
    assert torch.equal(packed.data, weight.to_panels().data)
    assert torch.equal(packed.dense(), weight.data)
    assert pack(packed) is packed


def test_pack_on_huge_pages() -> None:
    weight = Weight.dense_from(torch.randn(5000, 512))
    assert torch.equal(pack(weight).data, weight.to_panels().data)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_an_id_outside_the_table_reads_no_foreign_memory(dtype: torch.dtype) -> None:
    weight = pack(random_weight(100, 30, dtype))
    rows = kernel("embed")(torch.tensor([-5, 3, 1 << 40]), weight)
    assert torch.equal(rows, weight.dense()[[0, 3, 99]])


def test_views_are_taken() -> None:
    """Rows of a larger tensor, transposed, or of 32-bit ids."""
    weight = random_weight(70, 32, torch.float32)
    x = torch.randn(32, 9).T
    torch.testing.assert_close(kernel("linear")(x, pack(weight)), x @ weight.data.T, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([1, 2, 3, 4], dtype=torch.int32)[::2]
    assert torch.equal(kernel("embed")(ids, weight), weight.data[ids.long()])


def test_norm_leaves_x_as_it_is() -> None:
    x, residual = torch.randn(3, 20), torch.randn(3, 20)
    before, sum_ = x.clone(), x + residual
    normalized, total = kernel("norm")(x, residual, torch.ones(20), 1e-5)
    assert torch.equal(x, before)
    assert torch.equal(total, sum_)
    assert normalized.data_ptr() != x.data_ptr()


def test_spans_are_not_read() -> None:
    arguments = dict(attention_inputs("cpu", torch.float32, 4, 2, 64, 16, None, (3, 1), (40, 5)))
    expected = kernel("attention")(**arguments)
    arguments["spans"] = Spans((), ())
    assert torch.equal(kernel("attention")(**arguments), expected)
