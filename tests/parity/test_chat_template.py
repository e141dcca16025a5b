"""Chats with tools, reasoning and Chinese, in templates of the well-known styles, read by both."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai_core.tokenizer import AutoTokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXTS = ["你好，世界！请查询今天北京的天气。", "What is 12 + 30? Use the tool.\n\n", "{}\"':"] * 3

FILES = Path(__file__).parent / "chat_templates"
TEMPLATES = {
    "chatml": {"default": "chatml"},
    "llama-3": {"default": "headers"},
    "deepseek": {"default": "bars"},
    "qwen3": {"default": "thoughts"},
    "two by name": {"default": "bars", "tool_use": "chatml"},
}

text = st.text(
    st.one_of(
        st.sampled_from("天气查询北京你好，。 \n{}\"'<>/"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=20,
).filter(lambda t: "<|" not in t and "<｜" not in t)
name = st.sampled_from(["get_weather", "查询", "add"])
value = st.one_of(
    text, st.integers(), st.booleans(), st.none(), st.lists(st.integers(), max_size=2)
)
arguments = st.dictionaries(st.sampled_from(["city", "城市", "n"]), value, max_size=3)


@st.composite
def turns(draw):
    """A question, perhaps calls of tools with their results, and an answer, perhaps thought of."""
    messages = [{"role": "user", "content": draw(text)}]
    if draw(st.booleans()):
        calls = draw(st.lists(st.tuples(name, arguments), min_size=1, max_size=2))
        messages.append(
            {
                "role": "assistant",
                "content": draw(st.sampled_from(["", "让我查一下"])),
                "tool_calls": [
                    {"type": "function", "id": f"c{n}", "function": {"name": f, "arguments": a}}
                    for n, (f, a) in enumerate(calls)
                ],
            }
        )
        messages += [{"role": "tool", "content": draw(text), "tool_call_id": "c0"} for _ in calls]
    answer = {"role": "assistant", "content": draw(text)}
    thought = draw(st.sampled_from([None, "reasoning_content", "thinking", "reasoning"]))
    return [*messages, answer if thought is None else {**answer, thought: draw(text)}]


conversations = st.builds(
    lambda system, parts, is_open: (
        [{"role": "system", "content": system}] * bool(system)
        + [message for part in parts for message in part][: -1 if is_open else None]
    ),
    text,
    st.lists(turns(), min_size=1, max_size=3),
    st.booleans(),
)
tools = st.lists(
    st.builds(
        lambda name, told, properties: {
            "type": "function",
            "function": {
                "name": name,
                "description": told,
                "parameters": {"type": "object", "properties": properties},
            },
        },
        name,
        text,
        st.dictionaries(text, st.just({"type": "string", "description": "城市名"}), max_size=2),
    ),
    max_size=2,
)


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, tmp_path_factory):
    """A tokenizer with named templates, written by transformers and read by both."""
    logging.disable(logging.WARNING)
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    AutoTokenizer.train(TEXTS, 330).save_pretrained(ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours, bos_token="<|endoftext|>")
    sources = {
        name: (FILES / f"{file}.jinja").read_text("utf-8")
        for name, file in TEMPLATES[request.param].items()
    }
    tokenizer.chat_template = sources
    tokenizer.save_pretrained(theirs)
    if len(sources) > 1:
        assert (theirs / "additional_chat_templates" / "tool_use.jinja").is_file()
    again = tmp_path_factory.mktemp("again")
    AutoTokenizer.from_pretrained(theirs).save_pretrained(again)  # and what we write of it
    yield AutoTokenizer.from_pretrained(again), transformers.AutoTokenizer.from_pretrained(again)
    logging.disable(logging.NOTSET)


@settings(max_examples=40, deadline=None)
@given(chat=conversations, tools=tools, prompt=st.booleans(), thinking=st.booleans())
def test_conversations_are_rendered_and_encoded_alike(both, chat, tools, prompt, thinking):
    ours, theirs = both
    options = {"add_generation_prompt": prompt, "enable_thinking": thinking, "tools": tools or None}
    rendered = theirs.apply_chat_template(chat, tokenize=False, **options)
    assert ours.render_chat(chat, **options) == rendered
    ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert ours.apply_chat_template(chat, **options) == ids
