"""compute-sanitizer finds no bad access in small calls of the Triton kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", ["attention", "examples"])
def test_clean(case: str) -> None:
    script = Path(__file__).parent / "triton_sanitize.py"
    done = subprocess.run(
        [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script), case],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "calls" in done.stdout
