"""app.py in headless Chromium: load, ask, change s, see the maps, bad files. Needs the extra `demo-test` and Chromium.

python -m pytest -m slow tests/test_app.py
SCREENSHOTS=folder python -m pytest -m slow tests/test_app.py    # keeps a picture of each page
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
RECEIPT = ROOT / "examples" / "receipt.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"wide": {"width": 1280, "height": 900}, "narrow": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of the demo, in a process of its own, from a folder that is not this one."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "HF_MODULES_CACHE": str(folder)}
    command = [sys.executable, ROOT / "app.py", "--port", str(port)]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log) as server,
    ):
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield url
        server.terminate()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[("wide", "light"), ("wide", "dark"), ("narrow", "light"), ("narrow", "dark")], ids="-".join)
def page(request, browser, url):
    """The demo's page, of a size and in a theme; a picture of it at the end, if asked for."""
    size, theme = request.param
    page = browser.new_page(viewport=SIZES[size])
    page.set_default_timeout(20_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{url}/?__theme={theme}")
    page.get_by_role("button", name="Ask").wait_for()
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        name = re.sub(r"\W+", "-", request.node.name)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
    page.close()
    assert not problems


def ask(page, question: str, s: int | None = None):
    page.get_by_label("Question").first.fill(question)
    if s is not None:
        number = page.get_by_label("number input for s", exact=False)
        number.fill(str(s))
        number.press("Tab")
    page.get_by_role("button", name="Ask").click()


def newest_run(page, tokens: int) -> list[str]:
    """The first row of the table, once it is that of an image of so many tokens."""
    page.locator("[data-testid=cell-0-1]", has_text=re.compile(rf"^\s*{tokens}\s*$")).wait_for()
    return [page.get_by_test_id(f"cell-0-{column}").inner_text().strip() for column in range(6)]


def upload(page, path: Path):
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_label("Remove Image").wait_for()


def test_ask_with_each_s_and_see_the_maps(page):
    upload(page, RECEIPT)
    question = "how much is the salad?"
    for s, tokens in ((3, 16), (4, 9), (2, 36)):
        ask(page, question, s)
        found = newest_run(page, tokens)
        assert (found[0], *found[4:]) == (str(s), question, "89") and 0 < int(found[2]) <= int(found[3])
        assert page.get_by_label("Answer").first.input_value() == "89"
    assert page.get_by_test_id("cell-2-1").inner_text().strip() == "16"
    maps = set()
    for layer in range(3):
        page.get_by_role("tab", name=f"layer {layer}").click()
        shown = page.locator("[role=tabpanel]:visible img")
        shown.wait_for()
        assert shown.evaluate("async image => (await image.decode(), image.naturalWidth)") == 288
        maps.add(shown.get_attribute("src"))
    assert len(maps) == 3


def test_an_example(page):
    page.get_by_text("What is d of cod?").last.click()
    page.get_by_label("Remove Image").wait_for()
    page.get_by_role("button", name="Ask").click()
    assert newest_run(page, 16)[4:] == ["What is d of cod?", "43"]


def test_what_is_missing_or_broken_is_said(page, tmp_path):
    def message() -> str:
        text = page.get_by_test_id("toast-text").inner_text()
        page.get_by_test_id("toast-close").click()
        page.get_by_test_id("toast-body").wait_for(state="detached")
        return text

    ask(page, "how much is the salad?")
    assert message() == "Upload a picture or pick an example first."
    (tmp_path / "broken.png").write_text("no picture")
    upload(page, tmp_path / "broken.png")
    ask(page, "how much is the salad?")
    assert message() == "This file is no picture that can be read."
    page.get_by_label("Remove Image").click()
    upload(page, RECEIPT)
    ask(page, "  ")
    assert message() == "Type a question first."
    ask(page, "how much " * 300)
    assert "model_max_length is 512" in message()
    ask(page, "how much is the salad?")  # the page still works
    assert newest_run(page, 16)[5] == "89"
