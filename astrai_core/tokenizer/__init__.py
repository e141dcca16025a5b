"""Text to token ids and back; messages to prompts."""

from astrai_core.tokenizer.chat_template import DEFAULT_TEMPLATE, ChatTemplate, Message
from astrai_core.tokenizer.tokenizer import AutoTokenizer

__all__ = ["DEFAULT_TEMPLATE", "AutoTokenizer", "ChatTemplate", "Message"]
