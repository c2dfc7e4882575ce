"""Traces arrive at a collector: one span a request, in the client's trace, with counts and times and no text."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from served import CANARY, COMPLETIONS, served

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "def my_very_secret_function():"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A URL that takes traces, and the spans that have come."""
    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                raw = gzip.decompress(raw)
            for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()


def value_of(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


def test_a_span_a_request(collector: tuple[str, list[Any]]) -> None:
    endpoint, spans = collector
    with served("--max-num-seqs", "4", "--otlp-traces-endpoint", endpoint) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        good = server.post(COMPLETIONS, {**CANARY, "prompt": SECRET, "user": "someone"}, headers=headers)
        assert good.status_code == 200
        assert server.post(COMPLETIONS, {**CANARY, "n": 0}).status_code == 400
        assert server.client.get("/health").status_code == 200
        assert server.stop() == 0
    served_one, refused = spans[0], spans[1]
    assert len(spans) == 2  # probes have none
    assert (served_one.trace_id.hex(), served_one.parent_span_id.hex()) == (TRACE, PARENT)
    assert (served_one.name, served_one.kind) == ("llm_request", Span.SPAN_KIND_SERVER)
    told = {one.key: value_of(one.value) for one in served_one.attributes}
    usage = good.json()["usage"]
    assert told["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.completion_tokens"] == 12
    assert told["gen_ai.response.model"] == "ridgeline"
    assert told["gen_ai.request.id"] == good.headers["x-request-id"]
    assert told["gen_ai.request.max_tokens"] == 12
    assert told["http.response.status_code"] == 200
    took = (served_one.end_time_unix_nano - served_one.start_time_unix_nano) / 1e9
    assert 0 < told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"] <= took + 0.001
    assert told["gen_ai.latency.time_in_queue"] + told["gen_ai.latency.time_in_model_prefill"] == pytest.approx(
        told["gen_ai.latency.time_to_first_token"], abs=0.001
    )
    assert refused.trace_id.hex() != TRACE
    assert {one.key: value_of(one.value) for one in refused.attributes}["http.response.status_code"] == 400
    assert refused.status.code != Status.STATUS_CODE_ERROR
    for span in spans:
        assert SECRET.encode() not in span.SerializeToString()
        assert b"someone" not in span.SerializeToString()


def test_a_dead_collector_stops_nobody() -> None:
    with served("--max-num-seqs", "4", "--otlp-traces-endpoint", "http://127.0.0.1:9/v1/traces") as server:
        want = server.canary()
        assert [server.canary() for _ in range(5)] == [want] * 5
        assert "Traceback" not in "".join(server.log)


def test_an_endpoint_that_is_none_is_one_line() -> None:
    command = [sys.executable, "-m", "ridgeline.cli.main", "serve", "--port", "0"]
    done = subprocess.run([*command, "--otlp-traces-endpoint", "x:4318"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "must be a URL" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
