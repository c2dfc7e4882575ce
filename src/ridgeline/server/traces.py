"""Traces of requests: a span each, with counts and times, sent by OpenTelemetry's library to an OTLP endpoint.

Knows OpenTelemetry and what an answer notes of itself. It must not know models or texts: no prompt, no output and no
key is ever an attribute. Names of attributes are vLLM's, where vLLM has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ridgeline.core.errors import InvalidArgument

Fields = Mapping[str, Any]
ATTRIBUTES = {
    "prompt_tokens": "gen_ai.usage.prompt_tokens",
    "completion_tokens": "gen_ai.usage.completion_tokens",
    "cached_tokens": "gen_ai.usage.cached_tokens",
    "n": "gen_ai.request.n",
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "finish": "gen_ai.response.finish_reasons",
    "stream": "gen_ai.request.stream",
    "gone": "ridgeline.client_gone",
    "queue_s": "gen_ai.latency.time_in_queue",
    "ttft_s": "gen_ai.latency.time_to_first_token",
    "e2e_s": "gen_ai.latency.e2e",
    "prefill_s": "gen_ai.latency.time_in_model_prefill",
    "decode_s": "gen_ai.latency.time_in_model_decode",
}
"""What answers note, and what it is called in a span."""


class Traced(Protocol):
    """Hears of every answer."""

    def __call__(
        self,
        headers: Mapping[str, str],
        began_ns: int,
        ended_ns: int,
        http: Mapping[str, Any],
        noted: Mapping[str, Any],
    ) -> None: ...


class Traces:
    """Spans to one endpoint, sent by a thread of the library's; what it cannot send in time is dropped."""

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise InvalidArgument(
                "otlp_traces_endpoint", f"needs {error.name}: pip install 'ridgeline[traces]'"
            ) from None
        if not endpoint.startswith(("http://", "https://")):
            raise InvalidArgument(
                "otlp_traces_endpoint", f"must be a URL such as http://localhost:4318/v1/traces, not {endpoint!r}"
            )
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ridgeline"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("ridgeline")
        self._model = model

    def __call__(
        self,
        headers: Mapping[str, str],
        began_ns: int,
        ended_ns: int,
        http: Mapping[str, Any],
        noted: Mapping[str, Any],
    ) -> None:
        """One request. headers: traceparent and tracestate, if the client sent them; http: attributes of the answer."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        attributes = dict(http)
        if noted:
            attributes["gen_ai.response.model"] = self._model
            attributes |= {ATTRIBUTES[name]: value for name, value in noted.items() if name in ATTRIBUTES}
        name = "llm_request" if noted else f"{http['http.request.method']} {http['http.route']}"
        span = self._tracer.start_span(name, context, SpanKind.SERVER, attributes, start_time=began_ns)
        if http["http.response.status_code"] >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)

    def close(self) -> None:
        """Send what is left. Takes as long as the endpoint does, within the library's own limit."""
        self._provider.shutdown()
