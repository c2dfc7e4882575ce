"""The documents' figures come out of the code, and the page says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import documents
from ridgeline.perf.hardware import find

PAGE = Path(__file__).parents[2] / "docs" / "documents.md"


def counted(figure: str) -> str:
    rows = [
        *documents.machines(),
        *documents.single_ops(),
        *documents.models(),
        *documents.end_to_end(),
        *documents.complexity(),
    ]
    found = [row.counted for row in rows if row.figure.startswith(figure)]
    assert len(found) == 1, figure
    return found[0]


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == documents.page(), (
        "run: python -m benchmarks.documents > docs/documents.md"
    )


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("A10, FLOP/byte", "208.3"),
        ("A100 40 GB, FLOP/byte", "200.6"),
        ("standard attention", "62.4"),
        ("GEMM of 4096", "1365"),
        ("Llama-2-7B, weights", "13.48 GB"),
        ("Llama-2-7B, KV cache of 4,096", "2.15 GB"),
        ("OPT-175B, weights", "349.2 GB = 325.2 GiB"),
        ("OPT-175B, KV cache", "1.314 TB = 1.195 TiB"),
        ("that cache over the weights", "3.76x"),
    ],
)
def test_figures(figure: str, value: str) -> None:
    assert counted(figure) == value


def test_keys_and_values_cost_the_same_up_to_the_ridge() -> None:
    """One to about 206 to 217 tokens on an A100: flat, then rising with the tokens."""
    machine = find("a100-40")
    for hidden in (4096, 12288):
        flat = documents.flat_tokens(hidden)
        assert 200 < flat < 220
        times = [documents.linear(tokens, hidden, 2 * hidden).as_dict()["seconds"] for tokens in (1, flat, 4 * flat)]
        assert times[1] / times[0] < 1.16
        assert times[2] / times[1] > 3.4
    assert machine.balance("float16") < 201


def test_table_a1() -> None:
    said = {name: (document, found) for name, document, found in documents.encoder_layer()}
    for name in ("Q, K, V", "QKᵀ", "Gamma (P V)", "linear 1", "linear 2"):
        assert said[name][0] == said[name][1]
    assert said["scaled softmax"][1].startswith("0.201 GFLOP, 33.55 in")
    assert said["output projection"][1].startswith("8.590 GFLOP")
