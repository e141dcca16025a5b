"""How a model writes messages, read off its chat templates."""

from dataclasses import dataclass

from astrai_core.tokenizer.message_parsing.deltas import ParsedMessage
from astrai_core.tokenizer.message_parsing.markup import (
    MARKUP,
    OPENERS,
    THOUGHTS,
    ToolStyle,
    Where,
)
from astrai_core.tokenizer.message_parsing.parser import MessageParser
from astrai_core.tokenizer.tokenizer import AutoTokenizer


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """How a model writes thoughts and calls of tools; None where it does neither."""

    thoughts: tuple[str, str] | None = None
    """What opens and closes them."""
    tools: ToolStyle | None = None
    control_texts: tuple[tuple[int, str], ...] = ()
    """Markup that is a control token: its id, and the text that the parser wants to see."""

    @classmethod
    def of(cls, tokenizer: AutoTokenizer) -> "MessageFormat":
        """Read the format off a tokenizer's chat templates."""
        templates = (tokenizer.chat_template, tokenizer.tool_template)
        source = "\n".join(template.source for template in templates if template is not None)
        shown = [(i, text) for text, i in tokenizer.control_tokens.items() if text in MARKUP]
        return cls(
            thoughts=next((pair for pair in THOUGHTS if pair[1] in source), None),
            tools=_style_of(source),
            control_texts=tuple(sorted(shown)),
        )

    def parser(
        self, *, prompt: str = "", continued: str | None = None, reads_tools: bool = False
    ) -> MessageParser:
        """Start to read an answer.

        Args:
            prompt: the end of the prompt, control tokens included: it may have opened the thoughts,
                or closed them.
            continued: the beginning of the answer, where the prompt ends in the middle of one.
            reads_tools: whether calls are told apart; else they are content.
        """
        where = self.where_after(prompt, continued)
        return MessageParser(self, where=where, reads_tools=reads_tools)

    def where_after(self, prompt: str, continued: str | None = None) -> Where:
        """Where an answer to a prompt begins; the arguments are those of `parser`."""
        if self.thoughts is None:
            return "content"
        opener, closer = self.thoughts
        if continued is not None:
            if continued.lstrip().startswith(opener):
                return "content" if closer in continued else "thoughts"
            return "content" if continued.strip() else "start"
        end = prompt.rstrip()
        if end.endswith(opener):
            return "thoughts"
        return "content" if end.endswith(closer) else "start"

    def parse(self, text: str, *, prompt: str = "", reads_tools: bool = True) -> ParsedMessage:
        """Take a whole answer apart."""
        parser = self.parser(prompt=prompt, reads_tools=reads_tools)
        message = ParsedMessage()
        message.add(parser.feed(text))
        message.add(parser.finish())
        return message


def _style_of(source: str) -> ToolStyle | None:
    """The style of calls in a template; None where it has none that is known here."""
    if "<function=" in source or "<arg_key>" in source:
        return None  # calls written as XML, by Qwen3-Coder and GLM
    if OPENERS["hermes"] in source:
        return "hermes"
    if OPENERS["mistral"] in source:
        return "mistral_named" if "[ARGS]" in source else "mistral"
    if OPENERS["deepseek"] in source:
        return "deepseek_fenced" if "```json" in source else "deepseek"
    # Llama 3.2 writes its calls bare
    is_llama = OPENERS["llama"] in source or ('{"name": ' in source and '"parameters": ' in source)
    return "llama" if is_llama else None
