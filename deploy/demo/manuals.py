"""Turns a manual's HTML page into plain paragraphs under their headings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

_SKIPPED = {"script", "style", "head", "nav", "svg", "form", "select", "button", "footer", "table"}
_SKIPPED_CLASSES = {"navheader", "navfooter", "toc", "related", "sphinxsidebar", "footer"}
_BLOCKS = {"p", "li", "dd", "dt", "pre", "div", "section", "blockquote", "br", "ul", "ol", "dl"}
_HEADINGS = {"h1", "h2", "h3", "h4"}
_VOID = {"br", "img", "hr", "input", "meta", "link", "wbr", "col"}

_NOT_PROSE = re.compile(
    r"genindex|bookindex|py-modindex|search|changes|changelog|releaselog|whatsnew"
    r"|toc\.html|keyword_index|hlr\d|matrix|requirements|errcodes"
)
_MIN_PAGE_CHARS = 600
_MIN_PROSE = 0.72  # share of letters and spaces: below it a page is a listing, not prose


@dataclass
class Section:
    title: str
    paragraphs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    sections: list[Section]

    @property
    def text(self) -> str:
        parts = [part for s in self.sections for part in (s.title, *s.paragraphs) if part]
        return "\n\n".join(parts)


def read_manual(path: Path) -> Page | None:
    """Reads one page.

    Args:
        path: an HTML file.

    Returns:
        Its headings and paragraphs; None for index pages, listings and scraps.
    """
    if _NOT_PROSE.search(path.as_posix()):
        return None
    parser = _PageParser()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    parser.flush()
    page = Page([s for s in parser.sections if s.paragraphs])
    text = page.text
    if len(text) < _MIN_PAGE_CHARS:
        return None
    prose = sum(c.isalpha() or c == " " for c in text) / len(text)
    return page if prose >= _MIN_PROSE else None


class _PageParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections = [Section("")]
        self._text: list[str] = []
        self._skipping: list[str] = []  # open tags inside a skipped element, outermost first
        self._pre = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if not self._skipping:
                self._text.append("\n" if tag == "br" else " ")
            return
        classes = set((dict(attrs).get("class") or "").split())
        if self._skipping or tag in _SKIPPED or classes & _SKIPPED_CLASSES:
            self._skipping.append(tag)
            return
        if tag in _BLOCKS or tag in _HEADINGS:
            self.flush()
        self._pre = self._pre or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            # Pages leave tags open; closing an outer one closes what is inside it.
            if tag in self._skipping:
                while self._skipping.pop() != tag:
                    pass
            return
        if tag in _HEADINGS:
            title = " ".join("".join(self._text).split()).replace("¶", "").strip()
            self._text.clear()
            self.sections.append(Section(re.sub(r"^[\dA-Z]?[\d.]*\d\.\s*", "", title)))
        elif tag in _BLOCKS:
            self.flush()
        if tag == "pre":
            self._pre = False

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def flush(self) -> None:
        """Ends the paragraph that is being read."""
        text = "".join(self._text).replace("¶", "").replace("\xa0", " ")
        self._text.clear()
        text = text.strip("\n").rstrip() if self._pre else " ".join(text.split())
        if text.strip():
            self.sections[-1].paragraphs.append(text)
