"""A tokenizer folder of ours read by transformers: equal ids, equal rendered chats."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai_core.tokenizer import AutoTokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXTS = ["你好，世界！我们去公园吧。", "Hello world, it's 12 + 30 = 42.\n\n", "😀 café Привет"] * 3
SOURCES = {
    "default": None,
    "system first": (
        "{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}\n{% endif -%}\n"
        "{%- for message in messages if message.role != 'system' %}\n"
        "    {%- set who = {'user': '用户', 'assistant': '助手'}[message.role] %}\n"
        "    {{- '<|im_start|>' + who + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
        "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>助手\\n' }}{% endif %}"
    ),
    "json": "{% for m in messages %}{{ m | tojson }}{{ eos_token }}\n{% endfor %}{{ pad_token }}",
}
text = st.text(
    st.one_of(st.sampled_from("你好世界，。 \n\t"), st.characters(exclude_categories=["Cs"])),
    max_size=30,
).filter(lambda t: "<|" not in t)
conversations = st.builds(
    lambda system, turns: (
        [{"role": "system", "content": system}] * bool(system)
        + [
            {"role": "assistant" if n % 2 else "user", "content": content}
            for n, content in enumerate(turns)
        ]
    ),
    text,
    st.lists(text, min_size=1, max_size=5),
)
quick = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module", params=SOURCES)
def both(request, tmp_path_factory):
    """Our tokenizer and what transformers makes of its folder."""
    logging.disable(logging.WARNING)
    folder = tmp_path_factory.mktemp("tokenizer")
    source = SOURCES[request.param]
    options = {} if source is None else {"chat_template": source}
    AutoTokenizer.train(TEXTS, 330, **options).save_pretrained(folder)
    yield AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    logging.disable(logging.NOTSET)


def test_the_roles_are_the_same(both):
    ours, theirs = both
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    assert theirs.bos_token_id is None
    assert len(theirs) == ours.vocab_size
    assert set(theirs.all_special_ids) <= ours.control_ids


@quick
@given(written=text)
def test_ids_and_text_are_equal(both, written):
    ours, theirs = both
    ids = ours.encode(written)
    assert theirs.encode(written, add_special_tokens=False) == ids
    assert theirs.decode(ids) == written == ours.decode(ids)


@quick
@given(chat=conversations, prompt=st.booleans())
def test_chats_are_equal_as_text_and_as_ids(both, chat, prompt):
    ours, theirs = both
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert ours.render_chat(chat, add_generation_prompt=prompt) == rendered
    ids = theirs.apply_chat_template(
        chat, add_generation_prompt=prompt, return_dict=False, tokenize=True
    )
    assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == ids


@pytest.mark.parametrize("both", ["default"], indirect=True)
def test_the_mask_is_the_one_that_the_generation_marks_give(both):
    ours, theirs = both
    chat = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hello world"},
        {"role": "user", "content": "再见"},
        {"role": "assistant", "content": "好"},
    ]
    wanted = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = ours.encode_chat_with_mask(chat)
    assert (ids, [int(one) for one in mask]) == (wanted["input_ids"], wanted["assistant_masks"])
