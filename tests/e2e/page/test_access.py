"""For everyone: both languages, light and dark, a phone, the keyboard alone, a screen reader."""

import threading

import pytest
from playwright.sync_api import expect

from .actions import answers, figures, say
from .server import delta, stream, text


def test_the_page_speaks_the_browsers_language_and_the_chosen_one(visit, server):
    page = visit(server.url, locale="zh-CN")
    expect(page.locator(".greeting")).to_have_text("想聊点什么？")
    say(page, "你好")
    expect(page.get_by_role("button", name="重新回答")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "en"
    page.reload()
    expect(page.locator(".greeting")).to_have_text("What is on your mind?")


def contrast(page, selector):
    """WCAG's ratio of an element's text to what is behind it."""
    return page.locator(selector).first.evaluate("""(element) => {
      const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const rgb = (colour) => {
        paint.clearRect(0, 0, 1, 1);
        paint.fillStyle = colour;
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data];
      };
      const light = (colour) => {
        const part = (value) =>
          value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = rgb(colour).map(part);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      let behind = element;
      // a faint tint is taken for what it lies on
      while (rgb(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
      const ink = light(getComputedStyle(element).color);
      const paper = light(getComputedStyle(behind).backgroundColor);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    }""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_easy_to_read(visit, server, scheme):
    page = visit(server.url, color_scheme=scheme)
    server.script = [text("[a](https://example.org)\n```python\nif 1: 'a'  # b\n```\n> c")]
    say(page, "hi")
    figures(page)
    seen = [".bubble", ".text p", ".text a", ".figures", "#hint", "#modelName", ".open", "pre"]
    seen += [".code .word", ".code .string", ".code .comment", ".code .number", "figcaption"]
    ratios = {selector: contrast(page, selector) for selector in [*seen, "blockquote"]}
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}
    back = "getComputedStyle(document.body).backgroundColor"
    own = page.evaluate(back)
    page.locator("#openSettings").click()
    page.locator("#theme").select_option("dark" if scheme == "light" else "light")
    assert page.evaluate(back) != own
    page.reload()
    assert page.evaluate(back) != own


def test_the_page_fits_a_phone(visit, server):
    screen = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
    page = visit(server.url, **screen)
    wide = "| a | b |\n|-|-|\n| " + "x" * 90 + " | y |\n\n```\n" + "z" * 200 + "\n```\n" + "w" * 300
    server.script = [text(wide)]
    page.locator("#text").fill("hi")
    page.locator("#send").tap()
    figures(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    box = page.locator("#composer").bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
    assert box["y"] + box["height"] <= 640
    expect(page.locator("#sidebar")).to_be_hidden()
    page.locator("#menu").tap()
    expect(page.locator("#sidebar")).to_be_visible()
    page.locator("#new").tap()
    expect(page.locator("#sidebar")).to_be_hidden()
    sizes = page.locator("#menu, #send, #openSettings").evaluate_all(
        "all => all.map(one => Math.min(one.offsetWidth, one.offsetHeight))"
    )
    assert min(sizes) >= 36


def test_the_keyboard_is_enough(page, server):
    server.script = [stream(delta(content="wait"), threading.Event())]
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("wait")
    assert server.bodies[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Escape")
    assert "stopped" in figures(page)
    for _ in range(40):  # each thing that can be done is reached by Tab
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('again')"):
            break
    page.keyboard.press("Enter")
    expect(answers(page).locator("p")).to_have_text("echo: onetwo")
    page.locator("#openModel").press("Enter")
    expect(page.locator("#modelDialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#openModel")).to_be_focused()
    page.locator("#title").click()
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()


def test_an_input_methods_enter_sends_nothing(page, server):
    composing = """() => document.getElementById("text").dispatchEvent(new KeyboardEvent(
      "keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    page.locator("#text").fill("nihao")
    assert page.evaluate(composing) is True  # nobody took the key
    assert server.bodies == []


def test_everything_has_a_name_and_answers_are_announced(page, server):
    say(page, "hi")
    figures(page)
    expect(page.locator("#announcer")).to_have_text("The answer is complete. echo: hi")
    page.locator("#openSettings").click()
    nameless = page.evaluate("""() => [...document.querySelectorAll(
      "button, input, textarea, select, dialog, progress:not([hidden]), a")].filter((one) => {
        const labels = [...(one.labels ?? [])].map((label) => label.textContent).join("");
        const by = document.getElementById(one.getAttribute("aria-labelledby"))?.textContent;
        const isField = /^(INPUT|TEXTAREA|SELECT)$/.test(one.tagName);
        return !(one.ariaLabel || labels.trim() || by || (!isField && one.textContent.trim()));
      }).map((one) => one.outerHTML)""")
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
