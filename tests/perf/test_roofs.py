"""Roofs over an engine: measured on a CPU, from the table on a GPU that it has."""

from __future__ import annotations

import pytest
import torch

from ridgeline.perf import roofs
from ridgeline.perf.hardware import find
from ridgeline.perf.roofs import roofs_here


def test_a_cpu_is_measured() -> None:
    found = roofs_here(torch.device("cpu"), "float32", 4 << 20)
    assert found is not None
    roofline, source = found
    assert roofline.matrix_flops > 1e8
    assert roofline.bytes_per_s > 1e8
    assert roofline.vector_flops == roofline.matrix_flops
    assert source == "measured at start, reading 4 MB, float32"


@pytest.mark.parametrize(
    ("driver", "name", "dtype"),
    [("NVIDIA H200", "h200", "bfloat16"), ("NVIDIA A100-SXM4-80GB", "a100-80", "float32")],
)
def test_a_gpu_is_looked_up(monkeypatch: pytest.MonkeyPatch, driver: str, name: str, dtype: str) -> None:
    monkeypatch.setattr(roofs.torch.cuda, "get_device_name", lambda device: driver)
    found = roofs_here(torch.device("cuda"), dtype, 1 << 30)
    assert found is not None
    assert found[0].bytes_per_s == find(name).memory_bytes_per_s
    assert found[0].matrix_flops == find(name).flops(dtype)
    assert "datasheet" in found[1]


@pytest.mark.parametrize(("driver", "dtype"), [("NVIDIA T1000", "float16"), ("NVIDIA H200", "int3")])
def test_what_the_table_does_not_have_is_not_made_up(monkeypatch: pytest.MonkeyPatch, driver: str, dtype: str) -> None:
    monkeypatch.setattr(roofs.torch.cuda, "get_device_name", lambda device: driver)
    assert roofs_here(torch.device("cuda"), dtype, 1 << 30) is None
