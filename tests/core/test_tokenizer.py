import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from astrai_core.tokenizer import AutoTokenizer
from astrai_core.tokenizer.folder_files import twin_of
from astrai_core.tokenizer.stand_ins import StandIns, restore
from astrai_core.tokenizer.token_bytes import speller

TEXTS = [
    "你好，世界！今天天气很好，我们去公园吧。你好，世界！",
    "Hello world, the weather is fine today. Hello world, it's 12 + 30 = 42.",
    "def f(x):\n    return x  # 注释\n\n",
    "emoji 😀👩‍👩‍👧 café naïve Привет",
] * 3
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# what somebody writes who wants to speak as the system: control tokens, halves of them, white space
hostile_text = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL, "<|im_start|>system\n", "<|im_", "start|>", "<", "|>", "end|>", "<|im_end|"]
        ),
        st.sampled_from([" ", "\n", "\U000f0000", "\U000f0001", "好", "a"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    max_size=8,
).map("".join)
quick = settings(max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def tokenizer():
    """Trained on a handful of lines in two languages."""
    logging.disable(logging.WARNING)
    yield AutoTokenizer.train(TEXTS, 400)
    logging.disable(logging.NOTSET)


def chats(content):
    """Conversations that end with an answer."""
    turn = st.tuples(content, content)
    return st.builds(
        lambda system, turns: (
            [{"role": "system", "content": system}] * bool(system)
            + [
                {"role": role, "content": text}
                for pair in turns
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        ),
        content,
        st.lists(turn, min_size=1, max_size=3),
    )


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = AutoTokenizer.train(iter(TEXTS), 400)
    assert again.fingerprint == tokenizer.fingerprint
    assert AutoTokenizer.train([*TEXTS, "zzzz zzzz"], 400).fingerprint != tokenizer.fingerprint


def test_training_in_another_process_gives_the_same_tokenizer(tokenizer):
    program = (
        "import sys, json; from astrai_core.tokenizer import AutoTokenizer as T;"
        "print(T.train(json.load(sys.stdin), 400).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(TEXTS),
        text=True,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path.cwd())},
    )
    assert done.stdout.strip() == tokenizer.fingerprint


def test_the_vocabulary_is_laid_out_as_documented(tokenizer):
    assert sorted(tokenizer.control_ids) == [0, 1, 2]
    assert [tokenizer.decode([i], skip_special_tokens=False) for i in range(3)] == CONTROL
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (2, 0, None)
    assert tokenizer.stop_ids == {0, 2}
    assert {tokenizer.token_bytes(i) for i in range(3, 259)} == {bytes([b]) for b in range(256)}
    assert len(tokenizer.encode("你好，世界")) < len("你好，世界".encode())


def test_a_number_always_splits_into_its_digits(tokenizer):
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("1234+12")]
    assert pieces == [b"1", b"2", b"3", b"4", b"+", b"1", b"2"]


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size 258 is too small: .* at least 259"):
        AutoTokenizer.train(TEXTS, 258)


@quick
@given(text=any_text)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert sum(tokenizer.token_byte_lengths[i] for i in ids) == len(text.encode())
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@quick
@given(text=hostile_text)
def test_typed_text_never_holds_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_half_a_surrogate_pair_is_refused(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            encode("a\ud83d")


@quick
@given(chat=chats(hostile_text))
def test_message_text_never_becomes_a_control_token(tokenizer, chat):
    """The control tokens are those of the frame, two a turn, whatever the messages say."""
    frame = [1, 2] * len(chat)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=False)
    assert [i for i in ids if i in tokenizer.control_ids] == frame
    wanted = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
    assert tokenizer.decode(ids, skip_special_tokens=False) == wanted
    assert tokenizer.render_chat(chat, add_generation_prompt=False) == wanted
    masked, _ = tokenizer.encode_chat_with_mask(chat)
    assert [i for i in masked if i in tokenizer.control_ids] == frame
    assert tokenizer.decode(masked, skip_special_tokens=False) == wanted


@quick
@given(chat=chats(hostile_text))
def test_the_mask_is_the_answers_and_their_ends(tokenizer, chat):
    ids, mask = tokenizer.encode_chat_with_mask(chat)
    assert len(ids) == len(mask)
    answers = "".join(m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant")
    trained = [i for i, is_trained in zip(ids, mask, strict=True) if is_trained]
    assert tokenizer.decode(trained, skip_special_tokens=False) == answers
    ids_last, mask_last = tokenizer.encode_chat_with_mask(chat, which="last")
    trained = [i for i, is_trained in zip(ids_last, mask_last, strict=True) if is_trained]
    last = chat[-1]["content"] + "<|im_end|>"
    assert tokenizer.decode(trained, skip_special_tokens=False) == last


@quick
@given(chat=chats(any_text))
def test_the_prompt_is_trained_as_it_is_served(tokenizer, chat):
    """The ids before the last answer are those that serving would feed the model."""
    ids, mask = tokenizer.encode_chat_with_mask(chat, which="last")
    assert ids[: mask.index(True)] == tokenizer.apply_chat_template(chat[:-1])


def test_a_chat_without_an_answer_cannot_be_trained_on(tokenizer):
    with pytest.raises(ValueError, match="no message has the role assistant"):
        tokenizer.encode_chat_with_mask([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("message", [{"content": "a"}, "hi", {"role": 3, "content": "a"}])
def test_what_is_no_message_is_shown(tokenizer, message):
    with pytest.raises(ValueError, match="a message must be a dict with a role, not"):
        tokenizer.apply_chat_template([message])


def with_template(tokenizer, tmp_path, source):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def joining(tokenizer, tmp_path_factory):
    """A template that writes nothing between the messages."""
    source = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    return with_template(tokenizer, tmp_path_factory.mktemp("joining"), source)


@quick
@given(texts=st.lists(hostile_text, min_size=1, max_size=4))
def test_a_template_that_joins_and_trims_forms_no_control_token(joining, texts):
    ids = joining.apply_chat_template([{"role": "user", "content": text} for text in texts])
    assert joining.control_ids.isdisjoint(ids)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (
            "{% for m in messages %}{{ '<|im_start|>' ~ loop.revindex ~ m.content }}{% endfor %}",
            "writes message 2 differently once more messages follow",
        ),
        (
            "{% for m in messages %}{{ m.role ~ m.content }}\n{% endfor %}",
            "without a control token",
        ),
    ],
)
def test_a_template_whose_answers_cannot_be_told_apart_is_refused(
    tokenizer, tmp_path, source, named
):
    other = with_template(tokenizer, tmp_path, source)
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ValueError, match=named):
        other.encode_chat_with_mask(chat)


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert back.fingerprint == tokenizer.fingerprint
    assert (back.stop_ids, back.eos_id, back.pad_id) == (tokenizer.stop_ids, 2, 0)
    assert back.chat_template is not None
    assert back.chat_template.fingerprint == tokenizer.chat_template.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer file"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json is not a tokenizer file"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "3 is not a token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "neither a string nor a list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "neither a string nor"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "chat template line 1"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": true}}}',
            "gives '<|im_end|>' the id 7, tokenizer.json 2",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": 3}}}', "describe a"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": 3}}', "describe a token"),
        ("tokenizer_config.json", '{"extra_special_tokens": 3}', "is not a list of tokens"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
    ],
)
def test_a_broken_file_is_named(tokenizer, tmp_path, file, content, named):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the texts hold metacharacters
        AutoTokenizer.from_pretrained(tmp_path)
    assert named in str(error.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json: give a folder"):
        AutoTokenizer.from_pretrained(tmp_path)


@quick
@given(text=hostile_text)
def test_stand_ins_give_back_exactly_what_they_took(text):
    hidden, originals = StandIns(CONTROL).hide({"a": [text, (text,)]})
    assert not any(token in hidden["a"][0] for token in CONTROL)
    assert restore(hidden["a"][0], originals) == restore(hidden["a"][1][0], originals) == text


def test_named_templates_in_files_win_and_stay_in_files(tmp_path):
    AutoTokenizer.train(["hello"] * 3, 262).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("plain{{ messages[0].thinking }}")
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    (tmp_path / "a" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    chat = [{"role": "assistant", "content": "", "reasoning": " thought"}]
    assert again.render_chat(chat) == "plain thought"
    assert again.render_chat(chat, tools=[{"name": "f"}]) == "tools"
    AutoTokenizer.train(["hello"] * 3, 262).save_pretrained(tmp_path / "b")
    assert not list(tmp_path.glob("b/**/*.jinja")), "those of another tokenizer would win"


def test_a_twin_reads_alike_and_has_settings_of_its_own(tokenizer):
    first = tokenizer._markup
    twin = twin_of(first)
    assert json.loads(twin.to_str()) == json.loads(first.to_str())
    twin.encode_special_tokens = True
    start = first.token_to_id("<|im_start|>")
    assert first.encode("<|im_start|>你好").ids[0] == start
    assert start not in twin.encode("<|im_start|>你好").ids


def test_a_twin_has_the_ids_of_a_file_that_leaves_some_out(tokenizer):
    content = json.loads(tokenizer._markup.to_str())
    far = content["added_tokens"][0] | {"id": 5_000, "content": "<far>"}
    content["model"]["vocab"]["<far>"] = 5_000
    content["added_tokens"].append(far)
    first = Tokenizer.from_str(json.dumps(content))
    assert first.token_to_id("<far>") == 5_000
    assert twin_of(first).get_added_tokens_decoder() == first.get_added_tokens_decoder()


def test_a_token_outside_of_the_alphabet_of_bytes_is_its_own_text(tokenizer):
    content = json.loads(tokenizer._markup.to_str())
    content["model"]["vocab"]["two words"] = 400
    raw = Tokenizer.from_str(json.dumps(content))
    assert speller(raw)("two words") == b"two words" == raw.decode([400]).encode()
    assert speller(raw)("ä½ł") == "你".encode()
