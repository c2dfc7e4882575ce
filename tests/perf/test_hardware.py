"""The table of machines: complete, sourced, dense, editable; and the roofs that follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument
from ridgeline.perf.hardware import find, known
from ridgeline.perf.roofline import Roofline

ASKED = [
    "a10",
    "a100-40",
    "a100-80",
    "h100-sxm",
    "h100-pcie",
    "h200",
    "b200",
    "l4",
    "l40s",
    "rtx4090",
    "rtx5090",
    "mi300x",
]


def test_every_machine_of_the_list_is_there_with_sources() -> None:
    assert list(known()) == ASKED
    for machine in known().values():
        assert {"matrix", "memory", "chip"} <= set(machine.source), machine.id
        figures = (machine.sram_bytes, machine.l2_bytes, machine.host_link_bytes_per_s, machine.watts)
        assert all(figures), machine.id
        assert machine.matrix["bfloat16"] == machine.matrix["float16"]
        if machine.price_per_hour is not None:
            assert "20" in machine.source["price"]


@pytest.mark.parametrize(
    ("name", "balance"), [("a10", 208.3), ("a100-40", 200.6), ("h100-sxm", 295.3), ("h200", 206.1), ("l4", 403.3)]
)
def test_balance(name: str, balance: float) -> None:
    assert find(name).balance("bfloat16") == pytest.approx(balance, abs=0.06)


def test_matrix_peaks_are_dense() -> None:
    """FLOP a multiprocessor and clock by generation: a sparse figure would be twice as much."""
    per_clock = {"a10": 1024, "a100-40": 2048, "h100-sxm": 4096, "h100-pcie": 4096, "h200": 4096, "b200": 8192}
    per_clock |= {"l4": 1024, "l40s": 1024, "rtx4090": 512, "rtx5090": 512, "mi300x": 2048, "a100-80": 2048}
    for name, flops in per_clock.items():
        machine = find(name)
        assert machine.clock_hz is not None
        assert machine.flops("bfloat16") == pytest.approx(flops * machine.sms * machine.clock_hz, rel=0.02), name


def test_exponentials_are_the_second_compute_roof() -> None:
    """FlashAttention-2 counts 312 TFLOP/s of matrix units against 19.5 of the others on an A100: a factor of 16."""
    a100 = find("a100-40")
    assert a100.flops("bfloat16") / a100.vector_flops == pytest.approx(16)
    assert a100.exps_per_s == pytest.approx(16 * 108 * 1.41e9)
    assert a100.sram_bytes_per_s == pytest.approx(19.5e12, rel=0.01)


@pytest.mark.parametrize("name", ["H200", "h100_SXM", "RTX 4090", "Mi300X"])
def test_names_in_any_case(name: str) -> None:
    assert find(name).id == name.lower().replace("_", "-").replace(" ", "")


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match=r"'h20' is not known: a10, .*, this; did you mean h200\?"):
        find("h20")
    with pytest.raises(InvalidArgument, match=r"did you mean h100-sxm or h100-pcie\?"):
        find("H100")


def test_the_users_file_adds_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hardware.toml"
    monkeypatch.setenv("RIDGELINE_HARDWARE", str(file))
    file.write_text(
        "[H200]\nprice_per_hour = 9\nmatrix = { float8 = 1e15 }\n"
        '[mine]\nname = "Mine"\nsms = 4\nmatrix = { bfloat16 = 1e12 }\nmemory_bytes = 8e9\nmemory_bytes_per_s = 1e11\n'
    )
    assert find("h200").price_per_hour == 9
    assert find("h200").flops("bfloat16") == 989.4e12
    assert find("h200").flops("float8") == 1e15
    assert find("mine").balance("bfloat16") == 10
    with pytest.raises(InvalidArgument, match="no matrix rate for float16; it has bfloat16"):
        find("mine").flops("float16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mine]\nname = 'x'\n", "lacks matrix, memory_bytes, memory_bytes_per_s, sms"),
        ("[h200]\nspeed = 3\n", r"\[h200\] has no field 'speed'"),
        ("[h200]\nmemory_bytes = -1\n", "memory_bytes must be a number above 0, not -1"),
        ("[h200]\nmatrix = { bfloat16 = 'fast' }\n", "bfloat16 must be a number above 0"),
        ("h200 = 3\n", "h200 must be a table"),
        ("[h200", "cannot read"),
    ],
)
def test_a_bad_file_is_one_clear_error(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hardware.toml"
    file.write_text(text)
    monkeypatch.setenv("RIDGELINE_HARDWARE", str(file))
    with pytest.raises(InvalidArgument, match=message):
        known()


def test_roofs() -> None:
    roofline = Roofline(matrix_flops=1000.0, vector_flops=10.0, bytes_per_s=10.0)
    assert roofline.ridge == 100
    assert roofline.seconds(Cost(flops=1000, read_bytes=5, write_bytes=5)) == 1
    assert roofline.seconds(Cost(flops=1000, read_bytes=40)) == 4
    assert roofline.seconds(Cost(flops=100, read_bytes=10), "elementwise") == 10
    assert roofline.bound([(Cost(flops=3000, read_bytes=10), "contraction")]) == "compute"
    assert roofline.bound([(Cost(flops=3000, read_bytes=50), "contraction")]) == "memory"
