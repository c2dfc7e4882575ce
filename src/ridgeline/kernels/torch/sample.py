"""The sampling ops on a GPU as their references compute them: none of these waits for the device.

Knows that a reference made of torch calls is a kernel too. It must not know how `sample` is fused
(kernels/triton/sample.py does that).
"""

from __future__ import annotations

from ridgeline.ops.op import cuda
from ridgeline.ops.sample import adjust, sample, score

sample.kernel("torch", needs=cuda(0))(sample.reference)
adjust.kernel("torch", needs=cuda(0))(adjust.reference)
score.kernel("torch", needs=cuda(0))(score.reference)
