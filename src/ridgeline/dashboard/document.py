"""The page as it is sent: one HTML document, and the headers that let it do no more than it needs.

Knows page.html. It must not know servers. Its one style and its one script are named by their digests in the
Content-Security-Policy, so nothing else runs, and nothing is fetched but from the server that sent it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HTML = Path(__file__).with_name("page.html")


@dataclass(frozen=True, slots=True)
class Document:
    """body: UTF-8. headers: all but its length. etag: changes with the body."""

    body: bytes
    headers: Mapping[str, str]
    etag: str


@cache
def document() -> Document:
    """The live page, read once."""
    text = HTML.read_text(encoding="utf-8")
    body = text.encode()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy(text),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
        "ETag": etag,
    }
    return Document(body, headers, etag)


def policy(html: str) -> str:
    """A Content-Security-Policy that lets this document's own style and script be, by their digests."""
    style = " ".join(digest(one) for one in re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    script = " ".join(digest(one) for one in re.findall(r"<script>(.*?)</script>", html, re.DOTALL))
    rules = {
        "default-src": "'none'",
        "style-src": style,
        "script-src": script,
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
