"""The page of a real server: its figures follow what the engine does, and in Chromium a prompt streams into it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, served

from ridgeline.dashboard.document import document

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--max-num-seqs", "16", "--kv-cache-memory-bytes", "200000000") as running:
        yield running


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with served("--max-num-seqs", "16", "--kv-cache-memory-bytes", "200000000", "--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="module")
def drafting() -> Iterator[Served]:
    config = '{"method": "tree", "num_speculative_tokens": 8}'
    with served(
        "--max-num-seqs", "4", "--kv-cache-memory-bytes", "100000000", "--speculative-config", config
    ) as running:
        yield running


def snapshot(server: Served) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/dashboard").json()
    return found


@pytest.mark.slow
def test_figures_follow_the_engine(server: Served) -> None:
    before = snapshot(server)
    assert before["state"] == "ready"
    assert before["engine"]["model"] == "ridgeline"
    prompt = list(range(5, 205))
    for _ in range(2):  # the second finds the first one's blocks
        body = {"model": "ridgeline", "prompt": prompt, "max_tokens": 30, "ignore_eos": True, "temperature": 0}
        assert server.post("/v1/completions", body).status_code == 200
    after = snapshot(server)
    assert after["totals"]["output_tokens"] - before["totals"]["output_tokens"] == 60
    assert after["totals"]["requests"]["length"] - before["totals"]["requests"].get("length", 0) == 2
    computed = after["totals"]["prompt_tokens"] - before["totals"]["prompt_tokens"]
    assert 200 <= computed < 300
    assert after["ttft"]["count"] - before["ttft"]["count"] == 2
    assert after["tpot"]["count"] - before["tpot"]["count"] == 2
    assert 0.4 < after["now"]["prefix_hit_rate"] < 0.5  # 192 of 400
    assert after["now"]["running"] == after["now"]["waiting"] == 0
    assert len(after["prediction"]["steps"]["decode"]) >= 50
    assert after["prediction"]["median_error"] < 0.5
    point = after["roofline"]["points"]["decode"]
    assert point["bytes_per_s"] == pytest.approx(point["flops_per_s"] / point["intensity"])
    assert 0.01 < point["share"] < 1.5
    assert "measured at start" in after["roofline"]["roofs"]
    metrics = server.client.get("/metrics").text
    assert 'vllm:estimated_flops_per_gpu_total{engine="0",model_name="ridgeline"} 0.0' not in metrics
    refused = server.post("/v1/completions", {"model": "ridgeline", "prompt": "a", "max_tokens": -1})
    assert refused.status_code == 400
    with server.client.stream(
        "POST",
        "/v1/completions",
        json={"model": "ridgeline", "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True},
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        busy = snapshot(server)
        assert busy["now"]["running"] == 1
        assert busy["now"]["kv_usage"] > 0
    limit = time.monotonic() + 5
    while (found := snapshot(server))["now"]["running"] or found["totals"]["requests"].get("abort", 0) != 1:
        assert time.monotonic() < limit, found
        time.sleep(0.05)


@pytest.mark.slow
def test_with_keys_only_the_page_that_asks_for_one_is_shown(keyed: Served) -> None:
    browser = {"Accept": "text/html,*/*;q=0.8"}
    page = keyed.client.get("/", headers=browser)
    assert (page.status_code, page.content) == (401, document().body)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-request-id"]
    for path in ("/", "/dashboard", "/v1/models"):
        answer = keyed.client.get(path, headers={} if path == "/" else browser)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert keyed.client.get("/", headers={**browser, **bearer}).status_code == 200
    assert keyed.client.get("/dashboard", headers=bearer).json()["state"] == "ready"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("size", [(1440, 900), (390, 844)], ids=["desktop", "phone"])
def test_in_chromium(keyed: Served, size: tuple[int, int]) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda one: one.type == "error" and "401" not in one.text and wrong.append(one.text))
        page.on("request", lambda one: one.url.startswith((keyed.url, "data:")) or wrong.append(one.url))
        page.goto(keyed.url)
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#state", has_text="ready").wait_for()
        page.get_by_label("Most tokens").fill("200")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Done (").wait_for()
        text = page.locator("#completion").inner_text()
        assert text.startswith("class Stack:")
        assert len(text) > len("class Stack:") + 150
        page.locator("#ttft svg").wait_for()
        page.locator("#tpot svg").wait_for()
        page.locator("#roofline svg").wait_for()
        page.locator("#prediction svg").wait_for()
        assert "of the limit" in page.locator("#roofline svg").get_attribute("aria-label")
        page.wait_for_timeout(1500)
        assert "tok/s" in page.locator(".tile", has_text="Output").inner_text()
        wide, seen = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert wide == seen
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"live-{size[0]}.png", full_page=True)
        browser.close()
    assert not wrong


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_drafts_of_a_real_engine(drafting: Served) -> None:
    assert snapshot(drafting)["speculation"] is None
    body = {
        "model": "ridgeline",
        "prompt": "class Stack:\n    def __init__(self):\n",
        "max_tokens": 60,
        "temperature": 0,
    }
    assert drafting.post("/v1/completions", {**body, "ignore_eos": True}).status_code == 200
    after = snapshot(drafting)
    found = after["speculation"]
    assert after["totals"]["output_tokens"] == 60
    assert 0 < found["accepted"] < found["drafted"] <= 8 * found["steps"]
    assert 1 < found["tokens_per_step"] <= 9
    assert 60 / found["tokens_per_step"] <= found["steps"] + 2
    assert 0 < found["draft_share"] < 1
    assert found["by_depth"] == sorted(found["by_depth"], reverse=True)
    told = drafting.client.get("/metrics").text
    for name, value in (("num_draft_tokens", "drafted"), ("num_accepted_tokens", "accepted"), ("num_drafts", "steps")):
        assert f'vllm:spec_decode_{name}_total{{engine="0",model_name="ridgeline"}} {found[value]:.1f}' in told
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="ridgeline",position="0"}' in told
    tree = found["tree"]
    assert len(tree["words"]) == len(tree["parents"]) <= 8
    assert all(tree["parents"][node] in (-1, *tree["accepted"]) for node in tree["accepted"])
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(20_000)
        page.goto(drafting.url)
        page.get_by_role("heading", name="Speculation").wait_for()
        drawn = page.get_by_role("img", name=f"A tree of {len(tree['words'])} drafted tokens")
        assert drawn.locator("rect").count() == len(tree["words"]) + 1
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "drafting.png", full_page=True)
        browser.close()
