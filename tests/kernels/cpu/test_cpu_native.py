"""Machine code on the disk: the second process compiles nothing and does not even import numba."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from ridgeline.kernels.cpu import native
from ridgeline.kernels.cpu.norm import norm_cpu
native.watchers.append(print)
x = torch.ones(2, 8)
assert torch.allclose(norm_cpu(x, None, torch.ones(8), 0.0)[0], x)
print("numba" in sys.modules)
"""


def run(cache: Path) -> list[str]:
    environment = {**os.environ, "RIDGELINE_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert first[-1] == "True"
    assert "norm_rows" in first
    assert second == ["False"]


@pytest.mark.slow
def test_old_editions_go(tmp_path: Path) -> None:
    old, recent = tmp_path / "kernels-old", tmp_path / "kernels-recent"
    old.mkdir()
    recent.mkdir()
    os.utime(old, (0, 0))
    run(tmp_path)
    assert not old.exists()
    assert recent.exists()


@pytest.mark.slow
def test_without_a_place_to_write_it_compiles_each_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made here")
    assert "norm_rows" in run(blocked)


@pytest.mark.slow
def test_a_damaged_object_file_is_made_again(tmp_path: Path) -> None:
    run(tmp_path)
    (found,) = tmp_path.glob("kernels-*/ridgeline_norm_rows.code")
    found.write_bytes(found.read_bytes()[:100])
    assert "norm_rows" in run(tmp_path)
    assert run(tmp_path) == ["False"]
