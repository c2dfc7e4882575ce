"""What of a GPU the Triton kernels size their grids and tiles by. It must not know any kernel."""

from functools import cache
from typing import NamedTuple

import torch
from triton.runtime import driver


class Machine(NamedTuple):
    """Multiprocessors, bytes of shared memory that a program may have, and whether an engine copies tiles (Hopper)."""

    multiprocessors: int
    shared_bytes: int
    copies_tiles: bool = True


@cache
def machine_of(device: torch.device) -> Machine:
    if device.type != "cuda":  # Triton's interpreter
        return Machine(1, 227 * 1024)
    index = torch.cuda.current_device() if device.index is None else device.index
    found = driver.active.utils.get_device_properties(index)
    copies_tiles = torch.cuda.get_device_capability(index) >= (9, 0)
    return Machine(found["multiprocessor_count"], found["max_shared_mem"], copies_tiles)
