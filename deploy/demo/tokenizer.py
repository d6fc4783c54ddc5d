"""Trains the demo model's byte-level BPE tokenizer and writes it in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from chatml import CHAT_TEMPLATE, END_OF_TEXT, IM_END, PAD, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4_096
MAX_POSITIONS = 2_048


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains on the given texts (training splits only).

    Returns:
        A tokenizer of exactly `VOCAB_SIZE` entries; `SPECIAL_TOKENS` have the first ids.
    """
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone: verse numbers and years share ten tokens instead of taking hundreds.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"too little text: {tokenizer.get_vocab_size()} of {VOCAB_SIZE} entries")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "eos_token": IM_END,
        "pad_token": PAD,
        "additional_special_tokens": list(SPECIAL_TOKENS[:2]),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    assert END_OF_TEXT in config["additional_special_tokens"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
