"""What a model writes: Markdown becomes elements, and nothing else happens."""

from playwright.sync_api import expect

from .actions import answers, figures, say
from .server import text

MARKDOWN = """\
# 标题 #

一段**重点**和*斜体*，`代码`，~~删~~，snake_case_name，2*3*4。
[链接](https://example.org/a?b=1 "x") 与 https://example.org/看。

3. 三
   - 内
     续
4. 四

- [x] 做完
- [ ] 没做

| 左 | 右 |
|:---|---:|
| a\\|b | `1` |

> 引用
> 两行

---

```python
def f():  # <b>
    return "1"
```
"""


def test_markdown_becomes_elements(page, server):
    server.script = [text(MARKDOWN)]
    say(page, "show")
    figures(page)
    answer = answers(page)
    expect(answer.locator("h3")).to_have_text("标题")
    expect(answer.locator("strong")).to_have_text("重点")
    expect(answer.locator("em")).to_have_text("斜体")
    expect(answer.locator("del")).to_have_text("删")
    expect(answer.locator("p > code")).to_have_text("代码")
    expect(answer.locator("p").first).to_contain_text("snake_case_name，2*3*4。")
    addresses = [link.get_attribute("href") for link in answer.locator("a").all()]
    assert addresses == ["https://example.org/a?b=1", "https://example.org/%E7%9C%8B"]  # 看
    assert answer.locator("ol").get_attribute("start") == "3"
    expect(answer.locator("ol > li > ul > li")).to_have_text("内续")
    assert [box.is_checked() for box in answer.locator(".task input").all()] == [True, False]
    expect(answer.locator("td")).to_have_text(["a|b", "1"])
    expect(answer.locator("th").last).to_have_class("end")
    expect(answer.locator("blockquote")).to_contain_text("引用两行")
    expect(answer.locator("hr")).to_have_count(1)
    expect(answer.locator("pre")).to_have_text('def f():  # <b>\n    return "1"')
    expect(answer.locator("pre .word")).to_have_text(["def", "return"])
    expect(answer.locator("pre .comment")).to_have_text("# <b>")


def test_code_is_copied(visit, server):
    page = visit(server.url, permissions=["clipboard-read", "clipboard-write"])
    server.script = [text("so:\n```sh\necho 你好 && ls\n```\n")]
    say(page, "show")
    figures(page)
    page.get_by_role("button", name="Copy code").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "echo 你好 && ls"


HOSTILE = """\
<script>window.stolen = 1</script>
<img src=x onerror="window.stolen = 1"><svg onload="window.stolen=1"></svg>
<iframe srcdoc="<script>parent.stolen = 1</script>"></iframe>
[a](javascript:window.stolen=1) [b](data:text/html,<script>1</script>) [c](JaVaScRiPt:1)
[d](vbscript:1) ![e](https://example.org/spy.png) <https://example.org/"onclick="stolen=1>
**<b onmouseover=stolen=1>x</b>** `</code><script>stolen=1</script>`

| <style>*{display:none}</style> | <base href=//example.org> |
|--|--|
| <a href=javascript:stolen=1>f</a> | <form action=//example.org><button>g |

```"><script>window.stolen=1</script>
</pre></figure><script>window.stolen=1</script>
```
"""
ALLOWED = {
    *("DIV", "P", "SPAN", "BR", "HR", "A", "BUTTON", "INPUT", "svg", "path", "BLOCKQUOTE"),
    *("STRONG", "EM", "DEL", "CODE", "PRE", "FIGURE", "FIGCAPTION", "H3", "H4", "H5", "H6"),
    *("UL", "OL", "LI", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD"),
}


def test_a_hostile_completion_runs_nothing(page, server):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    server.script = [text(HOSTILE, size=3)]
    say(page, "<img src=x onerror=stolen=1>")
    figures(page)
    root = answers(page)
    names = root.evaluate("root => [...root.querySelectorAll('*')].map(one => one.nodeName)")
    assert set(names) <= ALLOWED
    attributes = root.evaluate(
        "root => [...root.querySelectorAll('*')].flatMap(one => one.getAttributeNames())"
    )
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
    addresses = [link.get_attribute("href") for link in root.locator("a").all()]
    assert all(address.startswith("https://example.org/") for address in addresses)
    expect(root).to_contain_text("<script>window.stolen = 1</script>")
    expect(page.locator(".bubble")).to_have_text("<img src=x onerror=stolen=1>")
    assert page.evaluate("window.stolen") is None
    assert all(url.startswith(server.url) for url in asked)


def test_the_policy_holds_even_if_markup_came_in(browser, server):
    context = browser.new_context()
    page = context.new_page()
    refused = []
    page.on("console", lambda told: refused.append(told.text))
    page.goto(server.url)
    tries = """() => {
      const script = document.createElement("script");
      let caught = 0;
      try { script.textContent = "window.stolen = 1"; } catch { caught += 1; }
      document.body.append(script);
      try { document.body.insertAdjacentHTML("beforeend", "<i>x</i>"); } catch { caught += 1; }
      try { document.body.innerHTML = "<i>x</i>"; } catch { caught += 1; }
      return [caught, window.stolen];
    }"""
    assert page.evaluate(tries) == [3, None]
    assert page.evaluate("fetch('https://example.org/').catch(() => 'kept in')") == "kept in"
    assert any("Content Security Policy" in told for told in refused)
    context.close()


SLOW = {
    "stars": "*a " * 30_000,
    "nested stars": "**a *b " * 15_000,
    "closing stars": "a* " * 30_000,
    "brackets": "[" * 60_000,
    "links": "[a](" * 20_000,
    "backticks": "".join("`" * length + " " for length in range(300)),
    "quotes": "> " * 30_000,
    "lists": "".join("  " * depth + "- a\n" for depth in range(200)),
    "spaces": "# " + " " * 60_000 + "x",
    "border": "a|b\n-" + " " * 60_000 + "|x",
    "fence": "```" + " " * 60_000 + "`",
    "tildes": "~" * 60_000 + "`",
    "dots": "http://a" + "." * 60_000 + "x",
    "cells": "|" * 30_000 + "\n" + "|-" * 30_000,
    "mathematics": "\\(" * 30_000,
    "blank lines": "- a\n" + "\n" * 60_000 + "b",
    "string": "```python\n" + '"' * 15_000 + "\n```",
}


def test_no_text_keeps_the_page_busy(page):
    script = """async (texts) => {
      const { MarkdownView } = await import("/web/markdown.js");
      const times = {};
      for (const [name, text] of Object.entries(texts)) {
        const start = performance.now();
        new MarkdownView(document.createElement("div")).update(text);
        times[name] = performance.now() - start;
      }
      return times;
    }"""
    times = page.evaluate(script, SLOW)
    # what is quadratic takes several seconds here
    assert {name: round(took) for name, took in times.items() if took > 1500} == {}
