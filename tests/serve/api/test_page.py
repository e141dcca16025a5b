"""The chat page's files, read as text; `tests/e2e/page` opens them in a browser."""

import re
from pathlib import Path

import astrai_serve.api.page

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
WEB = Path(astrai_serve.api.page.__file__).parent / "web"


def sources():
    return "".join(path.read_text("utf-8") for path in WEB.glob("*.js"))


def test_a_browser_gets_a_page_that_loads_nothing_from_elsewhere(server):
    page = server.http.get("/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"<style|<script(?![^>]* src=)| on\w+=| style=", page.text)
    links = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"/web/chat.js", "/web/chat.css", "/v1/models", "/health"} <= set(links)
    for link in links:
        assert re.match("/(?!/)", link)
        assert server.http.get(link).status_code == 200, link


def test_the_page_and_its_scripts_agree_on_names(server):
    page = server.http.get("/", headers=HTML).text
    ids = set(re.findall(r'id="(\w+)"', page))
    assert set(re.findall(r'\$\("(\w+)"\)', sources())) <= ids
    for name in re.findall(r'from "\./([\w.]+)"', sources()):
        assert (WEB / name).is_file(), name


def test_all_words_are_there_in_both_languages():
    words = (WEB / "words.js").read_text("utf-8")
    table = re.findall(r'^  (\w+): \["(.+?)", "(.+?)"\],$', words, re.MULTILINE)
    assert len(table) == len({name for name, _, _ in table}) == words.count('"],')
    values = re.compile(r"\{\w+\}")
    for name, english, chinese in table:
        assert sorted(values.findall(english)) == sorted(values.findall(chinese)), name
    page = (WEB / "index.html").read_text("utf-8")
    used = re.findall(r'data-(?:text|label|hint)="(\w+)"', page)
    used += re.findall(r'\bsay\("(\w+)"', sources())
    assert set(used) <= {name for name, _, _ in table}


def test_no_script_makes_markup_of_text():
    markup = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function"
    )
    assert re.findall(markup, sources()) == []


def test_assets_have_their_types_and_nothing_else_is_served(server):
    assert server.http.get("/web/chat.js").headers["content-type"].startswith("text/javascript")
    assert server.http.get("/web/chat.css").headers["content-type"].startswith("text/css")
    for path in ("/web/app.py", "/web/..%2fapp.py", "/web/../app.py", "/web/"):
        assert server.http.get(path).status_code == 404, path
