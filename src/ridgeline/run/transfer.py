"""Bytes between the host's pinned memory and a GPU, in the order of the current stream.

Knows the driver's two copies. It must not know what the bytes are. torch's `copy_` does the same, and keeps books about
pinned memory besides, several times in every step. Whoever calls keeps both ends alive, and the host's as it is, until
the stream has come to the copy.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

TURNS = 4
"""Of Answers: at most two steps are under way, and the one before them may not have been read yet."""


def to_device(target: torch.Tensor, source: torch.Tensor) -> None:
    """`source`, contiguous on the host, to as many bytes of the contiguous `target`."""
    _copy("cuMemcpyHtoDAsync_v2", target, source, target.device)


def to_host(target: torch.Tensor, source: torch.Tensor) -> None:
    """`source`, contiguous on a device, to as many bytes of the contiguous `target` on the host."""
    _copy("cuMemcpyDtoHAsync_v2", target, source, source.device)


def _copy(name: str, target: torch.Tensor, source: torch.Tensor, device: torch.device) -> None:
    assert target.nbytes == source.nbytes
    assert target.is_contiguous()
    assert source.is_contiguous()
    if device.type == "cpu":
        target.copy_(source)
        return
    stream = torch.cuda.current_stream(device).cuda_stream
    problem = getattr(_driver(), name)(target.data_ptr(), source.data_ptr(), source.nbytes, stream)
    if problem:
        raise RuntimeError(f"the CUDA driver could not copy between host and device (error {problem})")


class Answers:
    """Places on the host for the tokens of steps, taken in turns: one is written again only after TURNS - 1 others."""

    def __init__(self) -> None:
        self._places = [torch.empty(0, dtype=torch.int64)] * TURNS
        self._turn = 0

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64[n] on its way to the host: it is there once the stream has come so far."""
        turn = self._turn = (self._turn + 1) % TURNS
        if len(self._places[turn]) < len(tokens):
            pinned = tokens.device.type == "cuda"
            self._places[turn] = torch.empty(2 * len(tokens), dtype=torch.int64, pin_memory=pinned)
        place = self._places[turn][: len(tokens)]
        to_host(place, tokens)
        return place


@cache
def _driver() -> Any:
    """The CUDA driver's library, told what its copies take."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyHtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    driver.cuMemcpyDtoHAsync_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return driver
