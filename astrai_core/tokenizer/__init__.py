"""Text to token ids and back; messages to prompts."""

from astrai_core.tokenizer.chat_template import ChatTemplate, Message
from astrai_core.tokenizer.default_template import DEFAULT_TEMPLATE
from astrai_core.tokenizer.tokenizer import AutoTokenizer

__all__ = ["DEFAULT_TEMPLATE", "AutoTokenizer", "ChatTemplate", "Message"]
