"""Counters, gauges and histograms, under vLLM's names where vLLM has them, ours beside them under `ridgeline:`.

Knows prometheus_client, steps, and requests that have ended. It must not know HTTP. docs/serving.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ridgeline.core.request import RequestOutput
from ridgeline.engine.messages import Beat, Ready, Stepped

LATENCIES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LENGTHS = tuple(float(1 << exponent) for exponent in range(18))
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """One registry, for one model."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._preemptions = self._queries = self._hits = self._blocks = 0
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self.running = gauge("vllm:num_requests_running", "Requests in the engine's batch.")
        self.waiting = gauge("vllm:num_requests_waiting", "Requests that wait for a seat.")
        self.kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of KV blocks that requests hold, 0 to 1.")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that have ended.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.preemptions = counter("vllm:num_preemptions", "Requests that had to give up their blocks.")
        self.iteration_tokens = histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", LENGTHS)
        self.success = Counter(
            "vllm:request_success",
            "Requests that have ended, by how.",
            ["model_name", "engine", "finished_reason"],
            registry=self.registry,
        )
        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", LATENCIES)
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", LATENCIES)
        self.tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a token after the first.", LATENCIES
        )
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", LATENCIES)
        self.queued = histogram("vllm:request_queue_time_seconds", "Arrival to first step.", LATENCIES)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "First step to first token.", LATENCIES)
        self.decode = histogram("vllm:request_decode_time_seconds", "First token to last.", LATENCIES)
        self.inference = histogram("vllm:request_inference_time_seconds", "First step to last token.", LATENCIES)
        self.request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", LENGTHS)
        self.request_generation = histogram("vllm:request_generation_tokens", "Generated tokens.", LENGTHS)
        self.params_n = histogram("vllm:request_params_n", "Asked for: n.", COUNTS)
        self.params_max_tokens = histogram("vllm:request_params_max_tokens", "Asked for: max_tokens.", LENGTHS)
        self.cache_config = Gauge(
            "vllm:cache_config_info",
            "How the KV cache is set up.",
            ["model_name", "engine", "block_size", "num_gpu_blocks", "enable_prefix_caching"],
            registry=self.registry,
        )
        self.step_s = histogram("ridgeline:step_seconds", "Measured time of a step.", STEPS)
        self.predicted_s = histogram("ridgeline:step_predicted_seconds", "Predicted time of a step.", STEPS)
        self.limit_share = histogram(
            "ridgeline:step_share_of_limit", "Least possible time of a step over the time its device took.", SHARES
        )
        self.flops = counter("vllm:estimated_flops_per_gpu", "Floating-point operations that steps had to do.")
        self.bytes = counter("ridgeline:estimated_bytes", "Bytes that steps had to move to and from memory.")
        self.drafts = counter("vllm:spec_decode_num_drafts", "Draft trees that were verified.")
        self.draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Tokens of draft trees.")
        self.accepted = counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self.accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were accepted, by their place behind the last token, from 0.",
            ["model_name", "engine", "position"],
            registry=self.registry,
        )
        self.draft_s = counter("ridgeline:draft_seconds", "Time spent on drafting.")
        self.memory = Gauge(
            "ridgeline:memory_bytes", "The memory ledger.", ["model_name", "engine", "part"], registry=self.registry
        )
        self.answers = Counter(
            "ridgeline:http_responses",
            "Answers, by path and status.",
            ["method", "path", "status"],
            registry=self.registry,
        )
        self.answer_s = Histogram(
            "ridgeline:http_response_seconds",
            "Time to the end of an answer.",
            ["path"],
            buckets=LATENCIES,
            registry=self.registry,
        )

    def _gauge(self, name: str, help_text: str) -> Gauge:
        made = Gauge(name, help_text, list(self._labels), registry=self.registry)
        found: Gauge = made.labels(**self._labels)
        return found

    def _counter(self, name: str, help_text: str) -> Counter:
        made = Counter(name, help_text, list(self._labels), registry=self.registry)
        found: Counter = made.labels(**self._labels)
        return found

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, help_text, list(self._labels), buckets=buckets, registry=self.registry)
        found: Histogram = made.labels(**self._labels)
        return found

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge that is asked for when somebody looks."""
        self._gauge(name, help_text).set_function(value)

    def engine(self, facts: Ready) -> None:
        """What the engine is."""
        self._blocks = facts.num_blocks
        self.cache_config.labels(
            **self._labels,
            block_size=str(facts.block_size),
            num_gpu_blocks=str(facts.num_blocks),
            enable_prefix_caching=str(facts.settings.get("enable_prefix_caching")),
        ).set(1)
        for part, amount in facts.memory.items():
            if part.endswith("_bytes"):
                self.memory.labels(**self._labels, part=part.removesuffix("_bytes")).set(amount)
        self._preemptions = self._queries = self._hits = 0

    def heard(self, message: Stepped | Beat) -> None:
        """A step, or word from an idle engine."""
        if isinstance(message, Beat):
            self.kv_usage.set(message.referenced_blocks / max(self._blocks, 1))
            if not message.requests:
                self.running.set(0)
                self.waiting.set(0)
            return
        self.running.set(message.running)
        self.waiting.set(message.waiting)
        self.kv_usage.set(1 - message.free_blocks / max(self._blocks, 1))
        if message.numbers:
            self.generation_tokens.inc(len(message.numbers))
        for name, counter, value in (
            ("_preemptions", self.preemptions, message.preemptions),
            ("_queries", self.prefix_queries, message.prefix_queries),
            ("_hits", self.prefix_hits, message.prefix_hits),
        ):
            before = getattr(self, name)
            if value != before:
                counter.inc(value - before if value > before else value)  # a new engine counts from zero
                setattr(self, name, value)
        if message.drafted:
            self._drafted(message)
        if message.kind:
            self.iteration_tokens.observe(message.new_tokens)
            self.step_s.observe(message.step_s)
            if message.predicted_s is not None:
                self.predicted_s.observe(message.predicted_s)
            if message.floor_s is not None and message.device_s > 0:
                self.limit_share.observe(message.floor_s / message.device_s)
                self.flops.inc(message.flops)
                self.bytes.inc(message.bytes)

    def _drafted(self, message: Stepped) -> None:
        self.drafts.inc(len(message.depths))
        self.draft_tokens.inc(message.drafted)
        self.accepted.inc(message.accepted)
        self.draft_s.inc(message.draft_s)
        for place in range(max(message.depths, default=0)):
            reached = sum(depth > place for depth in message.depths)
            self.accepted_at.labels(**self._labels, position=str(place)).inc(reached)

    def ended(self, output: RequestOutput, n: int, max_tokens: int) -> None:
        """A request has come to its end."""
        found = output.metrics
        for one in output.outputs:
            reason = one.finish_reason or "abort"
            self.success.labels(**self._labels, finished_reason=reason).inc()
        self.params_n.observe(n)
        self.params_max_tokens.observe(max_tokens)
        if found is None:
            return
        self.prompt_tokens.inc(found.num_prompt_tokens)
        self.request_prompt.observe(found.num_prompt_tokens)
        self.request_generation.observe(found.num_generated_tokens)
        first, last, began = found.first_token_s, found.finished_s, found.first_scheduled_s
        if began is not None:
            self.queued.observe(max(began - found.arrival_s, 0.0))
        if first is None or last is None:
            return
        self.ttft.observe(first - found.arrival_s)
        self.e2e.observe(last - found.arrival_s)
        self.decode.observe(last - first)
        if found.tpot_s is not None:
            self.tpot.observe(found.tpot_s)
        if began is not None:
            self.prefill.observe(max(first - began, 0.0))
            self.inference.observe(max(last - began, 0.0))

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """An answer has left."""
        known = method if method in ("GET", "POST") else "other"
        self.answers.labels(method=known, path=path, status=str(status)).inc()
        self.answer_s.labels(path=path).observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
