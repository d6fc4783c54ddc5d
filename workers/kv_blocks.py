"""Blocks of the paged KV cache: who holds which, and which full ones can serve again.

A full block is named by a hash chained over (salt, adapter digest, all tokens up to its end), so
a cached prefix is only ever found by the same tenant, the same adapter version and the same
tokens. Blocks nobody holds keep their content until the space is needed (least recently freed
goes first).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockHash = bytes


def first_hash(salt: str, adapter_key: str | None) -> BlockHash:
    """Start of a chain. `salt` keeps tenants apart; None is the base model."""
    return hashlib.blake2b(f"{salt}\0{adapter_key or ''}".encode(), digest_size=16).digest()


def next_hash(previous: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Hash of a full block that follows `previous`."""
    return hashlib.blake2b(previous + array("i", tokens).tobytes(), digest_size=16).digest()


class KVBlocks:
    """Reference-counted blocks 0 .. total-1 of `block_size` tokens each."""

    def __init__(self, total: int, block_size: int):
        self.total, self.block_size = total, block_size
        self._holders = [0] * total
        self._hash_of: list[BlockHash | None] = [None] * total
        self._owner_of: list[str | None] = [None] * total
        self._cached: dict[BlockHash, int] = {}
        # Free blocks, oldest first. Those that still carry a hash can be found by `match`.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Takes hold of the cached blocks of the longest known prefix of `hashes`, which are read
        no further than that."""
        found: list[int] = []
        for h in hashes:
            block = self._cached.get(h)
            if block is None:
                break
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1
            found.append(block)
        return found

    def allocate(self, n: int) -> list[int]:
        """Takes `n` blocks with no content. The caller checks `free` first."""
        if n > len(self._free):
            raise ValueError(f"{n} blocks asked for, {len(self._free)} free")
        taken = []
        for _ in range(n):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, h: BlockHash, owner: str) -> None:
        """Names a held block that is now full. A second block of equal content stays unnamed.

        `owner` is the adapter's key; `forget` takes all of an owner's blocks.
        """
        if h not in self._cached and self._hash_of[block] is None:
            self._cached[h] = block
            self._hash_of[block] = h
            self._owner_of[block] = owner

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one hold on each. A sequence's tail is freed first, so that it goes first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def forget(self, owner: str) -> None:
        """Drops an owner's cached prefixes. Held blocks stay held, but unnamed."""
        for block in range(self.total):
            if self._owner_of[block] == owner:
                self._forget(block)

    def check_integrity(self) -> None:
        """Raises AssertionError where the books don't balance."""
        assert all((self._holders[b] == 0) == (b in self._free) for b in range(self.total))
        assert all(self._hash_of[b] == h for h, b in self._cached.items())

    def _forget(self, block: int) -> None:
        h = self._hash_of[block]
        if h is not None:
            del self._cached[h]
            self._hash_of[block] = self._owner_of[block] = None
