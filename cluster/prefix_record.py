"""Which groups a gateway has sent which prompts to: where their prefixes are likely cached."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 64
_MAX_BLOCKS = 64  # of a prompt that are looked at
_GROUPS_KEPT = 4  # per block, the newest


class PrefixRecord:
    """Chained hashes of prompt blocks -> groups, for the blocks sent last.

    A guess: a group may have dropped the blocks since. Keyed like the groups' own prefix caches,
    by tenant, adapter and all tokens up to the block's end, so no tenant's prompts show in the
    choices for another's. One gateway's own; bounded.
    """

    def __init__(self, max_blocks: int = 1 << 16) -> None:
        """`max_blocks`: the oldest are forgotten beyond; about 200 bytes each."""
        self._max_blocks = max_blocks
        self._groups: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def blocks(self, owner: str, prompt_ids: Sequence[int]) -> list[int]:
        """Hashes of the prompt's whole blocks, each of all tokens up to its end.

        Args:
            owner: `AdapterRef.key`, or "tenant/base".
        """
        chain = blake2b(owner.encode(), digest_size=8)
        whole = min(len(prompt_ids) // BLOCK_TOKENS, _MAX_BLOCKS)
        data = memoryview(array("q", prompt_ids[: whole * BLOCK_TOKENS])).cast("B")
        size = BLOCK_TOKENS * 8
        hashes = []
        for i in range(whole):
            chain.update(data[i * size : (i + 1) * size])
            hashes.append(int.from_bytes(chain.digest(), "little"))
        return hashes

    def cached(self, blocks: Sequence[int]) -> dict[str, int]:
        """Group -> tokens of the prompt's beginning that were sent to it before."""
        tokens: dict[str, int] = {}
        for i, block in enumerate(blocks):
            groups = self._groups.get(block)
            if groups is None:
                break
            for group in groups:
                if tokens.get(group, 0) == i * BLOCK_TOKENS:
                    tokens[group] = (i + 1) * BLOCK_TOKENS
        return tokens

    def note(self, blocks: Sequence[int], group: str) -> None:
        """The prompt went to the group."""
        # The last block first: what is forgotten first of a prompt should be its end.
        for block in reversed(blocks):
            others = self._groups.pop(block, ())
            kept = [g for g in others if g != group][: _GROUPS_KEPT - 1]
            self._groups[block] = (group, *kept)
        while len(self._groups) > self._max_blocks:
            self._groups.popitem(last=False)

    def forget(self, group: str) -> None:
        """The group is gone, and its cache with it."""
        for block, groups in list(self._groups.items()):
            if group in groups:
                left = tuple(g for g in groups if g != group)
                if left:
                    self._groups[block] = left
                else:
                    del self._groups[block]

    def __len__(self) -> int:
        return len(self._groups)
