import json

import pytest

from astrai_core.tokenizer import AutoTokenizer

TEXTS = [
    "The cat sat on the mat. 猫坐在垫子上。",
    "One and one is two.",
    "你好，世界！",
    "短",
    "A longer text, so that a document crosses the edge of a row or two. " * 3,
    "emoji 🙂 and <|im_end|> spelled out",
]
CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "二加二等于几？"},
        {"role": "assistant", "content": "四。"},
        {"role": "user", "content": "And 3+3?"},
        {"role": "assistant", "content": "6"},
    ],
    [{"role": "user", "content": "Say nothing"}, {"role": "assistant", "content": ""}],
]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.train(TEXTS * 3, 300)


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture(scope="session")
def chats():
    return CHATS


@pytest.fixture(scope="session")
def write_lines():
    def write(path, records):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def folder(tokenizer, write_lines, tmp_path):
    """A folder with a tokenizer, texts and chats."""
    tokenizer.save_pretrained(tmp_path / "tok")
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    return tmp_path
