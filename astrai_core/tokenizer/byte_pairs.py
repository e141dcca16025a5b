"""Learning a byte-level BPE for Chinese and English."""

import logging
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

_log = logging.getLogger(__name__)

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
) -> Tokenizer:
    """Learn merges; the same texts in the same order always give the same tokenizer.

    The control tokens get the first ids and the 256 bytes the next, so every text can be encoded.

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
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(control_tokens),
        initial_alphabet=alphabet,
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        _log.warning("the text repeats itself enough for only %d of %d tokens", size, vocab_size)
    return tokenizer
