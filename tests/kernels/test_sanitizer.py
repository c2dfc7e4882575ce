"""compute-sanitizer finds nothing in small calls: no bad access, and in kernels in CUDA C++ no race."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not installed"),
]


KERNELS = {
    "attention_v1": "v1",
    "attention_v2": "v2",
    "attention_sm90": "sm90",
    "decode": "decode",
    "decode_wide": "decode_wide",
    "add_pieces": "decode_wide",
    "merge": "merge",
    "linear_few": "linear",
}
"""A kernel's name -> what sanitize.py calls it."""
HOPPER = ("attention_sm90", "decode_wide", "add_pieces")


def clean(tool: str, case: str, *more: str) -> None:
    script = Path(__file__).parent / "sanitize.py"
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", *more, sys.executable, str(script), case],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "calls" in done.stdout


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_clean(kernel: str, tool: str) -> None:
    if kernel in HOPPER and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(f"{kernel} runs on Hopper alone")
    clean(tool, KERNELS[kernel], "--kernel-name", f"kns={kernel}")


@pytest.mark.parametrize("case", ["triton-attention", "triton-examples"])
def test_triton(case: str) -> None:
    clean("memcheck", case)
