"""Every CPU kernel on its op's own examples, against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cpu_checks import DTYPES, compare, name_of

from ridgeline.ops import REGISTRY, Weight

SERVED = [name for name, op in REGISTRY.items() if "cpu" in op.kernels]


def test_every_op_of_a_forward_pass_is_served() -> None:
    assert set(SERVED) >= {
        "attention", "embed", "gate", "gated_linear", "kv_move", "layer_norm", "linear", "moe", "norm",
        "rope_kv_write", "sample", "take",
    }  # fmt: skip


def refused(arguments: Mapping[str, Any]) -> bool:
    """Whether an example of attention asks for more than pages, the causal mask, a window and trees."""
    accepts = REGISTRY["attention"].kernels["cpu"].accepts
    assert accepts is not None
    more = any(arguments.get(name) is not None for name in ("key_starts", "softcap", "sinks"))
    more |= not arguments["causal"] or arguments["return_lse"]
    assert ("cpu does not do" in str(accepts(**arguments))) == more
    return bool(more)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", SERVED)
def test_examples(op: str, dtype: torch.dtype) -> None:
    for arguments in REGISTRY[op].inputs("cpu", dtype):
        if op == "attention" and refused(arguments):
            continue
        weighted = any(isinstance(value, Weight) for value in arguments.values())
        if weighted:
            compare(op, arguments, dtype, pack_weights=True)
        if not weighted or op == "embed":
            compare(op, arguments, dtype)


@pytest.mark.parametrize("op", SERVED)
def test_other_dtypes_are_refused_with_a_reason(op: str) -> None:
    if op in ("kv_move", "kv_compact"):
        return
    accepts = REGISTRY[op].kernels["cpu"].accepts
    assert accepts is not None
    for arguments in REGISTRY[op].inputs("cpu", torch.float64):
        given = {key: value.to_panels() if isinstance(value, Weight) else value for key, value in arguments.items()}
        assert "float32 or bfloat16" in (reason := str(accepts(**given))) or "cpu does not do" in reason


def test_dense_weights_are_refused_with_a_reason() -> None:
    for op in ("linear", "gated_linear"):
        accepts = REGISTRY[op].kernels["cpu"].accepts
        assert accepts is not None
        assert "panels" in str(accepts(**next(iter(REGISTRY[op].inputs("cpu", torch.float32)))))
