"""The op `attention`: its reference against one row at a time, its counts, and every refusal by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.core.step import Spans
from ridgeline.kernels.select import load_kernels
from ridgeline.ops.attention import attention, attention_inputs
from ridgeline.ops.attention_call import LIMITS, Call, mistake

load_kernels("cpu")


def keys_seen(inputs: Mapping[str, Any], index: int, row: int, rows: int) -> list[int]:
    """By the words of the contract: which keys row `row` of request `index` sees."""
    length = int(inputs["lengths"][index])
    if not inputs["causal"]:
        return list(range(length))
    tail = 0 if inputs["tails"] is None else int(inputs["tails"][index])
    window = inputs["window"] or 1 << 40
    position = length - rows + row
    if row < rows - tail:
        return [key for key in range(length) if position - window < key <= position]
    words = inputs["tree"][int(inputs["query_starts"][index]) + row].tolist()
    mine = [j for j in range(tail) if words[j // 32] >> j % 32 & 1]
    position = length - tail + len(mine) - 1
    return [key for key in range(length - tail) if position - window < key] + [length - tail + j for j in mine]


def row_by_row(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row and head by itself, in Python floats; NaN where no request owns a row."""
    q = inputs["q"].double()
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:2], float("nan"), dtype=torch.float64)
    starts = inputs["query_starts"].tolist()
    group = q.shape[1] // inputs["k"].shape[1]
    for index, (first, last) in enumerate(pairwise(starts)):
        for row in range(last - first):
            places = keys_seen(inputs, index, row, last - first)
            for head in range(q.shape[1]):
                keys, values = (
                    torch.stack([one_key(inputs, name, index, place, head // group) for place in places]).double()
                    if places
                    else q.new_zeros(0, q.shape[2])
                    for name in ("k", "v")
                )
                scores = inputs["scale"] * (keys @ q[first + row, head])
                if inputs["softcap"] is not None:
                    scores = inputs["softcap"] * (scores / inputs["softcap"]).tanh()
                logits = scores.tolist() + ([] if inputs["sinks"] is None else [float(inputs["sinks"][head])])
                peak = max(logits, default=-math.inf)
                total = peak + math.log(sum(math.exp(one - peak) for one in logits)) if logits else -math.inf
                out[first + row, head] = (scores - total).exp() @ values if places else 0.0
                lse[first + row, head] = total
    return out, lse


def one_key(inputs: Mapping[str, Any], name: str, index: int, place: int, kv_head: int) -> torch.Tensor:
    data = inputs[name]
    if inputs["block_tables"] is None:
        return data[int(inputs["key_starts"][index]) + place, kv_head]
    size = data.shape[2]
    return data[int(inputs["block_tables"][index, place // size]), kv_head, place % size]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Small calls with any features that go together."""
    requests = draw(st.integers(1, 3))
    new = tuple(draw(st.integers(0, 5)) for _ in range(requests))
    visible = tuple(draw(st.integers(0, 9) | st.integers(30, 45)) for _ in range(requests))
    causal = draw(st.booleans())
    tails = None
    if causal and draw(st.booleans()):
        tails = tuple(draw(st.integers(0, min(pair))) for pair in zip(new, visible))
    low = 1 if tails is None else 32
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    return dict(
        attention_inputs(
            "cpu", torch.float64, 4, draw(st.sampled_from((1, 2, 4))), 8, draw(st.sampled_from((None, 2, 16))),
            draw(st.sampled_from((None, low, low + 3))) if causal else None, new, visible,
            causal=causal, softcap=draw(st.sampled_from((None, 0.5))), sinks=draw(st.booleans()), tails=tails,
            return_lse=True,
        )
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(calls())
def test_reference_row_by_row(inputs: dict[str, Any]) -> None:
    out, lse = attention(**inputs)
    want, logs = row_by_row(inputs)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse.double(), logs, atol=1e-5, rtol=1e-5)
    alone = attention(**{**inputs, "return_lse": False})
    assert torch.equal(alone, out)


@settings(max_examples=60, deadline=None)
@given(calls())
def test_cost_counts_pairs_and_keys(inputs: dict[str, Any]) -> None:
    """Spans count exactly what the mask lets through."""
    spans, starts = inputs["spans"], inputs["query_starts"].tolist()
    seen = [
        [keys_seen(inputs, index, row, last - first) for row in range(last - first)]
        for index, (first, last) in enumerate(pairwise(starts))
    ]
    assert spans.pairs(inputs["window"], inputs["causal"]) == sum(len(row) for rows in seen for row in rows)
    assert spans.keys(inputs["window"]) == sum(len({key for row in rows for key in row}) for rows in seen)


def test_rows_of_nobody_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written keeps what the memory held."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(7))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(7))
    inputs = dict(attention_inputs("cpu", torch.float32, 2, 1, 16, 16, None, (2, 0), (5, 3), return_lse=True))
    out, lse = attention(**{**inputs, "q": torch.cat((inputs["q"], inputs["q"]))})
    assert (out[2:] == 7).all()
    assert (lse[2:] == 7).all()
    assert (out[:2] != 7).all()


def given_call(**changes: Any) -> dict[str, Any]:
    """A right call of two requests over pages, with some arguments changed."""
    torch.manual_seed(0)
    return {**attention_inputs("cpu", torch.float32, 4, 2, 64, 16, None, (3, 1), (20, 9)), **changes}


def tree_call(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = attention_inputs("cpu", torch.float32, 4, 2, 64, 16, None, (3, 1), (20, 9), tails=(3, 0))
    return {**inputs, **changes}


BAD = [
    ("q", given_call(q=torch.zeros(4, 64)), "[tokens, heads, head dim]"),
    ("q", given_call(q=torch.zeros(4, 64, 4).transpose(1, 2)), "last dimension"),
    ("k", given_call(k=torch.zeros(5, 2, 64)), "[blocks, KV heads, block, head dim]"),
    ("k", given_call(k=torch.zeros(5, 2, 16, 32)), "head dim 64"),
    ("k", given_call(k=torch.zeros(5, 3, 16, 64), v=torch.zeros(5, 3, 16, 64)), "divide q's 4 heads"),
    ("k", given_call(k=torch.zeros(5, 2, 16, 64).half(), v=torch.zeros(5, 2, 16, 64).half()), "q's dtype"),
    ("k", given_call(k=torch.zeros(5, 2, 16, 64, device="meta")), "q's device cpu"),
    ("v", given_call(v=torch.zeros(4, 2, 16, 64)), "k's shape"),
    ("v", given_call(v=torch.zeros(5, 16, 2, 64).transpose(1, 2)), "k's strides"),
    ("block_tables", given_call(block_tables=None), "neither is given"),
    ("block_tables", given_call(key_starts=torch.zeros(3, dtype=torch.int32)), "both are given"),
    ("block_tables", given_call(block_tables=torch.zeros(2, 2)), "int32"),
    ("block_tables", given_call(block_tables=torch.zeros(3, 2, dtype=torch.int32)), "2 requests"),
    ("query_starts", given_call(query_starts=torch.zeros(2, dtype=torch.int32)), "[3] for the 2 requests"),
    ("lengths", given_call(lengths=torch.zeros(2, dtype=torch.int64)), "int32"),
    ("lengths", given_call(lengths=torch.zeros(4, dtype=torch.int32)[::2]), "last dimension"),
    ("scale", given_call(scale=0.0), "positive"),
    ("scale", given_call(scale=math.nan), "positive"),
    ("window", given_call(window=0), "at least one key"),
    ("window", given_call(window=5, causal=False), "causal=True"),
    ("softcap", given_call(softcap=-1.0), "positive"),
    ("sinks", given_call(sinks=torch.zeros(2)), "one logit a head"),
    ("sinks", given_call(sinks=torch.zeros(4).half()), "torch.float32"),
    ("tree", tree_call(tree=None), "with tails"),
    ("tails", tree_call(tails=None), "with tree"),
    ("tree", tree_call(causal=False), "causal=True"),
    ("tree", tree_call(tree=torch.zeros(4, 0, dtype=torch.int32)), "1 words a row"),
    ("tree", tree_call(tree=torch.zeros(4, 1)), "int32"),
    ("tree", tree_call(tree=torch.zeros(3, 1, dtype=torch.int32)), "[4, any]"),
    ("tails", tree_call(spans=Spans((3, 1), (20, 9), ((1,) * 4, ()))), "4 of 3"),
    ("spans", tree_call(spans=Spans((3, 1), (20, 9))), "2 requests"),
    ("window", tree_call(window=31), "at least 32 keys"),
]


@pytest.mark.parametrize(("name", "inputs", "text"), BAD, ids=[f"{name}-{text}" for name, _, text in BAD])
def test_wrong_arguments_are_named(name: str, inputs: dict[str, Any], text: str) -> None:
    """The reference and every kernel that is loaded say the same, before anything is computed."""
    for call in (attention.reference, attention.kernels["cpu"].call):
        with pytest.raises(InvalidArgument) as caught:
            call(**inputs)
        assert caught.value.parameter == name
        assert text in str(caught.value)
    assert text in str(LIMITS["cpu"].accepts(**inputs))


def test_a_right_call_is_none_of_these() -> None:
    assert mistake(Call(**given_call())) is None
    assert mistake(Call(**tree_call())) is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"causal": False}, "causal"), ({"softcap": 2.0}, "softcap"), ({"sinks": torch.zeros(4)}, "sinks"),
     ({"return_lse": True}, "return_lse")],
)  # fmt: skip
def test_a_kernel_refuses_what_it_does_not_do(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(KernelRefused, match=rf"^{name}: cpu does not do .*, only paged, window, tree; .* would do$"):
        attention.kernels["cpu"].call(**given_call(**changes))


def test_other_limits_are_named_too() -> None:
    half = {name: one.half() for name, one in given_call().items() if name in ("q", "k", "v")}
    with pytest.raises(KernelRefused, match=r"q: cpu takes float32 or bfloat16, not float16; .* would do"):
        attention.kernels["cpu"].call(**given_call(**half))
    wide = dict(attention_inputs("cpu", torch.float32, 1, 1, 300, 16, None, (1,), (1,)))
    with pytest.raises(KernelRefused, match="q: cpu takes head dims any to 256, not 300"):
        attention.kernels["cpu"].call(**wide)
