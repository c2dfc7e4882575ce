"""rope_kv_write: every slot that is named is written, and no other."""

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import kinds

from ridgeline.kernels.triton.rope import _accepts, rope_kv_write_triton
from ridgeline.ops.rope import rope_kv_write

SHAPES = {  # tokens, heads, KV heads, head dim, block
    "cpu": ((5, 3, 1, 8, 16), (4, 4, 2, 72, 48), (2, 2, 2, 256, 16)),
    "cuda": ((5, 3, 1, 8, 16), (300, 32, 8, 128, 64), (65, 28, 4, 96, 256), (7, 71, 1, 64, 48), (9, 8, 4, 256, 16)),
}


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_writes_its_slots_alone(device: str, rotary: bool, normed: bool) -> None:
    for dtype in kinds(device):
        for tokens, heads, kv_heads, head_dim, block in SHAPES[device]:
            blocks = tokens // block + 3
            slots = torch.randperm(blocks * block, device=device)[:tokens]
            slots[1] = -1
            angles = 6 * torch.rand(300, head_dim // 2, device=device)
            # Rows of a wider matrix: the kernel follows the stride.
            qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 16, device=device).to(dtype)[:, 16:]
            norms = [torch.randn(head_dim, device=device).to(dtype) if normed else None for _ in range(2)]
            pages = [
                torch.full((blocks, kv_heads, block, head_dim), float("nan"), device=device, dtype=dtype)
                for _ in range(4)
            ]
            common = {
                "positions": torch.randint(300, (tokens,), device=device),
                "slots": slots,
                "cos": angles.cos() if rotary else None,
                "sin": angles.sin() if rotary else None,
                "q_norm": norms[0],
                "k_norm": norms[1],
                "eps": 1e-6,
                "heads": heads,
            }
            got = rope_kv_write_triton(qkv, k_pages=pages[0], v_pages=pages[1], **common)
            want = rope_kv_write.reference(qkv.contiguous(), k_pages=pages[2], v_pages=pages[3], **common)
            assert got.is_contiguous()
            tolerance = rope_kv_write.tolerance[str(dtype).removeprefix("torch.")]
            for a, b in ((got, want), (pages[0], pages[2]), (pages[1], pages[3])):
                torch.testing.assert_close(a, b, atol=tolerance.absolute, rtol=tolerance.relative, equal_nan=True)
            assert torch.equal(pages[1].isnan(), pages[3].isnan())


def test_refuses() -> None:
    inputs = next(iter(rope_kv_write.inputs("meta", torch.float32)))
    assert _accepts(**inputs) is None
    pages = torch.empty(4, 1, 16, 12, device="meta")
    assert "multiples of 8" in str(_accepts(**{**inputs, "k_pages": pages, "v_pages": pages}))
    assert "q_norm with k_norm" in str(_accepts(**{**inputs, "q_norm": torch.empty(128, device="meta")}))
