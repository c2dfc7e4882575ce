"""compute-sanitizer finds no bad access and no race in small calls of the rungs."""

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
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("rung", ["v1", "v2"])
def test_clean(rung: str, tool: str) -> None:
    script = Path(__file__).parent / "cuda_sanitize.py"
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--kernel-name", f"kns=attention_{rung}", sys.executable,
         str(script), rung],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "calls" in done.stdout
