import time

import pytest

from astrai_core.tokenizer import DEFAULT_TEMPLATE, ChatTemplate
from astrai_core.tokenizer.chat_template import MAX_SECONDS

CHAT = [{"role": "user", "content": "嗨"}, {"role": "assistant", "content": "hi 👋"}]


def test_the_default_template_by_hand():
    template = ChatTemplate(DEFAULT_TEMPLATE)
    assert template.render(CHAT) == (
        "<|im_start|>user\n嗨<|im_end|>\n<|im_start|>assistant\nhi 👋<|im_end|>\n"
    )
    assert template.render(CHAT[:1], add_generation_prompt=True).endswith(
        "嗨<|im_end|>\n<|im_start|>assistant\n"
    )


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"城市": "北京"}}}


def test_tools_calls_and_thoughts_in_the_default_template_by_hand():
    messages = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "reasoning": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
    ]
    assert ChatTemplate(DEFAULT_TEMPLATE).render(messages, True, TOOLS) == (
        "<|im_start|>system\nbrief\n\n# Tools\n\nFunctions that can be called:\n<tools>\n"
        '{"name": "f", "parameters": {"type": "object"}}\n</tools>\n\n'
        'A call is written as:\n<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"城市": "北京"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("enabled", "wanted"), [(True, "<think>\n"), (False, "<think>\n\n</think>\n\n")]
)
def test_thoughts_can_be_opened_or_closed_for_the_answer(enabled, wanted):
    template = ChatTemplate(DEFAULT_TEMPLATE)
    plain = template.render(CHAT[:1], True)
    assert template.render(CHAT[:1], True, enable_thinking=enabled) == plain + wanted
    full = template.render([*CHAT[:1], {**CHAT[1], "thinking": "hm"}], enable_thinking=enabled)
    assert full.startswith(plain + "<think>\n")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ call.arguments | tojson }}", '{"a": "天"}'),
        ("{{ call['arguments']|tojson }}", '{"a": "天"}'),
        ("{{ '' + call.arguments }}", '{"a": "天"}'),
        ("{{ call | tojson }}", '{"name": "f", "arguments": {"a": "天"}}'),
    ],
)
@pytest.mark.parametrize("arguments", [{"a": "天"}, '{"a": "天"}'], ids=["object", "text"])
@pytest.mark.parametrize("outer", [True, False])
def test_a_template_gets_arguments_as_it_wants_them(source, wanted, arguments, outer):
    call = {"name": "f", "arguments": arguments}
    message = {"role": "assistant", "tool_calls": [{"function": call} if outer else call]}
    template = ChatTemplate("{% set call = messages[0].tool_calls[0].function %}" + source)
    assert template.render([message]) == wanted


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages is empty"),
        (
            [{"role": "judge", "content": "x"}],
            "unknown role judge: use system, user, assistant or tool",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of a message must be a str"),
        ([{"role": "user", "content": None}], "content of a message must be a string"),
    ],
)
def test_the_default_template_says_what_it_refuses(messages, named):
    with pytest.raises(ValueError, match=named):
        ChatTemplate(DEFAULT_TEMPLATE).render(messages)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
            "{% endfor %}{{ ns.n }}",
            "2",
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
            "{% endfor %}",
            "assistant",
        ),
        ("{{ messages | map(attribute='role') | join('+') }}", "user+assistant"),
        ("{{ messages[1:] | length }}{{ messages[::-1][0]['role'] }}", "1assistant"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "嗨"}'),
        ("{% macro m(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ m(1) ~ m('a', y=3) }}", "[12][a3]"),
        ("{% set a, b = 'x', [1, 2] %}{{ a }}{{ b }}{{ {'k': (1,)} }}", "x[1, 2]{'k': (1,)}"),
        ("{% set x %}<{{ messages[0].content }}>{% endset %}{{ x * 2 }}", "<嗨><嗨>"),
        ("{{ undefined_name }}{{ tools is none }}", "True"),
        ("{{ '%s-%05.1f' % ('a', 2) }}{{ '{:>4}'.format(7) }}", "a-002.0   7"),
        ("{{ 'a-b'.split('-')[1] }}", "b"),
        ("{% generation %}said{% endgeneration %}{{ 'x' | indent(2) | upper }}", "saidX"),
        (
            "{% for k, v in messages[0] | items %}{{ k }}={{ v }} {% endfor %}",
            "role=user content=嗨 ",
        ),
    ],
)
def test_what_templates_of_real_folders_use_works(source, wanted):
    assert ChatTemplate(source).render(CHAT) == wanted


def grow(step: str, start: str = "[1]", times: int = 60) -> str:
    """A template that applies a step to x again and again, then prints it."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}"
        f"{{% set ns.x = {step} %}}{{% endfor %}}{{{{ ns.x }}}}"
    )


HOSTILE = {
    "loop": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "range": "{{ range(10000000000) | list }}",
    "times": "{{ 'a' * 10000000000 }}",
    "list times": "{{ ['a'] * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "plus": grow("ns.x + ns.x", "'aaaa'"),
    "tilde": grow("ns.x ~ ns.x", "'aaaa'"),
    "join": grow("[ns.x, ns.x] | join", "'aaaa'"),
    "replace": grow("ns.x | replace('a', 'aaaaaaaa')", "'aaaa'"),
    "replace method": grow("ns.x.replace('a', 'aaaaaaaa')", "'aaaa'"),
    "nested": grow("[ns.x, ns.x]"),
    "nested tuple": grow("(ns.x, ns.x)"),
    "nested dict": grow("dict(a=ns.x, b=ns.x)"),
    "nested pairs": grow("{'a': ns.x, 'b': ns.x}"),
    "sum": grow("[ns.x, ns.x] | sum(start=[])"),
    "deep": grow("[ns.x]", times=100_000),
    "kept": grow("ns.x + ['a' * (7000000 - i)]", "[]", 5000),
    "blocks": "{% set x %}aaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "slices": "{% set s = 'a' * 7000000 %}"
    + "".join(f"{{% set a{i} = s[{i}:] %}}" for i in range(500)),
    "width": "{{ '%999999999d' % 1 }}",
    "star width": "{{ '%*d' % (999999999, 1) }}",
    "brace width": "{{ '{:>999999999}'.format(1) }}",
    "centre": "{{ 'a' | center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "indent": "{{ 'a\nb' | indent(999999999) }}",
    "batch": "{{ [1] | batch(999999999, 0) | list }}",
    "output": "{% set s = 'a' * 7000000 %}{% for i in range(100000) %}{{ s }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') | attr('__mro__') }}{{ x.y }}",
    "map attr": "{{ [''] | map(attribute='__class__.__mro__') | list | first | last }}{{ x.y }}",
    "format attr": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals": "{{ raise_exception.__globals__ }}{{ x.y }}",
    "self": "{{ self._TemplateReference__context.environment }}{{ x.y }}",
    "change": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_time_with_one_error(name):
    begin = time.monotonic()
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate(HOSTILE[name]).render(CHAT)
    assert time.monotonic() - begin < MAX_SECONDS + 5


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{% for %}", "chat template line 1"),
        ("\n\n{{ 'a }}", "chat template line 3"),
        ("{% if x %}", "chat template line 1"),
        ("{% trans %}{% endtrans %}", "unknown tag 'trans'"),
        ("{{ x | nofilter }}", "nofilter"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "nested too deeply"),
    ],
)
def test_what_is_no_template_is_refused_when_it_is_read(source, named):
    with pytest.raises(ValueError, match=named):
        ChatTemplate(source)


def test_a_template_sees_neither_the_machine_nor_other_renderings():
    assert ChatTemplate("{{ environ }}{{ os }}{{ open }}{{ __builtins__ }}").render(CHAT) == ""
    remembering = ChatTemplate("{{ kept }}{% set kept = 'x' %}")
    assert remembering.render(CHAT) == remembering.render(CHAT) == ""
