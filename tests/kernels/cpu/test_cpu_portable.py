"""The kernels compiled for a smaller processor (AVX2, no 512-bit registers, no bf16 products) are right too."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from llvmlite import binding

features = binding.get_host_cpu_features()
for name in list(features):
    if name.startswith(("avx512", "avx10", "amx", "avxvnni")) or name in ("evex512", "vp2intersect"):
        features[name] = False
os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = "haswell", features.flatten()
binding.get_host_cpu_name = lambda: "haswell"
binding.get_host_cpu_features = lambda: features

sys.path.insert(0, sys.argv[1])
import torch
from cpu_checks import DTYPES, compare
from ridgeline.kernels.cpu.code import tile
from ridgeline.ops import REGISTRY, Weight

assert not tile.WIDE and not tile.PAIRED
torch.manual_seed(0)
for name, op in REGISTRY.items():
    for dtype in DTYPES:
        if "cpu" in op.kernels:
            for arguments in op.inputs("cpu", dtype):
                if name == "attention" and op.kernels["cpu"].accepts(**arguments) is not None:
                    continue
                compare(name, arguments, dtype, any(isinstance(value, Weight) for value in arguments.values()))
print("fine")
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for haswell")
def test_without_512_bit_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "RIDGELINE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.stdout == "fine\n", done.stderr[-2000:]
    assert any(tmp_path.rglob("ridgeline_linear_panels.code"))
