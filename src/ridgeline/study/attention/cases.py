"""Which attentions are measured: the EE451 report's, the FlashAttention papers' sweep, decode, memory by length.

Knows shapes and how many operations and bytes they are. It must not know tensors, kernels or clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ridgeline.core.errors import InvalidArgument
from ridgeline.core.step import Spans

EXPERIMENTS = ("report", "sweep", "decode", "memory")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

REPORT_BATCHES = (1, 4, 16, 64)
REPORT_SEQUENCE = 64
REPORT_HEADS, REPORT_HEAD_DIM = 32, 128
"""The report names batches and the sequence; heads are those of the Llama-2-7B that it profiles."""
REPORT_SPEEDUPS = {1: 4.61, 4: 3.72, 16: 1.27, 64: 19.48}
"""Standard attention over FlashAttention, as the report prints it (A100), by batch."""
REPORT_TOTALS_MS = {1: (624.202, 135.383), 4: (978.146, 262.702), 16: (423.332, 332.725), 64: (26.460, 1.358)}
"""The report's total CUDA times in ms: standard, FlashAttention."""

SWEEP_SEQUENCES = (512, 1024, 2048, 4096, 8192, 16384)
SWEEP_HEAD_DIMS = (64, 128, 256)
SWEEP_TOKENS = 16384
SWEEP_WIDTH = 2048
"""The papers' grid (2307.08691, 2407.08608): batch x sequence = 16k, heads x head dim = 2048."""
SWEEP_GROUPED = ((32, 8, 128), (64, 8, 128))
"""Query heads, KV heads and head dim of the grouped rows of the grid."""

DECODE_BATCHES = (1, 8, 32, 64, 256)
DECODE_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 131072)
DECODE_HEADS, DECODE_KV_HEADS, DECODE_HEAD_DIM = 32, 8, 128

MEMORY_SEQUENCES = (512, 1024, 2048, 4096, 8192, 16384)
MEMORY_HEADS, MEMORY_HEAD_DIM = 16, 128
CPU_SEQUENCES = (128, 256, 512, 1024, 2048, 4096)
CPU_HEADS, CPU_HEAD_DIM = 8, 64
CPU_TOKENS = 1024
CPU_DECODE_BATCHES = (1, 8)
CPU_DECODE_CONTEXTS = (1024, 4096)
"""What a CPU does of each experiment unless told otherwise: it has a hundredth of a GPU's rates."""


@dataclass(frozen=True, slots=True)
class Case:
    """One attention: `batch` requests of `new` query tokens over `visible` keys each.

    page: tokens of a KV page, or None for contiguous keys.
    """

    experiment: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    new: int
    visible: int
    causal: bool
    dtype: str
    page: int | None = None

    @property
    def label(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        if self.new == 1:
            return f"{self.batch} x {self.visible}, {heads} heads, D{self.head_dim}"
        mask = "causal" if self.causal else "full"
        return f"B{self.batch} S{self.visible} H{heads} D{self.head_dim} {mask}"

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def spans(self) -> Spans:
        return Spans((self.new,) * self.batch, (self.visible,) * self.batch)

    @property
    def flops(self) -> float:
        """The papers' count: 4 * batch * heads * queries * keys * head dim, the hidden triangle left out.

        A row counts half of its own token, so that a causal square is one half of a full one.
        """
        pairs = float(self.new * self.visible)
        if self.causal and self.new > 1:
            pairs -= self.new * self.new / 2
        return 4 * self.batch * self.heads * self.head_dim * pairs

    @property
    def query_bytes(self) -> int:
        """Bytes of q, and as many of the output."""
        return self.batch * self.new * self.heads * self.head_dim * self.item_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V together."""
        return 2 * self.batch * self.visible * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def floor_bytes(self) -> int:
        """The least traffic: q, K and V read once, the output written once."""
        return 2 * self.query_bytes + self.kv_bytes

    @property
    def score_bytes(self) -> int:
        """Bytes of one full score matrix (S, or P) in the case's dtype."""
        return self.batch * self.heads * self.new * self.visible * self.item_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "label": self.label,
            "flops": self.flops,
            "floor_bytes": self.floor_bytes,
            "kv_bytes": self.kv_bytes,
            "score_matrix_bytes": self.score_bytes,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """What of an experiment is measured; empty lists take the experiment's own.

    sequences: lengths (of the context in decode). causal: None takes what the experiment does.
    layout: "auto", "contiguous" or "paged". grouped: also the grouped heads of the sweep.
    """

    batches: Sequence[int] = ()
    sequences: Sequence[int] = ()
    head_dims: Sequence[int] = ()
    heads: int | None = None
    kv_heads: int | None = None
    causal: bool | None = None
    dtype: str = "bfloat16"
    layout: str = "auto"
    page: int = 64
    grouped: bool = False
    device: str = "cuda"


def cases(experiment: str, choice: Choice) -> list[Case]:
    """The cases of an experiment, InvalidArgument for what it does not have."""
    if experiment not in EXPERIMENTS:
        raise InvalidArgument("experiment", f"must be one of {', '.join(EXPERIMENTS)}, not {experiment!r}")
    _check(choice)
    made = {"report": _report, "sweep": _sweep, "decode": _decode, "memory": _memory}[experiment](choice)
    return [case for number, case in enumerate(made) if case not in made[:number]]


def _check(choice: Choice) -> None:
    if choice.dtype not in ITEM_BYTES:
        raise InvalidArgument("dtype", f"must be one of {', '.join(ITEM_BYTES)}, not {choice.dtype!r}")
    if choice.layout not in ("auto", "contiguous", "paged"):
        raise InvalidArgument("layout", f"must be auto, contiguous or paged, not {choice.layout!r}")
    for name, values in (("batch", choice.batches), ("sequence", choice.sequences), ("head_dim", choice.head_dims)):
        if any(value < 1 for value in values):
            raise InvalidArgument(name, f"must be positive, not {', '.join(map(str, values))}")
    heads, kv_heads = choice.heads, choice.kv_heads
    if heads is not None and heads < 1:
        raise InvalidArgument("heads", f"must be positive, not {heads}")
    if kv_heads is not None and (heads is None or kv_heads < 1 or heads % kv_heads):
        raise InvalidArgument("kv_heads", f"must divide the number of heads, which is given with it, not {kv_heads}")
    if choice.page % 16 or not 16 <= choice.page <= 256:
        raise InvalidArgument("page", f"must be a multiple of 16 in [16, 256], not {choice.page}")


def _pages(choice: Choice, paged: bool) -> int | None:
    layout = choice.layout if choice.layout != "auto" else ("paged" if paged else "contiguous")
    return choice.page if layout == "paged" else None


def _report(choice: Choice) -> list[Case]:
    heads = choice.heads or REPORT_HEADS
    return [
        Case(
            "report", batch, heads, choice.kv_heads or heads, head_dim, sequence, sequence, bool(choice.causal),
            choice.dtype, _pages(choice, False),
        )
        for head_dim in choice.head_dims or (REPORT_HEAD_DIM,)
        for sequence in choice.sequences or (REPORT_SEQUENCE,)
        for batch in choice.batches or REPORT_BATCHES
    ]  # fmt: skip


def _sweep(choice: Choice) -> list[Case]:
    small = choice.device == "cpu"
    head_dims = choice.head_dims or ((CPU_HEAD_DIM,) if small else SWEEP_HEAD_DIMS)
    width = CPU_HEADS * CPU_HEAD_DIM if small else SWEEP_WIDTH
    if choice.heads is not None:
        shapes = [(choice.heads, choice.kv_heads or choice.heads, head_dim) for head_dim in head_dims]
    else:
        shapes = [(max(width // head_dim, 1), max(width // head_dim, 1), head_dim) for head_dim in head_dims]
        if choice.grouped:
            shapes += SWEEP_GROUPED
    masks = (False, True) if choice.causal is None else (choice.causal,)
    tokens = CPU_TOKENS if small else SWEEP_TOKENS
    return [
        Case("sweep", batch, heads, kv_heads, head_dim, length, length, causal, choice.dtype, _pages(choice, False))
        for heads, kv_heads, head_dim in shapes
        for causal in masks
        for length in choice.sequences or (CPU_SEQUENCES if small else SWEEP_SEQUENCES)
        for batch in choice.batches or (max(tokens // length, 1),)
    ]


def _decode(choice: Choice) -> list[Case]:
    small = choice.device == "cpu"
    heads = choice.heads or DECODE_HEADS
    kv_heads = choice.kv_heads or (DECODE_KV_HEADS if choice.heads is None else heads)
    return [
        Case("decode", batch, heads, kv_heads, head_dim, 1, context, True, choice.dtype, _pages(choice, True))
        for head_dim in choice.head_dims or (DECODE_HEAD_DIM,)
        for batch in choice.batches or (CPU_DECODE_BATCHES if small else DECODE_BATCHES)
        for context in choice.sequences or (CPU_DECODE_CONTEXTS if small else DECODE_CONTEXTS)
    ]


def _memory(choice: Choice) -> list[Case]:
    small = choice.device == "cpu"
    heads = choice.heads or (CPU_HEADS if small else MEMORY_HEADS)
    return [
        Case(
            "memory", batch, heads, choice.kv_heads or heads, head_dim, length, length, bool(choice.causal),
            choice.dtype, _pages(choice, False),
        )
        for head_dim in choice.head_dims or (CPU_HEAD_DIM if small else MEMORY_HEAD_DIM,)
        for batch in choice.batches or (1,)
        for length in choice.sequences or (CPU_SEQUENCES if small else MEMORY_SEQUENCES)
    ]  # fmt: skip
