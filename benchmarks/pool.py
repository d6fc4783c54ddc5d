"""Adapters that the pool holds, against slots padded to the largest rank, at Qwen3-30B-A3B's shape.

    python benchmarks/pool.py

Only the pool's accounts are run, which need neither a GPU nor the pool's memory. Adapters adapt
attention and all experts, at ranks 8, 16 and 32 in equal parts; half of them are shared-outer: all
experts of a layer have one A of gate and up and one B of down. They come in random order until the
next doesn't fit. Room is left then, as adapters are large beside the pool: the same orders in a
pool without pages, where an adapter takes the bytes of its factors and no more, tell how much of it
is the pages' doing. In an engine, a few may overtake the one that waits. Churn: one at random goes,
and what comes next is loaded while it fits.

A padded slot holds every factor of every expert at rank 32, whatever its adapter has: that is how
engines work that keep factors in one tensor per projection, indexed by slot.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import count, product
from pathlib import Path

from loraplex.adapter_store import DenseEntry, ExpertEntry, PackLayer
from loraplex.workers import ModelConfig
from loraplex.workers.pool.pool_account import Layouts, PoolAccount
from loraplex.workers.pool.pool_blocks import PoolBlocks
from loraplex.workers.shard import Shard

GIB = 1 << 30
ITEMSIZE = 2  # bfloat16
RANKS = (8, 16, 32)
RANK_MULTIPLE = 8  # as on a GPU
OVERTAKE = 8  # an engine's slack is counted in work: a few requests' worth
MODEL = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    eos_token_ids=(151645,),
    layer_windows=(None,) * 48,
)


def adapter(rank: int, shared_outer: bool) -> tuple[PackLayer, ...]:
    """The header of an adapter's pack."""
    hidden, experts = MODEL.hidden_size, MODEL.num_experts
    q, kv = MODEL.num_heads * MODEL.head_dim, MODEL.num_kv_heads * MODEL.head_dim
    dense = {
        "q_proj": DenseEntry(rank, 1.0, "column", out=q, in_=hidden),
        "k_proj": DenseEntry(rank, 1.0, "column", out=kv, in_=hidden),
        "v_proj": DenseEntry(rank, 1.0, "column", out=kv, in_=hidden),
        "o_proj": DenseEntry(rank, 1.0, "row", out=hidden, in_=q),
    }
    entry = ExpertEntry(
        ids=tuple(range(experts)),
        rank=((rank, rank, rank),) * experts,
        scale=((1.0, 1.0, 1.0),) * experts,
        fused_gate_up=False,
        shared_a13=shared_outer,
        shared_b2=shared_outer,
    )
    return tuple(PackLayer(n, dense, entry) for n in range(MODEL.num_layers))


def factor_bytes(rank: int, shared_outer: bool) -> int:
    """Of an adapter's factors, by their shapes: the measure that the pool's pages are held to."""
    hidden, inter = MODEL.hidden_size, MODEL.moe_intermediate_size
    q, kv = MODEL.num_heads * MODEL.head_dim, MODEL.num_kv_heads * MODEL.head_dim
    attention = 2 * (hidden + q) + 2 * (hidden + kv)
    outer, inner = 3 * hidden, 3 * inter  # gate's, up's and down's, at rank 1
    experts = MODEL.num_experts * inner + (1 if shared_outer else MODEL.num_experts) * outer
    return MODEL.num_layers * rank * (attention + experts) * ITEMSIZE


@dataclass(frozen=True)
class Kind:
    name: str
    layouts: Layouts
    needed: int  # bytes

    @property
    def waste(self) -> float:
        """Share of its pages that hold nothing."""
        return 1 - self.needed / self.layouts.nbytes


@dataclass(frozen=True)
class State:
    adapters: int
    used: float  # share of the pool's bytes that are in pages handed out
    waste: float  # share of those that hold nothing


class Tenants:
    """Adapters that come and go in one pool."""

    def __init__(self, account: PoolAccount, kinds: list[Kind], rng: random.Random):
        self._account, self._rng = account, rng
        self._coming = in_order(kinds, rng)
        self._next = next(self._coming)
        self._resident: dict[int, Kind] = {}
        self._slots = count()

    def fill(self) -> int:
        """Loads until the next doesn't fit; returns how many that were."""
        for loads in count():
            slot = next(self._slots)
            if self._account.take(slot, self._next.layouts) is None:
                return loads
            self._resident[slot] = self._next
            self._next = next(self._coming)
        raise AssertionError  # count() has no end

    def overtake(self, limit: int) -> None:
        """Loads what fits of the `limit` that come after the one that doesn't."""
        for _ in range(limit):
            slot, kind = next(self._slots), next(self._coming)
            if self._account.take(slot, kind.layouts) is not None:
                self._resident[slot] = kind

    def unload_one(self) -> None:
        slot = self._rng.choice(list(self._resident))
        self._account.release(slot)
        del self._resident[slot]

    def state(self) -> State:
        used = self._account.used_bytes
        needed = sum(kind.needed for kind in self._resident.values())
        return State(len(self._resident), used / self._account.total_bytes, 1 - needed / used)


def in_order(kinds: list[Kind], rng: random.Random) -> Iterator[Kind]:
    """Ten of each kind, shuffled, again and again."""
    while True:
        some = kinds * 10
        rng.shuffle(some)
        yield from some


def without_pages(pool_bytes: int, kinds: list[Kind], seed: int) -> State:
    """At the first adapter that doesn't fit."""
    used = 0
    for adapters, kind in enumerate(in_order(kinds, random.Random(seed))):
        if used + kind.needed > pool_bytes:
            return State(adapters, used / pool_bytes, 0.0)
        used += kind.needed
    raise AssertionError  # there are always more


def summary(states: list[State], slots: int) -> dict[str, float]:
    adapters = [state.adapters for state in states]
    return {
        "adapters": round(statistics.mean(adapters), 2),
        "adapters_min": min(adapters),
        "adapters_max": max(adapters),
        "to_padded_slots": round(statistics.mean(adapters) / slots, 3),
        "used": round(statistics.mean(state.used for state in states), 4),
        "used_min": round(min(state.used for state in states), 4),
        "waste": round(statistics.mean(state.waste for state in states), 4),
        "waste_max": round(max(state.waste for state in states), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="cpu-2core", help="name of the results folder")
    parser.add_argument("--pool-gib", type=float, default=16.0)
    parser.add_argument("--seeds", type=int, default=200, help="random orders of the adapters")
    parser.add_argument("--churn-seeds", type=int, default=5, help="of them, those with churn")
    parser.add_argument("--churn", type=int, default=2000, help="loads and unloads")
    args = parser.parse_args()
    pool_bytes = int(args.pool_gib * GIB)
    blocks = PoolBlocks(Shard(MODEL), RANK_MULTIPLE)
    account = PoolAccount(blocks, pool_bytes, ITEMSIZE, [0])
    kinds = [
        Kind(
            f"rank {rank}{', shared-outer' if shared else ''}",
            account.layouts(adapter(rank, shared)),
            factor_bytes(rank, shared),
        )
        for shared, rank in product((False, True), RANKS)
    ]
    slot_bytes = factor_bytes(max(RANKS), False)
    slots = pool_bytes // slot_bytes
    states: dict[str, list[State]] = {
        "first that doesn't fit": [],
        "the same without pages": [without_pages(pool_bytes, kinds, n) for n in range(args.seeds)],
        f"{OVERTAKE} may overtake it": [],
        "during churn": [],
        "after churn": [],
    }
    first, _, overtaken, during, after = states.values()
    for seed in range(args.seeds):
        pool = PoolAccount(blocks, pool_bytes, ITEMSIZE, [0])
        tenants = Tenants(pool, kinds, random.Random(seed))
        tenants.fill()
        first.append(tenants.state())
        if seed < args.churn_seeds:
            changes = 0
            while changes < args.churn:
                tenants.unload_one()
                changes += 1 + tenants.fill()
                during.append(tenants.state())
            after.append(tenants.state())
        else:
            tenants.overtake(OVERTAKE)
            overtaken.append(tenants.state())
    rows = {name: summary(some, slots) for name, some in states.items() if some}

    print(f"{'adapter':<24}{'MB needed':>12}{'MB in pages':>13}{'waste':>8}")
    for kind in kinds:
        sizes = f"{kind.needed / 1e6:12.1f}{kind.layouts.nbytes / 1e6:13.1f}"
        print(f"{kind.name:<24}{sizes}{kind.waste:8.1%}")
    print(f"\n{args.pool_gib:g} GiB: {slots} slots padded to rank {max(RANKS)}")
    print(f"{'':<24}{'adapters':>10}{'to padded':>11}{'pool in use':>13}{'waste':>8}")
    for name, row in rows.items():
        share = f"{row['to_padded_slots']:10.2f}x{row['used']:13.1%}{row['waste']:8.1%}"
        print(f"{name:<24}{row['adapters']:10.1f}{share}")
    result = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "loraplex": version("loraplex")},
        "model": "Qwen3-30B-A3B's shape, bfloat16, one rank",
        "pool_bytes": pool_bytes,
        "page_bytes": account.page_bytes,
        "orders": args.seeds,
        "churn": {"orders": args.churn_seeds, "loads_and_unloads": args.churn},
        "padded": {"slots": slots, "slot_bytes": slot_bytes},
        "kinds": {
            kind.name: {
                "needed_bytes": kind.needed,
                "page_bytes": kind.layouts.nbytes,
                "waste": round(kind.waste, 4),
            }
            for kind in kinds
        },
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / args.machine / "pool.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
