"""What the grammars let through, asked of llguidance itself, and read back by the parser."""

import json
from typing import Any

import pytest

from astrai_core.generation import Structure
from astrai_core.tokenizer import AutoTokenizer
from astrai_core.tokenizer.message_parsing import MessageFormat
from astrai_core.tokenizer.tool_grammar import Tool, ToolGrammar, after_thoughts
from astrai_serve.engine.structured import GrammarCompiler

THINK = ("<think>", "</think>")
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [Tool(name="weather", parameters=CITY), Tool(name="now")]
F = '"weather", "arguments": {"city": "北京"}}'
OTHER = '"weather", "arguments": {"town": "x"}}'
LLAMA_F = '{"name": "weather", "parameters": {"city": "北京"}}'


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.train(["hello world, hello <tool_call>"] * 9, 262)


@pytest.fixture(scope="module")
def takes(tokenizer):
    """Whether a structure lets a model write a text and end there."""
    compiler = GrammarCompiler.of_tokenizer(tokenizer, tokenizer.vocab_size)
    assert compiler is not None

    def takes(structure, text, control_texts=()):
        matcher = compiler.matcher(structure)
        for token_id in encode(text, control_texts):
            try:
                matcher.advance(token_id)
            except RuntimeError:
                return False
        return matcher._matcher.is_accepting()

    def encode(text, control_texts):
        for token_id, name in control_texts:
            if name in text:
                before, _, after = text.partition(name)
                return [*encode(before, control_texts), token_id, *encode(after, control_texts)]
        return tokenizer.encode(text)

    yield takes
    compiler.close()


DS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>")
DS_END = ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>',
    "llama": LLAMA_F,
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "北京"}}]',
    "mistral_named": '[TOOL_CALLS]weather[ARGS]{"city": "北京"}',
    "deepseek": f'{DS[0]}{DS[1]}weather{DS[2]}{{"city": "北京"}}{"".join(DS_END)}',
    "deepseek_fenced": f"{DS[0]}{DS[1]}function{DS[2]}weather\n```json\n"
    f'{{"city": "北京"}}\n```{"".join(DS_END)}',
}
TWICE = {
    "hermes": f"{CALLS['hermes']}\n{CALLS['hermes']}",
    "llama": f"{LLAMA_F}; {LLAMA_F}",
    "mistral": f"{CALLS['mistral'][:-1]}, {CALLS['mistral'][14:]}",
    "mistral_named": CALLS["mistral_named"] * 2,
    "deepseek": CALLS["deepseek"].removesuffix(DS_END[1]) + CALLS["deepseek"].removeprefix(DS[0]),
}


@pytest.mark.parametrize("shown", [(), ((1, "[TOOL_CALLS]"), (0, DS[0]))], ids=["text", "control"])
@pytest.mark.parametrize("style", CALLS)
def test_a_forced_call_is_a_call_that_the_parser_reads(takes, style, shown):
    form = MessageFormat(tools=style, control_texts=shown)
    structure = ToolGrammar(form, TOOLS).forced(parallel=True)
    assert takes(structure, CALLS[style], shown)
    assert not takes(structure, CALLS[style].replace("city", "town"), shown)
    assert not takes(structure, CALLS[style].replace("weather", "other"), shown)
    assert not takes(structure, "It rains.", shown)
    call = form.parse(CALLS[style]).calls[0]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "北京"})


@pytest.mark.parametrize("style", TWICE)
def test_a_second_call_only_where_calls_may_be_parallel(takes, style):
    grammar = ToolGrammar(MessageFormat(tools=style), TOOLS)
    for write in (grammar.forced, grammar.free):
        assert takes(write(parallel=True), TWICE[style])
        assert not takes(write(parallel=False), TWICE[style])
        assert takes(write(parallel=False), CALLS[style])


@pytest.mark.parametrize("style", CALLS)
def test_a_free_answer_is_text_or_a_call_by_its_schema(takes, style):
    structure = ToolGrammar(MessageFormat(tools=style), TOOLS).free(parallel=False)
    assert takes(structure, "It rains: {} [x] <b>\n")
    assert takes(structure, CALLS[style])
    assert takes(structure, "Let me see.\n" + CALLS[style])
    assert not takes(structure, CALLS[style].replace("city", "town"))


def test_open_thoughts_are_closed_before_the_form(takes):
    form = MessageFormat(thoughts=THINK, tools="hermes")
    call = ToolGrammar(form, TOOLS, opened_thoughts=True).forced(parallel=False)
    assert takes(call, f"so <b>\n</think>\n\n{CALLS['hermes']}")
    assert not takes(call, CALLS["hermes"])
    choice = after_thoughts(Structure(choice=("是", "否")), form)
    assert takes(choice, "hm</think>是")
    assert not takes(choice, "是")
    of_json = after_thoughts(Structure.of_json(CITY), form)
    assert takes(of_json, 'hm\n</think>\n\n{"city": "a"}')
    with pytest.raises(ValueError, match="regex cannot be kept"):
        after_thoughts(Structure(regex="a"), form)


def test_thoughts_end_with_a_control_token_where_that_is_what_ends_them(takes):
    shown = ((1, "[/THINK]"),)
    form = MessageFormat(thoughts=("[THINK]", "[/THINK]"), control_texts=shown)
    choice = after_thoughts(Structure(choice=("a",)), form)
    assert takes(choice, "hm[/THINK]a", shown)
    assert not takes(choice, "hm[/THINK]a")
