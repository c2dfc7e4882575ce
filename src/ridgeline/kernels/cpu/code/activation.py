"""Activation functions in compiled code.

Knows the numbers of kernels/cpu/activation.py. It must not know what they are applied to.
"""

from __future__ import annotations

from ridgeline.kernels.cpu.code.part import njit
from ridgeline.kernels.cpu.code.vector import gelu, gelu_tanh, relu, silu


@njit
def activate(x, code):  # type: ignore[no-untyped-def]
    if code == 1:
        return relu(x)
    if code == 2:
        return silu(x)
    if code == 3:
        return gelu(x)
    if code == 4:
        return gelu_tanh(x)
    return x
