"""The base model's tokenizer and chat template, read from its Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import SettingsError
from .chat_template import ChatTemplate
from .token_span import longest_token_chars


def _byte_alphabet() -> dict[str, int]:
    """The inverse of GPT-2's byte-to-character table, which byte-level BPE vocabularies use."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


class TextTokenizer:
    """Text to token ids, and each token's bytes. Only byte-level BPE is supported.

    Args:
        tokenizer: as read from tokenizer.json.
        template: the model's chat template; None: the model has none.
        context_length: tokens of prompt and answer together that the model can see.
        eos_ids: tokens that end an answer.

    Raises:
        SettingsError: the tokenizer isn't byte-level.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        context_length: int,
        eos_ids: Iterable[int] = (),
    ) -> None:
        facts = json.loads(tokenizer.to_str())
        decoder = facts.get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise SettingsError(
                f"the tokenizer's decoder is {decoder.get('type')!r}; only byte-level BPE "
                "tokenizers (decoder 'ByteLevel') are supported"
            )
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self.template = template
        self.context_length = context_length
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        # Of a text, at most; None: any number.
        self.chars_per_token = longest_token_chars(facts, _ALPHABET)

    @classmethod
    def from_folder(cls, folder: str | Path) -> TextTokenizer:
        """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and config.json.

        Raises:
            SettingsError: a file is missing or damaged; the message names it.
        """
        folder = Path(folder)
        try:
            tokenizer = Tokenizer.from_file(str(_existing(folder / "tokenizer.json")))
        except Exception as error:  # tokenizers raises bare Exception
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"cannot read {folder / 'tokenizer.json'}: {error}") from None
        config = _read_json(_existing(folder / "config.json"))
        config = config.get("text_config", config)
        context = config.get("max_position_embeddings")
        if not isinstance(context, int) or context < 1:
            raise SettingsError(
                f"{folder / 'config.json'}: max_position_embeddings is {context!r}; "
                "a positive number is needed"
            )
        tokenizer_config_path = folder / "tokenizer_config.json"
        tokenizer_config = (
            _read_json(tokenizer_config_path) if tokenizer_config_path.is_file() else {}
        )
        template = ChatTemplate.from_files(folder, tokenizer_config)
        generation_path = folder / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.is_file() else {}
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return cls(tokenizer, template, context, eos_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # Of a batch, even of one text, tokenizers lets other threads run meanwhile.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return batch[0].ids

    def is_special(self, token_id: int) -> bool:
        """Whether text omits this token (end of turn, padding)."""
        added = self._added.get(token_id)
        return added is not None and added.special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token stands for; none for ids outside of the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        try:
            return bytes(_ALPHABET[char] for char in token)
        except KeyError:  # an added token in plain text
            return token.encode()

    def token_name(self, token_id: int) -> str:
        """One token's text for lists of alternatives.

        A token that holds only a part of a character is written `bytes:\\xe2\\x80`, as OpenAI does,
        so that two such tokens never look the same.
        """
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise SettingsError(
            f"{path} doesn't exist; model_path must be a folder in Hugging Face layout "
            "(config.json, tokenizer.json, *.safetensors)"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{path} must hold a JSON object")
    return value
