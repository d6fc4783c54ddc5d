"""Prepares the demo model's training data: fetch, clean, split, tokenise.

    python deploy/demo/prepare_texts.py --cache .demo_cache --out .demo_data

Writes OUT/tokenizer/, one OUT/<style>.<split>.bin of little-endian uint16 token ids for each style
and split, OUT/base.{train,val}.bin (the mixed base corpus), and OUT/manifest.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from chatml import END_OF_TEXT, render_chat
from sources import SOURCES, fetch_all
from texts import READERS, Document
from tokenizer import save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

BASE_STYLES = ("president", "manual")
"""What the base model is made of. All other styles belong to tenants."""

STYLE_SHARE_IN_BASE = 0.10
"""Share of the tenants' training documents that the base sees too, in completion form only: enough
that rare words have an embedding, too little to learn the style (about 2 % of the base corpus)."""

SPLITS = (("heldout", 0.06), ("val", 0.06), ("train", 0.88))
TOKENIZER_CHARS_PER_STYLE = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"), help="downloads")
    parser.add_argument("--out", type=Path, default=Path(".demo_data"), help="prepared data")
    args = parser.parse_args()

    folders = fetch_all(args.cache)
    styles = {}
    for style, read in READERS.items():
        styles[style] = split(read(folders))
        chars = sum(len(d.text) for part in styles[style].values() for d in part)
        print(f"{style:10} {sum(map(len, styles[style].values())):6} documents {chars:10,} chars")

    tokenizer = train_tokenizer(_tokenizer_texts(styles))
    save_tokenizer(tokenizer, args.out / "tokenizer")
    counts = {
        name: write_stream(tokenizer, texts, args.out / f"{name}.bin")
        for name, texts in _streams(styles)
    }
    manifest = {
        "sources": [asdict(source) for source in SOURCES],
        "base_styles": list(BASE_STYLES),
        "tenant_styles": [style for style in READERS if style not in BASE_STYLES],
        "tokens": counts,
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name, tokens in counts.items():
        print(f"{name:20} {tokens:10,} tokens")


def split(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Splits by a hash of the text, so a document keeps its split whatever else changes."""
    parts: dict[str, list[Document]] = {name: [] for name, _ in SPLITS}
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for name, share in SPLITS:
            if place < share or name == SPLITS[-1][0]:
                parts[name].append(document)
                break
            place -= share
    return parts


def _streams(styles: dict[str, dict[str, list[Document]]]) -> Iterable[tuple[str, list[str]]]:
    """Names and contents of all token streams."""
    for style, parts in styles.items():
        for name, documents in parts.items():
            if style not in BASE_STYLES or name == "heldout":
                yield f"{style}.{name}", _both_forms(documents, f"{style}.{name}")
    for name in ("train", "val"):
        texts: list[str] = []
        for style, parts in styles.items():
            if style in BASE_STYLES:
                texts += _both_forms(parts[name], f"base.{style}.{name}")
            else:
                few = parts[name][:: round(1 / STYLE_SHARE_IN_BASE)]
                texts += [document.text for document in few]
        random.Random(f"base.{name}").shuffle(texts)
        yield f"base.{name}", texts


def _both_forms(documents: list[Document], seed: str) -> list[str]:
    """Completion and chat forms of the documents, shuffled together."""
    rng = random.Random(seed)
    texts = [document.text for document in documents]
    texts += [render_chat(c.subject, c.answer, rng) for d in documents for c in d.chats]
    rng.shuffle(texts)
    return texts


def _tokenizer_texts(styles: dict[str, dict[str, list[Document]]]) -> Iterable[str]:
    """Training documents of every style, up to a limit each, so that none rules the vocabulary."""
    for style, parts in styles.items():
        documents = list(parts["train"])
        random.Random(style).shuffle(documents)
        chars = 0
        for document in documents:
            if chars > TOKENIZER_CHARS_PER_STYLE:
                break
            chars += len(document.text)
            yield document.text


def write_stream(tokenizer: Tokenizer, texts: list[str], path: Path) -> int:
    """Writes the texts as one token stream, each ended by `END_OF_TEXT`.

    Returns:
        Number of tokens written (2 bytes each).
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [np.array([*e.ids, end], dtype="<u2") for e in tokenizer.encode_batch(texts)]
    stream = np.concatenate(ids)
    stream.tofile(path)
    return len(stream)


if __name__ == "__main__":
    main()
