"""One record: where it stands, and what a stage finds in it.

Nothing here knows a token. An error always says file and line, because the one bad line among a
million is what the user has to find.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Stage = Literal["seq", "sft", "dpo", "grpo"]
Messages = list[Mapping[str, Any]]

_WANTED = {
    "seq": '{"text": "..."}',
    "sft": '{"messages": [{"role": "...", "content": "..."}, ...]} or {"prompt", "completion"}',
    "dpo": '{"prompt", "chosen", "rejected"}, each a text or a list of messages',
    "grpo": '{"prompt", ...} or {"prompt", "responses": [...], "rewards": [...]}',
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What stage dpo compares: two answers to one prompt."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True, kw_only=True)
class Question:
    """What stage grpo asks, with the answers and rewards that are stored with it, if any are."""

    prompt: Messages
    responses: Sequence[Messages]
    columns: Mapping[str, Any]
    """What reward functions are told by name: all of the record but its responses."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One JSON object, or one document of a text file as `{"text": ...}`."""

    file: Path
    line: int
    """Where it begins, from 1; in a JSON array its number in the array."""
    content: Mapping[str, Any]
    size: int
    """Bytes of the file it takes, for progress."""
    goes_on: bool = False
    """Whether it is a document of a text file that was too long, whose next part is the next
    record."""

    @property
    def place(self) -> str:
        """File and line, as errors say it."""
        return f"{self.file} {place_word(self.file)} {self.line}"

    @property
    def stage(self) -> Stage | None:
        """The stage that it looks like, by its keys."""
        keys = self.content.keys()
        if keys & {"chosen", "rejected"}:
            return "dpo"
        if keys & {"messages", "completion"}:
            return "sft"
        if "prompt" in keys:
            return "grpo"
        return "seq" if "text" in keys else None

    def text(self) -> str:
        """The document of stage seq.

        Raises:
            ValueError: there is none, or nothing is in it.
        """
        text = self.content.get("text")
        if not isinstance(text, str):
            raise ValueError(self._lacks("seq"))
        if not text.strip():
            raise ValueError(f"{self.place}: the text is empty; remove the record")
        return text

    def messages(self) -> Messages:
        """The conversation of stage sft.

        Raises:
            ValueError: there is none, or it is not made of messages.
        """
        if "messages" in self.content:
            messages = self.content["messages"]
            if not isinstance(messages, list) or not messages:
                raise ValueError(f"{self.place}: messages must be a list that is not empty")
            return self._checked(messages, "")
        if "prompt" in self.content and "completion" in self.content:
            return self._side("prompt", "user") + self._side("completion", "assistant")
        raise ValueError(self._lacks("sft"))

    def pair(self) -> Pair:
        """The two answers of stage dpo; they may repeat the prompt, or hold it alone.

        Raises:
            ValueError: a part is missing, is not made of messages, or the answers are the same.
        """
        if not {"chosen", "rejected"} <= self.content.keys():
            raise ValueError(self._lacks("dpo"))
        chosen = self._side("chosen", "assistant")
        rejected = self._side("rejected", "assistant")
        if "prompt" in self.content:
            prompt = self._side("prompt", "user")
            n = len(prompt)
            if chosen[:n] == rejected[:n] == prompt and n < min(len(chosen), len(rejected)):
                chosen, rejected = chosen[n:], rejected[n:]
        else:
            n = _num_shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
            if not prompt:
                raise ValueError(
                    f"{self.place}: there is no prompt, and chosen and rejected do not begin with "
                    "the same messages"
                )
        if chosen == rejected:
            raise ValueError(f"{self.place}: chosen and rejected are the same; remove the record")
        return Pair(prompt=prompt, chosen=chosen, rejected=rejected)

    def question(self) -> Question:
        """The prompt of stage grpo.

        Raises:
            ValueError: there is none, it is not made of messages, or responses and rewards do not
                belong together.
        """
        if "prompt" not in self.content:
            raise ValueError(self._lacks("grpo"))
        prompt = self._side("prompt", "user")
        if prompt[-1]["role"] == "assistant":
            raise ValueError(
                f"{self.place}: the prompt ends with an answer; end it with a question"
            )
        responses: list[Messages] = []
        if "responses" in self.content or "rewards" in self.content:
            stored = self._list("responses")
            rewards = self._list("rewards")
            if len(stored) != len(rewards) or len(stored) < 2:
                raise ValueError(
                    f"{self.place}: {len(stored)} responses and {len(rewards)} rewards; there must "
                    "be at least two, and a reward for each"
                )
            for number, reward in enumerate(rewards, 1):
                if not _is_number(reward):
                    raise ValueError(
                        f"{self.place}: reward {number} must be a number, not {reward!r:.40}"
                    )
            responses = [
                self._messages(response, f"response {number}", "assistant")
                for number, response in enumerate(stored, 1)
            ]
        columns = {name: value for name, value in self.content.items() if name != "responses"}
        return Question(prompt=prompt, responses=responses, columns=columns)

    def all_messages(self) -> Messages:
        """Whatever anybody says in it, of any stage but seq."""
        match self.stage:
            case "dpo":
                pair = self.pair()
                return [*pair.prompt, *pair.chosen, *pair.rejected]
            case "grpo":
                question = self.question()
                return [*question.prompt, *(one for some in question.responses for one in some)]
            case _:
                return self.messages()

    def _side(self, key: str, role: str) -> Messages:
        return self._messages(self.content[key], f"the {key}", role)

    def _messages(self, value: object, what: str, role: str) -> Messages:
        if isinstance(value, str):
            if not value.strip():
                raise ValueError(f"{self.place}: {what} is empty; remove the record")
            return [{"role": role, "content": value}]
        if not isinstance(value, list) or not value:
            what = what.removeprefix("the ")
            raise ValueError(f"{self.place}: {what} must be text or a list of messages")
        return self._checked(value, f" of {what}")

    def _checked(self, messages: list[Any], where: str) -> Messages:
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(
                    f"{self.place}: message {number}{where} must be an object with a role"
                )
        return messages

    def _list(self, key: str) -> list[Any]:
        value = self.content.get(key)
        if not isinstance(value, list):
            raise ValueError(f"{self.place}: {key} must be a list; {self._lacks('grpo', False)}")
        return value

    def _lacks(self, stage: Stage, with_place: bool = True) -> str:
        keys = ", ".join(sorted(self.content)) or "no keys"
        other = self.stage
        hint = f"; this looks like stage {other}" if other not in (None, stage) else ""
        place = f"{self.place}: " if with_place else ""
        return f"{place}stage {stage} wants {_WANTED[stage]}, found {keys}{hint}"


def place_word(file: Path) -> str:
    """What the number of a record counts: lines, items of a JSON array, or rows."""
    return {".json": "item", ".parquet": "row"}.get(file.suffix.lower(), "line")


def _num_shared(one: Messages, other: Messages) -> int:
    """Messages that two conversations begin with; each keeps one of its own."""
    most = min(len(one), len(other)) - 1
    return next((n for n in range(most) if one[n] != other[n]), most)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
