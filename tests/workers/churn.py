"""Many adapters through all tiers of a node, and what must hold of every answer and every byte."""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from loraplex.adapter_store import BaseModel, DiskTier, HostTier, ObjectStore, Pack
from loraplex.adapter_store.host_entry import parse_entry
from loraplex.workers import AdapterRef, Engine, EngineConfig, GenerationRequest, SamplingParams

from tests.adapter_store.stored_packs import pack_key

from .conftest import DEMO, LocalPacks
from .synthetic import store_adapter

SLOTS = 20  # of the pool
HOST_SHARE, DISK_SHARE = 0.3, 0.6  # of all packs' bytes
OPEN = 24  # requests at a time
MOST_TOKENS = 3  # of an answer
SAMPLED = 50
# Of a first token's log-probability: batches of other sizes round differently.
TOLERANCE = 1e-3
# All adapters have the same prompts, so that one's cached prefix would be found for another. One is
# longer than a block of the KV cache.
BLOCK = 16
PROMPTS = tuple(tuple(range(100, 100 + n)) for n in (4, BLOCK + 3))
_SETTLE_S = 120.0  # packs just named to other ranks stay for seconds, on a quiet machine


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, the log-probability of the first one, and the adapter's bytes in the pool."""

    tokens: list[int]
    logprob: float
    pool_bytes: int = 0

    def agrees(self, other: Answer) -> bool:
        n = min(len(self.tokens), len(other.tokens))
        # NaN, of freed memory, agrees with nothing.
        close = abs(self.logprob - other.logprob) < TOLERANCE
        return n > 0 and close and self.tokens[:n] == other.tokens[:n]


@dataclass
class Outcome:
    """What a run counted. Sizes are bytes."""

    requests: int = 0  # that were answered
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    aborted: int = 0
    purged: int = 0
    admissions: dict[str, int] = field(default_factory=dict)  # by tier of the adapter
    loads: dict[str, int] = field(default_factory=dict)
    evictions: int = 0
    most_resident: int = 0  # in the pool
    seconds: float = 0.0
    # Of this process alone, without what files back: neither the arena nor mapped packs. Every
    # SAMPLED requests.
    anonymous_bytes: list[int] = field(default_factory=list)


class Node:
    """An engine over memory over disk over the store; each holds a part of what is above it."""

    def __init__(
        self,
        store: ObjectStore,
        folder: Path,
        shm: Path,
        adapters: int,
        rng: random.Random,
        overlap: bool,
    ):
        self._overlap = overlap
        self.base = BaseModel.from_folder(DEMO / "model", "loraplex-demo")
        seeds = rng.sample(range(1 << 30), adapters)
        self.refs = [store_adapter(store, self.base, folder / "made", seed) for seed in seeds]
        self.sizes = {ref.key: store.head(_stored(ref)).nbytes for ref in self.refs}
        self.expected = self._answers_alone(store, folder / "alone.pack")
        total = sum(self.sizes.values())
        self.folder, self.disk_bytes = folder / "disk", int(total * DISK_SHARE)
        self.disk = DiskTier(self.folder, store, self.disk_bytes)
        self.shm = shm / "arena"
        self.host = HostTier(self.disk, int(total * HOST_SHARE), self.shm)
        self.engine = Engine(self._config(), self.host)
        self.engine._runner.pool._poison = True  # who reads freed pages answers NaN

    def close(self) -> None:
        self.engine.close()
        self.host.close()

    def alike(self) -> float:
        """The share of pairs of adapters with one prompt that a mix-up of them wouldn't show."""
        pairs = found = 0
        for prompt in PROMPTS:
            answers = [self.expected[ref.key] for ref in self.refs if prompt_of(ref) == prompt]
            answers.sort(key=lambda answer: answer.logprob)
            pairs += math.comb(len(answers), 2)
            for i, answer in enumerate(answers):
                for other in answers[i + 1 :]:
                    if other.logprob - answer.logprob >= TOLERANCE:
                        break
                    found += answer.tokens[0] == other.tokens[0]
        return found / pairs

    def _answers_alone(self, store: ObjectStore, path: Path) -> dict[str, Answer]:
        """Each adapter's answer by an engine that holds no other one."""
        packs = LocalPacks()
        engine = Engine(self._config(), packs)
        answers: dict[str, Answer] = {}
        for ref in self.refs:
            path.write_bytes(store.get(_stored(ref))[0])
            packs.paths = {ref.key: path}
            engine.submit(_request("alone", ref, MOST_TOKENS))
            tokens: list[int] = []
            logprobs: list[float] = []
            while engine.has_work():
                for out in engine.step():
                    assert out.error is None, out.error
                    tokens += out.token_ids
                    logprobs += [x.logprob for x in out.logprobs]
            answers[ref.key] = Answer(tokens, logprobs[0], engine.report().gpu[ref.key])
            engine.purge(ref.key)
        engine.close()
        return answers

    def _config(self) -> EngineConfig:
        return EngineConfig(
            model_path=str(DEMO / "model"),
            base_fingerprint=self.base.fingerprint,
            pool_bytes=8 << 20,
            kv_tokens=2048,
            block_size=BLOCK,
            max_slots=SLOTS,
            torch_threads=1,
            overlap=self._overlap,
        )


@contextmanager
def churning(
    store: ObjectStore, folder: Path, adapters: int, rng: random.Random, overlap: bool = False
) -> Iterator[Node]:
    """A node over a store with so many adapters of its own."""
    shm = Path(tempfile.mkdtemp(prefix="loraplex-churn-", dir="/dev/shm"))
    try:
        node = Node(store, folder, shm, adapters, rng, overlap)
        yield node
        node.close()
    finally:
        shutil.rmtree(shm, ignore_errors=True)


def prompt_of(ref: AdapterRef) -> tuple[int, ...]:
    return PROMPTS[int(ref.digest[:8], 16) % len(PROMPTS)]


def run(node: Node, requests: int, rng: random.Random, most_seconds: float = math.inf) -> Outcome:
    """Requests for adapters at random, half by Zipf's law (exponent 1) and half uniform. Some are
    given up, and now and then an adapter is purged, in use or not."""
    found, started = Outcome(), time.monotonic()
    engine, refs = node.engine, rng.sample(node.refs, len(node.refs))
    zipf = list(accumulate(1 / (i + 1) for i in range(len(refs))))
    open_: dict[str, tuple[AdapterRef, list[int], list[float]]] = {}
    sent = 0
    while (more := sent < requests and time.monotonic() - started < most_seconds) or open_:
        while more and sent < requests and len(open_) < OPEN:
            [ref] = rng.choices(refs, cum_weights=zipf if rng.random() < 0.5 else None)
            engine.submit(_request(str(sent), ref, rng.randint(1, MOST_TOKENS)))
            open_[str(sent)] = ref, [], []
            sent += 1
            if rng.random() < 0.02:
                gone = rng.choice(list(open_))
                engine.abort(gone)
                del open_[gone]
                found.aborted += 1
            if rng.random() < 0.03:
                engine.purge(rng.choice([*refs[:50], *(ref for ref, _, _ in open_.values())]).key)
                found.purged += 1
            if sent % SAMPLED == 0:
                found.anonymous_bytes.append(anonymous_bytes())
                found.most_resident = max(found.most_resident, len(engine.report().gpu))
        for out in engine.step():
            if out.request_id not in open_:
                continue  # given up
            ref, tokens, logprobs = open_[out.request_id]
            tokens += out.token_ids
            logprobs += [x.logprob for x in out.logprobs]
            if out.finish_reason is None:
                continue
            del open_[out.request_id]
            found.requests += 1
            if out.error is not None:
                found.failed.append(f"{ref.key}: {out.error}")
                continue
            answer, expected = Answer(tokens, logprobs[0]), node.expected[ref.key]
            if not answer.agrees(expected):
                found.wrong.append(f"{ref.key}: {answer} instead of {expected}")
    report = engine.report()
    found.admissions, found.loads = report.admissions, report.loads
    found.evictions = report.evictions
    found.seconds = time.monotonic() - started
    return found


def check_bytes(node: Node) -> dict[str, int]:
    """That each tier's books are right to the byte, and nothing is left when all adapters go.

    Returns:
        The bytes that were held: "pool", "host" and "disk".
    """
    engine = node.engine
    _settle(node, lambda: not (engine.has_work() or engine.report().loading or _unfinished(node)))
    report = engine.report()
    assert report.kv_blocks_used == 0
    # Pool: of each what it takes alone.
    assert report.gpu == {key: node.expected[key].pool_bytes for key in report.gpu}
    assert report.pool_bytes_used == sum(report.gpu.values())
    # Disk: packs as they were stored, and no other file.
    assert report.disk == {key: node.sizes[key] for key in report.disk}
    files = [path for path in node.folder.glob("t-*/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == sum(report.disk.values())
    assert sum(report.disk.values()) <= node.disk_bytes
    # Memory: packs as they were stored, none on another's bytes.
    assert report.host == {key: node.sizes[key] for key in report.host}
    paths = [node.shm / f"{key}.pack" for key in report.host]
    end = 0
    for offset, nbytes in sorted(parse_entry(path.read_bytes()) for path in paths):
        assert offset >= end
        end = offset + nbytes
    assert end <= report.host_bytes_total
    for path in paths:
        Pack.open(path, verify=True)

    for ref in node.refs:
        engine.purge(ref.key)
    _settle(node, lambda: _empty(node))
    return {
        "pool": report.pool_bytes_used,
        "host": sum(report.host.values()),
        "disk": sum(report.disk.values()),
    }


def anonymous_bytes() -> int:
    """Without what malloc could give back: threads come and go with the fetches, and each leaves
    free pieces in its part of the heap."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def _settle(node: Node, done: Callable[[], bool]) -> None:
    until = time.monotonic() + _SETTLE_S
    while not done():
        assert time.monotonic() < until, (node.engine.report(), _unfinished(node))
        node.engine.step()
        time.sleep(0.05)


def _unfinished(node: Node) -> list[Path]:
    """What is being brought, or its locks."""
    return [
        *node.folder.glob("*/.*.partial"),
        *node.shm.glob("*/.*.fill"),
        *(node.folder / ".locks").iterdir(),
    ]


def _empty(node: Node) -> bool:
    """Asks again for what was pinned."""
    report = node.engine.report()
    for key in {*report.disk, *report.host}:
        node.host.remove(key)
    return not (report.gpu or report.host or report.disk or report.pool_bytes_used)


def _stored(ref: AdapterRef) -> str:
    return pack_key(ref.digest, ref.tenant_id)


def _request(request_id: str, ref: AdapterRef, count: int) -> GenerationRequest:
    params = SamplingParams(max_tokens=count, temperature=0.0, logprobs=0, ignore_eos=True)
    return GenerationRequest(request_id, prompt_of(ref), params, ref.tenant_id, ref)
