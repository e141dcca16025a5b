"""Learning a byte-level BPE for Chinese and English."""

import json
import logging
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from astrai_core.tokenizer.token_bytes import byte_level_alphabet

_log = logging.getLogger(__name__)

_SPARE = 16  # one in so many tokens more; in Chinese text one in a hundred is taken out

# Words with the mark or space before them; single digits, and single Chinese numerals for the same
# reason: a number then always splits the same way; runs of Han; marks; white space.
NUMERALS = "零一二两三四五六七八九十百千万亿"
SPLIT = "|".join(
    [
        r"(?i:'(?:s|t|re|ve|m|ll|d))",
        r"[^\r\n\p{L}\p{M}\p{N}]?[[\p{L}\p{M}]&&[^\p{Han}]]+",
        rf"[\p{{N}}{NUMERALS}]",
        rf"[\p{{Han}}&&[^{NUMERALS}]]+",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def train_byte_pairs(
    texts: Iterable[str],
    vocab_size: int,
    control_tokens: Sequence[str],
    show_progress: bool = False,
    portable: bool = True,
) -> Tokenizer:
    """Learn merges; the same texts in the same order always give the same tokenizer.

    The control tokens get the first ids and the 256 bytes the next, so every text can be encoded.
    A portable one has no token that joins a character with a part of another.

    Raises:
        ValueError: the vocabulary cannot hold the bytes and control tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(control_tokens) + len(alphabet)):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {len(control_tokens)} control tokens and "
            f"{len(alphabet)} bytes need at least {least}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # more than asked, where some merges are taken out again
        vocab_size=vocab_size + (vocab_size // _SPARE if portable else 0),
        min_frequency=2,
        special_tokens=list(control_tokens),
        initial_alphabet=alphabet,
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if portable:
        tokenizer = _without_straddling(tokenizer, vocab_size)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        _log.warning("the text repeats itself enough for only %d of %d tokens", size, vocab_size)
    return tokenizer


def _without_straddling(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Take out merges that join a character with a part of the next, or parts of two.

    Such tokens end within a character, which a reader of the text as it comes has to wait for, and
    other programs, which split text less than we do, would put them where we do not.

    Args:
        tokenizer: as the trainer left it.
        vocab_size: keep so many tokens at most.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    byte_of = byte_level_alphabet()
    known = {text for text in model["vocab"] if len(text) == 1}
    kept: list[list[str]] = []
    num_others = sum(token["content"] in model["vocab"] for token in content["added_tokens"])
    for left, right in model["merges"]:
        if num_others + len(known) == vocab_size:
            break
        spelled = [bytes(byte_of[character] for character in text) for text in (left, right)]
        if {left, right} <= known and not _straddles(*spelled):
            kept.append([left, right])
            known.add(left + right)
    controls = {token["content"] for token in content["added_tokens"]}
    in_order = sorted(model["vocab"], key=model["vocab"].__getitem__)
    names = [text for text in in_order if text in known or text in controls]
    model["vocab"] = {text: number for number, text in enumerate(names)}
    model["merges"] = kept
    return Tokenizer.from_str(json.dumps(content))


def _straddles(left: bytes, right: bytes) -> bool:
    """Whether the two meet between characters, of which one is not whole."""
    if right[0] & 0xC0 == 0x80:
        return False  # they meet within a character
    start, end = len(left) - 1, 1
    while start > 0 and left[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(right) and right[end] & 0xC0 == 0x80:
        end += 1
    return not (_is_whole(left[start:]) and _is_whole(right[:end]))


def _is_whole(character: bytes) -> bool:
    try:
        character.decode()
    except UnicodeDecodeError:
        return False
    return True
