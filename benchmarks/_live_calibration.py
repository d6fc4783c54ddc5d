"""What a live system's steps, loads and requests cost, for the simulator: measured on requests of
its own, before the traces that the simulator is judged on."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence

from _live_client import Adapter, Answer, Client
from loraplex.cluster.simulate import Hardware, StepCosts

_PROMPTS = (16, 64, 192, 512)  # tokens of single prompts
_STREAMS = (1, 3, 6)  # decoded together in one group
_STREAM_TOKENS = 64
_PROBE = 32  # tokens of the prompts that ask for an adapter
_REPEATS = 4
_S3_BYTES_S = 415e6  # as in Hardware; the rest of a load is put down to latency


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(4, 4000) for _ in range(tokens)]


class Calibration:
    """
    Args:
        adapters: more than the pools hold, none of them asked for yet.
    """

    def __init__(self, client: Client, adapters: Sequence[Adapter], seed: int) -> None:
        self._client, self._adapters = client, adapters
        self._rng = random.Random(seed)
        self.figures: dict[str, object] = {}

    def hardware(self, sizes: dict[str, int]) -> Hardware:
        """
        Args:
            sizes: filled with bytes in a pool by adapter key.
        """
        loads = self._load_seconds(sizes)
        places = self._places()
        front_s, points = self._single_prompts(places[0][0])
        points += self._decode(places[0][0])
        further_s = self._further_adapter(places, sorted(points))
        slowdown = self._slowdown([keys[0] for keys in places])
        status = self._client.placement()
        mean_bytes = statistics.mean(sizes.values())
        s3_s = max(0.0, loads["s3"] - loads["host"] - mean_bytes / _S3_BYTES_S)
        return Hardware(
            steps=StepCosts(tuple(sorted(points)), ((1, 0.0), (2, 0.0)), further_s),
            pool_bytes=status["groups"][0]["pool_bytes_total"],
            host_bytes=2 << 30,
            kv_tokens=16384,
            gpu_bytes_s=1e15,
            s3_bytes_s=_S3_BYTES_S,
            s3_latency_s=s3_s,
            load_latency_s=loads["host"],
            front_s=front_s,
            slowdown=slowdown,
            shared_node=True,
        )

    def _ask(self, asks: Sequence[tuple[Adapter, int, int]]) -> list[Answer]:
        """(adapter, prompt tokens, output tokens), all at once."""

        async def all_of_them() -> list[Answer]:
            return await asyncio.gather(
                *(self._client.ask(a, prompt(self._rng, n), out) for a, n, out in asks)
            )

        return asyncio.run(all_of_them())

    def _load_seconds(self, sizes: dict[str, int]) -> dict[str, float]:
        """What a load from each tier adds to the first token, with nothing else to do."""
        times: dict[str, list[float]] = {}
        for _ in range(3):
            for adapter in self._adapters:
                for _ in range(2):
                    (answer,) = self._ask([(adapter, _PROBE, 1)])
                    times.setdefault(answer.tier, []).append(answer.ttft_s)
        time.sleep(1.0)
        for group in self._client.placement()["groups"]:
            sizes.update(group["resident"])
        here = statistics.median(times["gpu"])
        self.figures["first_token_s_by_tier"] = {
            tier: [round(statistics.median(t), 4), len(t)] for tier, t in times.items()
        }
        return {t: max(0.0, statistics.median(times[t]) - here) for t in ("s3", "host")}

    def _places(self) -> list[list[Adapter]]:
        """Adapters of each group that has any and share it with no other, most first."""
        by_key = {a.key: a for a in self._adapters}
        groups = [
            [by_key[key] for key in group["resident"] if key in by_key]
            for group in self._client.placement()["groups"]
        ]
        return sorted((g for g in groups if g), key=len, reverse=True)

    def _steps(self, asks: Sequence[tuple[Adapter, int, int]]) -> list[tuple[float, float]]:
        """(tokens a step, seconds a step) of every group that worked on these."""
        before = self._client.counters()
        for _ in range(_REPEATS if len(asks) == 1 else 2):
            self.answers = self._ask(asks)
        after = self._client.counters()
        found = []
        for group, now in after.items():
            old = before.get(group, dict.fromkeys(now, 0.0))
            if (steps := now["steps"] - old["steps"]) > 0:
                found.append(
                    (
                        (now["output"] - old["output"]) / steps,
                        (now["seconds"] - old["seconds"]) / steps,
                    )
                )
        return found

    def _single_prompts(self, adapter: Adapter) -> tuple[float, list[tuple[int, float]]]:
        """Seconds of a request outside its step, and of steps with one prompt."""
        fronts, points = [], []
        for tokens in _PROMPTS:
            before = self._client.counters()
            times = [self._ask([(adapter, tokens, 1)])[0].ttft_s for _ in range(_REPEATS)]
            after = self._client.counters()
            steps, seconds = (
                sum(g[name] for g in after.values()) - sum(g[name] for g in before.values())
                for name in ("steps", "seconds")
            )
            points.append((tokens, seconds / steps))
            fronts.append(statistics.mean(times) - seconds / steps)
        self.figures["front_s"] = [round(f, 4) for f in fronts]
        return max(0.0, statistics.median(fronts)), points

    def _decode(self, adapter: Adapter) -> list[tuple[int, float]]:
        """Steps that only decode, of one group."""
        points = {}
        for streams in _STREAMS:
            for rows, seconds in self._steps([(adapter, 2, _STREAM_TOKENS)] * streams):
                points[max(1, round(rows))] = seconds
        return list(points.items())

    def _further_adapter(
        self, places: list[list[Adapter]], points: Sequence[tuple[int, float]]
    ) -> float:
        """What each further adapter adds to a step of the same rows."""
        mixed = places[0][:3]
        if len(mixed) < 2:
            return 0.0
        alone = StepCosts(tuple(points), ((1, 0.0), (2, 0.0)))
        measured = self._steps([(a, 2, _STREAM_TOKENS) for a in mixed])
        rows, seconds = max(measured)
        return max(0.0, (seconds - alone.seconds(round(rows), 1)) / (len(mixed) - 1))

    def _slowdown(self, adapters: Sequence[Adapter]) -> tuple[float, ...]:
        """How many times as long steps take when 1, 2, ... groups compute."""
        seconds = []
        for busy in range(1, len(adapters) + 1):
            asks = [(a, 2, _STREAM_TOKENS) for a in adapters[:busy] for _ in range(3)]
            seconds.append(statistics.mean(s for _, s in self._steps(asks)))
        slowdown = [max(1.0, s / seconds[0]) for s in seconds]
        return tuple(max(slowdown[: i + 1]) for i in range(len(slowdown)))
