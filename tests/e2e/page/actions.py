"""What a visitor does on the page, and what is looked at."""

from playwright.sync_api import expect


def say(page, words):
    page.locator("#text").fill(words)
    page.keyboard.press("Enter")


def answers(page):
    return page.locator(".assistant > .text")


def figures(page):
    """The figures of the last answer, once it is complete."""
    last = page.locator(".assistant .figures").last
    expect(last).not_to_be_empty()
    return last.text_content()


def configure(page, **values):
    page.locator("#openSettings").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.keyboard.press("Escape")


def open_menu(page, title, choice):
    page.locator("#conversations li", has_text=title).hover()
    page.get_by_role("button", name=f"More about “{title}”").click()
    page.get_by_role("menuitem", name=choice).click()
