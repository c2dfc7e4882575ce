"""The figures of the documents that ridgeline grew from, each counted by ridgeline's own code, on one page.

Nothing here is typed in but what a document says: the other column comes from the ops' cost functions, the models on
meta tensors, the KV layout and the table of machines. A test holds the page equal to what this prints.

    python -m benchmarks.documents > docs/documents.md
"""

# ruff: noqa: E501 - sentences of the page

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ridgeline.core.step import Spans
from ridgeline.kv.layout import KVLayout
from ridgeline.models import ModelSpec, build_model, parse_config
from ridgeline.perf.hardware import find
from ridgeline.perf.price import Price
from ridgeline.perf.roofline import Roofline
from ridgeline.study.plan import Planner
from ridgeline.study.price_op import price_op, standard_parts

LECTURE = "lecture, *Performance of Transformers* (Krishnamurthy, Lin)"
NOTES = "notes, *A simple blog of large model inference*"
REPORT = "project report, *LLM Inference Comparison* (EE451)"
PRIMER = "*Primer on LLM Inference Optimizations*, part 4 (Mandliya)"

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
OPT_175B = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "ffn_dim": 49152,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "torch_dtype": "float16",
}
BERT = {"batch": 8, "tokens": 512, "hidden": 1024, "heads": 16, "inner": 4096}


@dataclass(frozen=True)
class Row:
    """A figure: who says it, what they say, what the code counts, and why the two differ."""

    figure: str
    document: str
    said: str
    counted: str
    remark: str = ""


def linear(m: int, k: int, n: int, machine: str = "a100-40", dtype: str = "float16") -> Any:
    return price_op("linear", {"m": str(m), "k": str(k), "n": str(n)}, dtype, find(machine))


def attention(variant: str, n: int, d: int, **more: int) -> Any:
    given = {"variant": variant, "n": n, "d": d, **more}
    return price_op("attention", {key: str(value) for key, value in given.items()}, "float16", find("a100-40"))


def layout_of(spec: ModelSpec) -> KVLayout:
    return KVLayout(spec.layers, spec.kv_heads, spec.head_dim, 2, 64)


def machines() -> Iterator[Row]:
    a10, a100 = find("a10"), find("a100-40")
    yield Row("A10, FLOP/byte at the ridge", LECTURE, "208.3", f"{a10.balance('float16'):.1f}")
    yield Row(
        "A100 40 GB, FLOP/byte at the ridge",
        NOTES,
        "208",
        f"{a100.balance('float16'):.1f}",
        "312 TFLOP/s over the 1,555 GB/s that the notes name are 200.6; 208 is 312 over 1,500",
    )
    yield Row(
        "SRAM of an A100",
        PRIMER,
        "20 MB, 19 TB/s",
        f"{(a100.sram_bytes or 0) / 1e6:.1f} MB, {(a100.sram_bytes_per_s or 0) / 1e12:.1f} TB/s",
        "108 multiprocessors; shared memory that a program may use, of 192 KB together with L1",
    )
    yield Row(
        "matrix units over the others, A100",
        "FlashAttention-2 (summary)",
        "16x",
        f"{a100.flops('float16') / a100.vector_flops:.0f}x",
    )


def single_ops() -> Iterator[Row]:
    standard, flash = attention("standard", 4096, 128), attention("flash", 4096, 128)
    yield Row(
        "standard attention, N = 4096, d = 128, FLOP/byte",
        LECTURE,
        "62",
        f"{standard.flop_per_byte:.1f}",
        "(4 d + 3) N² over 8 N² + 8 N d bytes",
    )
    yield Row(
        "flash attention, the same",
        "—",
        "—",
        f"{flash.flop_per_byte:,.0f}",
        "S and P never leave the chip: the floor is Q, K, V and O, once each",
    )
    yield Row(
        "bytes of S and P against those of Q, K, V, O",
        REPORT,
        "HBM access is what FlashAttention saves",
        f"{(standard.cost.bytes - flash.cost.bytes) / flash.cost.bytes:.0f}x",
    )
    yield Row("GEMM of 4096³, FLOP/byte", LECTURE, "1365", f"{linear(4096, 4096, 4096).flop_per_byte:.0f}")
    yield Row(
        "the same with one row (decode)",
        LECTURE,
        "GEMV, memory-bound",
        f"{linear(1, 4096, 4096).flop_per_byte:.2f} FLOP/byte, {linear(1, 4096, 4096).as_dict()['bound']}-bound",
    )
    for hidden in (4096, 12288):
        yield Row(
            f"tokens whose K and V cost no more than one token's, A100, hidden size {hidden:,}",
            NOTES,
            "208",
            str(flat_tokens(hidden)),
            "activations are read and written too, so the two roofs meet a little beyond the ridge (200.6)",
        )


def flat_tokens(hidden: int, machine: str = "a100-40") -> int:
    """Most tokens through W_K and W_V of one layer for which memory still takes longer than arithmetic."""
    roofline = Roofline.of(find(machine), "float16")
    tokens = 1
    while True:
        cost = linear(tokens + 1, hidden, 2 * hidden, machine).cost
        if roofline.compute_s(cost) > roofline.memory_s(cost):
            return tokens
        tokens += 1


def models() -> Iterator[Row]:
    llama = parse_config(LLAMA_2_7B)
    planner = Planner(llama, "Llama-2-7B", "float16")
    a10 = find("a10")
    kv = layout_of(llama).bytes_per_token * 4096
    yield Row(
        "Llama-2-7B, weights", LECTURE, "~14 GB", f"{planner.weight_bytes / 1e9:.2f} GB", "6.74 B parameters, not 7"
    )
    yield Row("Llama-2-7B, KV cache of 4,096 tokens", LECTURE, "~2 GB", f"{kv / 1e9:.2f} GB")
    free = a10.memory_bytes - planner.weight_bytes
    yield Row(
        "requests of 4,096 tokens resident on a 24 GB A10",
        LECTURE,
        "~5",
        f"{free / kv:.1f}; {planner.plan(a10, 3968, 128, 1).resident_requests} in an engine",
        "(24 − 13.48) / 2.15 leaves 4.9; an engine keeps a tenth of the memory free and needs room for activations",
    )
    opt = parse_config(OPT_175B)
    model = build_model(opt, torch.device("meta"), torch.float16, 2048)
    weights, kv = model.store.nbytes, layout_of(opt).bytes_per_token * 512 * (512 + 32)
    yield Row(
        "OPT-175B, weights",
        NOTES,
        "325 GB",
        f"{weights / 1e9:.1f} GB = {weights / 2**30:.1f} GiB",
        "the notes' figure is in GiB",
    )
    yield Row(
        "OPT-175B, KV cache, batch 512, 512 + 32 tokens",
        NOTES,
        "1.2 TB",
        f"{kv / 1e12:.3f} TB = {kv / 2**40:.3f} TiB",
        "the notes' figure is in TiB",
    )
    rule = 2 * 96 * (4 * 12288**2 + 2 * 12288 * 49152)
    yield Row(
        "that cache over the weights",
        NOTES,
        "3.8x",
        f"{kv / weights:.2f}x",
        f"{kv / rule:.2f}x of the notes' own rule for weights, l (4 h₁² + 2 h₁ h₂), which leaves embeddings and biases out",
    )


def end_to_end() -> Iterator[Row]:
    planner = Planner(parse_config(LLAMA_2_7B), "Llama-2-7B", "float16")
    a10 = find("a10")
    for prompt, output in ((350, 150), (2048, 512)):
        plan = planner.plan(a10, prompt, output, 1)
        rule = plan.simple_rule
        yield Row(
            f"Llama-2-7B on an A10, S = {prompt:,}, G = {output}: E2E",
            LECTURE,
            f"S·(2·params/FLOPS) + G·(2·params/MBW) = {rule['e2e_s']:.2f} s",
            f"{plan.e2e_s:.2f} s (TTFT {plan.ttft_s * 1e3:.1f} ms, TPOT {plan.tpot_s * 1e3:.2f} ms)",
            "the floor counts attention and the KV cache, but neither the embedding table nor lm_head for every prompt token",
        )


def complexity() -> Iterator[Row]:
    """The primer's terms, found by doubling: what each part of prefill and decode grows with."""
    price = Price(build_model(parse_config(LLAMA_2_7B), torch.device("meta"), torch.float16, 4096), 64, torch.float16)

    def flops(new: int, visible: int) -> tuple[float, float]:
        meter = price.meter(Spans((new,), (visible,)), 1).by_op()
        head = 2 * 4096 * 32000
        return meter["linear"].flops + meter["gated_linear"].flops - head, meter["attention"].flops

    (dense, mixed), (dense_2, mixed_2) = flops(1024, 1024), flops(2048, 2048)
    yield Row(
        "prefill, twice the length: linear layers, attention",
        PRIMER,
        "O(L n d²) and O(L² n h d): 2x, 4x",
        f"{dense_2 / dense:.2f}x, {mixed_2 / mixed:.2f}x",
    )
    (dense, mixed), (dense_2, mixed_2) = flops(1, 1024), flops(1, 2048)
    yield Row(
        "decode, twice the context: linear layers, attention",
        PRIMER,
        "O(n d²) and O(L n d h): 1x, 2x",
        f"{dense_2 / dense:.2f}x, {mixed_2 / mixed:.2f}x",
    )


def encoder_layer() -> list[tuple[str, str, str]]:
    """Table A.1 of "Data Movement Is All You Need" for BERT-large's contractions and softmax: (operator, said, counted)."""
    tokens, hidden, inner = BERT["batch"] * BERT["tokens"], BERT["hidden"], BERT["inner"]
    qkv, out = linear(tokens, hidden, 3 * hidden).cost, linear(tokens, hidden, hidden).cost
    up, down = linear(tokens, hidden, inner).cost, linear(tokens, inner, hidden).cost
    scores, softmax, values = standard_parts(
        BERT["batch"], BERT["heads"], BERT["heads"], BERT["tokens"], BERT["tokens"], hidden // BERT["heads"], 2, 6
    )
    rows = [
        ("Q, K, V", "25.770 GFLOP, 7.34 in, 12.58 out", qkv),
        ("QKᵀ", "4.295 GFLOP, 8.39 in, 33.55 out", scores),
        ("scaled softmax", "0.201 GFLOP, 33.55 in, 100.66 out", softmax),
        ("Gamma (P V)", "4.295 GFLOP, 37.75 in, 4.19 out", values),
        ("output projection", "8.590 GFLOP", out),
        ("linear 1", "34.360 GFLOP, 8.39 in, 16.78 out", up),
        ("linear 2", "34.360 GFLOP, 20.97 in, 4.19 out", down),
    ]
    return [
        (
            name,
            said,
            f"{cost.flops / 1e9:.3f} GFLOP, {cost.read_bytes / 2e6:.2f} in, {cost.write_bytes / 2e6:.2f} out",
        )
        for name, said, cost in rows
    ]


def page() -> str:
    """docs/documents.md."""
    lines = [
        "# The documents' figures, counted",
        "",
        "Made by `python -m benchmarks.documents`; a test holds this page equal to its output. The last but one column is",
        "computed by ridgeline's cost functions, models on meta tensors, KV layout and table of machines.",
    ]
    for title, rows in (
        ("Machines", machines()),
        ("Single operations", single_ops()),
        ("Models", models()),
        ("The simple end-to-end rule", end_to_end()),
        ("What grows with what", complexity()),
    ):
        lines += [
            "",
            f"## {title}",
            "",
            "| figure | document | it says | counted | remark |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [f"| {r.figure} | {r.document} | {r.said} | {r.counted} | {r.remark} |" for r in rows]
    lines += [
        "",
        "## A BERT-large encoder layer",
        "",
        f"Table A.1 of Ivanov et al. (2007.00072) as the notes print it: {json.dumps(BERT)}; millions of words in and out.",
        "",
        "| operator | table A.1 | counted |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {said} | {counted} |" for name, said, counted in encoder_layer()]
    lines += [
        "",
        "The table's softmax writes three tensors, because training keeps the mask of its dropout and the values before it;",
        "inference writes one. The notes' print of linear 2 says 20.99 in; its operands have 20.97 million words.",
        "",
        "## Where a document's sentence fails its own numbers",
        "",
        '- Notes: "A100 … 312 TFLOPS and a bandwidth of 1555 GB/s. The difference between them is 208 times": it is 200.6.',
        '- Notes: "softmax occupies most of the computation time": in the table printed below it the two linear layers take',
        "  451 and 449 µs and Q, K, V 333 µs; softmax, at 453 µs, is the longest single operator, but contractions have",
        "  61.0 % of the time and all normalizations together 25.5 %.",
        '- Notes: the KV cache\'s "1.2 TB" and the weights\' "325 GB" are TiB and GiB; their ratio is right either way.',
        '- Report: "FlashAttention\'s approach becomes increasingly efficient as the workload grows": its own speedups are',
        "  4.61, 3.72, 1.27 and 19.48 at batch 1, 4, 16 and 64, so they fall twice before one outlier; and the time of",
        "  the largest batch (1.358 ms) is a hundredth of that of the smallest (135.383 ms), which no growing workload does.",
        "- Report: an A100 with 32 GB: there are 40 GB and 80 GB ones.",
        '- Primer: "how FlashAttention optimizes the memory usage in the decode stage": a decode step has one query row, so',
        "  S and P are rows as well, and standard attention moves hardly more than flash attention does there.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
