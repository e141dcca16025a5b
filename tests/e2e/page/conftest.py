"""A real browser for the chat page, `astrai-serve`, and a server that misbehaves."""

from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from ..server_process import ServerProcess, write_model
from .server import PageServer

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# what moves is drawn again and again, which costs most of the time
USUAL = {"locale": "en-US", "reduced_motion": "reduce"}
PATIENCE = 30_000  # ms; a busy machine is no failure
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    # for one file: its event loop would be in the way of other tests that run their own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open the page as a new visitor; whatever the browser complains of fails the test."""
    contexts, complaints = [], []

    def open_page(url, **options):
        context = browser.new_context(**(USUAL | options))
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda found: complaints.append(str(found)))
        page.on(
            "console",
            lambda told: (
                complaints.append(told.text)
                # a refusal of the server is told there as well, and meant
                if told.type == "error" and "Failed to load resource" not in told.text
                else None
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def server():
    with PageServer() as server:
        yield server


@pytest.fixture
def page(visit, server):
    return visit(server.url)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The address of `astrai-serve` on a tiny random model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, dim=32, n_layers=2, n_kv_heads=2, dim_ffn=64, max_len=512)
    with ServerProcess(folder, "--kv-cache-gb", 0.01) as process:
        yield process.url + "/"
