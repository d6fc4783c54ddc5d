"""Token streams that the demo is trained and evaluated on, held on the training device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from chatml import SPECIAL_TOKENS

END_OF_TEXT_ID = 0
"""`tokenizer.py` gives the special tokens the first ids, the end of a document the very first."""

_ALIGNED_SHARE = 0.5  # share of training windows that begin where a document begins, as requests do


@dataclass(frozen=True)
class TokenStream:
    """One stream of documents, each ended by `<|endoftext|>`.

    Attributes:
        tokens: int32 [N] token ids.
        starts: int64 [D] where documents begin.
    """

    tokens: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def load(cls, data: Path, name: str, device: torch.device) -> TokenStream:
        """Reads DATA/<name>.bin (little-endian uint16)."""
        ids = np.fromfile(data / f"{name}.bin", dtype="<u2").astype(np.int32)
        tokens = torch.from_numpy(ids).to(device)
        ends = torch.nonzero(tokens == END_OF_TEXT_ID).flatten()
        starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])
        return cls(tokens, starts)

    def sample(self, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Random windows, half of them beginning with a document.

        Returns:
            int64 [batch, length], on the stream's device.
        """
        device = self.tokens.device
        last = len(self.tokens) - length
        at = torch.randint(0, last + 1, (batch,), generator=generator)
        aligned = int(batch * _ALIGNED_SHARE)
        pick = torch.randint(0, len(self.starts), (aligned,), generator=generator)
        at = at.to(device)
        at[:aligned] = self.starts[pick.to(device)].clamp(max=last)
        window = at[:, None] + torch.arange(length, device=device)
        return self.tokens[window].long()

    def windows(self, batch: int, length: int, limit: int) -> Iterator[torch.Tensor]:
        """Consecutive windows that don't overlap, up to `limit` tokens in all.

        Yields:
            int64 [<= batch, length].
        """
        count = min(len(self.tokens), limit) // length
        if count == 0:
            raise ValueError(f"stream of {len(self.tokens)} tokens has no window of {length}")
        rows = self.tokens[: count * length].view(count, length)
        for at in range(0, count, batch):
            yield rows[at : at + batch].long()


def load_manifest(data: Path) -> dict:
    """DATA/manifest.json, checked against the special tokens that this code relies on."""
    manifest = json.loads((data / "manifest.json").read_text())
    vocab = json.loads((data / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    ids = [vocab.get(token) for token in SPECIAL_TOKENS]
    if ids != list(range(len(SPECIAL_TOKENS))):
        raise ValueError(f"{data}/tokenizer: special tokens have ids {ids}, expected 0 to 3")
    return manifest
