"""The page in a real browser: Debian's Chromium, driven by Playwright, on a desk and on a phone, light and dark.

Set PAGE_SCREENSHOTS to a folder to keep pictures of every look.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from standin import FACTS, TREE, Time, application, lively, serving

from ridgeline.core.step import Verified
from ridgeline.core.tree import TokenTree
from ridgeline.dashboard.board import Board, Now, Step

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

DRAFTED = Step(
    kind="tree", output_tokens=5, prompt_tokens=0, device_s=0.006, predicted_s=0.006, running=3, waiting=0,
    free_blocks=7000, rows=3, drafted=8, accepted=2, draft_s=0.002, depths=(2, 0),
)  # fmt: skip
SIZES = {"desktop": (1440, 900), "tablet": (820, 1180), "phone": (390, 844)}
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, words = node.textContent.trim();
    const own = element.closest("svg") === null || element.tagName === "text";
    if (!words || !own || ["SCRIPT", "STYLE"].includes(element.tagName) || element.closest(":disabled")) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = light(parse(element.tagName === "text" ? style.fill : style.color)), back = light(behind(element));
    found.push([words.slice(0, 40), (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05)]);
  }
  return found;
}"""
NAMELESS = """() => [...document.querySelectorAll("input, textarea, button, [role], section, dialog, pre")]
  .filter((one) => !["status", "alert"].includes(one.role))
  .filter((one) => one.getClientRects().length)
  .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim() && one.tagName === "BUTTON"
    || document.getElementById(one.getAttribute("aria-labelledby"))?.textContent))
  .map((one) => one.outerHTML.slice(0, 80))"""
SMALL = """() => [...document.querySelectorAll("input, textarea, button")]
  .filter((one) => one.getClientRects().length && one.getBoundingClientRect().height < 44)
  .map((one) => one.id)"""
BOXES = """(places) => places.map((place) => {
  const box = document.querySelector(`#${place} svg`).getBoundingClientRect();
  return [place, box.width, box.height];
})"""
CLIPPED = """() => [...document.querySelectorAll(".tile .value, .tile dt, button, h2")]
  .filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Serves an app until the pages are closed; its address."""
    with ExitStack() as servers:
        yield lambda app: servers.enter_context(serving(app))


@pytest.fixture
def look(browser: Any, serve: Callable[[FastAPI], str]) -> Iterator[Callable[..., Any]]:
    """Opens an address at a size and in a scheme. Whatever the page complains of, or asks of others, fails the test."""
    contexts, wrong = [], []

    def open_page(address: str, size: str = "desktop", scheme: str = "light", quiet: tuple[str, ...] = ()) -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def said(message: Any) -> None:
            if message.type in ("error", "warning") and not any(one in message.text for one in quiet):
                wrong.append(f"console: {message.text}")

        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("request", lambda one: one.url.startswith((address, "data:")) or wrong.append(f"asked {one.url}"))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def busy() -> Iterator[str]:
    """The address of a busy server."""
    clock = Time()
    board = Board(FACTS, clock)
    lively(board, clock)
    with serving(application(board, Now("ready", 31, 4))) as address:
        yield address


def shot(page: Any, name: str) -> None:
    if folder := os.environ.get("PAGE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def tile(page: Any, name: str) -> str:
    """A tile's value with its unit, and its note."""
    words = page.locator(".tile", has=page.locator("dt", has_text=re.compile(f"^{name}"))).locator("dd").inner_text()
    return " ".join(words.split())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_every_look(look: Callable[..., Any], busy: str, size: str, scheme: str) -> None:
    page = look(busy, size, scheme)
    page.locator("#ttft svg").wait_for()
    pictures = ("rate", "ttft", "tpot", "roofline", "prediction", "accepted", "gained", "depths", "speculation")
    small = [box for box in page.evaluate(BOXES, pictures) if box[1] < 150 or box[2] < 80]
    assert not small
    assert page.locator("#rate svg").count() == 4
    assert page.locator("#state").inner_text() == "ready"
    assert tile(page, "In flight") == "35 4 waiting"
    assert tile(page, "Of the limit").endswith("bound by memory")
    wide, seen = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert wide == seen, "the page scrolls sideways"
    faint = [(words, round(ratio, 2)) for words, ratio in page.evaluate(CONTRAST) if ratio < 4.5]
    assert not faint
    assert not page.evaluate(NAMELESS)
    assert not page.evaluate(SMALL)
    assert not page.evaluate(CLIPPED)
    back = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", back)[:3])) < 60) == (scheme == "dark")
    shot(page, f"{size}-{scheme}")


def test_figures_are_those_of_the_snapshot_and_move(look: Callable[..., Any], serve: Callable[[FastAPI], str]) -> None:
    clock = Time()
    board = Board(FACTS, clock)
    address = serve(application(board))
    page = look(address)
    assert tile(page, "First token, p50") == "– p99 –"
    assert page.locator("#roofline").inner_text() == "No step yet: send a prompt."
    assert page.locator("#speculation-section").is_hidden()
    shot(page, "empty")
    lively(board, clock)
    page.locator("#roofline svg").wait_for()
    found = board.snapshot()
    assert tile(page, "Output").startswith(f"{found['now']['output_tokens_per_s']:,.0f}tok/s")
    assert tile(page, "First token, p50").startswith(f"{found['ttft']['p50_s'] * 1e3:.0f}ms")
    share = found["roofline"]["points"]["decode"]["share"]
    row = page.locator("#points tr", has_text="decode").inner_text()
    assert f"{share * 100:.1f} %" in row
    assert "memory" in row
    label = page.locator("#prediction svg").get_attribute("aria-label")
    assert f"{found['prediction']['median_error'] * 100:.2f} %" in label
    drawn = page.locator("#ttft .bar").evaluate_all(
        "(bars) => bars.map((bar) => Number(bar.textContent.split(': ')[1]))"
    )
    assert sum(drawn) == found["ttft"]["count"]
    assert page.locator("#speculation .node").count() == len(found["speculation"]["tree"]["words"]) + 1


def test_a_prompt_streams_and_can_be_stopped(look: Callable[..., Any], serve: Callable[[FastAPI], str]) -> None:
    app = application(Board(FACTS, Time()))
    address = serve(app)
    page = look(address, "phone", quiet=("400 (Bad Request)",))
    page.get_by_role("textbox", name="Prompt").fill("class Queue:\n")
    page.get_by_label("Most tokens").fill("30")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Done (length): 30 tokens, the first after").wait_for()
    text = page.locator("#completion").inner_text()
    assert text.startswith("class Queue:\n")
    assert "self.items.append(item)" in text
    # Stopping closes the connection, which is how the server hears of it.
    page.get_by_label("Most tokens").fill("2000")
    page.get_by_role("textbox", name="Prompt").press("Control+Enter")
    page.get_by_text("def push").wait_for()
    page.get_by_text("Streaming: the first token after").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped: ").wait_for()
    for _ in range(100):
        if app.state.cancelled:
            break
        page.wait_for_timeout(50)
    assert app.state.cancelled == 1
    # Refusals and breaks are said in the server's words.
    page.get_by_label("Most tokens").fill("5000")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("max_tokens: must be in [1, 4096]").wait_for()
    page.get_by_label("Most tokens").fill("50")
    page.get_by_role("textbox", name="Prompt").fill("break")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("the engine was restarted").wait_for()
    assert page.get_by_role("button", name="Send").is_enabled()
    assert page.get_by_role("button", name="Stop").is_disabled()


def test_a_key_is_asked_for_and_kept_in_the_tab(look: Callable[..., Any], serve: Callable[[FastAPI], str]) -> None:
    address = serve(application(Board(FACTS, Time()), keys=("right-key",)))
    page = look(address, quiet=("401 (Unauthorized)",))
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    dialog.wait_for()
    assert page.get_by_label("API key").evaluate("(one) => one === document.activeElement")
    shot(page, "key")
    page.keyboard.press("Escape")
    assert dialog.is_visible()
    for wrong, said in (("schlüssel", "visible ASCII"), ("wrong-key", "That key was refused.")):
        page.get_by_label("API key").fill(wrong)
        page.keyboard.press("Enter")
        page.get_by_text(said).wait_for()
    page.get_by_label("API key").fill("right-key")
    page.get_by_role("button", name="Use this key").click()
    page.locator("#state", has_text="ready").wait_for()
    assert dialog.is_hidden()
    page.get_by_label("Most tokens").fill("5")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Done (length): 5 tokens").wait_for()
    assert page.evaluate("() => [Object.keys(sessionStorage).length, localStorage.length, document.cookie]") == [
        1,
        0,
        "",
    ]
    assert "right-key" not in page.url
    page.reload()
    page.locator("#state", has_text="ready").wait_for()


def test_drafts_appear_when_there_are_some(look: Callable[..., Any], serve: Callable[[FastAPI], str]) -> None:
    clock = Time()
    board = Board(FACTS, clock)
    lively(board, clock, 20, speculation=False)
    page = look(serve(application(board)))
    page.locator("#ttft svg").wait_for()
    section = page.locator("#speculation-section")
    assert section.is_hidden()
    # Records that tell of drafts in sum only: figures and curves, and no tree.
    for _ in range(3):
        board.step(DRAFTED)
        clock.now_s += 1
    section.wait_for()
    words = " ".join(section.inner_text().split())
    assert "24 tokens drafted in 3 steps, 6 accepted; drafting takes 2 ms a step, 25 % of its time" in words
    assert "Accepted of drafted 25 %" in words
    assert "Tokens a request and step 1.67" in words
    assert page.locator("#latest-draft").is_hidden()
    board.step(replace(DRAFTED, verified=Verified(0, TREE, [0, 1])))
    tree = page.get_by_role("img", name="A tree of 12 drafted tokens, 2 accepted: return ␣self")
    tree.wait_for()
    assert tree.locator("rect.taken").count() == 3  # and the token before them
    assert tree.locator("path.taken").count() == 2
    # Where several keys share a server nobody reads what others are given.
    board.facts = replace(FACTS, word=None)
    page.get_by_text("words are hidden").wait_for()
    assert page.locator("#speculation text").count() == 0
    assert page.locator("#speculation rect.taken").count() == 3
    shot(page, "wordless")


def test_everything_can_be_reached_with_the_keyboard(look: Callable[..., Any], busy: str) -> None:
    page = look(busy)
    page.locator("#ttft svg").wait_for()
    reached, marked = [], []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id"))
        marked.append(page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle !== 'none'"))
    wanted = ["prompt", "max-tokens", "temperature", "send", "completion", "points", "speculation"]
    assert [one for one in reached if one in wanted][: len(wanted)] == wanted
    assert all(shown for one, shown in zip(reached, marked) if one in wanted)
    # A figure that changes every second must not take the focus away.
    page.locator("#points").focus()
    page.wait_for_timeout(1500)
    assert page.evaluate("() => document.activeElement.id") == "points"


def test_a_server_that_goes_away_and_comes_back(look: Callable[..., Any]) -> None:
    clock = Time()
    board = Board(FACTS, clock)
    lively(board, clock)
    with serving(application(board)) as address:
        page = look(address, quiet=("ERR_CONNECTION_REFUSED",))
        page.locator("#state", has_text="ready").wait_for()
        before = tile(page, "Output")
    page.locator("#state", has_text="no answer").wait_for()
    assert tile(page, "Output") == before
    page.get_by_role("button", name="Send").click()
    page.get_by_text("The server did not answer.").wait_for()
    with serving(application(board, Now("draining", 0, 0)), int(address.rsplit(":", 1)[1])):
        page.locator("#state", has_text="draining").wait_for(timeout=20_000)


def test_words_of_a_model_are_text_and_never_markup(look: Callable[..., Any], serve: Callable[[FastAPI], str]) -> None:
    bad = "<img src=x onerror=alert(1)>"
    board = Board(replace(FACTS, word=(bad, bad, "</text><script>").__getitem__), Time())
    board.step(replace(DRAFTED, verified=Verified(0, TokenTree((1, 2), (-1, 0)), [0])))
    address = serve(application(board))
    page = look(address)
    page.locator("#speculation svg").wait_for()
    page.get_by_role("textbox", name="Prompt").fill(bad)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Done").wait_for()
    assert page.locator("#completion").inner_text().startswith(bad)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1


def test_a_hidden_page_asks_for_nothing(look: Callable[..., Any], busy: str) -> None:
    page = look(busy)
    page.locator("#ttft svg").wait_for()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("() => Object.defineProperty(document, 'hidden', { get: () => true, configurable: true })")
    page.wait_for_timeout(1500)
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
    page.evaluate("() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }")
    page.wait_for_timeout(1500)
    assert asked
