import pytest
from tokenizers import Tokenizer, models

from astrai_core.tokenizer import AutoTokenizer
from astrai_train.data.records import read_records
from astrai_train.data.tokenizing import encode_records, end_of_text_id


def test_documents_end_with_the_end_of_text(folder, tokenizer, texts):
    columns = encode_records(list(read_records(folder / "texts.jsonl")), "seq", tokenizer)
    ids = [columns["input_ids"][n].tolist() for n in range(len(texts))]
    assert [tokenizer.decode(one, skip_special_tokens=False) for one in ids] == [
        text + "<|endoftext|>" for text in texts
    ]
    # a control token that is spelled out in a text is not one
    assert all(tokenizer.control_ids.isdisjoint(one[:-1]) for one in ids)


def test_chats_teach_what_the_assistant_says(folder, tokenizer, chats):
    columns = encode_records(list(read_records(folder / "chats.jsonl")), "sft", tokenizer)
    for n, chat in enumerate(chats):
        pairs = zip(columns["input_ids"][n].tolist(), columns["trained"][n].tolist(), strict=True)
        taught = [token for token, trained in pairs if trained]
        answers = [m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant"]
        assert tokenizer.decode(taught, skip_special_tokens=False) == "".join(answers)


def test_a_chat_without_an_answer_names_its_line(tmp_path, write_lines, tokenizer):
    asked = {"role": "user", "content": "a"}
    good = {"messages": [asked, {"role": "assistant", "content": "b"}]}
    path = write_lines(tmp_path / "a.jsonl", [good, {"messages": [asked]}])
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: nothing to train on"):
        encode_records(list(read_records(path)), "sft", tokenizer)


def test_half_a_surrogate_names_its_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: .*surrogate"):
        encode_records(list(read_records(path)), "seq", tokenizer)


def test_a_tokenizer_that_cannot_end_a_document_is_refused():
    tokenizer = AutoTokenizer(Tokenizer(models.BPE()), {})
    with pytest.raises(ValueError, match="eos_token"):
        end_of_text_id(tokenizer)


def test_calls_of_tools_and_thoughts_are_taught_and_results_are_read(
    tmp_path, write_lines, tokenizer
):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "北京"}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "reasoning_content": "hm", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages, "tools": tools}])
    columns = encode_records(list(read_records(path)), "sft", tokenizer)
    ids, trained = (columns[name][0].tolist() for name in ("input_ids", "trained"))
    taught = [token for token, is_taught in zip(ids, trained, strict=True) if is_taught]
    assert tokenizer.decode(taught, skip_special_tokens=False) == (
        "<think>\nhm\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
        "It rains.<|im_end|>"
    )
    assert '{"name": "f", "parameters": {"type": "object"}}' in tokenizer.decode(ids)
