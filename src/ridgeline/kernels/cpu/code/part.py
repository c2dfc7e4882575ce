"""How parts of compiled code are declared.

Knows numba's decorator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(function: Callable[..., Any]) -> Any:
    """A function of compiled code, compiled together with whatever calls it."""
    return numba.njit(error_model="numpy", boundscheck=False)(function)
