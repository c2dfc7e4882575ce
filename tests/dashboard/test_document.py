"""The page as it is sent: its policy names its own style and script, and it asks nobody else for anything."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from ridgeline.dashboard.document import HTML, document, policy


class Reader(HTMLParser):
    """What an HTML parser finds: styles, scripts, attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self.attributes: list[tuple[str, str, str]] = []
        self._in: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in self.texts:
            self._in = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in:
            self.texts[self._in][-1] += data


def read() -> Reader:
    reader = Reader()
    reader.feed(document().body.decode())
    return reader


def test_the_policy_names_exactly_what_a_parser_finds() -> None:
    reader = read()
    assert [len(found) for found in reader.texts.values()] == [1, 1]
    rules = dict(rule.split(" ", 1) for rule in document().headers["Content-Security-Policy"].split("; "))
    for name in ("style", "script"):
        found = base64.b64encode(hashlib.sha256(reader.texts[name][0].encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{found}'"
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["connect-src"] == "'self'"


def test_a_changed_script_is_another_policy() -> None:
    html = HTML.read_text(encoding="utf-8")
    assert policy(html) != policy(html.replace('"use strict";', '"use strict"; '))


def test_nothing_comes_from_elsewhere() -> None:
    text = document().body.decode()
    assert set(re.findall(r"https?://[^\s'\"<)]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", text)
    for tag, name, value in read().attributes:
        assert not name.startswith("on"), f"{tag} has {name}"
        assert name != "style", f"{tag} has a style of its own"
        if name in ("src", "href", "action"):
            assert value.startswith("data:"), f"{tag} {name}={value}"


def test_every_field_has_a_label() -> None:
    attributes = read().attributes
    labelled = {value for tag, name, value in attributes if (tag, name) == ("label", "for")}
    fields = {value for tag, name, value in attributes if tag in ("input", "textarea") and name == "id"}
    assert fields == labelled
    assert ("html", "lang", "en") in attributes
