"""Threads of the CPU kernels: started when needed, asleep when idle, safe with several callers and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from cpu_checks import kernel, random_weight

from ridgeline.kernels.cpu.native import Caller
from ridgeline.kernels.cpu.pack import pack
from ridgeline.kernels.cpu.pool import POOL, float_bits

WEIGHT = (3000, 700)


@pytest.mark.usefixtures("threads")
def test_as_many_helpers_as_torch_has_threads() -> None:
    torch.set_num_threads(2)
    assert POOL.helpers() == 1
    assert sum(thread.name == "ridgeline-cpu" for thread in threading.enumerate()) >= 1
    torch.set_num_threads(1)
    assert POOL.helpers() == 0


@pytest.mark.usefixtures("threads")
def test_many_short_calls() -> None:
    """Publishing and closing thousands of calls of few units loses none and mixes none up."""
    torch.set_num_threads(2)
    weight, x = pack(random_weight(200, 40, torch.float32)), torch.randn(3, 40)
    expected = kernel("linear")(x, weight)
    rows = [torch.randn(40, 700) for _ in range(2)]
    normalized = [kernel("norm")(one, None, torch.ones(700), 1e-5)[0] for one in rows]
    for index in range(3000):
        POOL.helpers()
        assert torch.equal(kernel("linear")(x, weight), expected)
        if index % 3 == 0:
            one = index % 2
            assert torch.equal(kernel("norm")(rows[one], None, torch.ones(700), 1e-5)[0], normalized[one])


@pytest.mark.usefixtures("threads")
def test_calls_from_several_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    weight = pack(random_weight(*WEIGHT, torch.float32))
    rows = [torch.randn(5, WEIGHT[1]) for _ in range(4)]
    expected = [kernel("linear")(x, weight) for x in rows]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(kernel("linear")(rows[index], weight), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.usefixtures("threads")
def test_helpers_sleep_when_nobody_calls() -> None:
    torch.set_num_threads(2)
    weight, x = pack(random_weight(*WEIGHT, torch.float32)), torch.randn(1, WEIGHT[1])
    kernel("linear")(x, weight)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.04
    kernel("linear")(x, weight)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_its_own_threads() -> None:
    script = """
import os, torch
from ridgeline.kernels.cpu.linear import linear_cpu
from ridgeline.kernels.cpu.pack import pack
from ridgeline.ops import Weight
torch.set_num_threads(2)
weight, x = pack(Weight.dense_from(torch.randn(3000, 700))), torch.randn(5, 700)
expected = linear_cpu(x, weight)
child = os.fork()
same = torch.equal(linear_cpu(x, weight), expected)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_a_caller_takes_integers_only() -> None:
    caller = Caller(gil=True)
    with pytest.raises(TypeError):
        caller.call(1.5, "text")
    with pytest.raises(OverflowError):
        caller.call(1 << 70)


def test_float_bits() -> None:
    assert float_bits(1.0) == 0x3F800000
    assert float_bits(-2.0) & 0xFFFFFFFF == 0xC0000000
