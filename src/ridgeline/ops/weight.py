"""A weight matrix that knows its format, so that cost prices the bytes it holds and kernels say what they accept.

Knows layouts. It must not know layers or checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PANEL = 64
"""Output features in a panel of the "panels" format: four 512-bit vectors of fp32."""


@dataclass(slots=True, eq=False)
class Weight:
    """A matrix [out_features, in_features], used as x @ W.T.

    format "dense": data is [out_features, in_features], as in the checkpoint.
    format "panels": data is [ceil(out_features / 64), in_features, 64]: the output features in panels,
        each stored input-major and padded with zeros, so that a CPU kernel streams it once and every
        output is a plain sum over inputs in order, whatever the batch (hence batch-invariant).
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    format: str = "dense"

    @classmethod
    def dense_from(cls, data: torch.Tensor) -> Weight:
        """Wrap a [out_features, in_features] tensor."""
        return cls(data, data.shape[0], data.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters themselves, without a format's padding."""
        return self.out_features * self.in_features * self.data.element_size()

    def dense(self) -> torch.Tensor:
        """[out_features, in_features]; a copy unless the format is dense."""
        if self.format == "dense":
            return self.data
        return self.data.permute(0, 2, 1).reshape(-1, self.in_features)[: self.out_features]

    def to_panels(self) -> Weight:
        """The same matrix in the "panels" format (a copy)."""
        if self.format == "panels":
            return self
        panels = -(-self.out_features // PANEL)
        padded = self.data
        if panels * PANEL != self.out_features:
            padded = torch.nn.functional.pad(self.data, (0, 0, 0, panels * PANEL - self.out_features))
        data = padded.view(panels, PANEL, self.in_features).permute(0, 2, 1).contiguous()
        return Weight(data, self.out_features, self.in_features, "panels")


def nbytes(*tensors: torch.Tensor | Weight | None) -> int:
    """Bytes of tensors and weights together; None counts nothing."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Weight):
            total += tensor.nbytes
        elif tensor is not None:
            total += tensor.numel() * tensor.element_size()
    return total
