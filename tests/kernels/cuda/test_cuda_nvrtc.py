"""NVRTC: compiling without a GPU, the kept cubins, and what is said when the compiler is not there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.cuda import nvrtc

SOURCE = """
extern "C" __global__ void add(float* out, const float* left, int count, long long shift, float factor) {
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index < count) out[index + shift] += left[index] * factor * FACTOR;
}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small kernel, and an empty folder for its machine code."""
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    nvrtc.folder.cache_clear()
    path = tmp_path / "add.cu"
    path.write_text(SOURCE)
    yield str(path)
    nvrtc.folder.cache_clear()


@pytest.fixture
def compiled() -> list[str]:
    """Names of the kernels that are really compiled."""
    names: list[str] = []
    nvrtc.watchers.append(names.append)
    yield names
    nvrtc.watchers.remove(names.append)


def test_compiled_once_and_then_read(source: str, compiled: list[str]) -> None:
    first = nvrtc.compile(source, {"FACTOR": 2}, "sm_90a")
    assert first.code.startswith(b"\x7fELF")
    assert "registers" in first.log
    start = time.perf_counter()
    assert nvrtc.compile(source, {"FACTOR": 2}, "sm_90a") == first
    assert time.perf_counter() - start < 0.05
    assert compiled == ["add"]


def test_the_name_of_a_cubin_says_all_that_it_depends_on(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {nvrtc.key(source, {"FACTOR": 2}, "sm_90a")}
    keys.add(nvrtc.key(source, {"FACTOR": 3}, "sm_90a"))
    keys.add(nvrtc.key(source, {"FACTOR": 2}, "sm_80"))
    monkeypatch.setattr(nvrtc, "version", lambda: "14.0")
    keys.add(nvrtc.key(source, {"FACTOR": 2}, "sm_90a"))
    monkeypatch.setattr(nvrtc, "_headers", lambda: b"other headers")
    keys.add(nvrtc.key(source, {"FACTOR": 2}, "sm_90a"))
    Path(source).write_text(SOURCE + "\n")
    keys.add(nvrtc.key(source, {"FACTOR": 2}, "sm_90a"))
    assert len(keys) == 6


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:60] + b"?" + content[61:]])
def test_a_damaged_cubin_is_made_again(source: str, compiled: list[str], damage: object) -> None:
    whole = nvrtc.compile(source, {"FACTOR": 2}, "sm_80")
    place = nvrtc.folder()
    assert place is not None
    (kept,) = place.glob("*.cubin")
    kept.write_bytes(damage(kept.read_bytes()))
    assert nvrtc.compile(source, {"FACTOR": 2}, "sm_80").code == whole.code
    assert compiled == ["add", "add"]


def test_an_error_in_the_source_is_shown(source: str) -> None:
    Path(source).write_text('extern "C" __global__ void add() { nonsense(); }')
    with pytest.raises(RuntimeError, match="nonsense"):
        nvrtc.compile(source, {}, "sm_80")


def test_without_nvrtc_one_sentence_says_what_to_do(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = pytest.importorskip("cuda.bindings.nvrtc")

    def absent() -> None:
        raise RuntimeError("no libnvrtc.so")

    monkeypatch.setattr(bindings, "nvrtcVersion", absent)
    with pytest.raises(KernelRefused, match=r"nvidia-cuda-nvrtc.*'triton'"):
        nvrtc.compile(source, {"FACTOR": 2}, "sm_90a")


def test_unread_cubins_are_forgotten_after_a_month(source: str) -> None:
    nvrtc.compile(source, {"FACTOR": 2}, "sm_80")
    place = nvrtc.folder()
    assert place is not None
    (old,) = place.glob("*.cubin")
    os.utime(old, (0, 0))
    nvrtc.compile(source, {"FACTOR": 3}, "sm_80")
    assert not old.exists()
