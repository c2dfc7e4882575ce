"""A step as data: what was decided (StepPlan), what happened (StepResult), and both on record.

Knows requests' ids, token ids and block numbers. It must not know tensors: the executor turns a plan
into them, the performance model prices it, a listener keeps its record.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ridgeline.core.request import SamplingParams
from ridgeline.core.tree import TokenTree

UNREAD = -1
"""Stands in a chunk for the token that the step before sampled for its request: only the device knows it yet."""


def padded(tokens: int, sizes: Sequence[int]) -> int:
    """Rows that a step with prompts of so many tokens computes where these numbers are captured, ascending."""
    return sizes[bisect_left(sizes, tokens)] if sizes and tokens <= sizes[-1] else tokens


class Sampling(NamedTuple):
    """How the next token of a chunk is chosen. (A tuple: hundreds are made in every step.)

    position: index of the token to be chosen in its sequence; with `seed` it fixes the noise.
    tokens: the sequence so far (for penalties), prompt_len of them from the prompt; all of it, unless the
        chunk ends with an UNREAD one, which will be appended.
    forbidden: ids that must not be chosen at this very position (bad words about to complete,
        end tokens before min_tokens).
    allowed: a bit for each token id, lowest first: only those set may be chosen. None: no grammar asks.
    """

    params: SamplingParams
    seed: int
    position: int
    tokens: Sequence[int]
    prompt_len: int
    forbidden: tuple[int, ...] = ()
    allowed: bytes | None = None


class Chunk(NamedTuple):
    """New tokens of one request in a step.

    start: tokens of the request already in the cache; the chunk holds tokens[start : start + len(token_ids)],
        of which the last may be UNREAD.
    blocks: the request's block table, covering `visible` tokens.
    sampling: None if the chunk ends before the last known token (an unfinished prefill).
    prompt_logprobs: alternatives a prompt token to report for this chunk's tokens, or None.
    targets: with prompt_logprobs, the token that follows each token of the chunk and is scored (may
        be one shorter than token_ids at the end of the prompt).
    tree: drafted tokens behind the last one, to be verified in this step, or None. Node i takes slot
        start + len(token_ids) + i; its position is that of the last token plus its depth.
    behind: with a tree, how the token behind each of its nodes is chosen.
    draws: how the tree's children were drawn (run/verify.py), if what decides about them is not the noise of
        (seed, position); None: it is.
    """

    request_id: str
    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    sampling: Sampling | None
    prompt_logprobs: int | None = None
    targets: Sequence[int] = ()
    tree: TokenTree | None = None
    behind: Sequence[Sampling] = ()
    draws: object | None = None

    @property
    def new(self) -> int:
        """Rows that the chunk takes: tokens and nodes."""
        return len(self.token_ids) + (0 if self.tree is None else len(self.tree))

    @property
    def visible(self) -> int:
        """Slots up to the chunk's last row."""
        return self.start + self.new


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does: chunks of tokens, after copying whole blocks (copy-on-write)."""

    number: int
    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> str:
        """Class of work: "decode" (one new token each), "prefill" (none so), "mixed", or "tree" if some verify one."""
        if any(chunk.tree is not None for chunk in self.chunks):
            return "tree"
        ones = sum(chunk.new == 1 for chunk in self.chunks)
        if ones == len(self.chunks):
            return "decode"
        return "mixed" if ones else "prefill"

    @property
    def num_tokens(self) -> int:
        return sum(chunk.new for chunk in self.chunks)


@dataclass(slots=True)
class TokenScore:
    """A token with its log-probability under the raw logits, its rank, and the likeliest others."""

    token: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


class Accepted(NamedTuple):
    """What verification of a tree came to: the nodes on its path, top down, and the tokens chosen on the way,
    which are those of the nodes and one more."""

    nodes: Sequence[int]
    tokens: Sequence[TokenScore]


@dataclass(slots=True)
class StepResult:
    """What a step produced, by request id.

    sampled: the next token of every chunk with a Sampling and no tree. accepted: of every chunk with a tree;
        keys and values of the accepted nodes are in the slots of their positions by then.
    prompt_scores: one score a target token, for chunks with prompt_logprobs.
    device_s: seconds the device (or its price) took for the step.
    padding: rows computed for nobody, because the step ran at a captured size.
    """

    sampled: dict[str, TokenScore] = field(default_factory=dict)
    accepted: dict[str, Accepted] = field(default_factory=dict)
    prompt_scores: dict[str, list[TokenScore]] = field(default_factory=dict)
    device_s: float = 0.0
    padding: int = 0


class Verified(NamedTuple):
    """A draft tree and what became of it. root: the token before it; accepted: its nodes that became tokens, top
    down."""

    root: int
    tree: TokenTree
    accepted: Sequence[int]


@dataclass(slots=True)
class StepRecord:
    """One step for the record: decided, predicted, measured (seconds).

    spans: (new, visible) a request. sampled: requests that got a next token. drafted, accepted: nodes of trees
    that were verified and that became tokens; draft_s: what drafting them took; verified: these trees, one by one.
    predicted_s: None while nothing predicts. padding: rows computed for nobody.
    host_s: scheduling, preparation and commit, i.e. the step less the executor's part; with overlap this and
    the device's part of the step before happen at the same time.
    """

    number: int
    kind: str
    spans: tuple[tuple[int, int], ...]
    running: int
    waiting: int
    free_blocks: int
    preempted: int
    start_s: float
    host_s: float
    device_s: float
    predicted_s: float | None = None
    sampled: int = 0
    padding: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    verified: tuple[Verified, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the step brought."""
        return self.sampled + self.accepted

    @property
    def rows(self) -> int:
        """Rows of logits that it computed."""
        return self.sampled + self.drafted


@dataclass(frozen=True, slots=True)
class Spans:
    """The host's view of a step's sequences: what cost may look at.

    new: tokens that each request computes now; visible: keys that its last new token sees (itself
    included). trees: empty if no request verifies a draft tree; else, for each request, how many of the
    tree's keys each of its last rows sees, one number a node of its tree (the last keys of `visible` are these
    nodes; no numbers: no tree). Nodes that were computed earlier count as keys before the tree: a row's number is
    less by all of them, and more by those that it sees. Kernels never see these integers; they read the device part of
    a Batch.
    """

    new: tuple[int, ...]
    visible: tuple[int, ...]
    trees: tuple[tuple[int, ...], ...] = ()

    def pairs(self, window: int | None = None, causal: bool = True) -> int:
        """Query-key pairs under the causal mask, aligned at the last token; all of them if not causal.

        window: a query sees at most this many keys, itself included.
        """
        if not causal:
            return sum(new * visible for new, visible in zip(self.new, self.visible))
        if not self.trees:
            return sum(_chain_pairs(new, visible, window) for new, visible in zip(self.new, self.visible))
        total = 0
        for new, visible, seen in zip(self.new, self.visible, self.trees):
            prefix = visible - len(seen)
            total += _chain_pairs(new - len(seen), prefix, window) + sum(seen)
            total += sum(prefix if window is None else min(prefix, window - depth) for depth in seen)
        return total

    def keys(self, window: int | None = None) -> int:
        """Distinct keys that any query of each request sees, summed over requests."""
        if window is None:
            return sum(visible for new, visible in zip(self.new, self.visible) if new)
        trees = self.trees or ((),) * len(self.new)
        total = 0
        for new, visible, seen in zip(self.new, self.visible, trees):
            # The row whose window begins first: the first of a chain, or the node of the least depth.
            chain, prefix = new - len(seen), visible - len(seen)
            first = prefix - chain if chain else prefix + min(seen, default=0) - 1
            total += min(visible, visible - first + window - 1) if new else 0
        return total


def _chain_pairs(new: int, visible: int, window: int | None) -> int:
    """Pairs of the last `new` queries of `visible` keys, each seeing those up to its own, `window` at most."""
    new = min(new, visible)  # earlier ones stand before the first key
    first = visible - new + 1
    if window is None or visible <= window:
        return new * (first + visible) // 2
    if first >= window:
        return new * window
    growing = window - first + 1
    return growing * (first + window) // 2 + (new - growing) * window
