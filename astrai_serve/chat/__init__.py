"""`astrai-chat`: a conversation in the terminal with any OpenAI-compatible server."""

from astrai_serve.chat.cli import main
from astrai_serve.chat.client import Answer, ChatError, Client, Piece
from astrai_serve.chat.conversation import Conversation
from astrai_serve.chat.options import ChatOptions

__all__ = ["Answer", "ChatError", "ChatOptions", "Client", "Conversation", "Piece", "main"]
