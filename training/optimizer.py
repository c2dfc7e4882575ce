"""The optimizer: Muon for matrices, AdamW for the embedding and the norms.

Knows parameters and gradients. Knows nothing of models, losses or schedules; whoever trains sets the learning
rate as a factor before each step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of `matrices` [count, rows, columns].

    Newton-Schulz iteration with the quintic of Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks" (2024); singular values land between about 0.7 and 1.2. bfloat16 is precise enough for it on a GPU.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Optimizer:
    """Muon (lr, Nesterov momentum, decoupled weight decay) on matrices of layers; AdamW on everything else.

    Muon's update is scaled by max(1, rows / columns) ** 0.5, so that one learning rate serves all shapes.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        matrix_lr: float,
        other_lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        others: list[nn.Parameter] = []
        for name, weight in named:
            if weight.ndim == 2 and "embed" not in name:
                shapes[weight.shape].append(weight)
            else:
                others.append(weight)
        self.groups: list[list[Tensor]] = [list[Tensor](group) for group in shapes.values()]
        self.memories = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]
        self.matrix_lr, self.other_lr = matrix_lr, other_lr
        self.weight_decay, self.momentum = weight_decay, momentum
        self.adam = torch.optim.AdamW(
            others, lr=other_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=others[0].is_cuda
        )
        cuda = others[0].is_cuda
        self._orthogonal = torch.compile(orthogonal, dynamic=False) if cuda else orthogonal

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` (0..1) of the full learning rates, then forgets the gradients."""
        lr = self.matrix_lr * factor
        for group, memory in zip(self.groups, self.memories):
            gradient = torch.stack([weight.grad for weight in group if weight.grad is not None]).float()
            memory.lerp_(gradient, 1 - self.momentum)
            update = self._orthogonal(gradient.lerp(memory, self.momentum))
            update = update * max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-lr)
            for weight in group:
                weight.grad = None
        for settings in self.adam.param_groups:
            settings["lr"] = self.other_lr * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
