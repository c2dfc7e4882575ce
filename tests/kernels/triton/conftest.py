"""Runs the Triton kernels' tests twice: through Triton's interpreter on CPU tensors, and on a GPU.

`TRITON_INTERPRET=1 pytest -m interpret tests/kernels/triton` (or the marker alone) does the first, in a
process of its own, because Triton reads the variable when a kernel is defined; `pytest -m gpu` the second.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent

if ("-m", "interpret") in zip(sys.argv, sys.argv[1:]) and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # workers of xdist inherit it
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's products of tiles are too small for several


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        if item.get_closest_marker("interpret") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (a process of its own)"))
        if item.get_closest_marker("gpu") and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and no TRITON_INTERPRET"))


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    """Make Triton 3.6's interpreter run under NumPy 2.4, and in half the time.

    It counts loops with int(array of one element), which NumPy 2.4 refuses. It also checks every sum of
    integers for overflow (compiled kernels do not) and patches the language anew for each inner call.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    modules: set[int] = set()  # an outer call patches for itself; what inner ones patch stays patched

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in modules:
            modules.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: "cpu" through the interpreter with small shapes, "cuda" with large ones."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    return str(request.param)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or a huge id): whatever a kernel forgets to write shows."""
    original = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = original(*args, **kwargs)
        if fresh.device.type == "meta" or fresh.dtype == torch.bool:
            return fresh
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
