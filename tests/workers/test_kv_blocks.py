"""The KV block books balance under any sequence of calls, and prefixes are found only by equals."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.workers.kv_blocks import KVBlocks, first_hash, next_hash

BLOCK = 4


def chain(salt: str, adapter: str | None, tokens: list[int]) -> list[bytes]:
    hashes, previous = [], first_hash(salt, adapter)
    for i in range(0, len(tokens) - len(tokens) % BLOCK, BLOCK):
        previous = next_hash(previous, tokens[i : i + BLOCK])
        hashes.append(previous)
    return hashes


@given(st.lists(st.integers(0, 5), min_size=BLOCK, max_size=20), st.text(), st.text())
def test_a_chain_depends_on_tenant_adapter_and_every_token(tokens, a, b):
    hashes = chain("t", "x", tokens)
    assert hashes == chain("t", "x", tokens)
    assert chain("u", "x", tokens)[0] != hashes[0]
    assert chain("t", None, tokens)[0] != hashes[0]
    for i in range(len(hashes) * BLOCK):
        other = [*tokens[:i], tokens[i] + 1, *tokens[i + 1 :]]
        changed = chain("t", "x", other)
        assert changed[: i // BLOCK] == hashes[: i // BLOCK]
        assert all(x != y for x, y in zip(changed[i // BLOCK :], hashes[i // BLOCK :], strict=True))
    if a != b:
        assert first_hash(a, "x") != first_hash(b, "x")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_use_keeps_the_books(data):
    kv = KVBlocks(data.draw(st.integers(1, 12)), BLOCK)
    held: list[tuple[list[int], str, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["start", "end", "forget"]))
        if action == "start":
            tokens = data.draw(st.lists(st.integers(0, 1), max_size=5 * BLOCK))
            owner = data.draw(st.sampled_from(["a", "b"]))
            hashes = chain("t", owner, tokens)
            blocks = kv.match(hashes)
            need = -(-len(tokens) // BLOCK) - len(blocks)
            if need > kv.free:
                kv.release(blocks)
            else:
                blocks += kv.allocate(need)
                for block, h in zip(blocks, hashes, strict=False):
                    kv.publish(block, h, owner)
                held.append((blocks, owner, tokens))
        elif action == "end" and held:
            kv.release(held.pop(data.draw(st.integers(0, len(held) - 1)))[0])
        elif action == "forget":
            kv.forget("a")
        kv.check_integrity()
        in_use = {b for blocks, _, _ in held for b in blocks}
        assert kv.used == len(in_use)
        # A shared block is shared by equal prefixes of one owner only.
        for blocks, owner, tokens in held:
            for other, other_owner, other_tokens in held:
                for i, block in enumerate(blocks):
                    if block in other:
                        assert other_owner == owner
                        end = (i + 1) * BLOCK
                        assert other is blocks or other_tokens[:end] == tokens[:end]


def test_cached_blocks_go_in_the_order_they_were_given_up():
    kv = KVBlocks(2, BLOCK)
    one, two = chain("t", None, [1] * 4), chain("t", None, [2] * 4)
    for hashes in (one, two):
        blocks = kv.allocate(1)
        kv.publish(blocks[0], hashes[0], "x")
        kv.release(blocks)
    taken = kv.allocate(1)
    assert kv.match(one) == []
    assert kv.match(two) != []
    assert len(taken) == 1


def test_a_prefix_is_read_no_further_than_it_is_known():
    kv = KVBlocks(8, 4)
    known = first_hash("salt", None)
    (block,) = kv.allocate(1)
    kv.publish(block, known, "owner")
    read = []

    def hashes():
        for h in (known, b"another", b"a third"):
            read.append(h)
            yield h

    assert kv.match(hashes()) == [block]
    assert read == [known, b"another"]
