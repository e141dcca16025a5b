"""A server that is busy, leaves, breaks off, refuses or wants a key."""

from playwright.sync_api import expect

from .actions import answers, figures, say
from .server import PageServer, delta, error, event, stream, text


def test_a_busy_server_is_asked_again_after_its_time(page, server):
    busy = error(429, "queue_full", "too many requests", retry_after="2")
    server.script = [busy, text("at last")]
    page.evaluate("""() => {
      window.seen = [];
      const look = () => window.seen.push(document.querySelector(".notice p")?.textContent);
      new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
    }""")
    say(page, "hi")
    expect(answers(page)).to_have_text("at last")
    told = page.evaluate("[...new Set(window.seen.filter((one) => one))]")
    assert told[:2] == [f"The server is busy. Next try in {n} s." for n in (2, 1)]
    expect(page.locator(".notice")).to_have_count(0)
    assert len(server.bodies) == 2


def test_a_busy_server_can_be_asked_at_once_or_left_alone(page, server):
    busy = error(429, "queue_full", "too many requests", retry_after="60")
    server.script = [busy, busy]
    say(page, "hi")
    page.get_by_role("button", name="Try now").click()
    server.wait(lambda: len(server.bodies) == 2)
    expect(page.get_by_text("Next try in 60 s")).to_be_visible()
    page.get_by_role("button", name="Stop the answer").click()
    expect(page.get_by_text("This message has no answer yet.")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("echo: hi")


def test_a_draining_server_is_told(page, server):
    server.script = [error(503, "shutting_down", "the server is shutting down", retry_after="5")]
    say(page, "hi")
    expect(page.get_by_role("alert")).to_contain_text("shutting down and takes no new questions")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("echo: hi")
    # an answer under way is ended in its stream
    ended = event({"error": {"message": "the server is shutting down", "code": "cancelled"}})
    server.script = [stream(delta(content="so fa"), ended)]
    say(page, "more")
    expect(page.get_by_role("alert")).to_contain_text("shutting down")
    expect(answers(page).last).to_have_text("so fa")
    assert "broken off" in figures(page)


def test_a_server_that_is_gone_is_found_again(visit):
    with PageServer() as server:
        page = visit(server.url)
        port = server.port
        expect(page.locator("#openModel")).to_have_class("ready")
    say(page, "anyone?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    expect(page.locator("#openModel")).to_have_class("gone")
    with PageServer(port):
        expect(page.locator("#openModel")).to_have_class("ready")
        page.get_by_role("button", name="Try again").click()
        expect(answers(page)).to_have_text("echo: anyone?")
        page.reload()  # nothing may be open when the server ends
        page.goto("about:blank")


def test_an_answer_that_breaks_off_is_kept_and_told(page, server):
    server.script = [stream(delta(content="half a"))]
    say(page, "hi")
    expect(page.get_by_role("alert")).to_contain_text("broke off")
    assert "broken off" in figures(page)
    expect(answers(page)).to_have_text("half a")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("echo: hi")
    expect(page.locator(".versions")).to_contain_text("2/2")


def test_a_refusal_is_told_in_the_servers_words(page, server):
    server.script = [error(400, "context_length_exceeded", "9 tokens do not fit into 8")]
    say(page, "hi")
    expect(page.get_by_role("alert")).to_contain_text("9 tokens do not fit into 8")


def test_a_key_is_asked_for_and_forgotten_with_the_tab(visit, server):
    server.key = "secret"
    page = visit(server.url)
    expect(page.get_by_text("This server asks for an API key.")).to_be_visible()
    page.locator(".key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server does not know this API key.")).to_be_visible()
    page.locator(".key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#openModel")).to_have_text("tiny")
    say(page, "hi")
    expect(answers(page)).to_have_text("echo: hi")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('astrai.key')") == "secret"
    page.locator("#openSettings").click()
    page.locator("#keyKeep").check()
    assert page.evaluate("localStorage.getItem('astrai.key')") == "secret"


def test_a_key_that_is_asked_for_later_answers_the_question(page, server):
    server.key = "secret"
    say(page, "hi")
    page.locator(".key").fill("secret")
    page.get_by_role("button", name="Use").click()
    expect(answers(page)).to_have_text("echo: hi")
