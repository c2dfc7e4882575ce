"""Sizes that the kernels' callers and their compiled parts agree on: what a unit of work is.

Knows numbers only.
"""

SCRATCH_BYTES = 1 << 20
"""Working memory of one worker; compiled code chooses its blocks so that it suffices."""

PASS_ROWS = 96
"""Rows of a unit of matrix products: a multiple of the highest tile's."""

NORM_ROWS = 8
ROPE_TOKENS = 4

SAMPLE_TOKENS = 8192
"""Part of a vocabulary: its noisy logits take 32 KiB."""

EXPERT_FEATURES = 64
"""Output features of an expert's unit."""

SEGMENT_KEYS = 256
"""Keys whose attention is one sum; the sums of segments are then merged in order."""
