"""The keys of Hugging Face's tokenizer files that matter here, and their several spellings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from astrai_core.tokenizer.chat_template import ChatTemplate

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"


def text_of(token: object) -> str | None:
    """A token of `tokenizer_config.json`: a string, or a dict that describes an AddedToken."""
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise ValueError(f"tokenizer_config.json: {token!r} is not a token")
    return token or None


def add_missing_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Make `tokenizer_config.json` and `tokenizer.json` agree on the added tokens."""
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, Mapping):
        raise ValueError("tokenizer_config.json: added_tokens_decoder is not an object")
    for token_id, flags in sorted(listed.items(), key=lambda item: int(item[0])):
        try:
            token = AddedToken(**{k: v for k, v in flags.items() if k != "__type"})
        except (AttributeError, TypeError):
            raise ValueError(
                f"tokenizer_config.json: {flags!r} does not describe a token"
            ) from None
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        if tokenizer.token_to_id(token.content) != int(token_id):
            raise ValueError(
                f"tokenizer_config.json gives {token.content!r} the id {token_id}, "
                f"tokenizer.json {tokenizer.token_to_id(token.content)}"
            )
    more = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        if not isinstance(value, Mapping | list):
            raise ValueError(f"tokenizer_config.json: {key} is not a list of tokens")
        more += value.values() if isinstance(value, Mapping) else value
    names = [text_of(token) for token in [*(config.get(role) for role in ROLES), *more]]
    known = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }
    tokenizer.add_special_tokens([name for name in names if name and name not in known])


def twin_of(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer alike, with settings of its own; the vocabulary and the merges are shared.

    Made from the text of the first one it would take as long and as much memory once more.
    """
    twin = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(twin, part, value)
    added = tokenizer.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    # tokens get the next ids, which are not theirs where a file leaves some out
    is_alike = twin.get_added_tokens_decoder() == added
    return twin if is_alike else Tokenizer.from_str(tokenizer.to_str())


def named_templates(value: Any) -> dict[str, ChatTemplate]:
    """Named templates from one string, from sources by name, or from a list with a name each."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {str(name): ChatTemplate(source) for name, source in value.items()}
    if isinstance(value, str):
        return {"default": ChatTemplate(value)}
    try:
        return {entry["name"]: ChatTemplate(entry["template"]) for entry in value}
    except (KeyError, TypeError):
        raise ValueError(
            "tokenizer_config.json: chat_template is neither a string nor a list of names and "
            "templates"
        ) from None


def read_template_files(folder: Path) -> dict[str, str]:
    """Named templates in files of their own, which win over those of `tokenizer_config.json`."""
    files = {"default": folder / _TEMPLATE}
    files |= {path.stem: path for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    return {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}


def write_template_files(folder: Path, templates: Mapping[str, str]) -> None:
    """Write named templates into files of their own, and take other ones away."""
    for name in read_template_files(folder).keys() - templates.keys():
        _template_file(folder, name).unlink()
    for name, source in templates.items():
        path = _template_file(folder, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, "utf-8")


def _template_file(folder: Path, name: str) -> Path:
    return folder / _TEMPLATE if name == "default" else folder / _MORE_TEMPLATES / f"{name}.jinja"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a reader would lay it out."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
