"""A byte-level BPE tokenizer in llama.cpp's terms: tokens, merges, and the rule that splits text.

llama.cpp knows the splitting rules of published tokenizers by name and can take no other. Ours
keeps runs of Han, and numerals, apart from the letters beside them; the nearest rule, `qwen35`, is
the same but for that. So it gives the same tokens exactly where no merge could reach across a place
that only our rule splits, which is decided for each vocabulary. One thing remains: the few Han that
Unicode counts as symbols (radicals, U+2E80 to U+2FD5) go with the marks beside them there, with the
Han beside them here.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astrai_core.interop.gguf.characters import HAN, OTHER, kinds_of_first, kinds_of_last
from astrai_core.tokenizer.byte_pairs import SPLIT
from astrai_core.tokenizer.token_bytes import byte_level_alphabet

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
# expressions by which text is cut, in turn, and llama.cpp's name for them
_RULES: dict[tuple[str, ...], str] = {
    (_QWEN2,): "qwen2",
    (_QWEN35,): "qwen35",
    (_QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),): "smaug-bpe",
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3_WORDS): "deepseek-v3",
    ("byte level",): "gpt-2",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the file says of the tokenizer."""

    pre: str
    """llama.cpp's name of the rule that splits text before merging."""
    tokens: list[str]
    """In the alphabet of byte-level BPE, one for each row of the embedding."""
    types: list[str]
    """NORMAL, CONTROL, USER_DEFINED or UNUSED."""
    merges: list[str]
    """Two tokens with a space between, in order."""
    special_ids: dict[str, int]
    """By llama.cpp's names: bos, eos, eot, eom, pad."""
    adds_bos: bool
    """Every prompt begins with bos."""
    adds_eos: bool
    """Every prompt ends with eos."""
    chat_template: str | None
    """Jinja source."""


def read_vocabulary(
    content: Mapping[str, Any],
    vocab_size: int,
    special_ids: Mapping[str, int],
    *,
    adds_bos: bool,
    adds_eos: bool,
    chat_template: str | None,
    pre: str | None = None,
) -> Vocabulary:
    """Translate a `tokenizer.json`.

    Args:
        content: the file's content.
        vocab_size: rows of the embedding; those past the tokenizer's last one are unused.
        special_ids: ids of roles.
        adds_bos: whether a prompt begins with bos.
        adds_eos: whether a prompt ends with eos.
        chat_template: Jinja source.
        pre: take this rule, whatever the tokenizer's own is.

    Raises:
        ValueError: the tokenizer is no byte-level BPE, or llama.cpp would split text differently.
    """
    model = content["model"]
    _refuse_other_models(content, model)
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = ["UNUSED"] * vocab_size
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, "NORMAL"
    for added in content.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = "CONTROL" if added["special"] else "USER_DEFINED"
    return Vocabulary(
        pre=pre or _name_of_rule(content, merges, bool(model.get("ignore_merges"))),
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in merges],
        special_ids=dict(special_ids),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=chat_template,
    )


def _refuse_other_models(content: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    is_plain = model["type"] == "BPE" and not any(
        model.get(key)
        for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    parts = _parts(content.get("pre_tokenizer"))
    is_byte_level = any(part["type"] == "ByteLevel" for part in parts)
    if not (is_plain and is_byte_level):
        raise ValueError(
            "--format gguf takes byte-level BPE tokenizers only; this tokenizer.json holds a "
            f"{model['type']} of another kind"
        )
    # every reader of Qwen's files leaves its NFC to whoever typed the text
    kinds = {part["type"] for part in _parts(content.get("normalizer"))} - {"NFC"}
    if kinds:
        raise ValueError(f"llama.cpp does not know the normalizer {', '.join(sorted(kinds))}")


def _parts(node: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, in turn."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return list(node.get("pretokenizers") or node.get("normalizers") or [])


def _name_of_rule(
    content: Mapping[str, Any], merges: Sequence[Sequence[str]], ignores_merges: bool
) -> str:
    expressions = []
    for part in _parts(content["pre_tokenizer"]):
        if part["type"] == "Split":
            pattern = part["pattern"]
            is_cut = part["behavior"] == "Isolated" and not part["invert"] and "Regex" in pattern
            expressions.append(pattern["Regex"] if is_cut else json.dumps(part))
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            expressions += ["byte level"] * part["use_regex"]
        else:
            expressions.append(json.dumps(part))
    if expressions == [SPLIT] and not ignores_merges:
        _refuse_reaching(merges)
        return "qwen35"
    name = _RULES.get(tuple(expressions))
    if name == "smaug-bpe" and ignores_merges:
        return "llama-bpe"  # the same expression; whole words come before merges
    if name is None or ignores_merges:
        raise ValueError(
            "llama.cpp has no rule that splits text as this tokenizer does "
            f"({' then '.join(expressions)[:200]}); --pre NAME writes one of its rules "
            "nevertheless, and some text then becomes other tokens"
        )
    return name


def _refuse_reaching(merges: Sequence[Sequence[str]]) -> None:
    """Refuse a merge that could join what our rule keeps apart and qwen35 does not."""
    reaching = list(_reaching(merges))
    if reaching:
        left, right = reaching[0]
        raise ValueError(
            f"{len(reaching)} of the tokenizer's {len(merges)} merges join parts of two "
            f"characters, first {left.hex(' ')} with {right.hex(' ')}; llama.cpp, which splits "
            "Chinese from other text less, would make other tokens of some text with them. Train "
            "a tokenizer anew (astrai-data tokenizer), or accept that with --pre qwen35"
        )


def _reaching(merges: Sequence[Sequence[str]]) -> Iterator[tuple[bytes, bytes]]:
    byte_of = byte_level_alphabet()
    for left_text, right_text in merges:
        left = bytes(byte_of[character] for character in left_text)
        right = bytes(byte_of[character] for character in right_text)
        if right[0] & 0xC0 == 0x80:
            continue  # goes on inside a character
        before, after = kinds_of_last(left), kinds_of_first(right)
        # runs of Han, and of what is not Han, are cut alike by both rules
        if not (before == after == {HAN} or before == after == {OTHER}):
            yield left, right
