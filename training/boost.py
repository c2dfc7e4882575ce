"""What a further small model learns from: where those before it fail to propose what the target says.

Knows small models, the target's logits and weights of positions. SpecInfer (Miao et al., 2024) drops what the first
model already covers and trains the next one on the rest; AdaBoost (Freund and Schapire, 1997) keeps all and lets what
was missed weigh more. Beside them stand bagging (Breiman, 1996: the same objective on documents drawn with
replacement) and one model of twice the size, which costs as much as the two. Knows nothing of how proposals are
combined afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.distill import Emphasis, compiled_on
from training.model import Sizes
from training.sample import mixed_precision

WIDE = Sizes(
    hidden_size=320,
    head_dim=64,
    num_attention_heads=5,
    num_key_value_heads=1,
    num_hidden_layers=2,
    intermediate_size=544,
)
"""One small model that costs as much as two of SSM: as many bytes and FLOPs a pass, within 1 %, and as deep."""


@dataclass(frozen=True)
class Kind:
    """One way of training a model beside those that are there.

    rule: "all" positions alike; "missed" ones only; "adaboost": missed ones weigh as much as all others together;
    "residual": the target's distribution without what is proposed already, each position by what is left of it.
    proposals: how many tokens each earlier model proposes at a position. ahead: a position also counts if one of so
    many, itself included, is missed. resampled: documents drawn with replacement. wide: twice the size.
    """

    rule: str
    proposals: int = 1
    ahead: int = 1
    resampled: bool = False
    wide: bool = False


KINDS = {
    "filter": Kind("missed"),
    "boost": Kind("adaboost"),
    "residual": Kind("residual", proposals=2),
    "bag": Kind("all", resampled=True),
    "wide": Kind("all", wide=True),
    "filter-ahead": Kind("missed", ahead=4),
}


def proposed(earlier: Sequence[Tensor], proposals: int) -> Tensor:
    """The best tokens of each of the earlier models' logits [rows, tokens, vocabulary]: int64[rows, tokens, many]."""
    return torch.cat([logits.topk(proposals, dim=-1).indices for logits in earlier], -1)


def missed(teacher_logits: Tensor, earlier: Sequence[Tensor], proposals: int) -> Tensor:
    """Where the target's best token is in no earlier model's best `proposals`: bool[rows, tokens]."""
    best = teacher_logits.argmax(-1, keepdim=True)
    return (proposed(earlier, proposals) != best).all(-1)


def reaching(positions: Tensor, ahead: int) -> Tensor:
    """Where one of the next `ahead` positions is set, the position itself being the first: bool[rows, tokens]."""
    found = positions.clone()
    for distance in range(1, ahead):
        found[:, :-distance] |= positions[:, distance:]
    return found


def adaboost_weights(wrong: Tensor) -> Tensor:
    """Weights after one round: those that are `wrong` weigh (1 - e) / e, e being their share, the others 1; so
    both weigh the same in sum. Where half or more are wrong all weigh alike, as AdaBoost would stop there."""
    share = wrong.float().mean().clamp(1e-4, 0.5)
    return torch.where(wrong, (1 - share) / share, 1.0)


def residual(teacher_logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The target's logits without `tokens` [rows, places, many], and the probability that is left of each position."""
    taken = torch.zeros_like(teacher_logits, dtype=torch.bool).scatter_(-1, tokens, True)
    left = teacher_logits.float().softmax(-1).masked_fill(taken, 0.0).sum(-1)
    # Low enough to weigh nothing, finite so that nothing times its logarithm stays nothing.
    return teacher_logits.masked_fill(taken, -1e4), left


def emphasis_of(kind: Kind, earlier: Sequence[nn.Module], device: torch.device) -> Emphasis | None:
    """What a kind makes of each batch: the teacher's logits to learn from, and each position's weight."""
    if kind.rule == "all":
        return None

    def judges(inputs: Tensor) -> list[Tensor]:
        with mixed_precision(device):
            return [model(inputs) for model in earlier]

    compiled = compiled_on(judges, device)

    def emphasis(inputs: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = compiled(inputs)
        if kind.rule == "residual":
            return residual(teacher_logits, proposed(logits, kind.proposals))
        wrong = reaching(missed(teacher_logits, logits, kind.proposals), kind.ahead)
        return teacher_logits, wrong.float() if kind.rule == "missed" else adaboost_weights(wrong)

    return emphasis
