"""Who runs in a step: each request's `computed` chases its token count, and everything else follows.

Knows requests, budgets and the KV cache's block numbers. Must not know tensors, text, clocks or how an
executor works: a plan goes out as data, a result comes back as data.

What keeps it moving. Running requests are kept in the policy's rank order, and one that needs blocks takes
them from those that rank behind it, never from one before it; if none is behind, it waits a step and keeps
what it has. So the first in rank always advances, and since the pool holds a whole `max_model_len`, it ends.
A request is admitted only in a step in which no running one has to wait, and only if blocks for all of its
known tokens are free: prefills do not push each other out, only growing outputs and priorities can.

Running ahead. A step may be chosen and planned while the one before is still under way, if that one
`may_run_ahead`: what it samples stands as UNREAD in the next plan. Nothing that depends on a token's value is
decided before `commit`: ends of sequence, stop ids and what is published. A request that ends at commit has a
surplus token under way, which is dropped; ends by length are foreseen. Blocks given up meanwhile may go to
others at once, because steps run in the order of their plans.

Drafts. Between `choose` and `plan` a speculator may ask for room behind a request's last token and draft a tree
there. Nobody is preempted for a draft, and none may take the last blocks. Its nodes lie in slots behind the known
tokens; what is accepted becomes tokens at commit, and only those count as computed or are published.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence

from ridgeline.core.errors import ContextLengthExceeded, DoesNotFit, InvalidArgument
from ridgeline.core.request import FinishReason, Request
from ridgeline.core.step import UNREAD, Accepted, Chunk, Sampling, StepPlan, StepResult, TokenScore
from ridgeline.core.tree import TokenTree
from ridgeline.kv.cache import NO_COPIES, Copies, KVCache
from ridgeline.schedule.event import Event
from ridgeline.schedule.policy import Policy
from ridgeline.schedule.queue import Queue, Rank

NO_DRAFTS: Mapping[str, TokenTree] = {}
NO_DRAWS: Mapping[str, object] = {}

Choice = tuple[Request, int]
"""A request and how many new tokens it may compute in this step."""

RESERVE_SHARE = 100
"""One block in so many stays free when someone is admitted beside others: room for their next tokens."""


class Scheduler:
    """Continuous batching over one KV cache: `choose`, `plan`, run it, `commit`.

    cache: the block tables; it must hold at least one request of max_model_len.
    policy: order, admission and victims (see `Policy`).
    max_num_seqs: most requests that run at a time. max_num_batched_tokens: most new tokens a step; no more
        requests than that run either, as each may want one.
    max_model_len: tokens of one request, prompt and output together.
    enable_chunked_prefill: False computes every prompt whole in one step, beside the running decodes, which
        wait for it (Orca, Yu et al., OSDI 2022); so does a recompute after a preemption.
    kv_cache: False throws the keys and values away after every sampled token, so that each token computes
        all of them again: the same tokens, at the cost that the cache saves. Samples of one prompt share
        nothing then.

    What others may hold on to: a plan's `Chunk.blocks` and `Sampling.tokens` are live lists. Both only grow
    at their end, so `blocks` up to `visible` and `tokens[:position]` stay as planned for as long as anyone
    reads them, even if the request ends meanwhile.

    Raises DoesNotFit if the pool cannot hold one request, InvalidArgument for arguments that exclude
    each other.
    """

    def __init__(
        self,
        cache: KVCache,
        policy: Policy,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        kv_cache: bool = True,
    ) -> None:
        if max_num_seqs < 1:
            raise InvalidArgument("max_num_seqs", f"must be at least 1, not {max_num_seqs}")
        if max_num_batched_tokens < 1:
            raise InvalidArgument("max_num_batched_tokens", f"must be at least 1, not {max_num_batched_tokens}")
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise InvalidArgument(
                "max_num_batched_tokens",
                f"{max_num_batched_tokens} is less than max_model_len {max_model_len}, but without chunked "
                "prefill a whole prompt must fit into a step: raise it or set enable_chunked_prefill=True",
            )
        if not kv_cache and cache.enable_prefix_caching:
            raise InvalidArgument("enable_prefix_caching", "must be off with kv_cache=False")
        if cache.blocks_for(max_model_len) > cache.num_blocks:
            raise DoesNotFit(
                f"one request of max_model_len {max_model_len} needs {cache.blocks_for(max_model_len)} "
                f"blocks of {cache.block_size} tokens, the KV pool has {cache.num_blocks}: lower "
                "max_model_len or give the pool more memory"
            )
        self.cache = cache
        self.policy = policy
        self.seats = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.kv_cache = kv_cache
        self.more_to_come = False
        """Set by whoever knows that further requests will arrive (only the static policy cares)."""
        self.preemptions = 0
        self.may_run_ahead = False
        """Whether the next step can be planned before the last plan's result is committed: nothing that it
        decides needs a token's value (as penalties, bad words and scores of the prompt do)."""
        self._left_tokens = 0  # of the step that is being chosen
        self._arrivals = 0
        self._steps = 0
        self._ranks: dict[str, Rank] = {}
        self._queue = Queue()
        self._running: list[Request] = []
        self._seated: dict[str, Request] = {}
        self._forked: dict[str, Request] = {}
        self._unscored: dict[str, int] = {}
        self._copies: dict[str, Copies] = {}
        self._launched: list[Copies] = []
        self._under_way: dict[int, list[tuple[Request, int]]] = {}  # by plan: requests, each with its preemptions
        self._refused: tuple[str, int] | None = None

    # What can be seen

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._ranks)

    @property
    def running(self) -> Sequence[Request]:
        """Requests with a seat, in rank order. A live view: read, do not keep."""
        return self._running

    @property
    def waiting(self) -> Queue:
        """Requests without a seat, those that follow a leader included: sized, iterated in rank order."""
        return self._queue

    # How requests come and go

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. A leader must be added before those that follow it.

        Scores of the prompt, if asked for, come with the leader's events only.

        Raises ContextLengthExceeded if its tokens leave no room for a new one, InvalidArgument if its id is
        in use, if it has no tokens, or if it is not the sibling of its leader.
        """
        request_id, leader = request.request_id, request.leader
        if request_id in self._ranks:
            raise InvalidArgument("request_id", f"{request_id!r} is in use")
        if not request.tokens:
            raise InvalidArgument("prompt", "is empty")
        if len(request.tokens) >= self.max_model_len:
            raise ContextLengthExceeded(
                "prompt",
                f"has {len(request.tokens)} tokens, which leaves no room for a new one within max_model_len "
                f"{self.max_model_len}",
            )
        if leader is not None and not _siblings(request, leader):
            raise InvalidArgument("leader", f"{request_id!r} and its leader differ in prompt or salt")
        rank = self._ranks[request_id] = self.policy.rank(request, self._arrivals)
        self._arrivals += 1
        request.computed = request.planned = 0
        if request.params.prompt_logprobs is not None and leader is None and request.prompt_len > 1:
            self._unscored[request_id] = 0
        if leader is None or leader.request_id not in self._ranks or not self.kv_cache:
            self._queue.push(request, rank)
        elif leader.computed < leader.prompt_len:
            self._queue.follow(leader.request_id, request, rank)
        else:
            self._queue.push(request, rank)
            if leader.request_id not in self._copies:  # its last block may be waiting for its content
                self._fork(leader, request)

    def abort(self, request_id: str) -> Request | None:
        """End a request, wherever it is. None if it is not here (any more)."""
        request = self._find(request_id)
        if request is not None:
            request.finish = FinishReason.ABORT
            self._leave(request)
        return request

    def finish(self, request_id: str, at_token: int, stop_reason: str | None) -> Request | None:
        """End a request whose text is complete: its owner found a stop string.

        at_token: how many output tokens remain. Later ones are dropped: not counted, not published.
        None if the request is not here (any more): it ended by itself before.
        """
        request = self._find(request_id)
        if request is None:
            return None
        kept = min(request.prompt_len + at_token, len(request.tokens))
        if self.cache.holds(request_id):
            self.cache.retract(request_id, kept)
        request.tokens = request.tokens[:kept]  # a plan may hold the old list
        request.computed = min(request.computed, kept)
        request.finish, request.stop_reason = FinishReason.STOP, stop_reason
        self._leave(request)
        return request

    def _find(self, request_id: str) -> Request | None:
        return self._seated.get(request_id) or self._queue.get(request_id)

    def _leave(self, request: Request) -> None:
        """An ended request gives up its seat or place, its blocks, and those that follow it."""
        if request.request_id in self._seated:
            self._running.remove(request)
        else:
            self._queue.remove(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """All of `_leave` but the place in line."""
        request_id = request.request_id
        self._seated.pop(request_id, None)
        self._forked.pop(request_id, None)
        self._unscored.pop(request_id, None)
        self._drop_copies(request_id)
        self.cache.free(request_id)
        self._queue.release(request_id)
        del self._ranks[request_id]

    # Who runs

    def choose(self) -> list[Choice]:
        """Who runs in the next step, and how many new tokens each may compute (at least 1).

        Blocks for them are reserved, copies noted, and where blocks ran out others are preempted. First
        every running decode gets its token, then unfinished prefills go on, then others are admitted, in
        rank order, while seats, tokens and blocks last. Empty if nobody can run: only with no work at all,
        or while a policy waits for more to come.
        """
        self._settle()
        cache = self.cache
        chosen: list[Choice] = []
        behind = False  # is anyone more than one token behind?
        full = 0  # how many wait for their last token to be read
        for request in self._running:  # those preempted on the way are further down this list
            planned = request.planned
            known = len(request.tokens) + request.unread
            if known - planned != 1:
                behind = True
                continue
            if request.unread and self._is_full(request, known):
                full += 1
                continue
            copies = cache.reserve(request.request_id, planned, known)
            if copies is None:
                copies = self._make_room(request, known, chosen)
                if copies is None:
                    continue
            if copies:
                self._note_copies(request, copies)
            chosen.append((request, 1))
        self._left_tokens = self.max_num_batched_tokens - len(chosen)
        if behind:
            self._go_on(chosen)
        if self._queue and len(chosen) + full == len(self._running):
            self._admit(chosen)
        return chosen

    def _is_full(self, request: Request, tokens: int) -> bool:
        """Whether this many tokens are all that the request may have."""
        return tokens - request.prompt_len >= request.max_tokens or tokens >= self.max_model_len

    def _go_on(self, chosen: list[Choice]) -> None:
        """Unfinished prefills take what the decodes have left of the budget."""
        for request in self._running:
            new = self._portion(request)
            if request.remaining == 1 or new == 0:
                continue
            copies = self._make_room(request, request.planned + new, chosen)
            if copies is not None:
                self._note_copies(request, copies)
                self._take(request, new, chosen)

    def _portion(self, request: Request) -> int:
        """How many of a request's tokens to compute now: what fits, or without chunking all or nothing."""
        if request.remaining <= self._left_tokens:
            return request.remaining
        return self._left_tokens if self.enable_chunked_prefill else 0

    def _take(self, request: Request, new: int, chosen: list[Choice]) -> None:
        chosen.append((request, new))
        self._left_tokens -= new

    def _make_room(self, request: Request, end: int, chosen: list[Choice]) -> Copies | None:
        """Blocks up to token `end` for a running request, at the expense of those behind it.

        None if it has to wait: then nobody is behind it any more.
        """
        while True:
            copies = self.cache.reserve(request.request_id, request.planned, end)
            if copies is not None:
                return copies
            if self._reclaim():
                continue
            candidates = self._running[self._running.index(request) + 1 :]
            if not candidates:
                return None
            self._preempt(self.policy.victim(candidates), chosen)

    def _reclaim(self, spared: Request | None = None) -> bool:
        """Take back the shares of the waiting sample that ranks last. False if no (other) one has any."""
        others = [request for request in self._forked.values() if request is not spared]
        if not others:
            return False
        last = max(others, key=lambda request: self._ranks[request.request_id])
        del self._forked[last.request_id]
        self.cache.vacate(last.request_id)
        last.computed = last.planned = last.cached_tokens = 0
        return True

    def _preempt(self, victim: Request, chosen: list[Choice]) -> None:
        """Take seat and blocks from a running request; it will compute its tokens again."""
        self._left_tokens += sum(new for request, new in chosen if request is victim)
        chosen[:] = [choice for choice in chosen if choice[0] is not victim]
        self._running.remove(victim)
        del self._seated[victim.request_id]
        self._drop_copies(victim.request_id)
        self.cache.vacate(victim.request_id)
        victim.computed = victim.planned = 0
        victim.preemptions += 1
        self.preemptions += 1
        self._queue.push(victim, self._ranks[victim.request_id])

    # Who is admitted

    def _admit(self, chosen: list[Choice]) -> None:
        """Seat waiting requests in rank order until one cannot be seated: nobody overtakes.

        One that was preempted with a token unread waits until it is read: its tokens are not all known.
        """
        self.policy.gather(self._queue, len(self._running), self.seats, self.more_to_come)
        while (request := self._queue.head()) is not None and self.policy.admits(request):
            if self._left_tokens < (1 if self.enable_chunked_prefill else len(request.tokens)):
                break
            if request.unread:
                break
            if len(self._running) >= self.seats and not self._displace(request, chosen):
                break
            if not self._find_blocks(request, chosen):
                break
            self._seat(request, chosen)

    def _find_blocks(self, request: Request, chosen: list[Choice]) -> bool:
        """Give a waiting request its cached blocks, if blocks for all its tokens are free."""
        while not self._attach(request):
            if self._displace(request, chosen):
                continue
            if self._running:
                return False
            if not self._reclaim(spared=request):
                raise RuntimeError(f"nothing runs, yet there are no blocks for {request.request_id}")
        return True

    def _attach(self, request: Request) -> bool:
        request_id, cache = request.request_id, self.cache
        spare = cache.num_blocks // RESERVE_SHARE if self._running else 0
        if request_id in self._forked:
            copies = cache.reserve(request_id, request.planned, len(request.tokens), spare)
            if copies is not None:
                self._note_copies(request, copies)
            return copies is not None
        available = cache.free_blocks - spare
        if self._refused is not None and self._refused[0] == request_id and available <= self._refused[1]:
            return False
        unscored = self._unscored.get(request_id)
        found = cache.attach(request_id, request.tokens, request.salt, unscored, spare)
        if found is None:
            self._refused = (request_id, available) if self._running else None
            return False
        self._refused = None
        request.computed = request.planned = found
        if request.preemptions == 0:
            request.cached_tokens = found
        return True

    def _seat(self, request: Request, chosen: list[Choice]) -> None:
        """Move a request for which there are blocks from the queue to the running ones."""
        request_id = request.request_id
        new = self._portion(request)
        copies = self.cache.reserve(request_id, request.planned, request.planned + new)
        assert copies is not None, "blocks for all tokens were there"
        self._note_copies(request, copies)
        self._queue.remove(request)
        self._forked.pop(request_id, None)
        insort(self._running, request, key=lambda one: self._ranks[one.request_id])
        self._seated[request_id] = request
        self._take(request, new, chosen)

    def _displace(self, request: Request, chosen: list[Choice]) -> bool:
        """Preempt one running request in favour of a waiting one, if the policy says so and it can help."""
        cache = self.cache
        candidates = [one for one in self._running if self.policy.displaces(request, one)]
        if not candidates:
            return False
        within_reach = cache.free_blocks + sum(len(cache.table(one.request_id)) for one in candidates)
        if within_reach < cache.blocks_for(len(request.tokens)):
            return False
        self._preempt(self.policy.victim(candidates), chosen)
        return True

    # Copies, and samples of one prompt

    def _note_copies(self, request: Request, copies: Copies) -> None:
        if copies:
            self._copies[request.request_id] = self._copies.get(request.request_id, ()) + copies

    def _drop_copies(self, request_id: str) -> None:
        self.cache.copied(self._copies.pop(request_id, ()))

    def _launch_copies(self) -> Copies:
        """All copies noted, also of requests that do not run in this plan: others may write next to them."""
        if not self._copies:
            return NO_COPIES
        copies = tuple(pair for group in self._copies.values() for pair in group)
        self._copies.clear()
        self._launched.append(copies)
        return copies

    def _settle(self) -> None:
        """Copies of earlier plans are made, or ordered before whatever comes: let go of their sources."""
        for copies in self._launched:
            self.cache.copied(copies)
        self._launched.clear()

    def _fork(self, leader: Request, child: Request) -> None:
        """A waiting sample shares its leader's prompt; only the last prompt token is computed again."""
        self.cache.fork(leader.request_id, child.request_id, child.prompt_len)
        child.computed = child.planned = child.cached_tokens = child.prompt_len - 1
        self._forked[child.request_id] = child

    # What is drafted

    def room(self, request: Request, nodes: int, slots: int = 0) -> int:
        """How many of `nodes` drafted nodes a request chosen for its last token may have, their slots reserved.

        Bounded by the step's tokens, the context, and blocks that are free beyond one for each running request.
        slots: what drafting them takes behind the request's tokens, if that is more; the table then shows whether there
        were as many.
        """
        known, cache = len(request.tokens), self.cache
        if request.unread or request.planned != known - 1 or request.planned < request.prompt_len:
            return 0
        if request.grammar is not None:
            return 0  # which tokens it allows behind a node is not known before the node is accepted
        nodes = min(nodes, self._left_tokens, self.max_model_len - known)
        if nodes <= 0:
            return 0
        copies = None
        for behind in sorted({max(nodes, min(slots, self.max_model_len - known)), nodes}, reverse=True):
            if copies is None:
                copies = cache.reserve(request.request_id, request.planned, known + behind, len(self._running))
        if copies is None:
            nodes = min(nodes, len(cache.table(request.request_id)) * cache.block_size - known)
        else:
            self._note_copies(request, copies)
        self._left_tokens -= nodes
        return nodes

    def deepest(self, request: Request) -> int:
        """Drafted tokens of a path that could all be accepted before the request is full."""
        length = len(request.tokens)
        return min(request.max_tokens - (length - request.prompt_len), self.max_model_len - length) - 1

    # What the step is

    def plan(
        self,
        chosen: Sequence[Choice],
        drafts: Mapping[str, TokenTree] = NO_DRAFTS,
        draws: Mapping[str, object] = NO_DRAWS,
    ) -> StepPlan | None:
        """The chosen tokens as a step: decodes first, each group in rank order. None if there are none.

        drafts: trees by request, each within what `room` granted. draws: of some of them, how their children were
        drawn (`Chunk.draws`). Requests that ended since `choose` are left
        out. A step with drafts cannot be run ahead of.
        """
        ones: list[tuple[Chunk, Request]] = []
        others: list[tuple[Chunk, Request]] = []
        cache, seated, unscored = self.cache, self._seated, self._unscored
        ahead = self.kv_cache
        for request, new in chosen:
            request_id = request.request_id
            if request_id not in seated:
                continue
            tokens, start, unread = request.tokens, request.planned, request.unread
            known, end = len(tokens) + unread, start + new
            sampling = None
            if end == known:
                sampling = _sampling(request, known)
                request.unread = unread + 1
                ahead = ahead and not _needs_values(request)
            chunk = Chunk(
                request_id,
                tokens[start:end] if not unread or end < known else [*tokens[start:end], UNREAD],
                start,
                cache.table(request_id),
                sampling,
                *(_targets(request, end, unscored[request_id]) if request_id in unscored else ()),
            )
            if chunk.prompt_logprobs is not None:
                ahead = False
            request.planned = end
            if sampling is not None and request_id in drafts:
                tree = drafts[request_id]
                behind = _samplings_behind(request, tree)
                chunk = chunk._replace(tree=tree, behind=behind, draws=draws.get(request_id))
                ahead, new = False, chunk.new
            (ones if new == 1 else others).append((chunk, request))
        if not ones and not others:
            return None
        self._steps += 1
        self.may_run_ahead = ahead
        ordered = ones + others
        self._under_way[self._steps] = [(request, request.preemptions) for _, request in ordered]
        return StepPlan(self._steps, tuple([chunk for chunk, _ in ordered]), self._launch_copies())

    # What came of it

    def commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take in what a step produced: tokens, scores, and who ended. Steps are committed in their order.

        Requests that ended since `plan` are passed over, and their results dropped. Those preempted since
        keep the token that was sampled for them: it is as good as before.
        """
        self._settle()
        events: list[Event] = []
        cache, sampled = self.cache, result.sampled
        block_size, publishes, kv_cache = cache.block_size, cache.enable_prefix_caching, self.kv_cache
        ended = False
        for chunk, (request, preemptions) in zip(plan.chunks, self._under_way.pop(plan.number)):
            if request.finish is not None:
                continue
            start = chunk.start
            if request.preemptions == preemptions:  # it still has the blocks that were written
                visible = request.computed = start + len(chunk.token_ids)
                if chunk.tree is not None:
                    self._accept(request, chunk, result.accepted[chunk.request_id], events)
                    ended |= request.finish is not None
                    continue
                if publishes and visible // block_size != start // block_size:
                    cache.publish(chunk.request_id, request.tokens, visible)
                if start < request.prompt_len <= visible:
                    for child in self._queue.release(chunk.request_id):
                        self._fork(request, child)
            scores: Sequence[TokenScore] = ()
            if chunk.prompt_logprobs is not None:
                scores = self._take_scores(chunk, result.prompt_scores[chunk.request_id])
            if chunk.sampling is None:
                if scores:
                    events.append(Event(request, None, scores))
                continue
            token = sampled[chunk.request_id]
            request.unread -= 1
            request.steps += 1
            request.tokens.append(token.token)
            finish = self._end_of(request, token.token)
            if finish is not None:
                if request.request_id in self._queue:
                    self._queue.remove(request)
                ended = True
                self._forget(request)
            elif not kv_cache:
                request.computed = request.planned = 0
            events.append(Event(request, token, scores, finish))
        if ended:
            self._running = [request for request in self._running if request.finish is None]
        return events

    def _accept(self, request: Request, chunk: Chunk, accepted: Accepted, events: list[Event]) -> None:
        """Take in the tokens of a tree's accepted path, up to where the request ends."""
        start, size = chunk.start, self.cache.block_size
        request.unread -= 1
        request.steps += 1
        request.drafted += len(chunk.tree or ())
        for place, token in enumerate(accepted.tokens):
            request.tokens.append(token.token)
            finish = self._end_of(request, token.token)
            written = min(place + 1, len(accepted.nodes))  # nodes whose tokens are in
            events.append(Event(request, token, (), finish))
            if finish is not None:
                break
        request.accepted += written
        request.computed = request.planned = start + len(chunk.token_ids) + written
        if self.cache.enable_prefix_caching and request.computed // size != start // size:
            self.cache.publish(request.request_id, request.tokens, request.computed)
        if request.finish is not None:
            self._forget(request)

    def give_up(self, plan: StepPlan) -> None:
        """A step will bring no results: its requests end, and what it would have copied is let go of."""
        for request, _ in self._under_way.pop(plan.number):
            if request.finish is None:
                request.finish = FinishReason.ABORT
                self._leave(request)
        self._settle()

    def retreat(self) -> None:
        """A step failed: forget every step under way. All who ran wait again and compute their tokens anew.

        Nothing that was read is lost; what was sampled and not read yet is sampled again, to the same tokens.
        """
        self._under_way.clear()
        while self._reclaim():
            pass  # the copies that a waiting sample's blocks need may not have been made
        for request in [*self._running][::-1]:
            request.unread = 0
            self._preempt(request, [])
        for request in self._queue:
            request.unread = 0  # preempted while a token of it was under way
        self._settle()

    def withdraw(self, request_id: str) -> Request | None:
        """Take a waiting request out as if it had never been added; `add` lets it go on. None if it does not wait."""
        request = self._queue.get(request_id)
        if request is not None:
            if self.cache.holds(request_id):
                self.cache.vacate(request_id)
            self._leave(request)
            request.computed = request.planned = 0
        return request

    def _take_scores(self, chunk: Chunk, scores: Sequence[TokenScore]) -> Sequence[TokenScore]:
        """Those scores of a chunk that were not reported before (it may be a recompute)."""
        before = self._unscored[chunk.request_id]
        after = max(before, chunk.start + len(chunk.targets))
        self._unscored[chunk.request_id] = after
        if after == self._seated[chunk.request_id].prompt_len - 1:
            del self._unscored[chunk.request_id]
        return scores[before - chunk.start :]

    def _end_of(self, request: Request, token: int) -> FinishReason | None:
        """Whether the token just appended ends the request; noted on it if so."""
        length = len(request.tokens)
        output = length - request.prompt_len
        if (token in request.eos_ids or token in request.stop_ids) and output > request.params.min_tokens:
            request.finish = FinishReason.STOP
            request.stop_reason = None if token in request.eos_ids else token
        elif output >= request.max_tokens or length >= self.max_model_len:
            request.finish = FinishReason.LENGTH
        if request.grammar is not None and request.grammar.accept(token) and request.finish is not FinishReason.STOP:
            request.finish = FinishReason.STOP
        return request.finish


def _siblings(request: Request, leader: Request) -> bool:
    """Whether two requests have the same prompt, so that they may share its blocks."""
    return (
        request.prompt_len == leader.prompt_len
        and request.salt == leader.salt
        and request.tokens[: request.prompt_len] == leader.tokens[: leader.prompt_len]
    )


def _sampling(request: Request, length: int, tokens: Sequence[int] | None = None) -> Sampling:
    """How the token behind `length` known ones is chosen. tokens: other than the request's own."""
    params, tokens = request.params, request.tokens if tokens is None else tokens
    forbidden: tuple[int, ...] = ()
    if request.bad_word_ids or length - request.prompt_len < params.min_tokens:
        forbidden = _forbidden(request, length - request.prompt_len, tokens)
    allowed = None if request.grammar is None else request.grammar.mask()
    return Sampling(params, request.seed, length, tokens, request.prompt_len, forbidden, allowed)


def _samplings_behind(request: Request, tree: TokenTree) -> list[Sampling]:
    """How the token behind each node is chosen: as if the node's path had been appended."""
    params, length = request.params, len(request.tokens)
    if not (_needs_values(request) or length + 1 - request.prompt_len < params.min_tokens):
        # Nobody will look at the tokens before.
        prompt_len, seed, tokens = request.prompt_len, request.seed, request.tokens
        return [Sampling(params, seed, length + depth, tokens, prompt_len) for depth in tree.depths]
    result = []
    for node in range(len(tree)):
        tokens = [*request.tokens, *tree.path_tokens(node)]
        result.append(_sampling(request, len(tokens), tokens))
    return result


def _needs_values(request: Request) -> bool:
    """Whether the choice of a token looks at the values of those before it, on the host."""
    params = request.params
    return bool(
        request.grammar is not None
        or request.bad_word_ids
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
    )


def _forbidden(request: Request, output: int, tokens: Sequence[int]) -> tuple[int, ...]:
    """Ids that must not come next, behind `output` tokens of output at the end of `tokens`: the last of a bad word
    whose others are the output's tail, and before min_tokens whatever would end the output."""
    forbidden = set(request.eos_ids | request.stop_ids) if output < request.params.min_tokens else set()
    for word in request.bad_word_ids:
        before = len(word) - 1
        if before <= output and tuple(tokens[len(tokens) - before :]) == word[:-1]:
            forbidden.add(word[-1])
    return tuple(sorted(forbidden))


def _targets(request: Request, end: int, scored: int) -> tuple[int | None, Sequence[int]]:
    """Chunk's `prompt_logprobs` and `targets`: the prompt tokens that follow those in [planned, end)."""
    last = min(end + 1, request.prompt_len)
    if last <= scored + 1:
        return None, ()
    return request.params.prompt_logprobs, request.tokens[request.planned + 1 : last]
