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
    page.set_default_timeout(60_000)
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
