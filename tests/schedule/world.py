"""A scheduler, its cache, and a memory that remembers what was written where.

Each slot of each block holds a tag that stands for keys and values: a hash of the salt and of all tokens up
to the slot's own. A step writes and reads tags as an executor writes and reads tensors, so a slot that was
never written, was overwritten by another, or belongs to other tokens is found out when it is read. What each
request must produce is computed beside, by the same toy model without any cache or batch.

A world that runs ahead plans each step before it hears of the one before, as an engine with overlap does: its
device runs steps in order at once, and what they sampled is kept back.

A world that drafts puts trees behind last tokens, some of whose paths come true: their slots hold the tags of their
paths, and what is accepted is moved as an executor moves it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

from ridgeline.core.request import FinishReason, Request, SamplingParams
from ridgeline.core.step import UNREAD, Accepted, Chunk, Sampling, StepPlan, StepResult, TokenScore
from ridgeline.core.tree import ROOT, Sketch, TokenTree
from ridgeline.kv import KVCache
from ridgeline.schedule import Event, Scheduler, make_policy

VOCABULARY = 5
EOS = 0


def tags(salt: str, tokens: Sequence[int]) -> list[int]:
    """What memory must hold at each position of a sequence."""
    result, tag = [], crc32(salt.encode())  # hash() of a string differs from run to run
    for token in tokens:
        tag = hash((tag, token))
        result.append(tag)
    return result


def next_token(salt: str, tokens: Sequence[int], seed: int, forbidden: Sequence[int]) -> int:
    """The toy model: any function of everything before, the seed and what is forbidden."""
    first = hash((tags(salt, tokens)[-1], seed)) % VOCABULARY
    allowed = [token for token in range(VOCABULARY) if token not in forbidden]
    return next((token for token in range(first, VOCABULARY) if token in allowed), allowed[0])


def forbidden_now(request: Request, tokens: Sequence[int]) -> set[int]:
    """Ids that may not follow `tokens`, spelled out naively."""
    output = list(tokens[request.prompt_len :])
    result = set()
    if len(output) < request.params.min_tokens:
        result |= request.eos_ids | request.stop_ids
    for word in request.bad_word_ids:
        for token in range(VOCABULARY):
            if (*output, token)[-len(word) :] == word:
                result.add(token)
    return result


def alone(request: Request, max_model_len: int) -> tuple[list[int], FinishReason, int | str | None]:
    """What a request must come to when nobody disturbs it: tokens, finish, stop reason."""
    tokens = list(request.tokens[: request.prompt_len])
    while True:
        forbidden = sorted(forbidden_now(request, tokens))
        token = next_token(request.salt, tokens, request.seed, forbidden)
        tokens.append(token)
        output = len(tokens) - request.prompt_len
        if token in request.eos_ids:
            return tokens, FinishReason.STOP, None
        if token in request.stop_ids:
            return tokens, FinishReason.STOP, token
        if output == request.max_tokens or len(tokens) == max_model_len:
            return tokens, FinishReason.LENGTH, None


@dataclass(frozen=True)
class Setup:
    """Arguments of a cache and a scheduler, and whether steps overlap (ahead).

    spare_blocks: beyond what one longest request needs. drafts: nodes that a tree may have, 0 for no trees.
    """

    policy: str = "fcfs"
    block_size: int = 2
    spare_blocks: int = 2
    max_num_seqs: int = 3
    max_num_batched_tokens: int = 8
    max_model_len: int = 12
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    kv_cache: bool = True
    ahead: bool = False
    drafts: int = 0


class Memory:
    """Slots with tags, and the checks that a step must pass to touch them."""

    def __init__(self, block_size: int, blocks: int) -> None:
        self.block_size = block_size
        self.slots: list[list[int | None]] = [[None] * block_size for _ in range(blocks)]

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """All at once: no destination may be another's, or a source."""
        destinations = [to for _, to in copies]
        assert len(set(destinations)) == len(destinations), f"two copies into one block: {copies}"
        assert not set(destinations) & {source for source, _ in copies}, f"a copy reads another's: {copies}"
        for source, to in copies:
            self.slots[to] = self.slots[source].copy()

    def write(self, chunk: Chunk, expected: Sequence[int]) -> set[int]:
        """Store the chunk's new tags. Returns the blocks written."""
        written = set()
        for position in range(chunk.start, chunk.visible):
            block, offset = divmod(position, self.block_size)
            self.slots[chunk.blocks[block]][offset] = expected[position]
            written.add(chunk.blocks[block])
        return written

    def accept(self, chunk: Chunk, nodes: Sequence[int]) -> None:
        """Move the slots of accepted nodes to the positions of their tokens, in order."""
        first = chunk.start + len(chunk.token_ids)
        for depth, node in enumerate(nodes):
            block, offset = divmod(first + node, self.block_size)
            tag = self.slots[chunk.blocks[block]][offset]
            block, offset = divmod(first + depth, self.block_size)
            self.slots[chunk.blocks[block]][offset] = tag

    def read(self, chunk: Chunk, expected: Sequence[int]) -> None:
        """Every key that the chunk sees must be that of its own tokens."""
        for position in range(chunk.visible):
            block, offset = divmod(position, self.block_size)
            found = self.slots[chunk.blocks[block]][offset]
            assert found == expected[position], f"{chunk.request_id} reads a wrong slot at {position}: {chunk}"

    def wipe(self, block: int) -> None:
        self.slots[block] = [None] * self.block_size


class World:
    """A scheduler at work, watched."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        blocks = -(-setup.max_model_len // setup.block_size) + setup.spare_blocks
        self.cache = KVCache(
            block_size=setup.block_size,
            num_blocks=blocks,
            enable_prefix_caching=setup.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            self.cache,
            make_policy(setup.policy),
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_model_len=setup.max_model_len,
            enable_chunked_prefill=setup.enable_chunked_prefill,
            kv_cache=setup.kv_cache,
        )
        self.memory = Memory(setup.block_size, blocks)
        self.requests: dict[str, Request] = {}
        self.alive: dict[str, Request] = {}
        self.outcomes: dict[str, tuple[list[int], FinishReason, int | str | None]] = {}
        self.told: dict[str, list[int]] = {}
        self.scored: dict[str, list[int]] = {}
        self.planned: dict[str, list[int]] = {}  # each request's tokens when the step was planned
        self.heard: dict[str, list[int]] = {}  # those of them that the host had
        self.under_way: list[tuple[StepPlan, StepResult]] = []
        self.surplus = 0
        self.steps = 0
        self.drafted = self.accepted = 0
        self._dice = random.Random(blocks)

    def add(
        self,
        prompt: Sequence[int],
        n: int = 1,
        max_tokens: int = 4,
        min_tokens: int = 0,
        priority: int = 0,
        salt: str = "",
        prompt_logprobs: int | None = None,
        bad_words: tuple[tuple[int, ...], ...] = (),
        stop_ids: frozenset[int] = frozenset(),
        ignore_eos: bool = False,
        leader: Request | None = None,
    ) -> list[Request]:
        """`n` samples of a prompt, or with a leader one more sample of its prompt."""
        added: list[Request] = []
        params = SamplingParams(
            min_tokens=min_tokens, max_tokens=max(max_tokens, min_tokens), prompt_logprobs=prompt_logprobs
        )
        for _ in range(n):
            number = len(self.requests)
            request = Request(
                str(number),
                list(prompt),
                len(prompt),
                params,
                max(max_tokens, min_tokens),
                seed=number,
                eos_ids=frozenset() if ignore_eos else frozenset({EOS}),
                stop_ids=stop_ids,
                bad_word_ids=bad_words,
                priority=priority,
                salt=salt,
                leader=leader,
            )
            leader = leader or request
            self.requests[request.request_id] = self.alive[request.request_id] = request
            self.outcomes[request.request_id] = alone(request, self.setup.max_model_len)
            self.told[request.request_id] = list(prompt)
            self.scored[request.request_id] = []
            self.scheduler.add(request)
            added.append(request)
        return added

    def abort(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id)
        assert (request is not None) == (request_id in self.alive)
        if request is not None:
            assert request.finish is FinishReason.ABORT
            assert request.tokens == self.told[request_id]
            del self.alive[request_id]

    def stop(self, request_id: str, at_token: int) -> None:
        """The text's owner found a stop string after `at_token` output tokens."""
        request = self.scheduler.finish(request_id, at_token, "stop!")
        assert (request is not None) == (request_id in self.alive)
        if request is not None:
            del self.told[request_id][request.prompt_len + at_token :]
            assert request.tokens == self.told[request_id]
            assert (request.finish, request.stop_reason) == (FinishReason.STOP, "stop!")
            del self.alive[request_id]

    def step(self, meddle: Callable[[str], None] = lambda when: None) -> list[Event]:
        """One step; `meddle` may add, abort or stop between its parts."""
        self.steps += 1
        scheduler = self.scheduler
        first = next(iter(scheduler.running), None)
        chosen = scheduler.choose()
        self._check_choice(chosen)
        if first is not None and self.setup.policy != "priority":
            assert first in scheduler.running, "the first in rank lost its seat"
        meddle("chosen")
        plan = scheduler.plan(chosen, self._drafts(chosen))
        self.planned = {request_id: self.whole(request_id) for request_id in self.told}
        self.heard = {request_id: tokens.copy() for request_id, tokens in self.told.items()}
        meddle("planned")
        if plan is not None:
            self.under_way.append((plan, self._run(plan)))
            meddle("run")
        events: list[Event] = []
        most = 1 if self.setup.ahead else 0
        while self.under_way and (plan is None or len(self.under_way) > most or not scheduler.may_run_ahead):
            oldest, result = self.under_way.pop(0)
            committed = scheduler.commit(oldest, result)
            for event in committed:
                self._hear(event)
            events += committed
            self.surplus += sum(
                self.requests[name].finish is not None for name in (*result.sampled, *result.accepted)
            ) - sum(event.finish is not None for event in committed)
        self.check()
        return events

    def _drafts(self, chosen: Sequence[tuple[Request, int]]) -> dict[str, TokenTree]:
        """Trees behind the last tokens of some that run: half of the nodes are what the model will say."""
        drafts = {}
        seated = {id(request) for request in self.scheduler.running}
        for request, _ in chosen:
            if id(request) not in seated or not self.setup.drafts:
                continue
            depth, left = self.scheduler.deepest(request), self.scheduler._left_tokens
            if depth < 1 or not (nodes := self.scheduler.room(request, self._dice.randint(1, self.setup.drafts))):
                continue
            assert nodes <= left
            sketch = Sketch()
            paths = {ROOT: list(request.tokens)}
            for _ in range(3 * nodes):
                parent = self._dice.randint(ROOT, len(sketch) - 1)
                if len(sketch) == nodes or (parent != ROOT and sketch.depths[parent] == depth):
                    continue
                token = self._dice.randrange(VOCABULARY)
                if self._dice.random() < 0.7:
                    forbidden = sorted(forbidden_now(request, paths[parent]))
                    token = next_token(request.salt, paths[parent], request.seed, forbidden)
                score = 1.0 if parent == ROOT else sketch.scores[parent]
                node = sketch.add(token, parent, score * self._dice.random())
                paths[node] = [*paths[parent], token]
            if len(sketch):
                drafts[request.request_id] = sketch.tree()[0]
        return drafts

    def whole(self, request_id: str) -> list[int]:
        """A request's tokens as the device knows them."""
        late = [one.sampled[request_id].token for _, one in self.under_way if request_id in one.sampled]
        return self.told[request_id] + late

    def _check_choice(self, chosen: Sequence[tuple[Request, int]]) -> None:
        setup, scheduler = self.setup, self.scheduler
        assert len({request.request_id for request, _ in chosen}) == len(chosen)
        assert sum(new for _, new in chosen) <= setup.max_num_batched_tokens
        assert len(scheduler.running) <= setup.max_num_seqs
        running = set(map(id, scheduler.running))
        for request, new in chosen:
            assert id(request) in running
            assert 1 <= new <= request.remaining
            assert setup.enable_chunked_prefill or new == request.remaining
            assert request.known_len < setup.max_model_len
            assert request.known_len - request.prompt_len < request.max_tokens, "an end by length is foreseen"
        if scheduler.has_work and not chosen and not self.under_way:
            assert setup.policy == "static", "nobody runs although somebody could"
            assert scheduler.more_to_come

    def _run(self, plan: StepPlan) -> StepResult:
        memory, result = self.memory, StepResult()
        news = [chunk.new for chunk in plan.chunks]
        assert sorted(news, key=lambda new: new != 1) == news, "decodes come first"
        expected = {
            chunk.request_id: tags(self.requests[chunk.request_id].salt, self.planned[chunk.request_id])
            for chunk in plan.chunks
        }
        memory.copy(plan.copies)
        written: list[set[int]] = []
        kept = bytes(self.cache._pool.kept)
        for chunk in plan.chunks:
            told = self.heard[chunk.request_id]
            late = [UNREAD] * (len(self.planned[chunk.request_id]) - len(told))
            assert len(late) <= (1 if self.setup.ahead else 0)
            assert list(chunk.token_ids) == (told + late)[chunk.start : chunk.start + len(chunk.token_ids)]
            if chunk.tree is not None:
                assert not late
                expected[chunk.request_id] = self._behind(chunk, expected[chunk.request_id])
            written.append(memory.write(chunk, expected[chunk.request_id]))
            assert not any(kept[block] for block in written[-1]), "a published block is written"
        for chunk, own in zip(plan.chunks, written):
            memory.read(chunk, expected[chunk.request_id])
            seen = set(chunk.blocks[: -(-chunk.visible // memory.block_size)])
            for other in written:
                assert other is own or not other & seen, "a block is written while another reads it"
            self._answer(chunk, result)
        return result

    def _behind(self, chunk: Chunk, expected: Sequence[int]) -> list[int]:
        """Expected tags of a chunk with a tree: behind the known tokens, each node's is that of its path."""
        assert chunk.tree is not None
        known = self.planned[chunk.request_id]
        assert chunk.start + len(chunk.token_ids) == len(known)
        salt = self.requests[chunk.request_id].salt
        nodes = range(len(chunk.tree))
        return [*expected[: len(known)], *(tags(salt, [*known, *chunk.tree.path_tokens(node)])[-1] for node in nodes)]

    def _choice(self, request: Request, sampling: Sampling, tokens: list[int], needed: bool) -> int:
        """The token behind `tokens`, chosen as `sampling` says. needed: `sampling.tokens` must be right."""
        assert sampling.position == len(tokens)
        assert not needed or list(sampling.tokens) == tokens
        assert set(sampling.forbidden) == forbidden_now(request, tokens)
        return next_token(request.salt, tokens, sampling.seed, sampling.forbidden)

    def _answer(self, chunk: Chunk, result: StepResult) -> None:
        request, told = self.requests[chunk.request_id], self.planned[chunk.request_id]
        assert (chunk.sampling is not None) == (chunk.start + len(chunk.token_ids) == len(told))
        if chunk.sampling is not None:
            assert list(chunk.sampling.tokens) == self.heard[chunk.request_id]
            token = self._choice(request, chunk.sampling, told, needed=False)
            if chunk.tree is None:
                result.sampled[chunk.request_id] = TokenScore(token)
            else:
                chosen = [token]
                for node, sampling in enumerate(chunk.behind):
                    tokens = [*told, *chunk.tree.path_tokens(node)]
                    chosen.append(self._choice(request, sampling, tokens, needed=bool(request.bad_word_ids)))
                nodes = chunk.tree.walk(chosen)
                self.memory.accept(chunk, nodes)
                scores = [TokenScore(token) for token in (chosen[0], *(chosen[node + 1] for node in nodes))]
                result.accepted[chunk.request_id] = Accepted(nodes, scores)
                self.drafted, self.accepted = self.drafted + len(chunk.tree), self.accepted + len(nodes)
        if chunk.prompt_logprobs is not None:
            following = told[chunk.start + 1 : min(chunk.visible + 1, request.prompt_len)]
            assert list(chunk.targets) == following
            result.prompt_scores[chunk.request_id] = [TokenScore(token) for token in chunk.targets]

    def _hear(self, event: Event) -> None:
        request = event.request
        request_id = request.request_id
        assert request_id in self.alive, "news of a request that has ended"
        self.scored[request_id] += [score.token for score in event.prompt_scores]
        if event.token is not None:
            self.told[request_id].append(event.token.token)
        told = self.told[request_id]
        assert request.tokens[: len(told)] == told
        if len(told) < len(request.tokens):  # more of an accepted path is to come
            assert event.finish is None
            return
        assert event.finish is request.finish
        if request.params.prompt_logprobs is not None and event.token is not None:
            wanted = [] if request.leader else request.tokens[1 : request.prompt_len]
            assert self.scored[request_id] == wanted, "each prompt token is scored once"
        whole, finish, stop_reason = self.outcomes[request_id]
        assert whole[: len(request.tokens)] == request.tokens
        assert (event.finish is not None) == (len(whole) == len(request.tokens))
        if event.token is not None and event.finish is None:
            preempted = self.setup.ahead and request.request_id in self.scheduler.waiting
            assert request.computed == (len(request.tokens) - 1 if self.setup.kv_cache and not preempted else 0)
        if event.finish is not None:
            assert (event.finish, request.stop_reason) == (finish, stop_reason)
            del self.alive[request_id]

    def check(self) -> None:
        """What must hold between any two calls."""
        scheduler, cache = self.scheduler, self.cache
        cache.check()
        seen = [*scheduler.running, *scheduler.waiting]
        assert len(seen) == len(self.alive)
        assert {request.request_id for request in seen} == set(self.alive)
        assert set(cache._holdings) <= set(self.alive), "blocks of a request that has ended"
        for request in scheduler.running:
            assert 0 <= request.computed <= request.planned < request.known_len
            assert request.computed < len(request.tokens)
            assert len(cache.table(request.request_id)) >= cache.blocks_for(request.planned)
        for request in seen:
            assert self.under_way or (request.planned == request.computed and request.unread == 0)
            assert request.known_len == len(self.whole(request.request_id))
        for request in scheduler.waiting:
            assert request.computed == 0 or cache.holds(request.request_id)
        ranks = [scheduler._ranks[request.request_id] for request in scheduler.running]
        assert ranks == sorted(ranks)
        for block in range(cache.num_blocks):
            if cache._pool.references[block] == 0 and not cache._pool.kept[block]:
                self.memory.wipe(block)

    def drain(self) -> None:
        """Run to the end, which must come, and leave nothing behind."""
        self.scheduler.more_to_come = False
        lengths = self.setup.max_model_len * (1 if self.setup.kv_cache else self.setup.max_model_len)
        limit = self.steps + 10 + 4 * len(self.requests) * lengths
        while self.scheduler.has_work:
            assert self.steps < limit, "it does not end"
            self.step()
        self.check()
        assert not self.alive
        assert not self.cache._copying
        assert self.cache.free_blocks == self.cache.num_blocks
