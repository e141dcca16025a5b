"""Text to token ids and back, in Hugging Face's own files.

The rule a reader would get wrong: `encode` is for text that somebody typed and never yields a
control token. Control tokens come from a chat template only, through `apply_chat_template`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from astrai_core.tokenizer.byte_pairs import train_byte_pairs
from astrai_core.tokenizer.chat_template import ChatTemplate, Message
from astrai_core.tokenizer.default_template import DEFAULT_TEMPLATE
from astrai_core.tokenizer.folder_files import (
    ROLES,
    add_missing_tokens,
    named_templates,
    read_json,
    read_template_files,
    text_of,
    twin_of,
    write_json,
    write_template_files,
)
from astrai_core.tokenizer.stand_ins import StandIns, restore
from astrai_core.tokenizer.token_bytes import speller

_log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

_OPEN_END = "\U0010fffd"  # of the last private-use plane, which StandIns leaves alone
_SURROGATE = "text cannot be written in UTF-8: it holds half a surrogate pair"


class AutoTokenizer:
    """A byte-level BPE of ours or the tokenizer of a Hugging Face folder.

    Args:
        tokenizer: the `tokenizers` object; this class owns it from now on.
        config: the keys of `tokenizer_config.json`.
        generation_config: the keys of `generation_config.json`, for more stop tokens.
        templates: chat templates by name, `default` among them, that win over those in `config`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self._config = dict(config)
        self._generation_config = dict(generation_config or {})
        self._template_files = dict(templates or {})
        tokenizer.no_truncation()
        tokenizer.no_padding()
        add_missing_tokens(tokenizer, self._config)
        self._markup = tokenizer
        """Reads control tokens where the text spells them."""
        self._plain = twin_of(tokenizer)
        """Reads the same text as somebody's words."""
        self._plain.encode_special_tokens = True
        self._added = self._markup.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in self._added.items() if token.special)
        """Ids that no user text is ever encoded to."""
        self._control_id_of = {self._added[i].content: i for i in self.control_ids}
        self._stand_ins = StandIns(self._control_id_of)
        vocabulary = self._markup.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """One more than the largest id; a model may have more rows."""
        self.special_tokens = {
            role: text for role in ROLES if (text := text_of(self._config.get(role))) is not None
        }
        """`bos_token`, `eos_token`, ... as text, as chat templates may use them."""
        self.bos_id = self._role_id("bos_token")
        self.eos_id = self._role_id("eos_token")
        self.pad_id = self._role_id("pad_token")
        by_name = named_templates(self._template_files or config.get("chat_template"))
        self.chat_template = by_name.get("default")
        """How messages become a prompt; None for a folder without one."""
        self.tool_template = by_name.get("tool_use", self.chat_template)
        """How messages become a prompt when there are tools."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "AutoTokenizer":
        """Read the tokenizer of a model folder.

        Raises:
            FileNotFoundError: the folder has no `tokenizer.json`.
            ValueError: a file is corrupt or the files contradict each other.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            problem = "has no tokenizer.json" if path.parent.is_dir() else "is no folder here"
            raise FileNotFoundError(
                f"{folder} {problem}: give a folder written by `astrai-data tokenizer` "
                "or a Hugging Face model folder with a fast tokenizer"
            )
        try:
            tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from None
        try:
            return cls(
                tokenizer,
                read_json(Path(folder) / "tokenizer_config.json"),
                read_json(Path(folder) / "generation_config.json"),
                read_template_files(Path(folder)),
            )
        except ValueError as error:
            raise ValueError(f"tokenizer of {folder}: {error}") from None

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        chat_template: str = DEFAULT_TEMPLATE,
        show_progress: bool = False,
        portable: bool = True,
    ) -> "AutoTokenizer":
        """Learn a byte-level BPE; the same texts always give the same tokenizer.

        Args:
            texts: what to learn from, in any order that is the same each time.
            vocab_size: number of tokens, three control tokens and 256 bytes among them.
            chat_template: Jinja source; the default writes `<|im_start|>role ... <|im_end|>`.
            show_progress: draw the progress bars of the `tokenizers` library.
            portable: no token joins a character with a part of another, so that other programs,
                which split text less than we do, can be given the same tokens (GGUF).

        Raises:
            ValueError: the vocabulary cannot hold the bytes and control tokens.
        """
        tokenizer = train_byte_pairs(
            texts, vocab_size, [END_OF_TEXT, TURN_START, TURN_END], show_progress, portable
        )
        return cls(
            tokenizer,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": None,
                "eos_token": TURN_END,
                "pad_token": END_OF_TEXT,
                "unk_token": None,
                "clean_up_tokenization_spaces": False,
                "chat_template": chat_template,
            },
            {"eos_token_id": [tokenizer.token_to_id(t) for t in (TURN_END, END_OF_TEXT)]},
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that `from_pretrained` and `transformers` read.

        An existing `generation_config.json` keeps its other keys.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer_config.json", self._config)
        generation = folder / "generation_config.json"
        write_json(
            generation,
            read_json(generation)
            | self._generation_config
            | {"eos_token_id": sorted(self.stop_ids)},
        )
        write_template_files(folder, self._template_files)  # others would win over ours
        # last, and by one step: a folder with this file is taken for a whole tokenizer. Not by its
        # own save(), which reports a full disk as a bare Exception
        temporary = folder / f".tmp-tokenizer.json-{os.getpid()}"
        try:
            temporary.write_text(self._markup.to_str(pretty=True), "utf-8")
            temporary.replace(folder / "tokenizer.json")
        finally:
            temporary.unlink(missing_ok=True)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of text that somebody wrote; what looks like a control token is spelled out.

        Args:
            text: any string that UTF-8 can hold.
            add_special_tokens: put the folder's own start (and end) tokens around it.

        Raises:
            ValueError: the text holds half a surrogate pair, or this tokenizer's vocabulary spells
                a control token from plain text.
        """
        try:
            encoding = self._plain.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise ValueError(_SURROGATE) from None
        return self._typed_ids(encoding)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        try:
            encodings = self._plain.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        except TypeError:
            raise ValueError(_SURROGATE) from None
        return [self._typed_ids(encoding) for encoding in encodings]

    def encode_rendered(
        self, rendered: str, protected: Mapping[str, str] | None = None
    ) -> list[int]:
        """Ids of what a chat template wrote: its control tokens count, the user's do not.

        Args:
            rendered: the template's output.
            protected: which text each stand-in character gives back.
        """
        if not protected:
            return self._markup.encode(rendered, add_special_tokens=False).ids
        pieces = list(self._stand_ins.cut(rendered))
        restored = restore(rendered, protected)
        if list(self._stand_ins.cut(restored)) == [
            (restore(piece, protected), is_control) for piece, is_control in pieces
        ]:
            return self._markup.encode(restored, add_special_tokens=False).ids
        ids: list[int] = []
        for piece, is_control in pieces:
            if is_control:
                ids.append(self._control_id_of[piece])
            else:
                ids.extend(self.encode(restore(piece, protected)))
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids; a cut character becomes U+FFFD."""
        return self._markup.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text; none for control tokens and past the vocabulary."""
        if token_id < 0:
            raise IndexError(f"token id {token_id} is negative")
        return self._token_bytes[token_id] if token_id < self.vocab_size else b""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids of the control tokens by the names that templates give them."""
        return self._control_id_of

    @cached_property
    def token_byte_lengths(self) -> list[int]:
        """How many bytes of text each token stands for, for bits per byte."""
        return [len(content) for content in self._token_bytes]

    @cached_property
    def longest_token(self) -> int:
        """Most bytes of text that a token stands for."""
        return max(self.token_byte_lengths)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the folder's own, and what its chat template ends turns with."""
        more = self._generation_config.get("eos_token_id") or []
        ids = {*([more] if isinstance(more, int) else more), self.eos_id, self._end_of_turn}
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the content of `tokenizer.json`, however it is laid out."""
        content = json.loads(self._markup.to_str())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """The conversation as one string, to look at; `apply_chat_template` gives the ids."""
        rendered, originals = self._render(messages, add_generation_prompt, tools, variables)
        return restore(rendered, originals)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        continue_final_message: bool = False,
        **variables: object,
    ) -> list[int]:
        """The conversation as token ids; control tokens in message text stay text.

        Args:
            messages: dicts with `role` and `content`, and what else the template knows.
            add_generation_prompt: end with the start of the answer.
            tools: JSON schemas for the template.
            continue_final_message: end with the last message's content, for the model to go on.
            **variables: more names for the template.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        if continue_final_message:
            return self._apply_open_template(messages, tools, variables)
        return self.encode_rendered(
            *self._render(messages, add_generation_prompt, tools, variables)
        )

    def _apply_open_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, object],
    ) -> list[int]:
        """The conversation up to the end of its last text, found by a mark put there."""
        last = messages[-1] if messages else {}
        if not isinstance(last.get("content"), str) or _OPEN_END in last["content"]:
            raise ValueError("only a last message whose content is text can be continued")
        marked = [*messages[:-1], {**last, "content": last["content"] + _OPEN_END}]
        rendered, originals = self._render(marked, False, tools, variables)
        before, mark, _ = rendered.rpartition(_OPEN_END)
        if not mark:
            raise ValueError("the chat template leaves out the message that is to be continued")
        return self.encode_rendered(before, originals)

    def encode_chat_with_mask(
        self,
        messages: Sequence[Message],
        which: Literal["all", "last"] = "all",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them training should teach: the assistant's, to the end of turn.

        The prompt of each answer is encoded as serving encodes it, so the first trained token is
        the first one that serving asks for.

        Args:
            messages: the conversation.
            which: teach all answers or only the last one.
            tools: JSON schemas for the template.
            **variables: more names for the template.

        Raises:
            ValueError: there is no answer, the template rewrites earlier turns, or it ends an
                answer without a control token.
        """
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise ValueError("nothing to train on: no message has the role assistant")
        if which == "last":
            turns = turns[-1:]
        (hidden, hidden_tools, hidden_variables), originals = self._hide(messages, tools, variables)
        template = self._template_for(tools)

        def render(count: int, prompt: bool) -> str:
            return template.render(hidden[:count], prompt, hidden_tools, **hidden_variables)

        full = render(len(hidden), False)
        cuts = [0]
        for turn in turns:
            before = render(turn, True)
            after = full if turn + 1 == len(hidden) else render(turn + 1, False)
            if not (
                full.startswith(before) and full.startswith(after) and len(before) < len(after)
            ):
                raise ValueError(
                    f"the chat template writes message {turn + 1} differently once more messages "
                    "follow, so its tokens cannot be told apart; train on the last answer only"
                )
            cuts += [len(before), len(after)]
        pieces = self._encode_cut(full, [*cuts, len(full)], originals)
        ids: list[int] = []
        mask: list[bool] = []
        for index, piece in enumerate(pieces):
            trained = 0
            if index % 2:
                ends = [n for n, i in enumerate(piece, 1) if i in self.control_ids]
                if not ends:
                    raise ValueError(
                        "the chat template ends an answer without a control token, so a model "
                        "could never learn to stop"
                    )
                trained = ends[-1]
            ids += piece
            mask += [True] * trained + [False] * (len(piece) - trained)
        return ids, mask

    def _encode_cut(
        self, text: str, cuts: Sequence[int], originals: Mapping[str, str]
    ) -> list[list[int]]:
        """Ids of the text between successive cuts."""
        if self._encodes_pieces_alike:
            return [self.encode_rendered(text[a:b], originals) for a, b in pairwise(cuts)]
        # This tokenizer puts a space before whatever comes first, so a piece has to be encoded with
        # all that goes before it.
        whole = self.encode_rendered(text, originals)
        ends = [0]
        for cut in cuts[1:]:
            prefix = self.encode_rendered(text[:cut], originals)
            if whole[: len(prefix)] != prefix:
                raise ValueError("a token spans the edge between a prompt and its answer")
            ends.append(len(prefix))
        return [whole[a:b] for a, b in pairwise(ends)]

    @cached_property
    def _encodes_pieces_alike(self) -> bool:
        """Whether a piece of text has the same ids at the start of a text as within one."""
        return b"".join(map(self.token_bytes, self.encode("a"))) == b"a"

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, object],
    ) -> tuple[str, dict[str, str]]:
        template = self._template_for(tools)
        (messages, tools, hidden), originals = self._hide(messages, tools, variables)
        return template.render(messages, add_generation_prompt, tools, **hidden), originals

    def _hide(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, object],
    ) -> tuple[tuple[Any, Any, dict[str, Any]], dict[str, str]]:
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"a message must be a dict with a role, not {message!r:.80}")
        # before it is hidden: JSON may spell a control token in escapes
        messages = self._template_for(tools).prepare(messages)
        hidden, originals = self._stand_ins.hide([messages, tools, dict(variables)])
        return (hidden[0], hidden[1], self.special_tokens | hidden[2]), originals

    def _template_for(self, tools: object) -> ChatTemplate:
        template = self.tool_template if tools else self.chat_template
        if template is None:
            raise ValueError(
                "this tokenizer has no chat template: add a chat_template.jinja to its folder"
            )
        return template

    def _typed_ids(self, encoding: Encoding) -> list[int]:
        ids = encoding.ids
        if not self._forbidden.isdisjoint(ids):
            added = encoding.special_tokens_mask
            for token_id, is_added in zip(ids, added, strict=True):
                if token_id in self._forbidden and not is_added:
                    text = self._added[token_id].content
                    raise ValueError(f"this tokenizer cannot spell {text!r} as plain text")
        return ids

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        """Control ids, without the one that stands for an unknown character."""
        return self.control_ids - {self._role_id("unk_token")}

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The control token that the chat template writes after an answer."""
        if self.chat_template is None:
            return None
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, mask = self.encode_chat_with_mask(turns, which="last")
        except ValueError as error:
            _log.debug("the chat template does not tell its end of turn: %s", error)
            return None
        return next(i for i, trained in zip(reversed(ids), reversed(mask), strict=True) if trained)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        contents = [b""] * self.vocab_size
        spell = speller(self._markup)
        for text, token_id in self._markup.get_vocab(with_added_tokens=False).items():
            contents[token_id] = spell(text)
        for token_id, token in self._added.items():
            contents[token_id] = b"" if token.special else token.content.encode()
        return contents

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        if text is None:
            return None
        token_id = self._markup.token_to_id(text)
        if token_id is None:
            raise ValueError(f"{role} {text!r} is not in the vocabulary")
        return token_id
