"""The pictures of the page in the documentation: `PICTURES=docs/images make prove` draws them anew.

The answers are written here, and no model's.
"""

import os
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .actions import figures, say
from .server import MODEL, PageServer, delta, ending, event, stream, usage

DESK = {"viewport": {"width": 1200, "height": 800}}
PHONE = {
    "viewport": {"width": 390, "height": 800},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 1.5,
}
LARGEST = 200_000  # bytes

ENGLISH = """\
A *prefix cache* keeps the keys and values of text it has seen. A follow-up question repeats the \
whole conversation, so only its **last lines** have to be computed.

| turn | prompt | cached | computed |
|---|--:|--:|--:|
| 1 | 180 | 0 | 180 |
| 2 | 460 | 416 | 44 |

```python
def num_cached(prompt: list[int], page_size: int) -> int:
    # whole pages only, and at least one token is left to compute
    return (len(prompt) - 1) // page_size * page_size
```

What changes the cache's mind:

1. another system prompt, since it comes first;
2. an edited message, from there on.
"""
CHINESE = """\
**前缀缓存**保存已经算过的键和值。追问会重复整个对话，所以只需要计算*最后几行*。

| 轮次 | 提示词元 | 来自缓存 | 需要计算 |
|---|--:|--:|--:|
| 一 | 180 | 0 | 180 |
| 二 | 460 | 416 | 44 |

```python
def num_cached(prompt: list[int], page_size: int) -> int:
    # 只算整页，并且至少留一个词元要计算
    return (len(prompt) - 1) // page_size * page_size
```

哪些情况会让缓存失效：

1. 换了系统提示词，因为它排在最前面；
2. 修改了前面的消息，从那里开始重算。
"""
TALKS = {
    "en": {
        "locale": "en-US",
        "earlier": ["Compare three bread recipes", "把这封信翻译成中文"],
        "question": "Why is a follow-up question answered faster?",
        "thought": "They ask about time to first token. The cache of prefixes explains it.",
        "answer": ENGLISH,
    },
    "zh": {
        "locale": "zh-CN",
        "earlier": ["三种面包的做法比较", "Translate this letter"],
        "question": "为什么追问的回答来得更快？",
        "thought": "问的是首字时间，前缀缓存可以解释。",
        "answer": CHINESE,
    },
}


def talk(page, server, words):
    for earlier in words["earlier"]:
        say(page, earlier)
        figures(page)
        page.keyboard.press("Control+Shift+O")
    size = 6
    pieces = [words["answer"][at : at + size] for at in range(0, len(words["answer"]), size)]
    told = {"usage": usage(460, 236, 416), "timings": {"predicted_per_second": 38.2}}
    server.script = [
        stream(
            delta(reasoning_content=words["thought"]),
            1.4,
            *(delta(content=piece) for piece in pieces),
            ending(**told),
        )
    ]
    say(page, words["question"])
    figures(page)
    page.locator("#pane").evaluate("pane => { pane.scrollTop = 0; }")
    page.evaluate("document.fonts.ready")


def keep(page, name, tmp_path):
    folder = Path(os.environ.get("PICTURES") or tmp_path)
    path = folder / f"{name}.png"
    page.screenshot(path=path, animations="disabled")
    assert 5_000 < path.stat().st_size < LARGEST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "scheme", "device"),
    [
        ("en", "light", "desktop"),
        ("zh", "dark", "desktop"),
        ("en", "dark", "phone"),
        ("zh", "light", "phone"),
    ],
)
def test_pictures_of_a_conversation(visit, tmp_path, language, scheme, device):
    screen = {"desktop": DESK, "phone": PHONE}[device]
    words = TALKS[language]
    with PageServer() as server:
        server.models = [{**MODEL, "id": "demo", "max_input_tokens": 4096}]
        page = visit(server.url, locale=words["locale"], color_scheme=scheme, **screen)
        talk(page, server, words)
        keep(page, f"chat-{language}-{scheme}-{device}", tmp_path)
        page.goto("about:blank")


@pytest.mark.slow
def test_picture_of_a_long_prefill(visit, tmp_path):
    with PageServer() as server:
        server.models = [{**MODEL, "id": "demo", "max_input_tokens": 4096}]
        page = visit(server.url, **DESK)
        progress = {"choices": [], "prompt_progress": {"total": 3900, "processed": 1536}}
        go = threading.Event()
        server.script = [stream(event(progress), go)]
        say(page, "Summarise the attached minutes in five sentences.")
        expect(page.locator("progress")).to_be_visible()
        keep(page, "chat-en-light-prefill", tmp_path)
        go.set()
        page.goto("about:blank")
