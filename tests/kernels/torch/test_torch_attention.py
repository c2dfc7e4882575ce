"""attention in plain torch: the blocked reference over the whole matrix of features, and torch's fused CPU kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from attention_matrix import AXES, COVER, cover, inputs_of, name_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.core.errors import KernelRefused
from ridgeline.kernels.torch.attention_blocked import blocked
from ridgeline.kernels.torch.attention_fused import LIMITS as FUSED
from ridgeline.kernels.torch.attention_fused import attention_fused
from ridgeline.ops.attention import attention, attention_inputs
from ridgeline.ops.attention_call import Call

SIZES = ((16, 16), (7, 33), (128, 256), (1, 64))


@pytest.fixture(autouse=True)
def _poisoned() -> Any:
    """Fresh memory holds NaN: whatever a kernel forgets to write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def agrees(call: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
    """Output and logarithms within the op's tolerance; no NaN, since every row has an owner."""
    tolerance = attention.tolerance[str(inputs["q"].dtype).removeprefix("torch.")]
    got, want = (one(**{**inputs, "return_lse": True}) for one in (call, attention.reference))
    assert not got[0].isnan().any()
    torch.testing.assert_close(got[0], want[0], atol=tolerance.absolute, rtol=tolerance.relative)
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)
    if not inputs["return_lse"]:
        assert torch.equal(call(**inputs), got[0])


def test_the_cover_is_one() -> None:
    """Each pair of values is there, in a tenth of a thousandth of all combinations."""
    seen = {(one, other, str(c[one]), str(c[other])) for c in COVER for one in AXES for other in AXES}
    assert all((a, b, str(x), str(y)) in seen for a in AXES for b in AXES if a != b for x in AXES[a] for y in AXES[b])
    assert len(COVER) < 60
    assert cover() == COVER


@pytest.mark.parametrize("index", range(len(COVER)), ids=[name_of(choice) for choice in COVER])
def test_blocked_matrix(index: int) -> None:
    inputs = inputs_of(COVER[index], "cpu")
    sizes = SIZES[index % len(SIZES)]
    agrees(lambda **given: blocked(Call(**given), *sizes), inputs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocked_is_exact_for_any_sizes(data: st.DataObject) -> None:
    """In fp64, where only an error of thought can show: any lengths, blocks and features."""
    draw = data.draw
    new = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    visible = tuple(draw(st.integers(0, 90)) for _ in new)
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    tails = None
    causal = draw(st.booleans())
    if causal and draw(st.booleans()):
        tails = tuple(draw(st.integers(0, min(pair))) for pair in zip(new, visible))
    least = 64 if tails and max(tails) > 32 else 32 if tails else 1
    window = draw(st.none() | st.integers(least, least + 40)) if causal else None
    inputs = attention_inputs(
        "cpu", torch.float64, 4, draw(st.sampled_from((1, 2, 4))), 8, draw(st.sampled_from((None, 4, 48))), window,
        new, visible, causal=causal, softcap=draw(st.sampled_from((None, 2.0))), sinks=draw(st.booleans()),
        tails=tails, return_lse=True,
    )  # fmt: skip
    sizes = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    got, want = blocked(Call(**inputs), *sizes), attention.reference(**inputs)
    torch.testing.assert_close(got[0], want[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("choice", COVER, ids=name_of)
def test_fused_matrix(choice: Mapping[str, Any]) -> None:
    inputs = inputs_of(choice, "cpu")
    if FUSED.accepts(**inputs) is not None:
        with pytest.raises(KernelRefused, match=r"^(window|softcap): fused does not do .*; .*blocked.* would do$"):
            attention_fused(**inputs)
        return
    agrees(attention_fused, inputs)


def test_blocked_needs_memory_for_one_block_of_scores() -> None:
    """Sixteen thousand keys: the whole matrix of scores would take 1 GiB a head."""
    inputs = attention_inputs("cpu", torch.float32, 1, 1, 16, 64, None, (64, 16), (16384, 16000))
    largest = 0
    original = torch.Tensor.__matmul__

    def watched(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        result = original(self, other)
        largest = max(largest, result.numel())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", watched)
        got = blocked(Call(**inputs), 32, 256)
    assert largest == 32 * 256
    torch.testing.assert_close(got, attention.reference(**inputs), atol=1e-5, rtol=1e-5)
