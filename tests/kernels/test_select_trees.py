"""A GPU's table for steps that verify draft trees and for drafting: kernels that no captured step waits for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from ridgeline.core.step import Spans
from ridgeline.engine.build import WAITING_KERNELS
from ridgeline.kernels import select as selecting
from ridgeline.kernels.select import CLASSES_OF_WORK, Table, select
from ridgeline.models import build_model, parse_config
from ridgeline.ops import Ops
from ridgeline.perf.price import Price

WORKS = (*CLASSES_OF_WORK, "tree")
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}


def traced(dtype: torch.dtype) -> Callable[[str, Ops], None]:
    """A step of each class of work, and everything that trees add to it."""
    spec = parse_config(MODEL)
    price = Price(build_model(spec, torch.device("meta"), dtype, 4096), 64, dtype)

    def trace(work: str, ops: Ops) -> None:
        new = {"decode": (1, 1), "prefill": (8, 8), "mixed": (1, 8), "tree": (1, 8)}[work]
        trees = ((), tuple(range(1, 8))) if work == "tree" else ()
        price.trace(Spans(new, (8, 8), trees), 2, False, ops, work)

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        longs, floats = empty(9), empty(9, dtype=torch.float32)
        logits = torch.empty(9, spec.vocabulary, dtype=dtype, device="meta")
        ops.feed(longs, longs, longs, spec.vocabulary)
        ops.adjust(logits, longs, longs, floats, floats, floats, floats, floats, longs, longs, floats)
        ops.restrict(logits, empty(9, -(-spec.vocabulary // 32), dtype=torch.int32))
        ops.score(logits, longs, 1)
        ops.propose(logits, floats, longs, longs, False, 4)
        tree, starts, tails = (empty(*shape, dtype=torch.int32) for shape in ((9, 1), (3,), (2,)))
        source, target = ops.accept(longs, longs, longs, longs, longs, tree, starts, tails, 7)
        ops.kv_compact(price.pages, source, target)
        ops.kv_compact(price.pages, empty(1), empty(1))

    return trace


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    found: int = request.param
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(found, 10))
    selecting.load_kernels("cuda")
    return found


def tree_kernels(table: Table) -> dict[str, str]:
    return {row.op: row.kernel for row in table.rows if row.work == "tree"}


@pytest.mark.parametrize("capability", [80, 90], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("invariant", [False, True])
def test_every_op_of_a_tree_step_has_a_kernel(capability: int, dtype: torch.dtype, invariant: bool) -> None:
    table = select(torch.device("cuda"), traced(dtype), works=WORKS, invariant=invariant)
    found = tree_kernels(table)
    assert not {row.kernel for row in table.rows} & set(WAITING_KERNELS)
    for name in ("accept", "kv_compact", "propose", "sample", "feed"):
        assert found[name] == "triton"
    if invariant or dtype is torch.float32:
        assert found["attention"] == "triton"
    else:
        assert found["attention"] == "decode"
    assert set(found) >= {"attention", "rope_kv_write", "linear", "adjust", "restrict", "score"}


@pytest.mark.parametrize("capability", [90], indirect=True)
def test_moves_of_several_requests_are_not_for_the_kernel_that_waits(capability: int) -> None:
    table = select(torch.device("cuda"), traced(torch.bfloat16), works=("tree",))
    assert tree_kernels(table)["kv_compact"] == "triton"
    with pytest.raises(selecting.KernelRefused, match="would wait for the device"):
        select(torch.device("cuda"), traced(torch.bfloat16), rungs={"kv_compact": ["torch"]}, works=("tree",))
