"""Conversations: branches, the list at the side, what is kept and exported."""

import json
import threading
from pathlib import Path

from playwright.sync_api import expect

from .actions import answers, figures, open_menu, say
from .server import delta, ending, stream, text


def test_another_answer_is_a_version_beside_the_first(page, server):
    server.script = [text("one"), text("two")]
    say(page, "count")
    expect(answers(page)).to_have_text("one")
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text("two")
    assert server.bodies[0]["messages"] == server.bodies[1]["messages"]
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text("one")
    page.reload()
    page.locator("#conversations .open").click()
    expect(answers(page)).to_have_text("one")
    page.get_by_role("button", name="Next version").press("Enter")
    expect(answers(page)).to_have_text("two")


def test_an_edited_question_is_a_branch_of_its_own(page, server):
    for words in ("first", "second"):
        say(page, words)
        expect(answers(page).last).to_have_text(f"echo: {words}")
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit and ask again").first.click()
    page.locator(".editing textarea").fill("other")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(["echo: other"])
    assert [one["content"] for one in server.bodies[-1]["messages"]] == ["other"]
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text(["echo: first", "echo: second"])


def test_leaving_an_edit_changes_nothing(page, server):
    say(page, "first")
    figures(page)
    page.get_by_role("button", name="Edit and ask again").press("Enter")
    page.locator(".editing textarea").fill("other")
    page.keyboard.press("Escape")
    expect(page.locator(".bubble")).to_have_text("first")
    expect(page.get_by_role("button", name="Edit and ask again")).to_be_focused()
    assert len(server.bodies) == 1


def test_conversations_are_kept_renamed_and_deleted(page, server):
    say(page, "apples")
    figures(page)
    page.get_by_role("button", name="New chat", exact=True).click()
    expect(page.locator("#hello")).to_be_visible()
    say(page, "pears")
    figures(page)
    assert [one["content"] for one in server.bodies[-1]["messages"]] == ["pears"]
    open_menu(page, "apples", "Rename")
    page.keyboard.type("红苹果")
    page.keyboard.press("Enter")
    page.reload()
    listed = page.locator("#conversations .open")
    expect(listed).to_have_text(["pears", "红苹果"])
    listed.last.click()
    expect(answers(page)).to_have_text("echo: apples")
    open_menu(page, "红苹果", "Delete")
    page.locator("#confirm").get_by_role("button", name="Delete").click()
    expect(listed).to_have_text(["pears"])
    page.reload()
    expect(listed).to_have_text(["pears"])


def test_an_answer_goes_on_while_another_conversation_is_read(page, server):
    go = threading.Event()
    server.script = [stream(delta(content="be"), go, delta(content="gun"), ending())]
    say(page, "slow")
    expect(answers(page)).to_have_text("be")
    page.keyboard.press("Control+Shift+O")
    say(page, "quick")
    expect(answers(page)).to_have_text("echo: quick")
    go.set()
    expect(page.locator("#conversations .running")).to_have_count(0)
    page.locator("#conversations .open", has_text="slow").click()
    expect(answers(page)).to_have_text("begun")


def test_a_deleted_conversation_does_not_come_back(page, server):
    server.script = [stream(delta(content="be"), threading.Event())]
    say(page, "slow")
    expect(answers(page)).to_have_text("be")
    open_menu(page, "slow", "Delete")
    page.locator("#confirm").get_by_role("button", name="Delete").click()
    server.wait_left()
    page.reload()
    expect(page.locator("#conversations .open")).to_have_count(0)


def test_a_conversation_is_exported(page):
    say(page, "你好")
    figures(page)
    with page.expect_download() as download:
        open_menu(page, "你好", "Export as Markdown")
    assert download.value.suggested_filename == "你好.md"
    written = Path(download.value.path()).read_text("utf-8")
    assert written == "# 你好\n\n**You**\n\n你好\n\n**AstrAI**\n\necho: 你好\n"
    with page.expect_download() as download:
        open_menu(page, "你好", "Export as JSON")
    data = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert {one["content"] for one in data["messages"].values()} == {"你好", "echo: 你好"}


def test_full_storage_is_told(page):
    page.evaluate("localStorage.setItem('other', 'x'.repeat(5 * 1024 * 1024 - 400))")
    say(page, "hello " * 100)
    expect(page.locator("#storage")).to_contain_text("storage is full")
    expect(answers(page)).to_contain_text("echo: hello")
