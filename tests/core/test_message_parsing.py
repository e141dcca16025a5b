import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from astrai_core.tokenizer import AutoTokenizer, ChatTemplate
from astrai_core.tokenizer.message_parsing import (
    MessageFormat,
    ParsedMessage,
    ToolCallArguments,
    ToolCallStart,
)

THINK = ("<think>", "</think>")
HERMES = MessageFormat(thoughts=THINK, tools="hermes")
LLAMA = MessageFormat(tools="llama")
MISTRAL = MessageFormat(thoughts=("[THINK]", "[/THINK]"), tools="mistral")
DEEPSEEK = MessageFormat(thoughts=THINK, tools="deepseek")
FORMATS = [HERMES, LLAMA, MISTRAL, DEEPSEEK]
ARGUMENTS = '{"city": "北京", "n": [1, -2.5e3, {"a": null}], "s": "a\\"}</tool_call>"}'


def read(form, text, **options):
    """Content, reasoning and calls; the calls must be whole."""
    message = form.parse(text, **options)
    assert all(call.is_complete for call in message.calls)
    return (
        message.content,
        message.reasoning,
        [(call.name, json.loads(call.arguments)) for call in message.calls],
    )


OURS = AutoTokenizer.train(["hello world, hello <tool_call>"] * 9, 262)
F = ("f", json.loads(ARGUMENTS))
G = ("g", {})
DS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>")
DS_END = ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")


@pytest.mark.parametrize(
    ("form", "text", "wanted"),
    [
        (
            HERMES,
            f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
            '<tool_call>{"arguments": {}, "name": "g"}</tool_call>\n',
            ("Let me see.", "", [F, G]),
        ),
        (HERMES, '<think>\nhm\n</think>\n\n<tool_call>{"name":"g"}</tool_call>', ("", "hm", [G])),
        (HERMES, "<think>\n\n</think>\n\nyes", ("yes", "", [])),
        (HERMES, "\n<think>a<b\n\nc\n</think>d", ("d", "a<b\n\nc", [])),
        # a brace is forgotten; arguments are a string of JSON, or null; a line end is written raw
        (HERMES, f'<tool_call>{{"name":"f","arguments":{ARGUMENTS}</tool_call>', ("", "", [F])),
        (
            HERMES,
            f'<tool_call>{{"name":"f","arguments":{json.dumps(ARGUMENTS)}}}</tool_call>',
            ("", "", [F]),
        ),
        (HERMES, '<tool_call>{"name":"g","arguments":null}</tool_call>', ("", "", [G])),
        (
            HERMES,
            '<tool_call>{"name":"f","arguments":{"a":"x\ny"}}</tool_call>',
            ("", "", [("f", {"a": "x\ny"})]),
        ),
        (LLAMA, f'{{"name": "f", "parameters": {ARGUMENTS}}}', ("", "", [F])),
        (
            LLAMA,
            f'<|python_tag|>{{"name": "f", "parameters": {ARGUMENTS}}}; '
            '{"type": "function", "name": "g", "parameters": {}}',
            ("", "", [F, G]),
        ),
        (
            MISTRAL,
            f'[THINK]hm[/THINK][TOOL_CALLS] [{{"name": "f", "arguments": {ARGUMENTS}, "id": "a"}}, '
            '{"name": "g", "arguments": {}}]',
            ("", "hm", [F, G]),
        ),
        (
            MISTRAL,
            f"ok[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]g[CALL_ID]12ab[ARGS]{{}}",
            ("ok", "", [F, G]),
        ),
        (MISTRAL, f"[TOOL_CALLS]f{ARGUMENTS}", ("", "", [F])),
        (
            DEEPSEEK,
            f"ok\n\n{DS[0]}{DS[1]}function{DS[2]}f\n```json\n{ARGUMENTS}\n```{DS_END[0]}\n"
            f"{DS[1]}function{DS[2]}g\n```json\n{{}}\n```{DS_END[0]}{DS_END[1]}",
            ("ok", "", [F, G]),
        ),
        (
            DEEPSEEK,
            f"{DS[0]}{DS[1]}f{DS[2]}{ARGUMENTS}{DS_END[0]}{DS[1]}g{DS[2]}{{}}{DS_END[0]}{DS_END[1]}",
            ("", "", [F, G]),
        ),
    ],
)
def test_what_the_families_write_is_understood(form, text, wanted):
    assert read(form, text) == wanted


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "<tool_call> {'name': 'f'} </tool_call>"),
        (HERMES, '<tool_call>{"name": 3}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "no"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments"'),
        (HERMES, "a <tool_call>"),
        (HERMES, "a <tool_cal\n\n"),
        (HERMES, "text <think>a</think>"),
        (LLAMA, '{"name": "Ann", "age": 3}'),
        (LLAMA, '{"name": "Ann"}'),
        (LLAMA, ' {"answer": [1, 2]} and more'),
        (LLAMA, "<|python_tag|>print(1)"),
        (MISTRAL, "[TOOL_CALLS] nothing"),
        (MISTRAL, '[TOOL_CALLS] [{"nom": "f"}]'),
        (DEEPSEEK, f"{DS[0]}{DS[1]}f g h{DS[2]}12"),
        (DEEPSEEK, f"{DS[0]}?"),
    ],
)
def test_what_is_no_call_comes_out_as_text(form, text):
    assert read(form, text) == (text, "", [])


def test_a_call_that_breaks_after_it_was_told_is_not_whole_and_its_rest_is_text():
    message = HERMES.parse('<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> z')
    assert [(call.name, call.arguments) for call in message.calls] == [("f", '{"a": ')]
    assert not message.calls[0].is_complete
    assert message.content == "oops}}</tool_call> z"
    cut = HERMES.parse('<tool_call>{"name": "f", "arguments": {"a": "b')
    assert cut.calls[0].arguments == '{"a": "b'
    assert (cut.calls[0].is_complete, cut.content) == (False, "")


def test_after_complete_arguments_a_call_stands_and_text_goes_on():
    message = HERMES.parse('<tool_call>{"name": "f", "arguments": {}} and </tool_call>')
    assert message.calls[0].is_complete
    assert message.content == "and </tool_call>"
    doubled = HERMES.parse('<tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    assert (doubled.content, len(doubled.calls)) == ("<tool_call>\n", 1)


def test_without_tools_calls_are_text():
    text = 'a <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert HERMES.parse(text, reads_tools=False).content == text


@pytest.mark.parametrize(
    ("prompt", "continued", "wanted"),
    [
        ("assistant\n", None, ("hm</think>", "")),
        ("assistant\n<think>\n", None, ("", "hm")),
        ("assistant\n<think>\n\n</think>\n\n", None, ("hm</think>", "")),
        ("whatever", "<think>\nso", ("", "hm")),
        ("whatever", "<think>a</think>b", ("hm</think>", "")),
        ("whatever", "b", ("hm</think>", "")),
    ],
)
def test_thoughts_may_have_been_opened_by_the_prompt(prompt, continued, wanted):
    parser = HERMES.parser(prompt=prompt, continued=continued)
    message = ParsedMessage()
    message.add([*parser.feed("hm</think>"), *parser.finish()])
    assert (message.content, message.reasoning) == wanted


FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "[THINK]", "[/THINK]", "\n", " ", "1", "2", "天气3", "<", "a4"),
        *("<tool_call>", "</tool_call>", "<tool_c", "</tool_", "<|python_tag|>", "<|py", ";"),
        *('{"name": "f5", "arguments": {"x": 6', '{"name": "f5", "parameters": {}}'),
        *('"y": "7\\n"', ",", "}", "}}", "{", "]", '"', '{"arguments": {"b": 8}, "name": "g9"}'),
        *("[TOOL_CALLS]", "[TOOL_", "[ARGS]", "f5", "[ARGS]{", "[", "```json\n", "```"),
        *(*DS, *DS_END, "<｜tool", "function"),
        '{"name": "f5", "arguments": "{\\"x\\": 1}"}',
        '{"name": "f5", "arguments": null}',
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)


@given(TEXTS, st.sampled_from(FORMATS), st.data())
@settings(max_examples=200, deadline=None)
@example('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', HERMES, None)
def test_however_a_text_is_cut_it_is_the_same_message(text, form, data):
    whole = form.parse(text)
    cuts = range(len(text) + 1) if data is None else sorted(data.draw(st.sets(indices(text))))
    parser, message = form.parser(reads_tools=True), ParsedMessage()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        message.add(parser.feed(text[start:end]))
    message.add(parser.finish())
    assert message == whole


def indices(text):
    return st.integers(0, len(text))


@given(TEXTS, st.sampled_from(FORMATS))
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost(text, form):
    """Digits stand only in what people say; none may go, and what is whole is JSON."""
    message, order = ParsedMessage(), []
    parser = form.parser(reads_tools=True)
    for delta in [d for c in text for d in parser.feed(c)] + parser.finish():
        message.add([delta])
        order.append(getattr(delta, "text", getattr(delta, "name", "")))
    told = sorted(re.findall("[0-9]", "".join(order)))
    assert told == sorted(re.findall("[0-9]", text))
    for call in message.calls:
        assert call.name
        if call.is_complete:
            assert isinstance(json.loads(call.arguments), dict)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from(FORMATS))
@settings(max_examples=100, deadline=None)
def test_ordinary_text_is_content(text, form):
    if "<think>" not in text:
        assert form.parse(text).content == text


def test_only_what_could_become_markup_is_held_back():
    parser = HERMES.parser(reads_tools=True)
    steps = ["a", " <", "b", "\n<tool", "_call>", '{"name": "f", ', '"arguments": {"x"', ": 1}}"]
    told = [parser.feed(step) for step in steps]
    texts = [[getattr(delta, "text", delta) for delta in deltas] for deltas in told]
    assert texts[:6] == [["a"], [], [" <b"], [], [], []]
    assert told[6] == [ToolCallStart(0, "f"), ToolCallArguments(0, '{"x"')]
    assert told[7][0] == ToolCallArguments(0, ": 1}")


def test_a_long_call_and_deep_brackets_take_linear_time():
    deep = '{"name": "f", "arguments": {"a": ' + "[" * 20_000 + "]" * 20_000 + "}}"
    message = HERMES.parse(f"<tool_call>{deep}</tool_call>")
    assert message.calls[0].is_complete
    assert len(message.calls[0].arguments) == 40_000 + len('{"a": }')


def tokenizer_with(source):
    template = None if source is None else ChatTemplate(source)
    fake: Any = SimpleNamespace(
        chat_template=template, tool_template=template, control_tokens={"<s>": 1, "[ARGS]": 9}
    )
    return fake


@pytest.mark.parametrize(
    ("source", "thoughts", "tools"),
    [
        (None, None, None),
        ("{{ messages }}", None, None),
        ("<tool_call> {{ c.split('</think>') }}", THINK, "hermes"),
        ("<tool_call><function=", None, None),
        ("[TOOL_CALLS] [", None, "mistral"),
        ("[TOOL_CALLS]f[ARGS] [THINK][/THINK]", ("[THINK]", "[/THINK]"), "mistral_named"),
        ("<｜tool▁calls▁begin｜> ```json", None, "deepseek_fenced"),
        ("<｜tool▁calls▁begin｜>", None, "deepseek"),
        ("<|python_tag|>", None, "llama"),
        ('\'{"name": "\' \'"parameters": \'', None, "llama"),
    ],
)
def test_the_format_is_read_off_the_template(source, thoughts, tools):
    form = MessageFormat.of(tokenizer_with(source))
    assert (form.thoughts, form.tools) == (thoughts, tools)


def test_markup_that_is_a_control_token_is_told_to_the_engine():
    assert MessageFormat.of(tokenizer_with("[TOOL_CALLS]")).control_texts == ((9, "[ARGS]"),)


def test_our_own_template_has_a_format():
    form = MessageFormat.of(OURS)
    assert (form.thoughts, form.tools, form.control_texts) == (THINK, "hermes", ())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a<北\n"/>}|_')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
CALLS = st.lists(st.tuples(st.sampled_from("fg"), st.dictionaries(st.text(), JSON)), max_size=3)
PLAIN = st.text(st.sampled_from("a北 .<"), max_size=6).map(str.strip)


@given(st.none() | PLAIN.filter(bool), PLAIN, CALLS)
@settings(max_examples=60, deadline=None)
def test_what_our_template_writes_is_what_is_read_of_it(thoughts, content, calls):
    """Training and serving agree: the taught tokens, read as an answer, are the message."""
    tokenizer = OURS
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": thoughts,
        "tool_calls": [{"name": name, "arguments": a} for name, a in calls] or None,
    }
    chat = [{"role": "user", "content": "?"}, message]
    ids, taught = tokenizer.encode_chat_with_mask(chat, tools=[{"name": "f"}])
    answer = [i for i, is_taught in zip(ids, taught, strict=True) if is_taught]
    assert answer.pop() == tokenizer.eos_id
    read_back = read(MessageFormat.of(tokenizer), tokenizer.decode(answer))
    assert read_back == (content, thoughts or "", calls)
