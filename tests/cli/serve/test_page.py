"""The chat page in a headless Chromium: it streams, stops, and shows markup as the text it is."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.serve.conftest import Server

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
MARKUP = "<img src=x onerror=alert(1)> **bold** `co<b>de`\n\n```\n<script>alert(2)</script>\n```"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda m: m.type == "error" and said.append(m.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append("a dialog"))
    page.on("request", lambda r: r.url.startswith((server.url, "data:")) or said.append(r.url))
    page.goto(server.url)
    api.expect(page.locator("#model")).to_have_text(server.name)
    yield page
    page.close()
    assert said == []


def say(page: Any, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#send").click()


def test_two_turns(page: Any) -> None:
    page.locator("summary").click()
    page.locator("#max_tokens").fill("40")
    for turn in (1, 2):
        say(page, "Hello")
        api.expect(page.locator("#send")).to_be_visible()
        assert page.locator(".turn").count() == 2 * turn
        assert page.locator(".turn").last.inner_text().strip()
    api.expect(page.locator("#speed")).to_contain_text("tokens/s")
    page.reload()
    assert page.locator(".turn").count() == 0


def test_stop(page: Any, server: Server) -> None:
    say(page, "Go on")
    api.expect(page.locator(".turn").last).not_to_be_empty()
    page.locator("#stop").click()
    api.expect(page.locator(".turn").last).to_contain_text("stopped")
    for _ in range(200):
        if server.metric("optim_live_texts") == 0:
            return
        page.wait_for_timeout(50)
    raise AssertionError("the text is still written")


def test_markup_is_text(page: Any) -> None:
    event = {"choices": [{"index": 0, "delta": {"content": MARKUP}}]}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    reply = {"status": 200, "content_type": "text/event-stream", "body": body}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**reply))
    say(page, MARKUP)
    answer = page.locator(".turn").last
    api.expect(answer.locator("strong")).to_have_text("bold")
    api.expect(answer).to_contain_text("<img src=x onerror=alert(1)>")
    api.expect(answer.locator("pre")).to_contain_text("<script>alert(2)</script>")
    api.expect(answer.locator("p code")).to_have_text("co<b>de")
    assert page.locator("img, #talk script").count() == 0
