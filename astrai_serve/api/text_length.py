"""Whether a text can fit into the model's context, told without tokenizing it."""

from collections.abc import Iterable

from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api.errors import ContextLengthError


def check_length(
    texts: Iterable[str], tokenizer: AutoTokenizer, max_context: int, param: str
) -> None:
    """Refuse what cannot fit however well it is tokenized, before work is spent on it.

    Args:
        texts: what becomes one prompt.
        tokenizer: tells how many bytes a token has at most.
        max_context: tokens of the model's context.
        param: the parameter that brought the texts.

    Raises:
        ContextLengthError: says how long they are.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > tokenizer.longest_token * max_context:
        raise ContextLengthError(
            f"{param}: {num_bytes:,} bytes cannot fit into this model's context of "
            f"{max_context:,} tokens; shorten it",
            param=param,
        )
