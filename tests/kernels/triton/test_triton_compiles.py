"""Every kernel compiles for the GPUs it claims to serve and fits their shared memory; no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_rms_kernel", "_layer_norm_kernel", "_rope_kernel", "_gate_kernel", "_fused_kernel", "_stretch_kernel",
    "_choose_kernel", "_count_kernel", "_gate_up_kernel", "_down_kernel", "_long_kernel", "_split_kernel",
    "_merge_kernel", "_row_kernel", "_gated_row_kernel", "_feed_kernel", "_product_kernel",
    "_route_kernel", "_sum_kernel", "_take_kernel", "_embed_kernel", "_few_kernel", "_few_of_few_kernel",
    "_slots_kernel", "_accept_kernel",
    "_branch_kernel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared_kib"), [(80, 163), (86, 99), (90, 227)])
def test_compiles(capability: int, shared_kib: int, tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(here / "compile_for.py"), str(capability), str(shared_kib)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == KERNELS
