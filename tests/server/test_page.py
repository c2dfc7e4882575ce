"""The page's routes: the document with its headers, snapshots, and what a browser without a key gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from ridgeline.dashboard.document import document
from ridgeline.server.page import locked, page_router


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return [{"state": "ready", "now": {"running": 1}}, {"state": "draining", "now": {"running": 0}}]


@pytest.fixture
def client(told: list[dict[str, Any]]) -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(page_router(lambda: told.pop(0)))
    with TestClient(app) as found:
        yield found


def test_the_document(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.content == document().body
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    for name, value in document().headers.items():
        assert answer.headers[name] == value
    again = client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.post("/").status_code == 405


def test_each_call_is_a_fresh_snapshot(client: TestClient) -> None:
    first, second = client.get("/dashboard"), client.get("/dashboard")
    assert first.json() == {"state": "ready", "now": {"running": 1}}
    assert second.json()["state"] == "draining"
    assert first.headers["cache-control"] == "no-store"


def test_the_routes_are_no_part_of_the_api(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


def test_a_browser_without_a_key_gets_the_page_that_asks_for_it() -> None:
    answer = locked("GET", b"/", b"text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")
    assert answer is not None
    assert (answer.status_code, answer.body) == (401, document().body)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["cache-control"] == "no-store"
    assert "etag" not in answer.headers
    assert answer.headers["content-security-policy"] == document().headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("method", "path", "accept"),
    [
        ("GET", b"/dashboard", b"text/html"),
        ("GET", b"/v1/models", b"text/html"),
        ("GET", b"//", b"text/html"),
        ("POST", b"/", b"text/html"),
        ("GET", b"/", b"application/json"),
        ("GET", b"/", b"*/*"),
        ("GET", b"/", None),
    ],
)
def test_whoever_else_has_no_key_gets_the_error(method: str, path: bytes, accept: bytes | None) -> None:
    assert locked(method, path, accept) is None


def test_the_page_needs_no_torch() -> None:
    script = "import sys, ridgeline.server.page, ridgeline.dashboard.board; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
