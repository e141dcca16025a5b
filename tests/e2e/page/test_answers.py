"""Answers: streamed, stopped, counted, thought about, waited for."""

import re
import threading
import time

from playwright.sync_api import expect

from .actions import answers, configure, figures, say
from .server import MODEL, delta, ending, event, stream, usage


def test_a_real_server_answers_with_its_figures(visit, real):
    page = visit(real)
    configure(page, temperature=0, max_tokens=12)
    say(page, "hello world, the weather is fine, hello world, the weather is fine")
    assert re.match(r"12 tokens · [\d.,]+ tokens/s · first word after", figures(page))
    assert "cut off by the length limit" in figures(page)
    said = answers(page).inner_text()
    page.locator(".again").click()
    expect(page.locator(".versions")).to_contain_text("2/2")
    assert re.search(r" · \d+ of \d+ prompt tokens cached · ", figures(page))
    assert answers(page).inner_text() == said  # at temperature 0
    expect(page.locator("#hint")).to_contain_text(re.compile(r"^\d+ of 512 tokens of context$"))


def test_the_models_card_tells_what_the_server_tells(visit, real):
    page = visit(real)
    expect(page.locator("#openModel")).to_have_text("tiny")
    page.locator("#openModel").click()
    card = page.locator("#card")
    expect(card).to_contain_text("512 tokens")
    expect(card).to_contain_text("astrai")


def test_a_model_is_chosen_among_several(visit, server):
    server.models = [MODEL, {**MODEL, "id": "other", "meta": {"n_params": 12}}]
    page = visit(server.url)
    page.locator("#openModel").click()
    page.locator("#card select").select_option("other")
    expect(page.locator("#modelName")).to_have_text("other")
    say(page, "hi")
    figures(page)
    assert server.bodies[0]["model"] == "other"
    page.locator("#openModel").click()
    expect(page.locator("#card")).to_contain_text("n_params12")


def test_the_stop_button_keeps_what_was_said(page, server):
    server.script = [stream(delta(content="first words"), threading.Event())]
    say(page, "go on for ever")
    expect(answers(page)).to_have_text("first words")
    page.get_by_role("button", name="Stop the answer").click()
    assert "stopped" in figures(page)
    server.wait_left()
    say(page, "more")
    expect(answers(page).last).to_have_text("echo: more")
    roles = [(one["role"], one["content"]) for one in server.bodies[-1]["messages"]]
    assert roles == [
        ("user", "go on for ever"),
        ("assistant", "first words"),
        ("user", "more"),
    ]


def test_speed_is_measured_here_where_the_server_does_not_tell(page, server):
    go = threading.Event()
    told = usage(50, 3, 40)
    server.script = [stream(delta(content="a"), go, delta(content="b"), ending(usage=told))]
    say(page, "hi")
    expect(answers(page)).to_have_text("a")
    time.sleep(0.4)
    go.set()
    shown = figures(page)
    [rate] = re.findall(r"([\d.]+) tokens/s", shown)
    assert 0 < float(rate) <= 5  # two tokens after the first, in 0.4 seconds and more
    assert "40 of 50 prompt tokens cached" in shown


def test_reasoning_is_open_while_it_comes_and_folded_after(page, server):
    go = threading.Event()
    thoughts = [delta(reasoning_content="let me "), delta(reasoning_content="**see**")]
    server.script = [stream(*thoughts, go, delta(content="82"), ending())]
    say(page, "37 + 45")
    expect(page.locator(".reasoning .text")).to_have_text("let me see")
    time.sleep(0.2)  # shorter thoughts have no time told
    go.set()
    figures(page)
    expect(page.locator(".reasoning .text")).to_be_hidden()
    page.get_by_text(re.compile("^Thought for")).click()
    expect(page.locator(".reasoning strong")).to_have_text("see")
    expect(answers(page)).to_have_text("82")
    say(page, "and?")
    figures(page)
    assert server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "82"}


def test_a_long_prefill_shows_time_and_progress(page, server):
    read, go = threading.Event(), threading.Event()
    progress = event({"choices": [], "prompt_progress": {"total": 4000, "processed": 1000}})
    server.script = [stream(": ping\n\n", read, progress, go, delta(content="!"), ending())]
    say(page, "a long text")
    expect(page.locator(".state")).to_have_text(re.compile(r"^Waiting for the first word · \d+ s$"))
    read.set()
    expect(page.locator(".state")).to_contain_text("Reading the prompt: 1,000 of 4,000 tokens")
    assert page.locator("progress").evaluate("bar => bar.position") == 0.25
    go.set()
    expect(answers(page)).to_have_text("!")
    expect(page.locator("progress")).to_be_hidden()
    assert server.bodies[0]["return_progress"] is True


def test_settings_are_sent_and_kept(page, server):
    page.locator("#openSettings").click()
    for name, value in {"system": "be brief", "temperature": 0.5, "top_p": 7, "seed": 3}.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#stopStrings").fill("END\n停")
    page.keyboard.press("Escape")
    say(page, "hi")
    figures(page)
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    sampling = {name: body.get(name) for name in ("temperature", "top_p", "seed", "stop")}
    # a top_p of 7 is refused by the field, and so not sent
    assert sampling == {"temperature": 0.5, "top_p": None, "seed": 3, "stop": ["END", "停"]}
    page.reload()
    page.locator("#openSettings").click()
    expect(page.locator("#system")).to_have_value("be brief")
    page.get_by_role("button", name="Back to the server's values").click()
    page.keyboard.press("Escape")
    say(page, "hi")
    figures(page)
    assert "temperature" not in server.bodies[1]
    assert [one["role"] for one in server.bodies[1]["messages"]] == ["user"]
