"""What llama.cpp cannot compute or split is refused by name; what it can is named exactly."""

import builtins
import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch

from astrai_core.folder_export import export_gguf
from astrai_core.interop.gguf import choose_architecture, read_vocabulary
from astrai_core.model import AutoModel, ModelConfig, Transformer
from astrai_core.tokenizer import AutoTokenizer
from astrai_core.tokenizer.token_bytes import byte_level_alphabet

MLA = {
    "attn_type": "mla", "use_qk_norm": False, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
MOE = {"ffn_type": "moe", "n_routed_experts": 6, "n_activated_experts": 2, "dim_ffn_expert": 8}
GROUPS = {"moe_topk_method": "group_limited_greedy", "n_expert_groups": 3, "n_activated_groups": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_len": 32}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fields(**changes) -> dict:
    return dataclasses.asdict(ModelConfig.from_dict(changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_gated_attention": True}, "qwen3 does not compute .*use_gated_attention True"),
        ({"sliding_window": 100}, "sliding_window 100"),
        ({"attention_output_bias": True}, "qwen3 .*attention_output_bias"),
        ({"ffn_bias": True}, "ffn_bias"),
        ({**MOE, "n_shared_experts": 1}, "qwen3moe .*n_shared_experts 1.*norm_topk_prob False"),
        ({**MOE, "use_qk_norm": False}, "experts only with use_qk_norm"),
        ({**MLA, **MOE, **GROUPS, "n_shared_experts": 1}, "ranks a group by its two best"),
        ({**MLA, "latent_norm_eps": 1e-5}, "latent_norm_eps 1e-05"),
        ({**MLA, "attention_bias": True}, "deepseek2 .*attention_bias"),
        ({**MLA, "q_lora_rank": 8, "n_layers": 27}, "q_lora_rank 8"),
        ({**MLA, "rope_scaling": YARN}, "mscale and mscale_all_dim must be equal"),
        ({"rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast is always 32"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate is always true"),
    ],
)
def test_what_it_computes_otherwise_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        choose_architecture(fields(**changes), torch.ones(4))


def test_a_window_as_long_as_the_context_is_none():
    assert choose_architecture(fields(sliding_window=2048), torch.ones(4)).name == "qwen3"


def content(expressions, merges=(), **model) -> dict:
    """A `tokenizer.json` of so many letters and merges."""
    splits = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in expressions
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not splits}
    vocabulary = {text: n for n, text in enumerate({t for m in merges for t in (*m, "".join(m))})}
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, last]},
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": list(merges), **model},
    }


def pre_of(tokenizer: dict, pre=None) -> str:
    options = {"adds_bos": False, "adds_eos": False, "chat_template": None, "pre": pre}
    return read_vocabulary(tokenizer, 400, {}, **options).pre


def test_the_rule_is_named_by_its_expressions():
    llama3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    assert pre_of(content([QWEN2])) == "qwen2"
    assert pre_of(content([llama3], ignore_merges=True)) == "llama-bpe"
    assert pre_of(content([llama3])) == "smaug-bpe"
    assert pre_of(content([])) == "gpt-2"


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (content([r"\s+"]), r"no rule that splits text as this tokenizer does .*--pre NAME"),
        (content([QWEN2], ignore_merges=True), "no rule"),
        (content([QWEN2], byte_fallback=True), "byte-level BPE tokenizers only"),
        ({**content([QWEN2]), "normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
    ],
)
def test_a_tokenizer_it_would_read_otherwise_is_refused(tokenizer, named):
    with pytest.raises(ValueError, match=named):
        pre_of(tokenizer)


def trained(texts, vocab_size) -> tuple[AutoTokenizer, dict]:
    """A tokenizer of ours, and its `tokenizer.json`."""
    tokenizer = AutoTokenizer.train(texts, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tokenizer, json.loads((Path(folder) / "tokenizer.json").read_text("utf-8"))


def spell(text: bytes) -> str:
    """Bytes in the alphabet of byte-level BPE."""
    character_of = {byte: character for character, byte in byte_level_alphabet().items()}
    return "".join(character_of[byte] for byte in text)


@pytest.mark.parametrize(
    ("left", "right", "is_exact"),
    [
        ("他", "们", True),  # two Han: one run for both rules
        ("(", "(", True),
        (" ", "a", True),
        ("（", "他", False),  # we split here
        ("他", "a", False),
        ("三", "他", False),
        ("⺀", "他", False),
        (b"\x88", "是", False),  # may end a Han or a mark
        ("答", b"\xe6\xa1", True),  # begins nothing but Han
        (b"\xe6", b"\x98", True),  # within a character
    ],
)
def test_merges_decide_whether_ours_is_split_alike(left, right, is_exact):
    _, tokenizer = trained(["x"], 259)
    pair = [spell(one if isinstance(one, bytes) else one.encode()) for one in (left, right)]
    tokenizer["model"]["merges"] = [pair]
    if is_exact:
        assert pre_of(tokenizer) == "qwen35"
        return
    with pytest.raises(ValueError, match="1 of the tokenizer's 1 merges"):
        pre_of(tokenizer)
    assert pre_of(tokenizer, "qwen35") == "qwen35"


def test_training_leaves_no_merge_of_half_characters():
    texts = ["答案是什么？这是一个问题的答案。", "小路上的问题，在哪里？（是）"] * 20
    tokenizer, content_of_file = trained(texts, 300)
    assert len(content_of_file["model"]["merges"]) > 20
    assert pre_of(content_of_file) == "qwen35"
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token).decode(errors="replace")
        assert text.strip("\ufffd") in (text, ""), "characters and a part of one in one token"


def test_a_tokenizer_that_need_not_be_portable_learns_them():
    texts = ["答案是什么？这是一个问题的答案。", "小路上的问题，在哪里？（是）"] * 20
    tokenizer = AutoTokenizer.train(texts, 300, portable=False)
    halves = [
        text
        for token in range(tokenizer.vocab_size)
        if (text := tokenizer.token_bytes(token).decode(errors="replace")).strip("\ufffd")
        not in (text, "")
    ]
    assert halves
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


@pytest.fixture
def folder(tmp_path):
    """A model folder with a tokenizer, and one number that float16 cannot hold."""
    model = Transformer(ModelConfig(vocab_size=260, dim=32, n_layers=1, dim_ffn=48, n_heads=2))
    with torch.no_grad():
        model.embed_tokens.weight[0, 0] = 1e6
    AutoModel.save_pretrained(model, tmp_path / "m")
    AutoTokenizer.train(["x"], 259).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_failed_export_leaves_the_older_file(folder, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_text("older")
    with pytest.raises(ValueError, match=r"--type f16 cannot hold token_embd.weight, .* 1e\+06"):
        export_gguf(folder, tmp_path / "m.gguf", "f16", None)
    assert (tmp_path / "m.gguf").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_without_the_package_it_says_what_to_install(folder, tmp_path, monkeypatch):
    real = builtins.__import__

    def without_gguf(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ValueError, match=r"pip install 'astrai\[export\]'"):
        export_gguf(folder, tmp_path / "m.gguf", None, None)


def test_a_folder_without_tokenizer_is_no_gguf_file(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        export_gguf(folder, tmp_path / "m.gguf", None, None)
